"""What a pack author declares of a seed, and the registry that finds it again. Needs no torch until a seed is made."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from kasmina_core.errors import (
    AmbiguousNameError,
    BlueprintError,
    HostError,
    NameConflictError,
    PluginError,
    UnknownNameError,
    did_you_mean,
)
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    from torch import nn

NAME_PATTERN: Final = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


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

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME_PATTERN.fullmatch(self.name):
            raise BlueprintError(
                f"{self.name!r} is not a blueprint name: use lower case letters, digits, '_' and '-', a letter first."
            )
        if not isinstance(self.topology, Topology):
            raise BlueprintError(
                f"Blueprint '{self.name}': topology must be a Topology, not {self.topology!r}."
            )
        if isinstance(self.factory, str):
            module, _, attribute = self.factory.partition(":")
            if not (module and attribute):
                raise BlueprintError(
                    f"Blueprint '{self.name}': factory {self.factory!r} must read 'package.module:attribute'."
                )
        elif not callable(self.factory):
            raise BlueprintError(
                f"Blueprint '{self.name}': factory {self.factory!r} is neither callable nor text."
            )
        if isinstance(self.param_estimate, int) and self.estimate_dim is None:
            raise BlueprintError(
                f"Blueprint '{self.name}': param_estimate={self.param_estimate} is a number, so say at which width "
                "it was counted: estimate_dim=64, or give a function of the width."
            )
        if not isinstance(self.param_estimate, int) and not callable(self.param_estimate):
            raise BlueprintError(
                f"Blueprint '{self.name}': param_estimate must be an int or a function of the width, "
                f"not {self.param_estimate!r}."
            )

    def declared_params(self, dim: int) -> int | None:
        """Return the declared number of parameters at width ``dim``; ``None`` where an int says nothing about it."""
        if callable(self.param_estimate):
            return int(self.param_estimate(dim))
        return self.param_estimate if dim == self.estimate_dim else None

    def refusal(self, dim: int) -> str | None:
        """Return why width ``dim`` is refused, or ``None`` if it is accepted."""
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
        loaded: Any = importlib.import_module(module)
        for part in attribute.split("."):
            loaded = getattr(loaded, part)
    except (Exception, SystemExit) as error:
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
        if not isinstance(self.name, str) or not NAME_PATTERN.fullmatch(self.name):
            raise HostError(f"{self.name!r} is not a host name: use lower case letters, digits, '_' and '-'.")
        if not isinstance(self.topology, Topology):
            raise HostError(f"Host '{self.name}': topology must be a Topology, not {self.topology!r}.")


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


class BlueprintRegistry:
    """Blueprints by id. Ids are ``pack:name``; a short name resolves when it is unique (within a topology if given).

    Attributes:
        gate_checks: The gate checks (`GateCheckSpec`) of the same packs by id. They join the gates of every model that
            has this registry, unless ``GrowthConfig(pack_gate_checks=False)`` leaves them out.

    >>> registry = BlueprintRegistry()
    >>> spec = BlueprintSpec("scale", Topology.CNN, "my_pack.seeds:Scale", lambda dim: dim)
    >>> registry.register(spec, pack="mine").id
    'mine:scale'
    >>> registry.get("scale").id
    'mine:scale'
    """

    def __init__(self) -> None:
        self._blueprints: dict[str, RegisteredBlueprint] = {}
        self._unavailable: dict[str, PluginError] = {}
        self.gate_checks: Mapping[str, Any] = {}

    def __len__(self) -> int:
        return len(self._blueprints)

    def __contains__(self, blueprint_id: object) -> bool:
        return blueprint_id in self._blueprints

    def register(
        self, spec: BlueprintSpec, *, pack: str, distribution: str = "", version: str = ""
    ) -> RegisteredBlueprint:
        """Add a blueprint under ``pack:name``.

        Raises:
            BlueprintError: If ``pack`` is not a usable name.
            NameConflictError: If the id is taken; the message names both claimants.
        """
        if not NAME_PATTERN.fullmatch(pack):
            raise BlueprintError(f"{pack!r} is not a pack name: use lower case letters, digits, '_' and '-'.")
        entry = RegisteredBlueprint(spec, pack, distribution, version)
        if (present := self._blueprints.get(entry.id)) is not None:
            raise NameConflictError(
                f"Two blueprints claim the id '{entry.id}'.\n  first:  {present.origin}\n  second: {entry.origin}\n"
                "Rename one of them, or uninstall one of the packs."
            )
        self._blueprints[entry.id] = entry
        self._unavailable.pop(entry.id, None)
        return entry

    def unregister(self, blueprint_id: str) -> RegisteredBlueprint:
        """Remove and return a blueprint.

        Raises:
            UnknownNameError: If there is none of that id.
        """
        entry = self.get(blueprint_id)
        del self._blueprints[entry.id]
        return entry

    def mark_unavailable(self, name: str, cause: PluginError) -> None:
        """Remember why a pack (``pack``) or blueprint (``pack:name``) is not there: asking for it raises the cause."""
        self._unavailable[name] = cause

    def mark_available(self, pack: str) -> None:
        """Forget what was remembered of a pack and its blueprints by `mark_unavailable`."""
        for name in [n for n in self._unavailable if n.partition(":")[0] == pack]:
            del self._unavailable[name]

    def get(self, blueprint_id: str, topology: Topology | None = None) -> RegisteredBlueprint:
        """Return the blueprint of a full id or a short name.

        Args:
            blueprint_id: ``pack:name``, or ``name`` where only one pack offers it.
            topology: Narrows a short name to one topology.

        Raises:
            PluginError: If it belongs to a pack that could not be loaded: the cause of that.
            UnknownNameError: If nobody offers it.
            AmbiguousNameError: If a short name fits more than one id.
        """
        if ":" in blueprint_id:
            if (entry := self._blueprints.get(blueprint_id)) is not None:
                return entry
            pack = blueprint_id.partition(":")[0]
            for claim in (blueprint_id, pack):
                if claim in self._unavailable:
                    raise self._unavailable[claim].with_traceback(None)
            raise UnknownNameError(
                f"No blueprint '{blueprint_id}' is registered.{did_you_mean(blueprint_id, self._blueprints)}"
                f"{self._absent_packs()}"
            )
        named = [entry for entry in self._blueprints.values() if entry.spec.name == blueprint_id]
        fitting = [entry for entry in named if topology is None or entry.spec.topology is topology]
        if len(fitting) == 1:
            return fitting[0]
        if len(fitting) > 1:
            ids = ", ".join(sorted(entry.id for entry in fitting))
            raise AmbiguousNameError(f"'{blueprint_id}' is offered more than once. Use one of: {ids}.")
        if len(named) == 1:
            return named[0]
        for claim, cause in sorted(self._unavailable.items()):
            if claim == blueprint_id or claim.partition(":")[2] == blueprint_id:
                raise cause.with_traceback(None)
        names = {
            e.spec.name for e in self._blueprints.values() if topology is None or e.spec.topology is topology
        }
        where = f" for {topology.value}" if topology is not None else ""
        raise UnknownNameError(
            f"No blueprint '{blueprint_id}' is registered{where}.{did_you_mean(blueprint_id, names)}"
            f"{self._absent_packs()}"
        )

    def _absent_packs(self) -> str:
        packs = sorted(name for name in self._unavailable if ":" not in name)
        return f" Not available: pack {', '.join(packs)}." if packs else ""

    def list_for_topology(self, topology: Topology) -> list[RegisteredBlueprint]:
        """Return the blueprints of a topology, sorted by id."""
        return [e for e in self.list_all() if e.spec.topology is topology]

    def list_all(self) -> list[RegisteredBlueprint]:
        """Return every blueprint, sorted by id."""
        return [self._blueprints[key] for key in sorted(self._blueprints)]

    def create(
        self,
        blueprint_id: str,
        dim: int,
        *,
        topology: Topology | None = None,
        causal: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Build the module of a blueprint. The caller owns the random number generator it draws from.

        Args:
            blueprint_id: Full id or unique short name.
            dim: Width of the features.
            topology: Layout of the features; narrows a short name.
            causal: Whether the host must not look ahead; passed to blueprints that take it.
            options: Options of the blueprint.

        Raises:
            UnknownNameError: If nobody offers the blueprint.
            BlueprintError: If the width or an option is refused; the message gives the reason.
        """
        entry = self.get(blueprint_id, topology)
        spec, given = entry.spec, dict(options or {})
        if (reason := spec.refusal(dim)) is not None:
            raise BlueprintError(f"Blueprint '{entry.id}' does not take width {dim}: {reason}")
        for name in given:
            if name not in spec.options:
                raise BlueprintError(
                    f"Blueprint '{entry.id}' has no option '{name}'.{did_you_mean(name, spec.options)}"
                )
        if spec.takes_causal:
            given["causal"] = causal
        factory = spec.load_factory()
        try:
            return factory(dim, **given)
        except (TypeError, ValueError) as error:
            raise BlueprintError(
                f"Blueprint '{entry.id}' could not be built at width {dim} with {given or 'its defaults'}: {error}"
            ) from error
