"""Declarations of blueprints and hosts. They need no torch until a seed is made."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from kasmina_core.blueprints.foreign import contained
from kasmina_core.errors import BlueprintError, HostError, KasminaError, PluginError
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    from torch import nn

NAME_PATTERN: Final = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
MIXES_POSITIONS: Final = "positions"
NAME_RULE: Final = "use lower case letters, digits, '_' and '-', a letter first."


@dataclass(frozen=True, slots=True)
class BlueprintSpec:
    """The declaration of one kind of seed.

    Attributes:
        name: Short name, unique in its pack: lower case, digits, ``_`` and ``-``.
        topology: Layout of features it works on.
        factory: ``factory(dim, **options) -> nn.Module`` or ``"package.module:attribute"`` for one, imported at first
            use. The module maps features to features of the same shape, and starts near the identity.
        param_estimate: Number of parameters with default options: a function of the width, or an int counted at
            ``estimate_dim``.
        description: One line for people.
        estimate_dim: Width at which an int ``param_estimate`` was counted.
        options: Names of the options that ``germinate`` may pass, with their defaults.
        accepts_width: Says why a width is refused (text), or ``None`` if it is accepted. The default accepts all.
        takes_causal: Whether the factory wants ``causal=`` from the injection point.
        mixes: ``"positions"`` if what a seed computes at a position of a sequence depends on other positions, or on
            where it is. Its module then takes ``forward(features, context=WHOLE_SEQUENCES)``, a `SeedContext`, and
            heeds padding, documents and cached positions. Empty if it treats each position by itself.
        source: Paper or page the module comes from.

    Raises:
        BlueprintError: If the declaration cannot be used.

    >>> spec = BlueprintSpec("scale", Topology.CNN, "my_pack.seeds:Scale", lambda dim: dim, "A scale per channel")
    >>> spec.declared_params(64)
    64
    """

    name: str
    topology: Topology
    factory: Callable[..., nn.Module] | str
    param_estimate: Callable[[int], int] | int
    description: str = ""
    estimate_dim: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    accepts_width: Callable[[int], str | None] | None = None
    takes_causal: bool = False
    source: str = ""
    mixes: str = ""

    def __post_init__(self) -> None:
        _demand_name_and_topology(self, "blueprint", BlueprintError)
        factory, estimate, problem = self.factory, self.param_estimate, ""
        if isinstance(factory, str):
            if not all(factory.partition(":")):
                problem = f"factory {factory!r} must read 'package.module:attribute'."
        elif not callable(factory):
            problem = f"factory {factory!r} is neither callable nor text."
        if not problem and isinstance(estimate, int):
            if self.estimate_dim is None:
                problem = (
                    f"param_estimate={estimate} is a number, so say at which width it was counted: estimate_dim=64, "
                    "or give a function of the width."
                )
        elif not problem and not callable(estimate):
            problem = f"param_estimate must be an int or a function of the width, not {estimate!r}."
        if self.mixes not in ("", MIXES_POSITIONS):
            problem = f"mixes must be '{MIXES_POSITIONS}' or empty, not {self.mixes!r}."
        elif self.mixes and self.topology.sequence_axis is None:
            problem = f"mixes='{self.mixes}' is for sequences, and {self.topology.value} features have no positions."
        if problem:
            raise BlueprintError(f"Blueprint '{self.name}': {problem}")

    def declared_params(self, dim: int) -> int | None:
        """Return the declared number of parameters at width ``dim``; ``None`` where an int says nothing about it.

        Raises:
            BlueprintError: If the function gives a fraction.
        """
        if callable(self.param_estimate):
            with contained():
                declared = self.param_estimate(dim)
            if int(declared) != declared:
                raise BlueprintError(
                    f"Blueprint '{self.name}': param_estimate gives {declared} at width {dim}; give a whole number."
                )
            return int(declared)
        return self.param_estimate if dim == self.estimate_dim else None

    def refusal(self, dim: int) -> str | None:
        """Return why width ``dim`` is refused, or ``None`` if it is accepted."""
        with contained():
            return self.accepts_width(dim) if self.accepts_width is not None else None

    def load_factory(self) -> Callable[..., nn.Module]:
        """Return the factory, importing it if it was declared as text.

        Raises:
            PluginError: If the import fails; the cause is chained.
        """
        return import_factory(f"Blueprint '{self.name}'", self.factory)


def import_factory(owner: str, factory: Callable[..., Any] | str) -> Callable[..., Any]:
    """Return ``factory``, importing it if it is text such as ``"package.module:attribute"``.

    Raises:
        PluginError: If the import fails, names nothing, or names nothing that can be called; the message begins with
            ``owner`` and the cause is chained.
    """
    if not isinstance(factory, str):
        return factory
    module, _, attribute = factory.partition(":")
    try:
        with contained():
            loaded: Any = importlib.import_module(module)
            for part in attribute.split("."):
                loaded = getattr(loaded, part)
    except Exception as error:
        raise PluginError(f"{owner}: {factory!r} cannot be imported: {error!r}") from error
    if not callable(loaded):
        raise PluginError(f"{owner}: {factory!r} is not callable but {loaded!r}.")
    return loaded  # type: ignore[no-any-return]  # a module attribute is untyped


@dataclass(frozen=True, slots=True)
class HostSpec:
    """The declaration of a host that a pack offers.

    Attributes:
        name: Short name, unique in its pack.
        factory: ``factory(**options) -> nn.Module`` with `HostProtocol`, or ``"package.module:attribute"`` for one.
        topology: Layout of the features at its points.
        description: One line for people.
    """

    name: str
    factory: Callable[..., nn.Module] | str
    topology: Topology
    description: str = ""

    def __post_init__(self) -> None:
        _demand_name_and_topology(self, "host", HostError)


def _demand_name_and_topology(spec: BlueprintSpec | HostSpec, kind: str, error: type[KasminaError]) -> None:
    if not isinstance(spec.name, str) or not NAME_PATTERN.fullmatch(spec.name):
        raise error(f"{spec.name!r} is not a {kind} name: {NAME_RULE}")
    if not isinstance(spec.topology, Topology):
        raise error(f"{kind.capitalize()} '{spec.name}': topology must be a Topology, not {spec.topology!r}.")


@dataclass(frozen=True, slots=True)
class RegisteredBlueprint:
    """A blueprint under its full id, with the pack and distribution that offered it."""

    spec: BlueprintSpec
    pack: str
    distribution: str = ""
    version: str = ""

    @property
    def id(self) -> str:
        """``pack:name``."""
        return f"{self.pack}:{self.spec.name}"

    @property
    def origin(self) -> str:
        """The distribution and version for messages, or the pack if it came from none."""
        return f"{self.distribution} {self.version}".strip() or f"pack '{self.pack}'"
