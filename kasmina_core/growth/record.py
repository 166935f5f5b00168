"""Record of a slot: everything but the weights as plain data, checked when it is read."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, cast, final

import torch

from kasmina_core.blending import AlphaSchedule
from kasmina_core.errors import CheckpointError
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.lifecycle import SeedStage, SeedState
from kasmina_core.plain_data import FORMAT_VERSION
from kasmina_core.slots.notes import EpochNotes, GradientNorms, SeedNotes, StageNotes
from kasmina_core.verdicts import GateResult

if TYPE_CHECKING:
    from kasmina_core.slots.slot import SeedSlot

_LARGEST_COUNT: Final = 1 << 63
_NOTHING_MEASURED: Final = -1.0


@final
@dataclass(slots=True)
class SlotRecord:
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
        host_losses: Held-out losses of the host as last measured in TRAINING, a sample each; ``None`` if never.
        gradient_norms: Number, sum and maximum of the gradient norms noted in this epoch.
        incubations: Calls of `MorphogeneticModel.incubate` since the seed began to learn.
        deviation: Largest deviation from the host in TRAINING since it was last read; -1 for none.
    """

    state: SeedState | None
    options: dict[str, Any]
    schedule: AlphaSchedule | None
    germinations: int
    gates: list[GateResult]
    gains: list[float]
    evidence: SeedEvidence | None
    evidence_is_fresh: bool
    isolation_is_fresh: bool
    frozen_by_pause: list[str]
    steps_since_isolation: int
    gradient_norms: tuple[int, float, float]
    incubations: int
    deviation: float
    looks: int
    look_is_counted: bool
    error_share: float
    host_losses: list[float] | None

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
    def has_deviation(self) -> bool:
        """Whether the deviation was measured; NaN is one that was."""
        return not self.deviation < 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with the version of the format."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("state", "schedule", "evidence"):
            plain[name] = plain[name].to_dict() if plain[name] is not None else None
        plain["gates"] = [result.to_dict() for result in self.gates]
        plain["gradient_norms"] = list(self.gradient_norms)
        return {"version": FORMAT_VERSION} | plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], slot: str) -> SlotRecord:
        """Rebuild from `to_dict`.

        Args:
            data: What was saved.
            slot: Name of the slot that reads it.

        Raises:
            CheckpointError: If the data is of another version, damaged, or belongs to another slot.
        """
        version = data.get("version") if isinstance(data, Mapping) else type(data).__name__
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"The saved state of slot '{slot}' has another version.\n"
                f"  saved:    {version!r}\n  readable: {FORMAT_VERSION}"
            )
        wanted = {f.name for f in fields(cls)}
        if lacking := sorted(wanted - set(data)):
            raise CheckpointError(f"The saved state of slot '{slot}' lacks: {', '.join(lacking)}.")
        try:
            record = cls(
                state=SeedState.from_dict(data["state"]) if data["state"] is not None else None,
                options=dict(data["options"]),
                schedule=AlphaSchedule.from_dict(data["schedule"]) if data["schedule"] is not None else None,
                germinations=_count(data["germinations"]),
                gates=[GateResult.from_dict(result) for result in data["gates"]],
                gains=[float(gain) for gain in data["gains"]],
                evidence=SeedEvidence.from_dict(data["evidence"]) if data["evidence"] is not None else None,
                evidence_is_fresh=bool(data["evidence_is_fresh"]),
                isolation_is_fresh=bool(data["isolation_is_fresh"]),
                frozen_by_pause=[str(name) for name in data["frozen_by_pause"]],
                steps_since_isolation=_count(data["steps_since_isolation"]),
                gradient_norms=_norms(*data["gradient_norms"]),
                incubations=_count(data["incubations"]),
                deviation=float(data["deviation"]),
                looks=_count(data["looks"]),
                look_is_counted=bool(data["look_is_counted"]),
                error_share=_share(data["error_share"]),
                host_losses=[float(loss) for loss in data["host_losses"]]
                if data["host_losses"] is not None
                else None,
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"The saved state of slot '{slot}' cannot be read: {error}") from error
        if (state := record.state) is not None:
            if state.stage in (SeedStage.UNKNOWN, SeedStage.DORMANT):
                raise CheckpointError(
                    f"The saved state of slot '{slot}' holds a seed that is {state.stage.name}; no seed can be."
                )
            alpha = state.metrics.alpha
            if state.slot != slot:
                raise CheckpointError(
                    f"The saved state belongs to another slot.\n  saved: '{state.slot}'\n  this:  '{slot}'"
                )
            if not (math.isfinite(alpha) and 0.0 <= alpha <= 1.0):
                raise CheckpointError(f"The saved alpha of slot '{slot}' is {alpha!r}, not in [0, 1].")
            if state.stage is SeedStage.BLENDING and record.schedule is None:
                raise CheckpointError(
                    f"The saved state of slot '{slot}' is BLENDING but has no alpha schedule."
                )
        return record


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST_COUNT:
        raise ValueError(f"expected a number of times, found {value!r:.40}")
    return value


def _share(value: float) -> float:
    if not 0.0 < float(value) <= 1.0:
        raise ValueError(f"expected a share of an error rate, found {value!r:.40}")
    return float(value)


def _norms(count: object, total: float, largest: float) -> tuple[int, float, float]:
    return _count(count), float(total), float(largest)
