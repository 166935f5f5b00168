"""The life of a seed as data: stages, the transitions between them, its metrics and its state. No torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Annotated, Final, final

from kasmina_core.errors import TransitionError
from kasmina_core.records import Count, Mark, Range, Record

HISTORY_LENGTH: Final = 100


@final
class SeedStage(IntEnum):
    """Where a seed is in its life. The values are stable: they are written to checkpoints and telemetry."""

    UNKNOWN = 0
    DORMANT = 1
    GERMINATED = 2
    TRAINING = 3
    BLENDING = 4
    SHADOWING = 5
    PROBATIONARY = 6
    FOSSILIZED = 7
    CULLED = 8
    EMBARGOED = 9
    RESETTING = 10


VALID_TRANSITIONS: Final[Mapping[SeedStage, tuple[SeedStage, ...]]] = MappingProxyType(
    {
        SeedStage.UNKNOWN: (),
        SeedStage.DORMANT: (SeedStage.GERMINATED,),
        SeedStage.GERMINATED: (SeedStage.TRAINING, SeedStage.CULLED),
        SeedStage.TRAINING: (SeedStage.BLENDING, SeedStage.CULLED),
        SeedStage.BLENDING: (SeedStage.SHADOWING, SeedStage.CULLED),
        SeedStage.SHADOWING: (SeedStage.PROBATIONARY, SeedStage.CULLED),
        SeedStage.PROBATIONARY: (SeedStage.FOSSILIZED, SeedStage.CULLED),
        SeedStage.FOSSILIZED: (),
        SeedStage.CULLED: (SeedStage.EMBARGOED,),
        SeedStage.EMBARGOED: (SeedStage.RESETTING,),
        SeedStage.RESETTING: (SeedStage.DORMANT,),
    }
)
"""Every stage change that may happen; the first target of a stage is the way forward."""

# Sets, never `<`: CULLED (8) comes after FOSSILIZED (7), so an order of stages says nothing of a life.
REVERTIBLE: Final = frozenset({SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.PROBATIONARY})
"""The seed contributes to the model's output and may still be culled."""

CONTRIBUTING: Final = REVERTIBLE | {SeedStage.FOSSILIZED}
"""The seed contributes to the model's output; in BLENDING from alpha above 0 on."""

LIVING: Final = REVERTIBLE | {SeedStage.GERMINATED, SeedStage.TRAINING}
"""The seed is on trial: it may move on or be culled."""

_ACTIVE: Final = CONTRIBUTING | {SeedStage.TRAINING}
_FAILURE: Final = frozenset({SeedStage.CULLED, SeedStage.EMBARGOED, SeedStage.RESETTING})


def is_valid_transition(current: SeedStage, target: SeedStage) -> bool:
    """Say whether a seed may go from ``current`` to ``target`` in one move.

    >>> is_valid_transition(SeedStage.TRAINING, SeedStage.BLENDING)
    True
    >>> is_valid_transition(SeedStage.TRAINING, SeedStage.FOSSILIZED)
    False
    """
    return target in VALID_TRANSITIONS.get(current, ())


def is_active_stage(stage: SeedStage) -> bool:
    """Say whether the seed computes in this stage (TRAINING to FOSSILIZED)."""
    return stage in _ACTIVE


def is_terminal_stage(stage: SeedStage) -> bool:
    """Say whether no transition leaves this stage: FOSSILIZED alone."""
    return stage == SeedStage.FOSSILIZED


def is_failure_stage(stage: SeedStage) -> bool:
    """Say whether the seed was rejected and its slot is cooling down (CULLED, EMBARGOED, RESETTING)."""
    return stage in _FAILURE


