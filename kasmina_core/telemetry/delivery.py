"""Delivery of events to sinks: batched, bounded, and off the training thread."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self, final

from kasmina_core.events import TelemetryEvent
from kasmina_core.telemetry.bundled import BUNDLED_SINKS
from kasmina_core.telemetry.sinks import Sink, as_sink

_LOG: Final = logging.getLogger("kasmina.telemetry")

RETRY_WAITS: tuple[float, ...] = (0.01, 0.1, 1.0)
"""Seconds before each further attempt at a terminal event whose batch raised."""

MAX_ATTEMPTS: Final = 12
"""Attempts at one terminal event before it is given up for good."""

EXIT_TIMEOUT: Final = 2.0
"""Seconds that process exit waits for sinks."""


class SinkSource(Protocol):
    """Makes sinks by name; a `PluginRegistry` is one."""

    def create_sink(self, name: str, config: Mapping[str, Any] | None = None) -> Sink:
        """Return a new sink."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SinkStatus:
    """Counters and last error of one sink.

    Attributes:
        name: Class name of the sink.
        delivered: Events that were written.
        dropped: Events that were not: the queue was full, the batch raised, or the telemetry was closed.
        errors: Exceptions the sink raised.
        last_error: The last of them.
        waiting: Events that are queued, being written, or terminal and awaiting another attempt.
        lost_terminal: Terminal events given up after `MAX_ATTEMPTS`, or at close; they count as dropped too.
    """

    name: str
    delivered: int
    dropped: int
    errors: int
    last_error: BaseException | None
    waiting: int
    lost_terminal: int


