"""Record of a run: plain data that goes to JSON and comes back the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, final

from kasmina_core.checkpoints.atomic import write_atomically
from kasmina_core.errors import CheckpointError, KasminaError
from kasmina_core.lifecycle import CONTRIBUTING
from kasmina_core.records import Mark, Record, read
from kasmina_core.telemetry.sinks import for_json

GROWN: Final = "grown"
"""Name of the arm that was grown."""

HOST_ALONE: Final = "host alone"
"""Name of the arm that trains the same host without growth, for the same training FLOPs."""

RUN_FORMAT: Final = 1
"""Version of the written form."""

BUDGETS: Final = (0.125, 0.25, 0.5, 1.0)
"""Shares of the grown run's training FLOPs at which it is compared with fixed sizes."""


class FilesError(KasminaError):
    """Files of a run could not be written."""


SeedOutcome = Literal["fossilized", "culled", "unfinished"]


@final
@dataclass(frozen=True, slots=True)
class EpochSlot(Record):
    """A slot at the end of an epoch.

    Attributes:
        name: Name of the slot.
        stage: Name of the `SeedStage`; ``DORMANT`` for an empty slot.
        blueprint: Blueprint of its seed, ``""`` if it holds none.
        alpha: Blend weight in [0, 1].
        gain: Last measured gain of the seed: held-out loss without it minus with it, in nats; ``None`` if never
            measured.
    """

    name: str
    stage: str
    blueprint: str = ""
    alpha: float = 0.0
    gain: float | None = None


@final
@dataclass(frozen=True, slots=True)
class EpochRecord(Record):
    """One epoch of one arm.

    Attributes:
        epoch: Counted from 1.
        train_loss: Mean loss over the epoch's training samples, in nats.
        val_loss: Mean loss over the validation samples after the epoch, in nats.
        val_metric: The task's metric on them, in its own unit.
        parameters: Trainable parameters of the model.
        flops: Training FLOPs spent since the start of the run, this epoch included.
        slots: Every slot, in the model's order; empty for a model without slots.
        gate: The last gate's verdict and reason; ``""`` if none was evaluated.
    """

    epoch: int
    train_loss: float
    val_loss: float
    val_metric: float
    parameters: int
    flops: float
    slots: Sequence[EpochSlot] = ()
    gate: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", tuple(self.slots))


@final
@dataclass(frozen=True, slots=True)
class SeedRecord(Record):
    """One seed's life.

    Attributes:
        seed_id: Unique name of the seed.
        slot: Slot that held it.
        blueprint: Blueprint it was made from.
        outcome: ``fossilized``, ``culled``, or ``unfinished`` when the run ended first.
        germinated_epoch: Epoch in which it germinated.
        ended_epoch: Epoch in which it was fossilised or culled; ``None`` if unfinished.
        stages: ``(stage entered, epoch)`` in order.
        parameters: Parameters it added.
        gain: Its contribution: held-out loss without it minus with it, in nats; ``None`` if never measured.
        gain_low: Lower end of the 95 % interval of ``gain``.
        gain_high: Upper end of it.
        reason: Why it was fossilised or culled.
        samples: Held-out samples that ``gain`` was measured on; ``None`` if never measured.
        finding: Result of the last gate that decided on evidence: ``gate`` and the fields of `Finding`; ``None`` if
            none did.
        unasked: Names of the gates that were not asked, because it was put in straight.
    """

    seed_id: str
    slot: str
    blueprint: str
    outcome: SeedOutcome
    germinated_epoch: int
    ended_epoch: int | None
    stages: Sequence[tuple[str, int]]
    parameters: int
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    reason: str = ""
    samples: Annotated[int | None, Mark.LATER] = None
    finding: Annotated[Mapping[str, Any] | None, Mark.LATER] = None
    unasked: Annotated[tuple[str, ...], Mark.LATER] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple((str(stage), int(epoch)) for stage, epoch in self.stages))

    @property
    def does_harm(self) -> bool:
        """Whether the model computes with the seed and is worse for it: the whole interval of its gain is below 0."""
        return self.contributes and self.gain_high is not None and self.gain_high < 0.0

    @property
    def contributes(self) -> bool:
        """Whether the model computes with the seed at the end of the run."""
        stage = self.stages[-1][0] if self.stages else ""
        return self.outcome == "fossilized" or (
            self.outcome == "unfinished" and stage in {member.name for member in CONTRIBUTING}
        )


@final
@dataclass(frozen=True, slots=True)
class ArmResult(Record):
    """The final figures of one way of training, on the test samples.

    Attributes:
        name: `GROWN`, `HOST_ALONE` or another arm's name.
        parameters: Trainable parameters at the end.
        flops: Training FLOPs spent.
        epochs: Epochs trained.
        val_loss: Mean validation loss at the end, in nats.
        test_loss: Mean test loss, in nats.
        test_metric: The task's metric on the test samples, in its own unit.
        seconds: Wall time of the training.
    """

    name: str
    parameters: int
    flops: float
    epochs: int
    val_loss: float
    test_loss: float
    test_metric: float
    seconds: float


