"""Catalogues of what packs offer, by id ``pack:name`` or by a unique short name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from kasmina_core.blueprints.declarations import (
    NAME_PATTERN,
    NAME_RULE,
    BlueprintSpec,
    HostSpec,
    RegisteredBlueprint,
    import_factory,
)
from kasmina_core.blueprints.foreign import contained
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

T = TypeVar("T")

Settle = Callable[[Collection[str] | None], bool]
"""Checks the packs of these ids, or all, that are not checked yet, and takes away what fails; whether there were any."""


def _all_checked(ids: Collection[str] | None) -> bool:
    return False


class Catalogue(Mapping[str, T], Generic[T]):
    """Things by id ``pack:name``; a short name resolves when it is unique.

    Iteration gives full ids in order. ``catalogue[name]`` raises `UnknownNameError` for a name that nobody offers,
    `AmbiguousNameError` for a short name that fits more than one, and `PluginError` for a pack that is not available.

    Args:
        kind: What the things are, for messages.
        unavailable: See `BlueprintRegistry`.
        settle: Called with ids before the things under them are given out, or counted.
    """

    def __init__(
        self, kind: str, unavailable: Mapping[str, PluginError], settle: Settle = _all_checked
    ) -> None:
        self._kind = kind
        self._things: dict[str, T] = {}
        self._unavailable = unavailable
        self._settle = settle

    def __getitem__(self, name: str) -> T:
        return self._things[self.resolve(name)]

    def __iter__(self) -> Iterator[str]:
        self._settle(list(self._things))
        return iter(sorted(self._things))

    def __len__(self) -> int:
        self._settle(list(self._things))
        return len(self._things)

    def __contains__(self, name: object) -> bool:
        return name in self._things and (not self._settle([str(name)]) or name in self._things)

    def those(self, fits: Callable[[T], bool]) -> list[T]:
        """Return the things for which ``fits`` holds, by id; the packs of others stay as they are."""
        self._settle([full for full, thing in self._things.items() if fits(thing)])
        return [thing for _, thing in sorted(self._things.items()) if fits(thing)]

    def resolve(self, name: str, fits: Callable[[T], bool] = lambda thing: True, where: str = "") -> str:
        """Return the full id of ``name``.

        Args:
            name: Full id, or a short name that is unique.
            fits: Narrows a short name to the things for which it holds; a single one for which it does not still counts.
            where: What it narrows to, for the message.

        Raises:
            PluginError: If it belongs to a pack that is not available: the cause of that.
            UnknownNameError: If nobody offers it.
            AmbiguousNameError: If a short name fits more than one id.
        """
        if name in self:
            return name
        while True:
            named = [full for full in sorted(self._things) if full.partition(":")[2] == name]
            fitting = [full for full in named if fits(self._things[full])]
            if not self._settle(fitting or named):
                break
        if len(chosen := fitting or named) == 1:
            return chosen[0]
        if fitting:
            raise AmbiguousNameError(f"'{name}' is offered more than once. Use one of: {', '.join(fitting)}.")
        for claim in sorted(self._unavailable):
            if claim in (name, name.partition(":")[0]) or claim.partition(":")[2] == name:
                raise self._unavailable[claim].with_traceback(None)
        if self._settle(None):
            return self.resolve(name, fits, where)
        absent = sorted(claim for claim in self._unavailable if ":" not in claim)
        if ":" in name:
            known, where = list(self), ""
        else:
            known = [full.partition(":")[2] for full in self if fits(self._things[full])]
        raise UnknownNameError(
            f"No {self._kind} '{name}' is registered{where}.{did_you_mean(name, known)}"
            + (f" Not available: pack {', '.join(absent)}." if absent else "")
        )

    def add(self, full: str, thing: T) -> None:
        """Put a thing under its full id."""
        self._things[full] = thing

    def discard(self, full: str) -> None:
        """Take a thing away, if it is there."""
        self._things.pop(full, None)


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

    def __init__(
        self, unavailable: dict[str, PluginError] | None = None, settle: Settle = _all_checked
    ) -> None:
        self._unavailable = unavailable if unavailable is not None else {}
        self._settle = settle
        self.gate_checks: Mapping[str, Any] = {}
        self._entries: Catalogue[RegisteredBlueprint] = Catalogue("blueprint", self._unavailable, settle)

    @property
    def unavailable(self) -> Mapping[str, PluginError]:
        """Why a pack (``pack``) or a thing of one (``pack:name``) is not there: what asking for it raises."""
        self._settle(None)
        return self._unavailable

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, blueprint_id: object) -> bool:
        return blueprint_id in self._entries

    def register(
        self, spec: BlueprintSpec, *, pack: str, distribution: str = "", version: str = ""
    ) -> RegisteredBlueprint:
        """Add a blueprint under ``pack:name``.

        Raises:
            BlueprintError: If ``pack`` is not a usable name.
            NameConflictError: If the id is taken; the message names both claimants.
        """
        if not NAME_PATTERN.fullmatch(pack):
            raise BlueprintError(f"{pack!r} is not a pack name: {NAME_RULE}")
        entry = RegisteredBlueprint(spec, pack, distribution, version)
        if entry.id in self._entries:
            present = self._entries[entry.id]
            raise NameConflictError(
                f"Two blueprints claim the id '{entry.id}'.\n  first:  {present.origin}\n  second: {entry.origin}\n"
                "Rename one of them, or uninstall one of the packs."
            )
        self._entries.add(entry.id, entry)
        self._unavailable.pop(entry.id, None)
        return entry

    def unregister(self, blueprint_id: str) -> RegisteredBlueprint:
        """Remove and return a blueprint.

        Raises:
            UnknownNameError: If there is none of that id.
        """
        entry = self.get(blueprint_id)
        self._entries.discard(entry.id)
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
            PluginError, UnknownNameError, AmbiguousNameError: As `Catalogue.resolve`.
        """
        if topology is None:
            return self._entries[blueprint_id]
        full = self._entries.resolve(
            blueprint_id, lambda entry: entry.spec.topology is topology, f" for {topology.value}"
        )
        return self._entries[full]

    def list_for_topology(self, topology: Topology) -> list[RegisteredBlueprint]:
        """Return the blueprints of a topology, sorted by id."""
        return self._entries.those(lambda entry: entry.spec.topology is topology)

    def list_all(self) -> list[RegisteredBlueprint]:
        """Return every blueprint, sorted by id."""
        return list(self._entries.values())

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
            BlueprintError: If the width or an option is refused, or the module carries a slot of a model; the message
                gives the reason.
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
            with contained():
                seed = factory(dim, **given)
        except (TypeError, ValueError) as error:
            raise BlueprintError(
                f"Blueprint '{entry.id}' could not be built at width {dim} with {given or 'its defaults'}: {error}"
            ) from error
        from kasmina_core.carried import refusal_of  # needs torch

        if refusal := refusal_of(seed):
            raise BlueprintError(f"Blueprint '{entry.id}' carries a slot of a model.\n  {refusal}.")
        return seed