@dataclass(slots=True)
class SeedMetrics(Record):
    """What was measured of a seed; ``None`` means never measured.

    Improvements are positive when the model got better, whichever way the metric points:
    ``current - since`` where higher is better, ``since - current`` where lower is.

    Attributes:
        higher_is_better: True for accuracy, False for a loss.
        epochs_total: Epochs since germination.
        epochs_in_current_stage: Epochs since the stage began.
        initial_metric: First metric recorded after germination.
        current_metric: Last metric recorded.
        best_metric: Best metric recorded.
        metric_at_stage_start: The metric that was current when the stage began.
        isolation_violations: Times the seed was measured to leak into the host.
        deviation: ``rms(seed - host) / rms(host)`` at the slot while the seed learned apart from the host: the largest
            of the batches since it was last read. NaN or infinite where the seed's output is.
        gradient_norm: L2 norm of the seed's gradient, mean over the steps of the last epoch.
        gradient_norm_max: Largest such norm of a step in the last epoch.
        alpha: Blend weight in [0, 1].
        blending_steps_done: Ramp steps taken.
        blending_steps_total: Ramp steps planned; 0 before blending.
    """

    higher_is_better: bool = False
    epochs_total: Count = 0
    epochs_in_current_stage: Count = 0
    initial_metric: float | None = None
    current_metric: float | None = None
    best_metric: float | None = None
    metric_at_stage_start: float | None = None
    isolation_violations: Count = 0
    deviation: float | None = None
    gradient_norm: float | None = None
    gradient_norm_max: float | None = None
    alpha: Annotated[float, Range(0.0, 1.0)] = 0.0
    blending_steps_done: Count = 0
    blending_steps_total: Count = 0

    def record(self, metric: float) -> None:
        """Take one validation measurement of the whole model; NaN and infinity are kept, so that a gate sees them."""
        value = float(metric)
        if self.initial_metric is None:
            self.initial_metric = value
        if self.metric_at_stage_start is None:
            self.metric_at_stage_start = value
        self.current_metric = value
        if (
            self.best_metric is None
            or self._improvement(self.best_metric, value) > 0
            or math.isnan(self.best_metric)
        ):
            self.best_metric = value

    @property
    def total_improvement(self) -> float | None:
        """Improvement of the whole model since germination; ``None`` before two measurements could differ."""
        return self._since(self.initial_metric)

    @property
    def improvement_since_stage_start(self) -> float | None:
        """Improvement of the whole model since the stage began. It measures the host as much as the seed."""
        return self._since(self.metric_at_stage_start)

    @property
    def ramp_progress(self) -> float:
        """``blending_steps_done / blending_steps_total`` in [0, 1]; 0 before blending."""
        return self.blending_steps_done / self.blending_steps_total if self.blending_steps_total else 0.0

    def _since(self, start: float | None) -> float | None:
        if start is None or self.current_metric is None:
            return None
        return self._improvement(start, self.current_metric)

    def _improvement(self, before: float, after: float) -> float:
        return after - before if self.higher_is_better else before - after


@dataclass(slots=True)
class SeedState(Record):
    """One seed's place in its life.

    Attributes:
        seed_id: Unique name of this seed.
        blueprint_id: ``pack:name`` it was made from.
        slot: Name of the slot that holds it.
        stage: Where it is.
        metrics: What was measured.
        stage_history: ``(stage entered, epochs_total then)``, the last `HISTORY_LENGTH` of them.
        is_paused: Whether its clock and its training stand still.
        is_stopped: Whether it was paused because it had gone too far from the host.
        cull_reason: Why it was culled; empty if it was not.
        unasked: Names of the gates that were not asked, because it was put in straight; empty for any other seed.
    """

    seed_id: str
    blueprint_id: str
    slot: str
    stage: SeedStage = SeedStage.DORMANT
    metrics: SeedMetrics = field(default_factory=SeedMetrics)
    stage_history: deque[tuple[SeedStage, Count]] = field(default_factory=deque)
    is_paused: bool = False
    is_stopped: bool = False
    cull_reason: str = ""
    unasked: Annotated[tuple[str, ...], Mark.LATER] = ()

    def __post_init__(self) -> None:
        self.stage_history = deque(self.stage_history, maxlen=HISTORY_LENGTH)

    @property
    def is_straight(self) -> bool:
        """Whether the seed was put in straight: it contributed before anything was proved."""
        return bool(self.unasked)

    @property
    def previous_stage(self) -> SeedStage:
        """The stage before this one; UNKNOWN if there was none."""
        return self.stage_history[-2][0] if len(self.stage_history) > 1 else SeedStage.UNKNOWN

    def can_move_to(self, target: SeedStage) -> bool:
        """Say whether ``target`` is a valid transition from here."""
        return is_valid_transition(self.stage, target)

    def demand_move(self, target: SeedStage | None) -> None:
        """Refuse a move that `VALID_TRANSITIONS` does not hold; ``None`` is none.

        Raises:
            TransitionError: If so; the message lists the moves there are.
        """
        onward = VALID_TRANSITIONS.get(self.stage, ())
        if target is None or target not in onward:
            allowed = ", ".join(stage.name for stage in onward) or "none"
            wanted = next((stage.name for stage in SeedStage if stage == target), repr(target))
            wanted = "anywhere" if target is None else wanted
            raise TransitionError(
                f"Seed '{self.seed_id}' in slot '{self.slot}' cannot go from {self.stage.name} to {wanted}.\n"
                f"  allowed from {self.stage.name}: {allowed}"
            )

    def move_to(self, target: SeedStage) -> None:
        """Enter ``target`` and restart the counters of the stage.

        Raises:
            TransitionError: If `VALID_TRANSITIONS` does not hold the move; nothing is changed.
        """
        self.demand_move(target)
        self.stage = SeedStage(target)  # an equal int would pass the check above
        self.stage_history.append((self.stage, self.metrics.epochs_total))
        self.metrics.epochs_in_current_stage = 0
        self.metrics.metric_at_stage_start = self.metrics.current_metric
