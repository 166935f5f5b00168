"""When to germinate, cull and fossilise: observations as plain data, commands, and policies between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final, runtime_checkable

from kasmina_core.lifecycle import SeedStage
from kasmina_core.topology import Topology


@final
@dataclass(frozen=True, slots=True)
class Germinate:
    """Make a seed in a dormant slot."""

    slot: str
    blueprint: str
    options: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Advance:
    """Ask the next gate, and move if it passes; from PROBATIONARY that fossilises."""

    slot: str


@final
@dataclass(frozen=True, slots=True)
class Cull:
    """Remove a seed."""

    slot: str
    reason: str


@final
@dataclass(frozen=True, slots=True)
class SetAlpha:
    """Set the blend weight of a seed in BLENDING, in [0, 1]."""

    slot: str
    alpha: float


@final
@dataclass(frozen=True, slots=True)
class Pause:
    """Let a seed stand still."""

    slot: str


@final
@dataclass(frozen=True, slots=True)
class Resume:
    """Let a paused seed go on."""

    slot: str


@final
@dataclass(frozen=True, slots=True)
class Continue:
    """Do nothing this epoch."""


Command = Germinate | Advance | Cull | SetAlpha | Pause | Resume | Continue
"""The actions of the lifecycle as a Markov decision process."""


@final
@dataclass(frozen=True, slots=True)
class SlotObservation:
    """One slot as a policy sees it; ``None`` means never measured.

    Attributes:
        gain: Loss per held-out sample that the seed saves, as last measured.
        gain_t: That over its standard error.
        gate_passed: What the gate of this epoch said.
        gate_reason: Why.
    """

    slot: str
    topology: Topology
    dim: int
    stage: SeedStage
    blueprint: str = ""
    seed_id: str = ""
    alpha: float = 0.0
    epochs_in_stage: int = 0
    epochs_total: int = 0
    is_paused: bool = False
    isolation_violations: int = 0
    ramp_progress: float = 0.0
    improvement_since_stage_start: float | None = None
    gain: float | None = None
    gain_t: float | None = None
    gate_passed: bool | None = None
    gate_reason: str = ""
    cull_reason: str = ""


@final
@dataclass(frozen=True, slots=True)
class Observation:
    """The model as a policy sees it, after an epoch.

    Attributes:
        epoch: Epochs stepped.
        metric: Validation metric of the whole model at this epoch.
        higher_is_better: Whether it grows with quality.
    """

    epoch: int
    metric: float | None
    higher_is_better: bool
    host_parameters: int
    seed_parameters: int
    slots: tuple[SlotObservation, ...]


@runtime_checkable
class Policy(Protocol):
    """Decides, once an epoch, what happens to the slots."""

    def decide(self, observation: Observation) -> Sequence[Command]:
        """Return the commands to carry out, in order."""
        ...


@final
class NoGrowthPolicy:
    """Never grows: the host alone."""

    def decide(self, observation: Observation) -> Sequence[Command]:
        """Return nothing."""
        return ()


@final
class PlateauPolicy:
    """Germinates when the metric stops improving, fossilises what passes G5, culls what takes too long.

    One seed lives at a time. The metric is on a plateau when its best has not improved by ``min_delta`` (relative to
    the best's size) for ``patience`` epochs. Candidates are tried in order, slot by slot, and a blueprint that was
    culled in a slot is not tried there again before all others were.

    Args:
        blueprints: Candidates by topology: a mapping, or a function of a slot's observation. Ids or short names.
        patience: Epochs without improvement that make a plateau, at least 1.
        min_delta: Smallest improvement that counts, as a share of the best metric.
        max_training_epochs: Epochs in GERMINATED or TRAINING after which a seed that its gate refuses is culled.
        max_probation_epochs: Epochs in SHADOWING, PROBATIONARY or, once the ramp is done, BLENDING after which a seed
            that its gate refuses is culled.
        max_seeds: Seeds to keep at most; ``None`` for as many as there are slots.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If ``blueprints`` is neither a mapping to lists nor a function.
        TopologyError: If it maps something that is no topology.
    """

    def __init__(
        self,
        blueprints: Mapping[Topology, Sequence[str]] | Callable[[SlotObservation], Sequence[str]],
        *,
        patience: int = 3,
        min_delta: float = 0.01,
        max_training_epochs: int = 8,
        max_probation_epochs: int = 8,
        max_seeds: int | None = None,
    ) -> None:
        for name, value in (
            ("patience", patience),
            ("max_training_epochs", max_training_epochs),
            ("max_probation_epochs", max_probation_epochs),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value!r}.")
        if not 0.0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be at least 0 and finite, not {min_delta!r}.")
        self._candidates = blueprints if callable(blueprints) else _from_mapping(blueprints)
        self.patience = patience
        self.min_delta = min_delta
        self.max_training_epochs = max_training_epochs
        self.max_probation_epochs = max_probation_epochs
        self.max_seeds = max_seeds
        self._best: float | None = None
        self._stale = 0
        self._tried: dict[tuple[str, str], int] = {}

    def decide(self, observation: Observation) -> Sequence[Command]:
        """Return at most one command a slot."""
        plateau = self._note(observation)
        living = [s for s in observation.slots if SeedStage.GERMINATED <= s.stage <= SeedStage.PROBATIONARY]
        if living:
            self._stale = 0  # the metric is judged anew once the seed's fate is known
            return [command for slot in living if (command := self._judge(slot)) is not None]
        kept = sum(s.stage is SeedStage.FOSSILIZED for s in observation.slots)
        if not plateau or (self.max_seeds is not None and kept >= self.max_seeds):
            return ()
        choice = self._choose(observation)
        if choice is None:
            return ()
        self._tried[choice] = self._tried.get(choice, 0) + 1
        self._stale = 0
        return [Germinate(*choice)]

    def _note(self, observation: Observation) -> bool:
        metric = observation.metric
        if metric is None or not math.isfinite(metric):
            return False  # a diverged host is not on a plateau
        sign = 1.0 if observation.higher_is_better else -1.0
        if self._best is None or sign * (metric - self._best) > self.min_delta * abs(self._best):
            self._best, self._stale = metric, 0
        else:
            self._stale += 1
        return self._stale >= self.patience

    def _judge(self, slot: SlotObservation) -> Command | None:
        if slot.is_paused:
            return None
        if slot.stage is SeedStage.PROBATIONARY and slot.gate_passed:
            return Advance(slot.slot)
        limit = {
            SeedStage.GERMINATED: self.max_training_epochs,
            SeedStage.TRAINING: self.max_training_epochs,
            SeedStage.BLENDING: self.max_probation_epochs if slot.ramp_progress >= 1.0 else None,
            SeedStage.SHADOWING: self.max_probation_epochs,
            SeedStage.PROBATIONARY: self.max_probation_epochs,
        }.get(slot.stage)
        if limit is not None and slot.epochs_in_stage >= limit:
            return Cull(slot.slot, f"{slot.epochs_in_stage} epochs in {slot.stage.name}: {slot.gate_reason}")
        return None

    def _choose(self, observation: Observation) -> tuple[str, str] | None:
        free = [s for s in observation.slots if s.stage is SeedStage.DORMANT]
        pairs = [
            (self._tried.get((slot.slot, blueprint), 0), rank, order, slot.slot, blueprint)
            for order, slot in enumerate(free)
            for rank, blueprint in enumerate(self._candidates(slot))
        ]
        return min(pairs)[3:] if pairs else None

    def state_dict(self) -> dict[str, Any]:
        """Return what the policy remembers, as plain data."""
        return {
            "best": self._best,
            "stale": self._stale,
            "tried": [[slot, blueprint, times] for (slot, blueprint), times in sorted(self._tried.items())],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        self._best, self._stale = state["best"], int(state["stale"])
        self._tried = {(slot, blueprint): int(times) for slot, blueprint, times in state["tried"]}


def _from_mapping(blueprints: Mapping[Topology, Sequence[str]]) -> Callable[[SlotObservation], Sequence[str]]:
    if not isinstance(blueprints, Mapping):
        raise TypeError(
            f"blueprints must map topologies to lists of ids, such as {{Topology.CNN: ['norm']}}, not {blueprints!r}."
        )
    listed: dict[Topology, tuple[str, ...]] = {}
    for topology, names in blueprints.items():
        if isinstance(names, str):
            raise TypeError(f"blueprints[{topology!r}] must be a list of ids, not the text {names!r}.")
        listed[Topology(topology)] = tuple(names)
    return lambda slot: listed.get(slot.topology, ())
