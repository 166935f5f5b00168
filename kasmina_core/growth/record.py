"""Record of a slot: everything but the weights as plain data, checked when it is read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, cast, final

import torch

from kasmina_core.blending import AlphaSchedule
from kasmina_core.errors import CheckpointError
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.growth.plain_data import FORMAT_VERSION
from kasmina_core.lifecycle import SeedStage, SeedState
from kasmina_core.records import Count, Mark, Range, Record
from kasmina_core.slots.notes import EpochNotes, GradientNorms, SeedNotes, StageNotes
from kasmina_core.verdicts import GateResult

if TYPE_CHECKING:
    from kasmina_core.slots.slot import SeedSlot

_NOTHING_MEASURED: Final = -1.0


@final
@dataclass(slots=True)
class SlotRecord(Record):
    """A slot's state, options, ramp and measurements.

    ``to_dict`` gives dicts, lists, text, numbers, booleans and ``None`` alone, which JSON and
    ``torch.load(weights_only=True)`` accept.

    Attributes:
        gates: What the gates said in this epoch, in the order in which they were asked.
        gains: Gains measured since the stage began.
        evidence_is_fresh: Whether the evidence is of this epoch.
        isolation_is_fresh: Whether isolation was measured in this epoch.
        frozen_by_pause: Names of the seed's parameters that `resume` makes trainable again.
        looks: Looks of the gates' test since the stage began.
        look_is_counted: Whether one of them is at the evidence of this epoch.
        error_share: Part of the gates' error rate that the seed may spend, in (0, 1].
        host_losses: Held-out losses of the host as last measured in TRAINING, one per sample; ``None`` if never.
        causal: Whether the slot's point is causal; ``None`` in records that do not say it.
        steps: Optimiser steps in which the seed was active.
        trend: Of a seed that was put in straight, epochs that the host had learned and the metric then.
        slot_behind: Whether a slot is open behind this one, at the same point.
        gradient_norms: Number, sum and maximum of the gradient norms noted in this epoch.
        incubations: Calls of `MorphogeneticModel.incubate` since the seed began to learn.
        deviation: Largest deviation from the host in TRAINING since it was last read; -1 for none.
    """

    derived: ClassVar = ("version",)

    state: SeedState | None
    options: dict[str, Any]
    schedule: AlphaSchedule | None
    germinations: Count
    gates: list[GateResult]
    gains: list[float]
    evidence: SeedEvidence | None
    evidence_is_fresh: bool
    isolation_is_fresh: bool
    frozen_by_pause: list[str]
    steps_since_isolation: Count
    gradient_norms: tuple[Count, float, float]
    incubations: Count
    deviation: float
    looks: Count
    look_is_counted: bool
    error_share: Annotated[float, Range(above=0.0, most=1.0)]
    host_losses: list[float] | None
    causal: Annotated[bool | None, Mark.LATER] = None
    steps: Annotated[Count, Mark.LATER] = 0
    trend: Annotated[tuple[tuple[int, float], ...], Mark.LATER] = ()
    slot_behind: Annotated[bool, Mark.LATER] = False

    @classmethod
    def of(cls, slot: SeedSlot) -> SlotRecord:
        """Return what a slot is now."""
        notes = slot.notes
        is_known = slot.device.type != "meta" and bool(slot.has_training_deviation)
        return cls(
            state=slot.state,
            options=copy.deepcopy(slot.options),
            schedule=slot.schedule,
            germinations=slot.germinations,
            gates=list(notes.answers.values()),
            gains=list(notes.stage.gains),
            evidence=cast("SeedEvidence | None", notes.evidence),
            evidence_is_fresh=notes.epoch.evidence_is_fresh,
            isolation_is_fresh=notes.epoch.isolation_is_fresh,
            frozen_by_pause=list(notes.frozen_by_pause),
            steps_since_isolation=notes.steps_since_isolation,
            gradient_norms=notes.epoch.norms.record(),
            incubations=notes.incubations,
            deviation=float(slot.training_deviation) if is_known else _NOTHING_MEASURED,
            looks=notes.stage.looks,
            look_is_counted=notes.look_is_counted,
            error_share=notes.error_share,
            host_losses=notes.host_losses.tolist() if notes.host_losses is not None else None,
            causal=slot.point.causal,
            steps=notes.steps,
            trend=notes.trend,
            slot_behind=bool(slot.behind),
        )

    @property
    def notes(self) -> SeedNotes:
        """The slot's notes."""
        return SeedNotes(
            evidence=self.evidence,
            host_losses=torch.tensor(self.host_losses) if self.host_losses is not None else None,
            frozen_by_pause=self.frozen_by_pause,
            error_share=self.error_share,
            incubations=self.incubations,
            steps_since_isolation=self.steps_since_isolation,
            steps=self.steps,
            trend=self.trend,
            stage=StageNotes(self.gains, self.looks),
            epoch=EpochNotes(
                self.evidence_is_fresh,
                self.isolation_is_fresh,
                self.looks if self.look_is_counted else 0,
                GradientNorms(*self.gradient_norms),
            ),
            answers={result.gate: result for result in self.gates if result.gate is not None},
        )

    @property
    def version(self) -> int:
        """Version of the format."""
        return FORMAT_VERSION

    @classmethod
    def for_slot(cls, data: Any, slot: str, causal: bool | None = None) -> SlotRecord:
        """Rebuild from `to_dict`.

        Args:
            data: What was saved.
            slot: Name of the slot that reads it.
            causal: Whether its point is causal; ``None`` if somebody else compares the points.

        Raises:
            CheckpointError: If the data is of another version, damaged, or belongs to another slot, or a seed is in it
                and the slot's point was causal and is not, or the reverse.
        """
        what = f"The saved state of slot '{slot}'"
        version = data.get("version") if isinstance(data, Mapping) else type(data).__name__
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{what} has another version.\n  saved:    {version!r:.200}\n  readable: {FORMAT_VERSION}"
            )
        record = cls.from_dict(data, what)
        if record.slot_behind and (record.state is None or record.state.stage is not SeedStage.FOSSILIZED):
            raise CheckpointError(f"{what} has a slot behind it, which only a fossil can have.")
        if (state := record.state) is not None:
            if state.stage in (SeedStage.UNKNOWN, SeedStage.DORMANT):
                raise CheckpointError(f"{what} holds a seed that is {state.stage.name}; no seed can be.")
            if state.slot != slot:
                raise CheckpointError(
                    f"The saved state belongs to another slot.\n  saved: '{state.slot:.200}'\n  this:  '{slot}'"
                )
            if None not in (record.causal, causal) and record.causal is not causal:
                raise CheckpointError(
                    f"Slot '{slot}' is at a point that was saved with causal={record.causal}, and has causal={causal} here: "
                    "a seed that mixes positions would compute something else.\n"
                    f"Make the model as it was saved: MorphogeneticModel(host, ..., causal={record.causal}), or "
                    f"InjectionPoint({slot!r}, ..., causal={record.causal}) if the point is declared."
                )
            if state.stage is SeedStage.BLENDING and record.schedule is None:
                raise CheckpointError(f"{what} is BLENDING but has no alpha schedule.")
        return record
