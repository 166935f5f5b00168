"""Sinks: receivers of batches of events."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

from kasmina_core.events import TelemetryEvent


@runtime_checkable
class Sink(Protocol):
    """Receives events. Both methods are called from one worker thread, never from the training thread.

    A sink may have an attribute ``max_batch`` (int): the largest batch it wants.
    """

    def write(self, batch: Sequence[TelemetryEvent]) -> None:
        """Store or send events, in the order they were emitted; raise if that fails."""
        ...

    def close(self) -> None:
        """Free what the sink holds; no ``write`` follows."""
        ...


@final
class MemorySink:
    """Keep events in a list.

    Args:
        limit: Keep only the last ``limit`` events, at least 1; ``None`` keeps all.

    Raises:
        ValueError: If ``limit`` is below 1.

    Attributes:
        events: The events received, oldest first.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 or None, not {limit}.")
        self.limit = limit
        self.events: list[TelemetryEvent] = []

    def write(self, batch: Sequence[TelemetryEvent]) -> None:
        """Append the batch."""
        self.events.extend(batch)
        if self.limit is not None:
            del self.events[: -self.limit]

    def close(self) -> None:
        """Do nothing; the events stay readable."""


@final
class CallableSink:
    """Call a function with each event.

    Args:
        function: Called with one event; its result is ignored. If it raises, only that event is affected.
    """

    max_batch = 1

    def __init__(self, function: Callable[[TelemetryEvent], object]) -> None:
        self.function = function

    def write(self, batch: Sequence[TelemetryEvent]) -> None:
        """Call the function with each event."""
        for event in batch:
            self.function(event)

    def close(self) -> None:
        """Do nothing."""


@final
class JsonLinesSink:
    """Append events to a file, one JSON object per line.

    The JSON is strict: NaN and the infinities become the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which
    keeps them distinct from ``null`` (never measured).

    Each batch is one append, so a crash loses no written batch, and several processes may append to one file. A line
    that a crash cut short stays; the next one starts on a new line, and `read` skips the cut one.

    Args:
        path: The file; it is created with its parent folders, or appended to.

    Raises:
        OSError: If the file cannot be opened for appending.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Opened for reading too: the last byte shows whether the last line is complete.
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._line_is_open = self._ends_inside_a_line()

    def write(self, batch: Sequence[TelemetryEvent]) -> None:
        """Append the batch.

        Raises:
            ValueError: If the sink is closed.
            OSError: If the file cannot be written, for instance because the disk is full.
        """
        if self._descriptor is None:
            raise ValueError(f"The sink for {self.path} is closed.")
        if not batch:
            return
        text = "".join(json.dumps(for_json(event), allow_nan=False) + "\n" for event in batch)
        data = memoryview((b"\n" if self._line_is_open else b"") + text.encode("ascii"))
        self._line_is_open = True  # until everything is out: a failure part-way leaves a cut line
        while data:
            data = data[os.write(self._descriptor, data) :]
        self._line_is_open = False

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
        """Yield the events of a file as dictionaries, without lines that a crash cut short.

        Raises:
            OSError: If the file cannot be read.
        """
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    yield event

    def _ends_inside_a_line(self) -> bool:
        assert self._descriptor is not None
        size = os.lseek(self._descriptor, 0, os.SEEK_END)
        if size == 0:
            return False
        os.lseek(self._descriptor, size - 1, os.SEEK_SET)
        return os.read(self._descriptor, 1) != b"\n"


def as_sink(sink: object) -> Sink:
    """Return a sink unchanged, a function as a `CallableSink`, and what a tracker writes with as the sink for it.

    That is a ``SummaryWriter``, a run of W&B, MLflow or Trackio, or a logger of Lightning's around one of these.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(sink, type):
        raise TypeError(f"{sink.__name__} is a class: give a sink made from it, {sink.__name__}(...).")
    if isinstance(sink, Sink):
        return sink
    if (joined := _joined(sink)) is not None:
        return joined
    if callable(sink):
        return CallableSink(sink)
    raise TypeError(
        f"A sink has write(batch) and close(), or is a function of one event; {sink!r} is neither."
    )


def _joined(target: object) -> Sink | None:
    """Return the sink that writes with somebody else's writer, run or logger; ``None`` for anything else."""
    run_id = None
    if _has(target, "log_metrics", "log_hyperparams"):  # a Lightning logger
        run_id, target = getattr(target, "run_id", None), getattr(target, "experiment", None)
    if _has(target, "add_scalar", "add_text", "flush"):
        from kasmina_core.telemetry.tensorboard import TensorBoardSink

        return TensorBoardSink(target)
    package = type(target).__module__.partition(".")[0]
    if package == "wandb" and _has(target, "log", "define_metric"):
        from kasmina_core.telemetry.wandb import WandbSink

        return WandbSink(target)
    if package == "mlflow" and run_id is not None and _has(target, "log_batch"):
        from kasmina_core.telemetry.mlflow import MlflowSink

        return MlflowSink(run_id, client=target)
    if package == "mlflow" and hasattr(target, "info"):
        from kasmina_core.telemetry.mlflow import MlflowSink

        return MlflowSink(target.info.run_id)
    if package == "trackio" and _has(target, "log", "finish"):
        from kasmina_core.telemetry.trackio import TrackioSink

        return TrackioSink(target)
    return None


def _has(target: object, *methods: str) -> bool:
    return all(callable(getattr(target, method, None)) for method in methods)


def for_json(value: Any) -> Any:
    """Return a value as strict JSON can hold it; numbers that JSON lacks, and what it does not know, become text."""
    if isinstance(value, Enum):
        return for_json(value.value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if hasattr(value, "to_dict"):
        return for_json(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): for_json(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [for_json(item) for item in sorted(value, key=str)]
    return [for_json(item) for item in value] if isinstance(value, list | tuple) else str(value)