@final
@dataclass(frozen=True, slots=True)
class Regret(Record):
    """How far one way of training is behind the best fixed size, which is another one at each budget.

    Attributes:
        name: Name of the arm.
        behind: Validation loss less that of the best fixed size at each of `BUDGETS`, in nats, linear between epochs;
            below 0 it is ahead. ``None`` before its first epoch ends.
    """

    name: str
    behind: tuple[float | None, ...]

    @property
    def most(self) -> float | None:
        """The largest, ``None`` if it is unknown at a budget."""
        known = [value for value in self.behind if value is not None]
        return max(known) if len(known) == len(self.behind) else None


def loss_at(epochs: Sequence[EpochRecord], flops: float) -> float | None:
    """Return the validation loss at so many training FLOPs, linear between epochs; ``None`` outside of them."""
    for before, after in pairwise(epochs):
        if before.flops <= flops <= after.flops and after.flops > before.flops:
            share = (flops - before.flops) / (after.flops - before.flops)
            return before.val_loss + share * (after.val_loss - before.val_loss)
    return next((epoch.val_loss for epoch in epochs if epoch.flops == flops), None)


@final
@dataclass(slots=True)
class RunRecord(Record):
    """Data of one run, filled while it runs; a report needs nothing else.

    Attributes:
        task: Name of the task.
        metric_name: Unit of the metric, for instance ``accuracy`` or ``bits per character``.
        host: Name of the host.
        config: The settings of the run, plain data.
        epochs: The grown model, epoch by epoch.
        baseline: The host alone, epoch by epoch; empty if it was not trained.
        seeds: Every seed that germinated, in order.
        arms: The final figures of every arm.
        interrupted: Whether the run was stopped before its end.
        notes: Sentences for the reader, for instance what did not run.
        higher_is_better: Whether a larger metric is better; False for bits per character.
        verdict: Why growth ended as it did; see `GrowthVerdict`.
        made_with: The command, versions, and what the settings came to: slots and `GrowthConfig`; plain data.
        sizes: By name of the arm, the host with the kept seeds of the first waves from the start, epoch by epoch.
    """

    derived: ClassVar = ("format", "regrets")

    task: str
    metric_name: str
    host: str
    config: dict[str, Any] = field(default_factory=dict)
    epochs: list[EpochRecord] = field(default_factory=list)
    baseline: list[EpochRecord] = field(default_factory=list)
    seeds: list[SeedRecord] = field(default_factory=list)
    arms: list[ArmResult] = field(default_factory=list)
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)
    higher_is_better: bool = True
    verdict: Annotated[str, Mark.LATER] = ""
    sizes: Annotated[dict[str, list[EpochRecord]], Mark.LATER] = field(default_factory=dict)
    made_with: Annotated[dict[str, Any], Mark.LATER] = field(default_factory=dict)

    @property
    def regrets(self) -> list[Regret]:
        """The grown run and every fixed size, the host alone among them, at `BUDGETS`; empty without `sizes`."""
        grown = self.arm(GROWN)
        if grown is None or not self.sizes:
            return []
        fixed = {HOST_ALONE: self.baseline, **self.sizes}
        found: dict[str, list[float | None]] = {name: [] for name in (GROWN, *fixed)}
        for share in BUDGETS:
            at = share * grown.flops
            best = min((loss for e in fixed.values() if (loss := loss_at(e, at)) is not None), default=None)
            for name, epochs in ((GROWN, self.epochs), *fixed.items()):
                loss = loss_at(epochs, at)
                found[name].append(None if loss is None or best is None else loss - best)
        return [Regret(name, tuple(behind)) for name, behind in found.items()]

    def arm(self, name: str) -> ArmResult | None:
        """Return the arm of that name, ``None`` if it did not run."""
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def format(self) -> int:
        """Version of the written form."""
        return RUN_FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for strict JSON; NaN and infinities are ``NaN``, ``Infinity`` and ``-Infinity``."""
        return dict(for_json(Record.to_dict(self)))

    @classmethod
    def from_dict(cls, data: Any, what: str = "") -> RunRecord:
        """Rebuild from `to_dict`.

        Raises:
            CheckpointError: If the format is another, or a field is missing, unknown or of the wrong type.
        """
        if not isinstance(data, Mapping) or data.get("format") != RUN_FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise CheckpointError(
                "This version of kasmina cannot read this run record.\n"
                f"  expected: format {RUN_FORMAT}\n"
                f"  found:    format {found!r:.200}"
            )
        made: RunRecord = read(cls, data, what or "The saved RunRecord")
        return made

    def to_json(self) -> str:
        """Return strict JSON; NaN and the infinities are the strings ``NaN``, ``Infinity``, ``-Infinity``."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file; a failure leaves the previous file.

        Raises:
            OSError: If the file cannot be written.
        """
        write_atomically(path, self.to_json())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RunRecord:
        """Read what `write` wrote.

        Raises:
            CheckpointError: If the file holds no run record, is cut short or is of another version.
            OSError: If the file cannot be read.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{os.fspath(path)} holds no JSON, or not all of it: {error}") from error
        return cls.from_dict(data)


def write_all(folder: Path, writers: Sequence[Callable[[], object]]) -> None:
    """Call each function that writes into a folder, even if an earlier one failed.

    Raises:
        FilesError: If one could not write; the other files stay.
    """
    failed: OSError | None = None
    for write in writers:
        try:
            write()
        except OSError as error:
            failed = failed or error
    if failed is not None:
        kept = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ""
        raise FilesError(
            f"Not every file could be written to {folder}: {failed.strerror or failed}.\n"
            f"  there: {kept or 'none'}"
        ) from failed
