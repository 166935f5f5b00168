"""What happened, as typed, frozen data. Events are emitted after the fact, in order, each once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, ClassVar, final

from kasmina_core.records import Mark, Record


@final
class TelemetryEventType(Enum):
    """Kinds of event."""

    RUN_STARTED = "run_started"
    BLUEPRINT_REGISTERED = "blueprint_registered"
    SEED_GERMINATED = "seed_germinated"
    SEED_STAGE_CHANGED = "seed_stage_changed"
    GATE_EVALUATED = "gate_evaluated"
    ALPHA_CHANGED = "alpha_changed"
    ISOLATION_VIOLATION = "isolation_violation"
    INCUBATION_STOPPED = "incubation_stopped"
    GATE_CHECKS_JOINED = "gate_checks_joined"
    GATES_NOT_ASKED = "gates_not_asked"
    COMMAND_DONE = "command_done"
    COMMAND_REFUSED = "command_refused"
    EPOCH_ENDED = "epoch_ended"
    SEED_FOSSILIZED = "seed_fossilized"
    SEED_CULLED = "seed_culled"
    SEED_SAVED = "seed_saved"

    @property
    def is_terminal(self) -> bool:
        """Whether the event ends a seed's life; such events are never dropped."""
        return self in (TelemetryEventType.SEED_FOSSILIZED, TelemetryEventType.SEED_CULLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryEvent(Record):
    """Base of all events.

    Attributes:
        slot: Name of the slot; empty for events of a whole model, a run or a registry.
        seed_id: The seed; empty where there is none.
        epoch: Epochs the model has stepped.
        sequence: Position among the events of one model, from 0, without gaps; -1 for those of a run or a registry.
    """

    derived: ClassVar = ("type",)

    type: ClassVar[TelemetryEventType]
    slot: str = ""
    seed_id: str = ""
    epoch: int = 0
    sequence: int = -1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(TelemetryEvent):
    """A run began with these settings, plain data. `kasmina grow` sends it; a loop of your own may.

    ``telemetry.emit(RunStarted(settings={"lr": 3e-3}))``: trackers show them as hyperparameters.

    Attributes:
        settings: What decides the run.
        made_with: The command, versions, and what the settings came to, such as the names of all slots.
    """

    type: ClassVar[TelemetryEventType] = TelemetryEventType.RUN_STARTED
    settings: Mapping[str, Any]
    made_with: Annotated[Mapping[str, Any], Mark.LATER] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BlueprintRegistered(TelemetryEvent):
    """A blueprint entered a registry; ``verdict`` is that of its registration checks."""

    type: ClassVar[TelemetryEventType] = TelemetryEventType.BLUEPRINT_REGISTERED
    blueprint_id: str
    distribution: str = ""
    verdict: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SeedGerminated(TelemetryEvent):
    """A seed was made; ``parameters`` counts what it added."""

    type: ClassVar[TelemetryEventType] = TelemetryEventType.SEED_GERMINATED
    blueprint_id: str
    parameters: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GateChecksJoined(TelemetryEvent):
    """Gate checks of installed packs judge the new seed as well; ``checks`` holds their ids, ``pack:name``."""

    type: ClassVar[TelemetryEventType] = TelemetryEventType.GATE_CHECKS_JOINED
    checks: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GatesNotAsked(TelemetryEvent):
    """A seed was put in straight; it passes these ``gates`` (names of `GateLevel`) by without being judged."""

    type: ClassVar[TelemetryEventType] = TelemetryEventType.GATES_NOT_ASKED
    gates: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StageChanged(TelemetryEvent):
    """A seed went from one stage to another (names of `SeedStage`)."""

    type: ClassVar[TelemetryEventType] = TelemetryEventType.SEED_STAGE_CHANGED
    before: str
    after: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GateEvaluated(TelemetryEvent):
    """A gate was evaluated.

    Attributes:
        gate: Name of the gate.
        passed: Whether the seed may move.
        reason: Why, in one line.
        checks: Plain data of each check: name, value, bounds, verdict, detail.
        verdict: Value of `GateResult.verdict`: ``passed``, ``failed``, or ``waiting`` if nothing but time is missing.
    """

    type: ClassVar[TelemetryEventType] = TelemetryEventType.GATE_EVALUATED
    gate: str
    passed: bool
    reason: str
    checks: tuple[Mapping[str, Any], ...] = ()
    verdict: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaChanged(TelemetryEvent):
    """The blend weight moved; ``progress`` is the share of the ramp done."""

    type: ClassVar[TelemetryEventType] = TelemetryEventType.ALPHA_CHANGED
    alpha: float
    progress: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class IsolationViolation(TelemetryEvent):
    """A seed leaked gradient into the host: ``leak`` is its L2 norm relative to the gradient at the slot."""

    type: ClassVar[TelemetryEventType] = TelemetryEventType.ISOLATION_VIOLATION
    leak: float
    threshold: float
    tensors: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class IncubationStopped(TelemetryEvent):
    """A seed in TRAINING went too far from the host and was paused: ``deviation`` is relative to the host's RMS."""

    type: ClassVar[TelemetryEventType] = TelemetryEventType.INCUBATION_STOPPED
    deviation: float
    limit: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CommandDone(TelemetryEvent):
    """A command of a policy was carried out; one that does nothing (`Continue`) makes no event.

    Attributes:
        command: Name of its class, such as ``Advance``.
        arguments: Its other fields, such as ``{"blueprint": "cnn:norm", "options": {}}``.
    """

    type: ClassVar[TelemetryEventType] = TelemetryEventType.COMMAND_DONE
    command: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRefused(TelemetryEvent):
    """A command of a policy was not carried out, and changed nothing.

    Attributes:
        command: Name of its class, such as ``Advance``.
        reason: Why.
        arguments: Its other fields, such as ``{"blueprint": "cnn:norm", "options": {}}``.
    """

    type: ClassVar[TelemetryEventType] = TelemetryEventType.COMMAND_REFUSED
    command: str
    reason: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class SlotReading(Record):
    """A slot at the end of an epoch. ``None`` stands for what was never measured.

    Attributes:
        slot: Name of the slot.
        stage: Name of the `SeedStage`; ``DORMANT`` for an empty slot.
        seed_id: The seed, or the last one where it was culled; empty if there was none.
        blueprint: Blueprint of the seed; empty if there is none.
        alpha: Blend weight, in [0, 1].
        parameters: Parameters that the seed adds.
        epochs_in_stage: Epochs since the stage began.
        is_paused: Whether the seed stands still.
        gain: Last paired gain of the seed: held-out loss without it minus with it.
        deviation: How far the seed was from the host while it learned apart, relative to the host's RMS.
        gradient_norm: L2 norm of the seed's gradient, mean over the epoch.
        isolation_violations: Times that the seed leaked gradient into the host.
        unasked: Names of the gates that were not asked, because the seed was put in straight.
    """

    slot: str
    stage: str
    seed_id: str = ""
    blueprint: str = ""
    alpha: float = 0.0
    parameters: int = 0
    epochs_in_stage: int = 0
    is_paused: bool = False
    gain: float | None = None
    deviation: float | None = None
    gradient_norm: float | None = None
    isolation_violations: int = 0
    unasked: Annotated[tuple[str, ...], Mark.LATER] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EpochEnded(TelemetryEvent):
    """An epoch of the model ended, after its gates and before the policy; ``epoch`` counts from 1.

    Attributes:
        metric: Metric of the whole model that was given to ``step_epoch``; ``None`` if none was.
        host_parameters: Parameters of the host.
        seed_parameters: Parameters that the seeds in all slots add.
        flops: Training FLOPs since the start of the run, as given to ``step_epoch``; ``None`` if not known.
        lost_epochs: Epochs of the host's training that reverts gave up since the start of the run.
        slots: Every slot, in the model's order.
    """

    type: ClassVar[TelemetryEventType] = TelemetryEventType.EPOCH_ENDED
    metric: float | None
    host_parameters: int
    seed_parameters: int
    flops: float | None = None
    lost_epochs: int = 0
    slots: tuple[SlotReading, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SeedFossilized(TelemetryEvent):
    """A seed became part of the model; ``gain`` is its last measured gain, ``None`` if never measured."""

    type: ClassVar[TelemetryEventType] = TelemetryEventType.SEED_FOSSILIZED
    blueprint_id: str
    parameters: int
    gain: float | None = None
    total_improvement: float | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SeedCulled(TelemetryEvent):
    """A seed was removed; ``stage`` is the one it was culled from.

    Attributes:
        reverted: Whether the host was put back to what it was before the seed began to contribute.
        lost_epochs: Epochs of the host's training that were given up with it; they were spent all the same.
    """

    type: ClassVar[TelemetryEventType] = TelemetryEventType.SEED_CULLED
    blueprint_id: str
    reason: str
    stage: str
    gain: float | None = None
    total_improvement: float | None = None
    reverted: bool = False
    lost_epochs: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SeedSaved(TelemetryEvent):
    """A seed that was kept or culled was written to a file, because a sink asked for it.

    Attributes:
        blueprint_id: What it was made from.
        outcome: ``fossilized`` or ``culled``.
        file: What `save_seeds` wrote; that of a culled seed holds it as it was before.
    """

    type: ClassVar[TelemetryEventType] = TelemetryEventType.SEED_SAVED
    blueprint_id: str
    outcome: str
    file: str
