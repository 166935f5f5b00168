"""What a host is: named injection points, and a way to put a slot at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kasmina_core.blueprints.declarations import NAME_PATTERN
from kasmina_core.errors import HostError
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class InjectionPoint:
    """A named place in a host where a slot can be.

    Attributes:
        name: Name of the slot there; no dots.
        path: Dotted path of the submodule whose output is the features, as in ``host.get_submodule``.
        dim: Width of the features: ``c`` of ``(b, c, h, w)`` or ``d`` of ``(b, t, d)``.
        topology: Layout of the features.
        causal: Whether position ``t`` must not see positions after it.

    Raises:
        HostError: If the name or the width cannot be used.
    """

    name: str
    path: str
    dim: int
    topology: Topology
    causal: bool = False

    def __post_init__(self) -> None:
        if not self.name or "." in self.name:
            raise HostError(
                f"{self.name!r} is not a name for an injection point: it may not be empty or hold dots."
            )
        if self.dim < 1:
            raise HostError(f"Injection point '{self.name}': the width must be at least 1, not {self.dim}.")


@runtime_checkable
class HostProtocol(Protocol):
    """What the core asks of a host that knows its own points.

    A module that lacks this becomes a host by naming points: see `MorphogeneticModel`. ``HookedHost`` gives
    ``register_slot`` and ``unregister_slot`` to any module that declares ``injection_points``. A host may also offer
    ``example_inputs() -> tuple`` for the probe at attach.
    """

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return the places where a slot can be, in the order in which the forward pass meets them."""
        ...

    def register_slot(self, name: str, slot: nn.Module) -> None:
        """Pass the features at point ``name`` through ``slot`` from now on, without owning the slot as a child."""
        ...

    def unregister_slot(self, name: str) -> None:
        """Undo `register_slot`."""
        ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model."""
        ...


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
