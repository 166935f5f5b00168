"""What a run needs to go on after it was stopped or killed: written to its folder after each epoch, and read back."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from kasmina_core.checkpoints.atomic import write_atomically
from kasmina_core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from kasmina_core.errors import CheckpointError, KasminaError
from kasmina_core.events import BlueprintRegistered, RunStarted, TelemetryEvent
from kasmina_core.experiments.arm import Arm, logits_of
from kasmina_core.experiments.record import GROWN, RunRecord
from kasmina_core.experiments.tasks import SPLITS, Task
from kasmina_core.quiet import derived_seed, private_rng
from kasmina_core.records import Record
from kasmina_core.telemetry import Sink

GROWN_FOLDER: Final = "checkpoint"
"""Folder of the grown arm, as `save_checkpoint` writes it."""

ALONE_FILE: Final = "host-alone.pt"
"""File of the arm that trains alone."""

SAMPLES: Final = 8
"""Training samples that tell whether host and loss are the same."""

EVENTS_FILE: Final = "events.jsonl"

_OURS: Final = re.compile(
    r"checkpoint(\.previous)?|host-alone\.pt|\.checkpoint\.(writing|removing)-.+"
    r"|\.(host-alone\.pt|config\.json|events\.jsonl|metrics\.csv)\.[0-9a-f]{32}\.writing"
)

_OF_NO_MODEL: Final = (RunStarted.type.value, BlueprintRegistered.type.value)


@final
class ModelEvents:
    """A sink that passes on the events of a model alone: those of a run and a registry stand in the file already.

    Args:
        sink: Where to.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, batch: Sequence[TelemetryEvent]) -> None:
        """Pass on a batch."""
        self._sink.write([event for event in batch if event.type.value not in _OF_NO_MODEL])

    def close(self) -> None:
        """Close the sink."""
        self._sink.close()


class ResumeError(KasminaError):
    """A run that cannot go on; the message says why."""


@final
@dataclass(frozen=True, slots=True)
class Beginning(Record):
    """Checksums of what a run begins with: its task and its host, which follow from the settings and the user's code.

    Attributes:
        data: All samples and targets.
        weights: Names, values and ``requires_grad`` of the host's parameters, and its buffers, as made.
        outputs: What the host makes of the first `SAMPLES` training samples in evaluation.
        training: What it makes of them in training, with random numbers of its own.
        losses: The task's loss of each of them.
        metrics: The task's metric of each of them.
        shifts: Whether the task shifts its images in training.
    """

    data: int
    weights: int
    outputs: int
    training: int
    losses: int
    metrics: int
    shifts: bool

    @classmethod
    def of(cls, host: nn.Module, task: Task) -> Beginning:
        """Take the checksums, on one thread, so that the number of threads does not matter.

        Args:
            host: Newly made, on the task's device. It is used up: its buffers change.
            task: What it learns.
        """
        inputs, targets = (part[:SAMPLES] for part in task.train)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            weights = 0
            for name, tensor in (*host.named_parameters(), *host.named_buffers()):
                weights = zlib.crc32(f"{name} {tensor.requires_grad}".encode(), weights)
                weights = _checksum([tensor], weights)
            with private_rng(derived_seed(0, "beginning"), inputs.device), torch.no_grad():
                host.eval()
                outputs = logits_of(host(inputs))
                losses, metrics = task.loss(outputs, targets), task.metric(outputs, targets)
                host.train()
                training = logits_of(host(inputs))
        finally:
            torch.set_num_threads(threads)
        return cls(
            data=_checksum(tensor for split in SPLITS for tensor in task.splits[split]),
            weights=weights,
            outputs=_checksum([outputs]),
            training=_checksum([training]),
            losses=_checksum([losses]),
            metrics=_checksum([metrics]),
            shifts=task.is_moved,
        )

    def demand(self, now: Beginning, task: str, folder: Path) -> None:
        """Refuse to go on with another task or host.

        Args:
            now: What the task and the host are.
            task: Name of the task.
            folder: The run's.

        Raises:
            ResumeError: If anything differs; the message has both checksums and what to do.
        """
        for name, what in _BEGINNINGS.items():
            then, found = getattr(self, name), getattr(now, name)
            if then != found:
                raise ResumeError(
                    f"The run in {folder} cannot go on: {what.format(task=task)} than when it began.\n"
                    f"  then: {_shown(then)}\n  now:  {_shown(found)}\n"
                    "Undo what was changed in the task or the host, or begin a new run. Another machine, torch or pack "
                    "can be the reason too."
                )


_BEGINNINGS: Final = {
    "data": "the task '{task}' gives other data",
    "weights": "the host begins with other weights",
    "outputs": "the host computes something else from the same weights",
    "training": "the host computes something else in training from the same weights",
    "losses": "the task '{task}' has another loss of the same outputs",
    "metrics": "the task '{task}' has another metric of the same outputs",
    "shifts": "the task '{task}' shifts its images otherwise",
}
"""What another checksum means, in the order in which one explains the next."""


