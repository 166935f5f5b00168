"""The record of one `kasmina grow` run: plain data that goes to JSON and comes back the same."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, cast, final, get_args

from kasmina_core.errors import CheckpointError, KasminaError
from kasmina_core.files import write_atomically

GROWN: Final = "grown"
"""Name of the arm that was grown."""

HOST_ALONE: Final = "host alone"
"""Name of the arm that trains the same host without growth, for the same training FLOPs."""

RUN_FORMAT: Final = 1
"""Version of the written form."""


class FilesError(KasminaError):
    """Files of a run could not be written."""


SeedOutcome = Literal["fossilized", "culled", "unfinished"]


@final
@dataclass(frozen=True, slots=True)
class EpochSlot:
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EpochSlot:
        """Rebuild from `to_dict`.

        Raises:
            CheckpointError: If a field is missing, unknown or of the wrong type.
        """
        with _Reading(cls, data) as read:
            return cls(
                read.text("name"),
                read.text("stage"),
                read.text("blueprint"),
                read.number("alpha"),
                read.optional("gain"),
            )


@final
@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch of one arm.

    Attributes:
        epoch: Counted from 1.
        train_loss: Mean loss over the epoch's training samples, in nats.
        val_loss: Mean loss over the validation samples after the epoch, in nats.
        val_metric: The task's metric there, in its own unit.
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EpochRecord:
        """Rebuild from `to_dict`.

        Raises:
            CheckpointError: If a field is missing, unknown or of the wrong type.
        """
        with _Reading(cls, data) as read:
            return cls(
                epoch=read.integer("epoch"),
                train_loss=read.number("train_loss"),
                val_loss=read.number("val_loss"),
                val_metric=read.number("val_metric"),
                parameters=read.integer("parameters"),
                flops=read.number("flops"),
                slots=tuple(EpochSlot.from_dict(slot) for slot in read.sequence("slots")),
                gate=read.text("gate"),
            )


@final
@dataclass(frozen=True, slots=True)
class SeedRecord:
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
        finding: What the last gate that decided on evidence found on its own samples: ``gate`` and the fields of
            `Finding`; ``None`` if none did.
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
    samples: int | None = None
    finding: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple((str(stage), int(epoch)) for stage, epoch in self.stages))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SeedRecord:
        """Rebuild from `to_dict`.

        Raises:
            CheckpointError: If a field is missing, unknown or of the wrong type.
        """
        with _Reading(cls, data, later=("samples", "finding")) as read:
            outcome = read.text("outcome")
            if outcome not in get_args(SeedOutcome):
                raise ValueError(f"outcome cannot be {outcome!r}")
            return cls(
                seed_id=read.text("seed_id"),
                slot=read.text("slot"),
                blueprint=read.text("blueprint"),
                outcome=cast(SeedOutcome, outcome),
                germinated_epoch=read.integer("germinated_epoch"),
                ended_epoch=None if read.value("ended_epoch") is None else read.integer("ended_epoch"),
                stages=read.sequence("stages"),
                parameters=read.integer("parameters"),
                gain=read.optional("gain"),
                gain_low=read.optional("gain_low"),
                gain_high=read.optional("gain_high"),
                reason=read.text("reason"),
                samples=None if read.value("samples") is None else read.integer("samples"),
                finding=read.mapping("finding"),
            )


@final
@dataclass(frozen=True, slots=True)
class ArmResult:
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ArmResult:
        """Rebuild from `to_dict`.

        Raises:
            CheckpointError: If a field is missing, unknown or of the wrong type.
        """
        with _Reading(cls, data) as read:
            return cls(
                name=read.text("name"),
                parameters=read.integer("parameters"),
                flops=read.number("flops"),
                epochs=read.integer("epochs"),
                val_loss=read.number("val_loss"),
                test_loss=read.number("test_loss"),
                test_metric=read.number("test_metric"),
                seconds=read.number("seconds"),
            )


@final
@dataclass(slots=True)
class RunRecord:
    """Everything a report needs of one run; filled while it goes on.

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
        higher_is_better: Which way the metric points; False for bits per character.
    """

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

    def arm(self, name: str) -> ArmResult | None:
        """Return the arm of that name, ``None`` if it did not run."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"format": RUN_FORMAT} | _to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunRecord:
        """Rebuild from `to_dict`.

        Raises:
            CheckpointError: If the format is another, or a field is missing, unknown or of the wrong type.
        """
        if not isinstance(data, Mapping) or data.get("format") != RUN_FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise CheckpointError(
                "This is no run record that this version of kasmina reads.\n"
                f"  expected: format {RUN_FORMAT}\n"
                f"  found:    format {found!r}"
            )
        with _Reading(cls, {key: value for key, value in data.items() if key != "format"}) as read:
            config = read.value("config")
            if not isinstance(config, Mapping):
                raise TypeError("config is not a mapping")
            return cls(
                task=read.text("task"),
                metric_name=read.text("metric_name"),
                host=read.text("host"),
                config=dict(config),
                epochs=[EpochRecord.from_dict(item) for item in read.sequence("epochs")],
                baseline=[EpochRecord.from_dict(item) for item in read.sequence("baseline")],
                seeds=[SeedRecord.from_dict(item) for item in read.sequence("seeds")],
                arms=[ArmResult.from_dict(item) for item in read.sequence("arms")],
                interrupted=read.flag("interrupted"),
                notes=[str(note) for note in read.sequence("notes")],
                higher_is_better=read.flag("higher_is_better"),
            )

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
    """Call each of the functions that write into a folder, also after one of them failed.

    Raises:
        FilesError: If one could not write; what could be written stays.
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


def plain(value: Any) -> Any:
    """Return ``value`` as strict JSON can hold it: numbers that JSON lacks, and what it does not know, as text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def _to_dict(record: Any) -> dict[str, Any]:
    return {f.name: plain(getattr(record, f.name)) for f in fields(record)}


