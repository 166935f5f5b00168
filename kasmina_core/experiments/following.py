"""Follow a run from outside by its files, while it goes on."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, final

from kasmina_core.errors import CheckpointError, KasminaError
from kasmina_core.events import (
    EpochEnded,
    GateEvaluated,
    RunStarted,
    SeedCulled,
    SeedFossilized,
    TelemetryEvent,
)
from kasmina_core.experiments.record import (
    GROWN,
    HOST_ALONE,
    EpochRecord,
    EpochSlot,
    RunRecord,
)
from kasmina_core.experiments.run import SeedLog

_EVENTS: Final[dict[str, type[TelemetryEvent]]] = {
    kind.type.value: kind for kind in TelemetryEvent.__subclasses__()
}
_LONGEST_LINE: Final = 1 << 22
"""Bytes of a line beyond which a file is no file of events."""


class FollowError(KasminaError):
    """There is nothing to follow; the message says what was looked for."""


@final
class _Lines:
    """The whole lines that came to a file since it was last looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] = (0, 0)

    def new(self) -> tuple[bool, list[str]]:
        """Return whether the file begins anew (another one, or cut shorter), and its new lines."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                node, at = self._seen
                anew = node != found.st_ino or found.st_size < at
                at = 0 if anew else at
                file.seek(at)
                text = file.read()
        except OSError:
            return False, []
        whole = text.rfind(b"\n") + 1
        if whole == 0 and (len(text) > _LONGEST_LINE or (at == 0 and text and not text.startswith(b"{"))):
            raise FollowError(f"{self.path} holds no lines of events.")
        self._seen = (found.st_ino, at + whole)
        return anew, text[:whole].decode("utf-8", errors="replace").splitlines()


@final
class FollowedRun:
    """A run seen through its folder, or through the file of a `JsonLinesSink` of any training loop.

    Args:
        path: A folder that `kasmina grow` writes to, or a file of events.

    Attributes:
        path: See above.
        name: What to call it.

    Raises:
        FollowError: If there is neither.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.name = self.path.name or str(self.path.resolve())
        if self.path.is_dir():
            self._events = self.path / "events.jsonl"
            if not (self._events.exists() or (self.path / "run.json").exists()):
                raise FollowError(
                    f"{self.path} is no folder of a run: it holds neither events.jsonl nor run.json.\n"
                    "Name a folder that `kasmina grow` writes to, or the file of a JsonLinesSink."
                )
        elif self.path.is_file():
            self._events = self.path
        else:
            raise FollowError(
                f"{self.path}: there is no such folder or file. `kasmina grow` makes the folder as its first epoch begins."
            )
        self._lines = _Lines(self._events)
        self._rows = _Lines(self.path / "metrics.csv") if self.path.is_dir() else None
        self._known = False
        self._done: RunRecord | None = None
        self._done_at: tuple[int, int] = (0, 0)
        self._begin()
        self._begin_table()

    def _begin(self) -> None:
        self._log = SeedLog()
        self._epochs: dict[int, EpochRecord] = {}
        self._config: dict[str, Any] = {}
        self._made_with: dict[str, Any] = {}
        self._reasons: dict[str, str] = {}
        self._gains: dict[str, float | None] = {}
        self._last_gate = ""

    def _begin_table(self) -> None:
        self._head: list[str] = []
        self._losses: dict[tuple[str, int], list[str]] = {}

    @property
    def is_done(self) -> bool:
        """Whether the run has ended and its record is written."""
        return self._done is not None

    def update(self) -> bool:
        """Read what is new.

        Returns:
            Whether anything was.

        Raises:
            FollowError: If no line of the file is an event.
        """
        anew, lines = self._lines.new()
        if anew:
            self._begin()
        for line in lines:
            self._take(line)
        if lines and not self._known:
            raise FollowError(f"{self._events}: none of its {len(lines):,} lines is an event of kasmina.")
        changed = bool(lines)
        if self._rows is not None:
            anew, rows = self._rows.new()
            if anew:
                self._begin_table()
            for row in csv.reader(io.StringIO("\n".join(rows))):
                if row[:1] == ["arm"]:
                    self._head = row
                elif len(row) >= 7 and row[1].isdecimal() and len(row[1]) < 10:
                    self._losses[row[0], int(row[1])] = row
            changed = changed or bool(rows)
        return self._read_record() or changed

    @property
    def last_news(self) -> float:
        """When something was last written, in seconds since the epoch of `time.time`; 0 if nothing was."""
        times = [0.0]
        for lines in (self._lines, self._rows):
            with suppress(OSError):
                times += [lines.path.stat().st_mtime] if lines is not None else []
        return max(times)

    def _read_record(self) -> bool:
        """Read run.json, which is written when a run has ended."""
        if self._rows is None:
            return False
        path = self.path / "run.json"
        try:
            found = path.stat()
        except OSError:
            gone, self._done, self._done_at = self._done is not None, None, (0, 0)
            return gone
        if (found.st_ino, found.st_mtime_ns) == self._done_at:
            return False
        self._done_at = (found.st_ino, found.st_mtime_ns)
        try:
            self._done = RunRecord.read(path)
        except (CheckpointError, OSError):  # of another version: the events are there still
            self._done = None
        return True

    def _take(self, line: str) -> None:
        try:
            data = json.loads(line)
            kind = _EVENTS[data["type"]]
            event = kind.from_dict({name: value for name, value in data.items() if name != "type"})
        except (ValueError, KeyError, TypeError, RecursionError, KasminaError):
            return  # not ours, of another version, or cut short
        if isinstance(event, RunStarted):
            self._begin()
            self._config, self._made_with = dict(event.settings), dict(event.made_with)
        elif isinstance(event, EpochEnded):
            self._take_epoch(event)
        elif isinstance(event, GateEvaluated):
            self._reasons[event.seed_id] = event.reason
            self._last_gate = f"{event.gate} {event.reason}"
        elif isinstance(event, SeedFossilized | SeedCulled):
            self._gains[event.seed_id] = event.gain
        self._log.emit(event)
        self._known = True

    def _take_epoch(self, event: EpochEnded) -> None:
        slots = [
            EpochSlot(slot.slot, slot.stage, slot.blueprint, slot.alpha, slot.gain) for slot in event.slots
        ]
        for slot in event.slots:
            if slot.seed_id and slot.gain is not None:
                self._gains[slot.seed_id] = slot.gain
        metric = math.nan if event.metric is None else event.metric
        flops = 0.0 if event.flops is None else event.flops
        parameters = event.host_parameters + event.seed_parameters
        self._epochs[event.epoch] = EpochRecord(
            event.epoch, math.nan, metric, metric, parameters, flops, slots, self._last_gate
        )
        self._last_gate = ""

    def record(self) -> RunRecord:
        """Return the run as far as it is known."""
        if self._done is not None:
            return self._done
        task, host = self._config.get("task"), self._config.get("host")
        record = RunRecord(
            task if isinstance(task, str) else self.name,
            self._head[4].removeprefix("val_").replace("_", " ") if len(self._head) > 4 else "metric",
            host if isinstance(host, str) else "",
            self._config,
            made_with=self._made_with,
        )
        for number, epoch in sorted(self._epochs.items()):
            row = self._losses.get((GROWN, number))
            record.epochs.append(epoch if row is None else _with_losses(epoch, row))
        for (arm, number), row in sorted(self._losses.items()):
            if arm != GROWN:
                epochs = record.baseline if arm == HOST_ALONE else record.sizes.setdefault(arm, [])
                epochs.append(_with_losses(EpochRecord(number, 0.0, 0.0, 0.0, 0, 0.0), row))
        record.seeds.extend(self._log.records(self._reasons, self._gains))
        return record


def _with_losses(epoch: EpochRecord, row: list[str]) -> EpochRecord:
    return EpochRecord(
        epoch.epoch,
        _number(row[2]),
        _number(row[3]),
        _number(row[4]),
        int(_number(row[5], lambda value: value.is_integer() and 0 <= value < 1e15, 0.0)),
        _number(row[6], math.isfinite, 0.0),
        epoch.slots,
        epoch.gate,
    )


def _number(
    text: str, fits: Callable[[float], bool] = lambda value: True, otherwise: float = math.nan
) -> float:
    try:
        value = float(text)
    except ValueError:
        return otherwise
    return value if fits(value) else otherwise