@final
class Telemetry:
    """Deliver events to sinks without delaying or stopping the training.

    Each sink has its own queue and daemon thread, so a slow or blocked one does not delay the others. A batch is what
    was queued while the previous one was written.

    Guarantees:

    - `emit` does not wait for a sink and does not raise.
    - A sink gets events in the order they were emitted. When its queue is full, events are dropped and counted, but
      never one that ends a seed's life (``event.type.is_terminal``): the newest other event is dropped for it.
    - Exceptions of a sink are counted, the first is logged, and the sink gets the later batches. Terminal events of a
      failed batch are retried one by one: a few times immediately, then after every successful batch, at `flush` and at
      `close`. So a terminal event arrives at least once if the sink recovers (perhaps late; ``event.sequence`` gives
      its place); every other event arrives at most once.
    - After a fork the child delivers only its own events; those queued before are the parent's.
    - A copy (``deepcopy``, pickle) has no sinks and emits nothing.

    The sinks belong to this object: `close` closes them. The end of the process waits up to `EXIT_TIMEOUT` for them.

    Args:
        sinks: Sinks, functions that take one event, what trackers write with (a ``SummaryWriter``, a run, a logger of
            Lightning's), names of bundled sinks (``mlflow``, ``tensorboard``, ``trackio``, ``wandb``), or of those that packs offer: ``pack:name``, or ``name`` where only one pack offers it.
            Packs are loaded only if one of theirs is named.
        queue_size: Events that may wait for one sink, at least 1.
        batch_size: Largest batch, at least 1.
        fast_mode: Emit nothing. Can be changed at any time; nothing else depends on it.
        registry: Where named sinks come from; ``None`` for the installed packs.
        sink_config: Configuration for the packs of named sinks; see ``kasmina_sinks``.

    Raises:
        PluginError: If the pack of a named sink is not available, or cannot make it; the cause is chained.
        TypeError: If a sink is neither a `Sink` nor callable.
        UnknownNameError: If no pack offers a named sink.
        ValueError: If ``queue_size`` or ``batch_size`` is below 1.

    >>> from kasmina_core.events import SeedGerminated
    >>> from kasmina_core.telemetry import MemorySink
    >>> sink = MemorySink()
    >>> with Telemetry([sink]) as telemetry:
    ...     telemetry.emit(SeedGerminated(slot="block2", blueprint_id="cnn:norm", parameters=128))
    >>> sink.events[0].slot
    'block2'
    """

    def __init__(
        self,
        sinks: Iterable[Sink | Callable[[TelemetryEvent], object] | str] = (),
        *,
        queue_size: int = 1024,
        batch_size: int = 64,
        fast_mode: bool = False,
        registry: SinkSource | None = None,
        sink_config: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(sinks, str):
            raise TypeError(f"sinks must be a list of sinks or names, such as [{sinks!r}], not text.")
        for name, value in (("queue_size", queue_size), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        self.queue_size = queue_size
        self.batch_size = batch_size
        self.fast_mode = fast_mode
        made = [
            as_sink(_named(sink, registry, sink_config) if isinstance(sink, str) else sink) for sink in sinks
        ]
        self._lines = tuple(_Line(sink, queue_size, batch_size) for sink in made)
        # Forgotten without close: the threads deliver what waits, close the sinks and end.
        weakref.finalize(self, _stop_all, self._lines).atexit = False

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """The sinks, in the order given; a function stands as its `CallableSink`."""
        return tuple(line.sink for line in self._lines)

    @property
    def seed_folders(self) -> tuple[str, ...]:
        """Folders in which sinks want a file of each seed that is kept or culled."""
        if self.fast_mode:
            return ()
        folders = (getattr(sink, "seeds", None) for sink in self.sinks)
        return tuple(dict.fromkeys(folder for folder in folders if isinstance(folder, str)))

    @property
    def status(self) -> tuple[SinkStatus, ...]:
        """Status of each sink, in the order of `sinks`."""
        return tuple(line.status() for line in self._lines)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Dropped events of each sink, in the order of `sinks`."""
        return tuple(status.dropped for status in self.status)

    @property
    def errors(self) -> tuple[int, ...]:
        """Exceptions of each sink, in the order of `sinks`."""
        return tuple(status.errors for status in self.status)

    def emit(self, event: TelemetryEvent) -> None:
        """Queue an event for every sink; never waits for a sink and never raises."""
        if self.fast_mode:
            return
        for line in self._lines:
            try:
                line.offer(event)
            except Exception as error:
                line.report(error)

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until every event emitted before this call was written or dropped.

        Args:
            timeout: Seconds to wait at most, for all sinks together.

        Returns:
            False if the time ran out, or a terminal event could not be written yet.
        """
        deadline = time.monotonic() + timeout
        targets = [(line, line.request_flush()) for line in self._lines]
        flushed = [line.wait_flushed(target, deadline) for line, target in targets]
        return all(flushed)

    def close(self, timeout: float = 5.0) -> bool:
        """Deliver what waits, close the sinks and end their threads; events emitted later are dropped.

        Args:
            timeout: Seconds to wait at most, for all sinks together. A sink that is still blocked keeps its thread and
                its queue, and gets the rest if it recovers.

        Returns:
            False if the time ran out or a terminal event was lost.
        """
        return _close_all(self._lines, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., Telemetry], tuple[int, int, bool]]:
        # Threads, locks and open files cannot be copied, and two owners of one sink would each close it.
        return _without_sinks, (self.queue_size, self.batch_size, self.fast_mode)


def _without_sinks(queue_size: int, batch_size: int, fast_mode: bool) -> Telemetry:
    return Telemetry((), queue_size=queue_size, batch_size=batch_size, fast_mode=fast_mode)


def _named(name: str, registry: SinkSource | None, config: Mapping[str, Any] | None) -> Sink:
    if registry is None and name in BUNDLED_SINKS:
        return BUNDLED_SINKS[name](config or {})
    if registry is None:
        from kasmina_core import default_registry  # through the door: packs lie above this room

        registry = default_registry()
    return registry.create_sink(name, config)


@dataclass(slots=True)
class _Parked:
    """A terminal event that its sink refused so far."""

    event: TelemetryEvent
    attempts: int


@final
class _Line:
    """The queue, the counters and the thread of one sink."""

    def __init__(self, sink: Sink, queue_size: int, batch_size: int) -> None:
        self.sink = sink
        self._queue_size = queue_size
        self._batch_size = max(1, min(batch_size, getattr(sink, "max_batch", batch_size)))
        self._delivered = 0
        self._dropped = 0
        self._errors = 0
        self._lost_terminal = 0
        self._last_error: BaseException | None = None
        self._next_index = 0
        self._closing = False
        self._finished = False
        self.begin()
        with _REGISTRY.lock:
            _REGISTRY.lines.add(self)

    def begin(self) -> None:
        """Set the state of a new process: a free lock, an empty queue, no thread."""
        self._changed = threading.Condition()  # on an RLock: a finalizer may emit while this thread holds it
        self._queue: OrderedDict[int, TelemetryEvent] = OrderedDict()  # by index, oldest first
        self._droppable: dict[int, None] = {}  # indices of queued events that end no life
        self._in_flight: tuple[int, int] | None = None  # first index and length of the batch being written
        self._parked: list[_Parked] = []
        self._parked_requested = False
        self._thread: threading.Thread | None = None

    # The training thread's side

    def offer(self, event: TelemetryEvent) -> None:
        with self._changed:
            if self._closing:
                self._drop(event)
                return
            if len(self._queue) >= self._queue_size and not self._make_room_for(event):
                self._drop(event)
                return
            index = self._next_index
            self._next_index += 1  # first: a finalizer may emit between any two lines
            self._queue[index] = event
            if not _is_terminal(event):
                self._droppable[index] = None
            self._ensure_thread()
            self._changed.notify_all()

    def request_flush(self) -> int:
        """Ask for another attempt at refused terminal events; return the index up to which to wait."""
        with self._changed:
            self._parked_requested = bool(self._parked)
            if self._queue or self._parked:
                self._ensure_thread()
            self._changed.notify_all()
            return self._next_index

    def wait_flushed(self, target: int, deadline: float) -> bool:
        def is_flushed() -> bool:
            first = self._in_flight[0] if self._in_flight else next(iter(self._queue), target)
            return first >= target and not self._parked_requested

        with self._changed:
            if threading.current_thread() is self._thread:
                return False  # a sink that flushes would wait for itself
            done = self._changed.wait_for(is_flushed, timeout=max(0.0, deadline - time.monotonic()))
            return done and not self._parked

    def request_close(self) -> None:
        with self._changed:
            self._closing = True
            if not self._finished:
                self._ensure_thread()
            self._changed.notify_all()

    def wait_closed(self, deadline: float) -> bool:
        if self._thread is None and not self._finished:
            self._run()  # the interpreter is ending and starts no more threads
        with self._changed:
            if threading.current_thread() is self._thread:
                return False
            done = self._changed.wait_for(
                lambda: self._finished, timeout=max(0.0, deadline - time.monotonic())
            )
            waiting = self._count_waiting()
        if not done and waiting:
            _LOG.warning("%s did not take %d events in time.", type(self.sink).__name__, waiting)
        return done and not self._lost_terminal

    def status(self) -> SinkStatus:
        with self._changed:
            return SinkStatus(
                name=type(self.sink).__name__,
                delivered=self._delivered,
                dropped=self._dropped,
                errors=self._errors,
                last_error=self._last_error,
                waiting=self._count_waiting(),
                lost_terminal=self._lost_terminal,
            )

    def report(self, error: BaseException) -> None:
        """Count an error; log the first."""
        with self._changed:
            self._errors += 1
            self._last_error = error
            is_first = self._errors == 1
        if is_first:
            _LOG.warning(
                "%s raised; training goes on, and so does telemetry. Further errors are only counted.",
                type(self.sink).__name__,
                exc_info=error,
            )

    def _count_waiting(self) -> int:
        return len(self._queue) + (self._in_flight[1] if self._in_flight else 0) + len(self._parked)

    def _drop(self, event: TelemetryEvent) -> None:
        self._dropped += 1
        if _is_terminal(event):
            self._lost_terminal += 1

    def _make_room_for(self, event: TelemetryEvent) -> bool:
        """Drop the newest non-terminal event for a terminal one; a queue of terminal events may exceed its size."""
        if not _is_terminal(event):
            return False
        if self._droppable:
            del self._queue[self._droppable.popitem()[0]]
            self._dropped += 1
        return True

    def _ensure_thread(self) -> None:
        if self._thread is not None:
            return
        thread = threading.Thread(
            target=self._run, name=f"kasmina-telemetry-{type(self.sink).__name__}", daemon=True
        )
        # A refusal (the interpreter is ending) leaves the events queued; close delivers them without a thread.
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._thread = thread

    # The sink's side

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._closing or self._parked_requested):
                    self._changed.wait()
                taken = [
                    self._queue.popitem(last=False) for _ in range(min(self._batch_size, len(self._queue)))
                ]
                for index, _ in taken:
                    self._droppable.pop(index, None)
                if not taken and self._closing:
                    break
                self._in_flight = (taken[0][0], len(taken)) if taken else None
                retry = self._parked_requested
            accepted = self._deliver([event for _, event in taken]) if taken else False
            if accepted or retry:
                self._retry_parked()
            with self._changed:
                self._in_flight = None
                if retry:
                    self._parked_requested = False
                self._changed.notify_all()
        self._retry_parked()
        self._give_up(self._parked)
        try:
            self.sink.close()
        except BaseException as error:
            self.report(error)
        with self._changed:
            self._parked = []
            self._parked_requested = False
            self._finished = True
            self._changed.notify_all()

    def _deliver(self, batch: Sequence[TelemetryEvent]) -> bool:
        """Write a batch; after a raise, its terminal events one by one. Return whether the batch was taken."""
        if self._write(batch):
            return True
        terminal = [event for event in batch if _is_terminal(event)]
        with self._changed:
            self._dropped += len(batch) - len(terminal)
        for event in terminal:
            attempts = 1
            for wait in RETRY_WAITS:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=wait)
                attempts += 1
                if self._write([event]):
                    break
            else:
                with self._changed:
                    self._parked.append(_Parked(event, attempts))
        return False

    def _retry_parked(self) -> None:
        """Try each refused terminal event once more, in order."""
        with self._changed:
            parked = list(self._parked)
        kept: list[_Parked] = []
        lost: list[_Parked] = []
        for entry in parked:
            entry.attempts += 1
            if not self._write([entry.event]):
                (kept if entry.attempts < MAX_ATTEMPTS else lost).append(entry)
        with self._changed:
            self._parked = kept
        self._give_up(lost)

    def _give_up(self, lost: Sequence[_Parked]) -> None:
        if not lost:
            return
        with self._changed:
            self._dropped += len(lost)
            self._lost_terminal += len(lost)
        for entry in lost:
            _LOG.error(
                "%s refused a terminal event %d times: %r",
                type(self.sink).__name__,
                entry.attempts,
                entry.event,
            )

    def _write(self, batch: Sequence[TelemetryEvent]) -> bool:
        try:
            self.sink.write(batch)
        except BaseException as error:  # SystemExit too: it would end the thread without a word
            self.report(error)
            return False
        with self._changed:
            self._delivered += len(batch)
        return True


def _is_terminal(event: TelemetryEvent) -> bool:
    # Tolerates objects that are no events: they must stop neither the training nor the thread.
    return bool(getattr(getattr(event, "type", None), "is_terminal", False))


def _stop_all(lines: Iterable[_Line]) -> None:
    for line in lines:
        line.request_close()


def _close_all(lines: Sequence[_Line], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    _stop_all(lines)
    closed = [line.wait_closed(deadline) for line in lines]
    return all(closed)


class _Registry:
    """The lines of this process, for its end and for its children."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lines: weakref.WeakSet[_Line] = weakref.WeakSet()


_REGISTRY: Final = _Registry()


def _at_exit() -> None:
    with _REGISTRY.lock:
        lines = list(_REGISTRY.lines)
    _close_all(lines, EXIT_TIMEOUT)


def _in_child() -> None:
    # Locks may have been held by threads that do not exist here, and what waits is the parent's to deliver.
    _REGISTRY.lock = threading.Lock()
    for line in list(_REGISTRY.lines):
        line.begin()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