class _Reading:
    """Reads the fields of one record; what is wrong with them becomes a `CheckpointError` naming the record."""

    def __init__(self, record: type, data: Mapping[str, Any], later: Sequence[str] = ()) -> None:
        self._name = record.__name__
        self._fields = {f.name for f in fields(record)}
        # What earlier versions did not write was not measured by them.
        self._data = dict.fromkeys(later) | dict(data) if isinstance(data, Mapping) else data

    def __enter__(self) -> _Reading:
        if not isinstance(self._data, Mapping):
            raise CheckpointError(f"A {self._name} must be a mapping, not {type(self._data).__name__}.")
        if set(self._data) != self._fields:
            missing = ", ".join(sorted(self._fields - set(self._data))) or "none"
            unknown = ", ".join(sorted(map(str, set(self._data) - self._fields))) or "none"
            raise CheckpointError(
                f"A {self._name} has other fields than this version of kasmina.\n"
                f"  missing: {missing}\n"
                f"  unknown: {unknown}"
            )
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> Literal[False]:
        if isinstance(error, TypeError | ValueError) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"A {self._name} cannot be read: {error}.") from error
        return False

    def value(self, name: str) -> Any:
        return self._data[name]

    def mapping(self, name: str) -> dict[str, Any] | None:
        value = self._data[name]
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} is not a mapping")
        return None if value is None else dict(value)

    def text(self, name: str) -> str:
        value = self._data[name]
        if not isinstance(value, str):
            raise TypeError(f"{name} is not text but {value!r}")
        return value

    def number(self, name: str) -> float:
        value = self._data[name]
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError(f"{name} is not a number but {value!r}")
        return float(value)  # also of the strings NaN, Infinity, -Infinity

    def optional(self, name: str) -> float | None:
        return None if self._data[name] is None else self.number(name)

    def integer(self, name: str) -> int:
        value = self._data[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is not a whole number but {value!r}")
        return value

    def flag(self, name: str) -> bool:
        value = self._data[name]
        if not isinstance(value, bool):
            raise TypeError(f"{name} is not true or false but {value!r}")
        return value

    def sequence(self, name: str) -> Sequence[Any]:
        value = self._data[name]
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} is not a list but {value!r}")
        return value