@final
class HostRegistry(Catalogue[HostSpec]):
    """Hosts by id; see `Catalogue`."""

    def __init__(self, unavailable: Mapping[str, PluginError], settle: Settle = _all_checked) -> None:
        super().__init__("host", unavailable, settle)

    def get(self, host_id: str) -> HostSpec:  # type: ignore[override]  # a default would hide a misspelt id
        """Return the declaration of a host; raises as `resolve`."""
        return self[host_id]

    def ids(self) -> list[str]:
        """Return every full id, sorted."""
        return list(self)

    def list_all(self) -> list[HostSpec]:
        """Return every declaration, sorted by id."""
        return list(self.values())

    def create(self, host_id: str, **options: Any) -> nn.Module:
        """Build a host. The caller owns the random number generator it draws from.

        Raises:
            PluginError: If its pack is not available, or its factory cannot be imported; the cause is chained.
            UnknownNameError: If nobody offers it.
            HostError: If the factory does not take the options; the cause is chained.
        """
        full = self.resolve(host_id)
        factory = import_factory(f"Host '{full}'", self[full].factory)
        try:
            with contained():
                host: nn.Module = factory(**options)
        except (TypeError, ValueError) as error:
            raise HostError(
                f"Host '{full}' could not be built with {options or 'its defaults'}: {error}"
            ) from error
        return host
