"""What packs offer, by id ``pack:name`` or by a short name that is unique."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from kasmina_core.blueprints.declarations import HostSpec, import_factory
from kasmina_core.errors import AmbiguousNameError, HostError, PluginError, UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


@final
class Catalogue(Mapping[str, T], Generic[T]):
    """Things by id ``pack:name``; a short name resolves when it is unique.

    Iteration gives full ids in order. ``catalogue[name]`` raises `UnknownNameError` for a name that nobody offers,
    `AmbiguousNameError` for a short name that fits more than one, and `PluginError` for a pack that is not available.
    """

    def __init__(self, kind: str, unavailable: Mapping[str, PluginError]) -> None:
        self._kind = kind
        self._things: dict[str, T] = {}
        self._unavailable = unavailable

    def __getitem__(self, name: str) -> T:
        return self._things[self.resolve(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._things))

    def __len__(self) -> int:
        return len(self._things)

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def resolve(self, name: str) -> str:
        """Return the full id of ``name``.

        Raises:
            PluginError: If it belongs to a pack that is not available: the cause of that.
            UnknownNameError: If nobody offers it.
            AmbiguousNameError: If a short name fits more than one id.
        """
        if name in self._things:
            return name
        fitting = [full for full in self if full.partition(":")[2] == name]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise AmbiguousNameError(f"'{name}' is offered more than once. Use one of: {', '.join(fitting)}.")
        for claim in sorted(self._unavailable):
            if claim in (name, name.partition(":")[0]) or claim.partition(":")[2] == name:
                raise self._unavailable[claim].with_traceback(None)
        absent = sorted(claim for claim in self._unavailable if ":" not in claim)
        known = list(self) if ":" in name else [full.partition(":")[2] for full in self]
        raise UnknownNameError(
            f"No {self._kind} '{name}' is registered.{did_you_mean(name, known)}"
            + (f" Not available: pack {', '.join(absent)}." if absent else "")
        )

    def add(self, full: str, thing: T) -> None:
        """Put a thing under its full id."""
        self._things[full] = thing

    def discard(self, full: str) -> None:
        """Take a thing away, if it is there."""
        self._things.pop(full, None)


@final
class HostRegistry:
    """Hosts by id. Ids are ``pack:name``; a short name resolves when it is unique."""

    def __init__(self, unavailable: Mapping[str, PluginError]) -> None:
        self._specs: Catalogue[HostSpec] = Catalogue("host", unavailable)

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, host_id: object) -> bool:
        return host_id in self._specs

    def get(self, host_id: str) -> HostSpec:
        """Return the declaration of a host.

        Raises:
            PluginError: If it belongs to a pack that is not available: the cause of that.
            UnknownNameError: If nobody offers it.
            AmbiguousNameError: If a short name fits more than one id.
        """
        return self._specs[host_id]

    def resolve(self, host_id: str) -> str:
        """Return the full id of a host; raises as `get`."""
        return self._specs.resolve(host_id)

    def ids(self) -> list[str]:
        """Return every full id, sorted."""
        return list(self._specs)

    def list_all(self) -> list[HostSpec]:
        """Return every declaration, sorted by id."""
        return [self._specs[full] for full in self._specs]

    def add(self, full: str, spec: HostSpec) -> None:
        """Put a declaration under its full id."""
        self._specs.add(full, spec)

    def discard(self, full: str) -> None:
        """Take a declaration away, if it is there."""
        self._specs.discard(full)

    def create(self, host_id: str, **options: Any) -> nn.Module:
        """Build a host. The caller owns the random number generator it draws from.

        Raises:
            PluginError: If its pack is not available, or its factory cannot be imported; the cause is chained.
            UnknownNameError: If nobody offers it.
            HostError: If the factory does not take the options; the cause is chained.
        """
        full = self.resolve(host_id)
        factory = import_factory(f"Host '{full}'", self._specs[full].factory)
        try:
            host: nn.Module = factory(**options)
        except (TypeError, ValueError) as error:
            raise HostError(
                f"Host '{full}' could not be built with {options or 'its defaults'}: {error}"
            ) from error
        return host
