"""What a slot asks of others: who makes seeds, who judges them, and the model around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, Final, Protocol, TypeVar, final

from torch import Tensor, nn

from kasmina_core.events import TelemetryEvent
from kasmina_core.hosts import InjectionPoint
from kasmina_core.isolation import IsolationReading
from kasmina_core.lifecycle import SeedStage, SeedState
from kasmina_core.topology import Topology
from kasmina_core.verdicts import Evidence, GateLevel, GateResult

if TYPE_CHECKING:
    from kasmina_core.slots.slot import SeedSlot


@final
@dataclass(slots=True)
class Trial:
    """A seed that was built, if it could be, and the findings for gate G0.

    Attributes:
        seed: The module in the slot's dtype and on its device; ``None`` if it could not be built or run.
        findings: Whether each check held, and why, by name. A check that was not reached is not there.
        mixes: Whether the seed mixes positions, and so takes a context.
        takes_causal: Whether what the seed computes depends on whether the host is causal.
    """

    seed: nn.Module | None = None
    findings: dict[str, tuple[bool, str]] = field(default_factory=dict)
    mixes: bool = False
    takes_causal: bool = False

    @property
    def faults(self) -> str:
        """The checks that did not hold, as text; empty if all held."""
        return "; ".join(f"{name}: {text}" for name, (holds, text) in self.findings.items() if not holds)


class SeedMaker(Protocol):
    """Makes seeds from blueprints; a blueprint that nobody offers raises `UnknownNameError`."""

    def find(self, blueprint_id: str, topology: Topology) -> str:
        """Return the full id of a blueprint."""
        ...

    def describe(self, blueprint_id: str) -> str:
        """Return the full id and the origin of a blueprint; processes that return the same text build the same."""
        ...

    def make(
        self,
        blueprint_id: str,
        point: InjectionPoint,
        options: Mapping[str, Any],
        like: Tensor,
        random_seed: int,
        may_draw: bool,
    ) -> Trial:
        """Build a seed for a point and try it.

        Args:
            blueprint_id: Full id.
            point: Where the seed will be.
            options: Options of the blueprint.
            like: An empty tensor with the shape of one sample's features, and the slot's dtype and device.
            random_seed: From which the seed's weights are drawn.
            may_draw: Whether its forward may draw from the global random numbers.
        """
        ...


class Judge(Protocol):
    """Judges a slot's seed at the gates."""

    @property
    def joined(self) -> tuple[str, ...]:
        """Names of the checks that packs add to the configured gates."""
        ...

    def judge_trial(self, state: SeedState, trial: Trial) -> GateResult:
        """Return the result of gate G0 for a seed that is not in its slot yet."""
        ...

    def judge(self, slot: SeedSlot, gate: GateLevel | int) -> GateResult:
        """Return the result of a gate for the slot's seed."""
        ...

    def foresee(self, slot: SeedSlot, gate: GateLevel) -> bool | None:
        """Say what a gate would answer, without measuring; ``None`` if only a measurement can tell."""
        ...


class SlotOwner(Protocol):
    """The model around a slot: it measures the seed and takes part in changes, with the other processes of a job.

    What it cannot measure is ``None``, and a gate then answers "never measured". The bodies are those of a slot outside
    of a model: nothing is measured and nothing prevented.
    """

    def measure(self, slot: SeedSlot, host_losses: Tensor | None) -> tuple[Evidence, Tensor | None] | None:
        """Measure the seed on held-out samples; return the losses without it too, where they can be kept.

        ``host_losses`` are those of the host as blending began.
        """
        return None

    def screen(self, slot: SeedSlot) -> object | None:
        """Measure the first-order gain of the seed, for the judge."""
        return None

    def error_share(self, slot: SeedSlot) -> float:
        """Return the part of the gates' error rate that the seed may spend, in (0, 1]."""
        return slot.notes.error_share

    def measure_isolation(self, slot: SeedSlot) -> IsolationReading | None:
        """Measure the gradient that the seed sends into the host."""
        return None

    def emit(self, event: TelemetryEvent) -> None:
        """Take an event."""
        return None

    def command(self, slot: SeedSlot, text: str) -> AbstractContextManager[None]:
        """Carry out a command of the slot as the processes of a job agree."""
        return nullcontext()

    def everywhere(self, slot: SeedSlot, what: str, holds: bool) -> bool:
        """Return whether something holds in every process of a job."""
        return holds

    def largest(self, slot: SeedSlot, what: str, value: float) -> float:
        """Return the largest value of all processes of a job; NaN if one is."""
        return value

    @property
    def learned_epochs(self) -> int:
        """Epochs that the host has learned: those stepped, less those that reverts gave up."""
        return 0

    def begin_straight(self, slot: SeedSlot) -> tuple[tuple[int, float], ...]:
        """Called with a new seed that is put in straight; keeps what a revert needs, or raises to prevent it.

        Returns ``learned_epochs`` and the metric of the last epochs, oldest first.
        """
        return ()

    def before_move(self, slot: SeedSlot, target: SeedStage) -> None:
        """Called before a stage change; may raise to prevent it."""
        return None

    def fossilized(self, slot: SeedSlot) -> None:
        """Called when the seed has become a part of the model."""
        return None

    def seed_made(self, slot: SeedSlot, seed: nn.Module, blueprint_id: str) -> None:
        """Called before anybody holds the parameters of a new seed; may replace them, or raise to prevent it."""
        return None

    def seed_added(self, slot: SeedSlot, parameters: Sequence[nn.Parameter]) -> None:
        """Called with new parameters while the seed is in its slot; may raise to prevent it."""
        return None

    def seed_removed(self, slot: SeedSlot, parameters: Sequence[nn.Parameter]) -> None:
        """Called with parameters that are gone."""
        return None


@final
class Unowned(SlotOwner):
    """The owner of a slot outside of a model."""


UNOWNED: Final = Unowned()

_Slot = TypeVar("_Slot", bound="SeedSlot")
_Result = TypeVar("_Result")


def shared_command(
    method: Callable[Concatenate[_Slot, ...], _Result],
) -> Callable[Concatenate[_Slot, ...], _Result]:
    """Make a slot's method a command on which the processes of a job agree."""

    @wraps(method)
    def agreed(self: _Slot, *args: Any, **kwargs: Any) -> _Result:
        name = method.__name__
        # An epoch's metric is each process's own; it is reduced by the model.
        given = [] if name == "step_epoch" else [*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())]
        with self.owner.command(self, f"{name}({', '.join([repr(self.name), *given])})"):
            return method(self, *args, **kwargs)

    return agreed