@final
@dataclass(slots=True)
class Progress(Record):
    """How far a run is, besides what its arms are.

    Attributes:
        arm: Name of the arm that trains.
        record: The record of the run so far, as `RunRecord.to_dict` gives it.
        log: What is remembered of the seeds, as `SeedLog.state_dict` gives it.
        last: Test loss and metric after each of the last epochs of the arm.
        seconds: What the arm has taken so far.
        flops: What it has spent.
        counted: What its ledger has counted.
        epochs: Epochs it has trained.
        began: Checksums of what the run began with.
        trusted: Slots that are measured without the part of the host before them.
        faults: Slots that are not, with the reason.
    """

    arm: str
    record: dict[str, Any]
    log: dict[str, Any]
    last: list[tuple[float, float]]
    seconds: float
    flops: int
    counted: dict[str, int]
    epochs: int
    began: Beginning
    trusted: list[str] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)


@final
class ProgressFolder:
    """Keeps the progress of a run in its folder, each epoch in place of the one before.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._grown, self._alone = folder / GROWN_FOLDER, folder / ALONE_FILE

    @property
    def exists(self) -> bool:
        """Whether there is anything to go on from."""
        return self._grown.exists() or self._grown.with_name(f"{GROWN_FOLDER}.previous").exists()

    def save(self, arm: Arm, policy: object, progress: Progress) -> None:
        """Write an arm and the progress.

        Raises:
            OSError: If it cannot be written.
            CheckpointError: Likewise.
        """
        text = json.dumps(progress.to_dict())
        if progress.arm == GROWN:
            save_checkpoint(
                self._grown,
                arm.model,
                optimizer=arm.optimizer,
                policy=policy,
                generators={"order": arm.order},
                extra=text,
                keep_previous=False,
            )
            return
        whole = io.BytesIO()
        state = {"host": arm.module.state_dict(), "optimizer": arm.optimizer.state_dict()}
        torch.save({**state, "order": arm.order.get_state(), "progress": text}, whole)
        write_atomically(self._alone, whole.getvalue())

    def load(self, grown: Arm, policy: object, alone: Arm, began: Beginning) -> Progress:
        """Make both arms and the policy what they were.

        Args:
            grown: The arm that grows.
            policy: Its policy.
            alone: The arm that trains alone.
            began: What the run begins with now; it must be what it began with.

        Raises:
            CheckpointError: If a file is damaged or does not fit.
            ResumeError: If the task or the host is not that of the run.
        """
        found = load_checkpoint(
            self._grown,
            grown.model,
            optimizer=grown.optimizer,
            policy=policy if hasattr(policy, "load_state_dict") else None,
            generators={"order": grown.order},
            rng=False,  # each epoch begins with numbers of its own
        )
        progress = _progress(found.extra, self.folder)
        progress.began.demand(began, grown.task.name, self.folder)
        _resume(grown, progress)
        measurer = grown.model.growth.examiner.measurer
        measurer.trusted, measurer.faults = set(progress.trusted), dict(progress.faults)
        if not self._alone.exists():
            return progress
        try:
            with zipfile.ZipFile(self._alone) as archive:
                if archive.testzip() is not None:  # torch.load compares no checksums
                    raise ValueError("its bytes have changed since it was written")
            saved = torch.load(self._alone, weights_only=True, map_location="cpu")
            alone.module.load_state_dict(saved["host"])
            alone.optimizer.load_state_dict(saved["optimizer"])
            alone.order.set_state(saved["order"])
        except Exception as error:
            raise CheckpointError(f"{self._alone} cannot be read: {error}") from error
        progress = _progress(saved["progress"], self.folder)
        _resume(alone, progress)
        return progress

    def remove(self) -> None:
        """Remove what was written, and what a killed process left half written: the run has ended."""
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def progress_of(
    name: str,
    arm: Arm,
    record: RunRecord,
    log: dict[str, Any],
    last: list[tuple[float, float]],
    seconds: float,
    began: Beginning,
) -> Progress:
    """Return how far a run is."""
    progress = Progress(
        arm=name,
        record=record.to_dict(),
        log=log,
        last=last,
        seconds=seconds,
        flops=arm.ledger.total,
        counted=arm.ledger.known,
        epochs=arm.epochs,
        began=began,
    )
    if name == GROWN:
        measurer = arm.model.growth.examiner.measurer
        progress.trusted, progress.faults = sorted(measurer.trusted), dict(measurer.faults)
    return progress


def _progress(text: object, folder: Path) -> Progress:
    try:
        return Progress.from_dict(json.loads(str(text)), f"The progress in {folder}")
    except ValueError as error:
        raise CheckpointError(f"The progress in {folder} cannot be read: {error}") from error


def _resume(arm: Arm, progress: Progress) -> None:
    arm.epochs = progress.epochs
    arm.ledger.total, arm.ledger.known = progress.flops, dict(progress.counted)


def _checksum(tensors: Iterable[Tensor], checksum: int = 0) -> int:
    for tensor in tensors:
        whole = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(whole.numpy().data, checksum)
    return checksum


def _shown(value: int) -> str:
    return str(value) if isinstance(value, bool) else f"checksum {value:08x}"


def cut_events(path: Path, sequence: int) -> None:
    """Remove from a file of events those of a model from its event ``sequence`` on, and a last line that was cut short.

    Raises:
        OSError: If the file cannot be written.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, Mapping) and (
            event.get("type") in _OF_NO_MODEL or event.get("sequence", 0) < sequence
        ):
            kept.append(f"{line}\n")
    write_atomically(path, "".join(kept))
