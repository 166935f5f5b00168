"""Policies: observations as plain data, commands, and the protocol between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final, runtime_checkable

from kasmina_core.lifecycle import SeedStage
from kasmina_core.topology import Topology


@final
@dataclass(frozen=True, slots=True)
class Germinate:
    """Make a seed in a dormant slot.

    Attributes:
        straight: Whether it contributes at once, before anything is proved; see `SeedSlot.germinate`.
    """

    slot: str
    blueprint: str
    options: Mapping[str, Any] = field(default_factory=dict)
    straight: bool = False


@final
@dataclass(frozen=True, slots=True)
class Regerminate:
    """Put the seed that a `Cull` kept back into its dormant slot, with its weights."""

    slot: str


@final
@dataclass(frozen=True, slots=True)
class Advance:
    """Ask the next gate, and move if it passes; from PROBATIONARY that fossilises."""

    slot: str


@final
@dataclass(frozen=True, slots=True)
class Cull:
    """Remove a seed.

    Attributes:
        revert: Whether to put the host back to what it was before the seed began to contribute.
        keep: Whether to keep the seed for `Regerminate`; it replaces the one kept before.
    """

    slot: str
    reason: str
    revert: bool = False
    keep: bool = False


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


Command = Germinate | Regerminate | Advance | Cull | SetAlpha | Pause | Resume | Continue
"""The actions of the lifecycle as a Markov decision process."""


@final
@dataclass(frozen=True, slots=True)
class CommandOutcome:
    """What became of a command; ``refusal`` says why it was not carried out, and is empty if it was."""

    command: Command
    refusal: str = ""

    @property
    def done(self) -> bool:
        """Whether it was carried out."""
        return not self.refusal


@final
@dataclass(frozen=True, slots=True)
class SlotObservation:
    """One slot as a policy sees it; ``None`` means never measured.

    Attributes:
        is_stopped: Whether the seed was paused because its deviation exceeded ``max_incubation_deviation``.
        deviation: ``rms(seed - host) / rms(host)``, as last read in TRAINING.
        kept_seed: Id of the seed that a `Cull` kept; empty for none.
        can_revert: Whether a `Cull` may ask to revert the host.
        parameters: Parameters of the seed.
        shape: Shape of the features at the slot, for a batch of any size.
        gain: Held-out loss per sample without the seed minus that with it, as last measured.
        gain_t: ``gain`` over its standard error.
        gate_passed: Result of this epoch's gate.
        gate_reason: Its reason.
        gate_verdict: Value of its `GateResult.verdict`: passed, waiting or failed; empty if no gate was asked.
        gate_score: Its `GateResult.score`.
        can_advance: Whether `Advance` would move the seed, or its cooldown, now; ``None`` where only a measurement on
            held-out samples, which nobody asked for in this epoch, could tell.
        unasked: Names of the gates that were not asked, because the seed was put in straight.
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
    is_stopped: bool = False
    deviation: float | None = None
    kept_seed: str = ""
    can_revert: bool = False
    parameters: int = 0
    shape: tuple[int, ...] = ()
    isolation_violations: int = 0
    ramp_progress: float = 0.0
    improvement_since_stage_start: float | None = None
    gain: float | None = None
    gain_t: float | None = None
    gate_passed: bool | None = None
    gate_reason: str = ""
    cull_reason: str = ""
    gate_score: float | None = None
    can_advance: bool | None = None
    unasked: tuple[str, ...] = ()
    gate_verdict: str = ""


@final
@dataclass(frozen=True, slots=True)
class Observation:
    """The model as a policy sees it, after an epoch.

    Attributes:
        epoch: Epochs stepped.
        metric: Validation metric of the whole model at this epoch.
        higher_is_better: Whether it grows with quality.
        lost_epochs: Epochs of the host's training that were given up by reverts so far.
        steps: Optimiser steps: calls of `MorphogeneticModel.step`.
        flops: Training FLOPs spent since the start of the run, as given to ``step_epoch``; ``None`` if not known.
        budget: Training FLOPs that the run may spend in all; ``None`` if not known, or unlimited.
        can_go_straight: Whether enough epochs had a metric for a `Germinate` with ``straight=True``.
    """

    epoch: int
    metric: float | None
    higher_is_better: bool
    host_parameters: int
    seed_parameters: int
    slots: tuple[SlotObservation, ...]
    lost_epochs: int = 0
    steps: int = 0
    flops: float | None = None
    budget: float | None = None
    can_go_straight: bool = True

    @property
    def flops_left(self) -> float | None:
        """Training FLOPs that are left of the budget, at least 0; ``None`` if that is not known."""
        return None if self.flops is None or self.budget is None else max(0.0, self.budget - self.flops)


@runtime_checkable
class Policy(Protocol):
    """Decides, once per epoch, what happens to the slots."""

    def decide(self, observation: Observation) -> Sequence[Command]:
        """Return the commands to carry out, in order."""
        ...


@final
class NoGrowthPolicy:
    """Never grows: the host alone."""

    def decide(self, observation: Observation) -> Sequence[Command]:
        """Return nothing."""
        return ()
