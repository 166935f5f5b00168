"""Delivery: sinks that raise, block or are slow never stop the training and lose no terminal event."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kasmina_core.events import AlphaChanged, SeedCulled, SeedFossilized
from kasmina_core.telemetry import MemorySink, Telemetry, delivery

LONG = 30.0  # an upper bound for what must happen; nothing waits that long when it does


@pytest.fixture(autouse=True)
def _no_waits_between_attempts(monkeypatch):
    monkeypatch.setattr(delivery, "RETRY_WAITS", (0.0, 0.0, 0.0))


def alpha(sequence):
    return AlphaChanged(slot="s", alpha=0.5, progress=0.5, sequence=sequence)


def culled(sequence):
    return SeedCulled(slot="s", blueprint_id="b", reason="r", stage="TRAINING", sequence=sequence)


def fossilized(sequence):
    return SeedFossilized(slot="s", blueprint_id="b", parameters=3, sequence=sequence)


def sequences(sink):
    return [event.sequence for event in sink.events]


class GatedSink:
    """Blocks in the first write until `gate` is set."""

    def __init__(self):
        self.events = []
        self.batches = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.closed = threading.Event()

    def write(self, batch):
        self.entered.set()
        assert self.gate.wait(LONG)
        self.events.extend(batch)
        self.batches.append(len(batch))

    def close(self):
        self.closed.set()


class FailingSink:
    """Raises where `fails(batch, call)` says so; `call` counts from 0."""

    def __init__(self, fails, error=RuntimeError):
        self.fails = fails
        self.error = error
        self.calls = 0
        self.events = []

    def write(self, batch):
        call, self.calls = self.calls, self.calls + 1
        if self.fails(batch, call):
            raise self.error("refused")
        self.events.extend(batch)

    def close(self):
        pass


def test_events_reach_every_sink_in_order():
    sinks = [MemorySink(), MemorySink()]
    with Telemetry(sinks) as telemetry:
        for i in range(300):
            telemetry.emit(alpha(i))
        assert telemetry.flush(LONG)
        assert [sequences(sink) for sink in sinks] == [list(range(300))] * 2
        assert telemetry.dropped == (0, 0)
        assert telemetry.errors == (0, 0)


def test_a_function_is_a_sink_and_runs_off_the_training_thread():
    threads = []
    with Telemetry([lambda event: threads.append(threading.current_thread())]) as telemetry:
        telemetry.emit(alpha(0))
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_something_that_is_no_sink_is_refused():
    with pytest.raises(
        TypeError, match=r"write.batch. and close.., or is a function of one event; 3 is neither"
    ):
        Telemetry([3])
    with pytest.raises(TypeError, match=r"such as ..nothing..,"):
        Telemetry("nothing")
    with pytest.raises(TypeError, match="MemorySink"):
        Telemetry([MemorySink])


@pytest.mark.parametrize("sizes", [{"queue_size": 0}, {"batch_size": 0}])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        Telemetry([], **sizes)


def test_batches_hold_what_gathered_meanwhile_up_to_the_batch_size():
    sink = GatedSink()
    with Telemetry([sink], batch_size=4) as telemetry:
        telemetry.emit(alpha(0))
        assert sink.entered.wait(LONG)
        for i in range(1, 7):
            telemetry.emit(alpha(i))
        sink.gate.set()
        assert telemetry.flush(LONG)
    assert sink.batches == [1, 4, 2]


def test_a_blocked_sink_holds_up_neither_emission_nor_the_other_sinks():
    blocked, free, arrived = GatedSink(), [], threading.Semaphore(0)

    def receive(event):
        free.append(event.sequence)
        arrived.release()

    telemetry = Telemetry([blocked, receive], queue_size=4)
    try:
        for i in range(50):
            telemetry.emit(alpha(i))
            if i == 0:
                assert blocked.entered.wait(LONG)
            assert arrived.acquire(timeout=LONG)
        assert blocked.events == []
        assert free == list(range(50))
        assert telemetry.dropped == (45, 0)
        assert not telemetry.flush(0.0)
    finally:
        blocked.gate.set()
        assert telemetry.close(LONG)
    assert sequences(blocked) == [0, 1, 2, 3, 4]


def test_a_full_queue_drops_the_newest_ordinary_event_for_a_terminal_one():
    sink = GatedSink()
    telemetry = Telemetry([sink], queue_size=3)
    telemetry.emit(alpha(0))
    assert sink.entered.wait(LONG)
    for event in (alpha(1), culled(2), alpha(3), alpha(4), fossilized(5), culled(6), culled(7), alpha(8)):
        telemetry.emit(event)
    sink.gate.set()
    assert telemetry.close(LONG)
    assert sequences(sink) == [0, 2, 5, 6, 7]
    assert telemetry.dropped == (4,)


@settings(deadline=None, max_examples=40)
@given(kinds=st.lists(st.booleans(), max_size=40), queue_size=st.integers(1, 6), batch_size=st.integers(1, 5))
def test_whatever_overflows_terminal_events_arrive_once_and_order_is_kept(kinds, queue_size, batch_size):
    sink = GatedSink()
    telemetry = Telemetry([sink], queue_size=queue_size, batch_size=batch_size)
    for i, is_terminal in enumerate(kinds):
        telemetry.emit(culled(i) if is_terminal else alpha(i))
    sink.gate.set()
    assert telemetry.close(LONG)
    received = sequences(sink)
    assert received == sorted(set(received))
    assert {i for i, is_terminal in enumerate(kinds) if is_terminal} <= set(received)
    (status,) = telemetry.status
    assert status.delivered == len(received)
    assert status.delivered + status.dropped == len(kinds)
    assert status.waiting == 0


@settings(deadline=None, max_examples=40)
@given(
    kinds=st.lists(st.booleans(), max_size=25),
    failures=st.sets(st.integers(0, 20)),
    batch_size=st.integers(1, 4),
)
def test_whichever_writes_fail_terminal_events_arrive_and_none_arrives_twice(kinds, failures, batch_size):
    logging.disable(logging.CRITICAL)
    # Two failures in a row at most: an event that is tried three times more gets through in its place.
    allowed = {i for i in failures if not {i - 1, i - 2} <= failures}
    sink = FailingSink(lambda batch, call: call in allowed)
    telemetry = Telemetry([sink], batch_size=batch_size)
    try:
        for i, is_terminal in enumerate(kinds):
            telemetry.emit(culled(i) if is_terminal else alpha(i))
        assert telemetry.close(LONG)
    finally:
        logging.disable(logging.NOTSET)
    received = sequences(sink)
    assert received == sorted(set(received))
    assert {i for i, is_terminal in enumerate(kinds) if is_terminal} <= set(received)
    assert telemetry.status[0].delivered + telemetry.status[0].dropped == len(kinds)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_raising_sink_is_counted_reported_once_and_gets_later_batches(caplog, error):
    sink = FailingSink(lambda batch, call: call < 3, error)
    with Telemetry([sink]) as telemetry, caplog.at_level(logging.WARNING, logger="kasmina.telemetry"):
        for i in range(5):
            telemetry.emit(alpha(i))
            assert telemetry.flush(LONG)
        assert sequences(sink) == [3, 4]
        (status,) = telemetry.status
    assert status.errors == 3
    assert status.dropped == 3
    assert isinstance(status.last_error, error)
    assert len(caplog.records) == 1
    assert "FailingSink" in caplog.text


def test_terminal_events_of_a_batch_that_raised_are_tried_again_in_order():
    entered, gate = threading.Event(), threading.Event()

    def fails(batch, call):
        entered.set()
        assert gate.wait(LONG)
        return call in (1, 2)

    sink = FailingSink(fails)
    telemetry = Telemetry([sink])
    telemetry.emit(alpha(0))
    assert entered.wait(LONG)
    for event in (
        culled(1),
        alpha(2),
        fossilized(3),
        alpha(4),
    ):  # one batch: its write, then one attempt, fail
        telemetry.emit(event)
    gate.set()
    assert telemetry.close(LONG)
    assert sequences(sink) == [0, 1, 3]
    assert telemetry.dropped == (2,)


def test_a_terminal_event_waits_for_a_sink_that_recovers_late():
    is_down = threading.Event()
    is_down.set()
    sink = FailingSink(lambda batch, call: is_down.is_set())
    telemetry = Telemetry([sink])
    telemetry.emit(culled(0))
    assert not telemetry.flush(LONG)
    assert telemetry.status[0].waiting == 1
    is_down.clear()
    telemetry.emit(alpha(1))
    assert telemetry.flush(LONG)
    assert sorted(sequences(sink)) == [0, 1]
    assert telemetry.close(LONG)


def test_flush_tries_a_refused_terminal_event_again():
    is_down = threading.Event()
    is_down.set()
    sink = FailingSink(lambda batch, call: is_down.is_set())
    with Telemetry([sink]) as telemetry:
        telemetry.emit(culled(0))
        assert not telemetry.flush(LONG)
        is_down.clear()
        assert telemetry.flush(LONG)
        assert sequences(sink) == [0]


def test_close_tries_a_refused_terminal_event_again():
    is_down = threading.Event()
    is_down.set()
    sink = FailingSink(lambda batch, call: is_down.is_set())
    telemetry = Telemetry([sink])
    telemetry.emit(culled(0))
    assert not telemetry.flush(LONG)
    is_down.clear()
    assert telemetry.close(LONG)
    assert sequences(sink) == [0]


def test_a_function_that_raises_for_one_event_misses_no_other():
    received, gate = [], threading.Event()

    def sink(event):
        assert gate.wait(LONG)
        if event.sequence == 3:
            raise ValueError
        received.append(event.sequence)

    with Telemetry([sink]) as telemetry:
        for i in range(6):
            telemetry.emit(alpha(i))
        gate.set()
    assert received == [0, 1, 2, 4, 5]


def test_a_terminal_event_that_is_always_refused_is_given_up_and_named(caplog):
    sink = FailingSink(lambda batch, call: batch[0].sequence == 0)
    telemetry = Telemetry([sink], batch_size=1)
    telemetry.emit(culled(0))
    for i in range(1, 40):
        telemetry.emit(culled(i))
    assert not telemetry.close(LONG)
    assert sequences(sink) == list(range(1, 40))
    (status,) = telemetry.status
    assert status.lost_terminal == 1
    assert status.errors == delivery.MAX_ATTEMPTS
    assert "sequence=0" in caplog.text


def test_what_is_no_event_stops_neither_the_training_nor_the_delivery():
    sink = FailingSink(lambda batch, call: any(type(event) is object for event in batch))
    with Telemetry([sink], queue_size=1) as telemetry:
        for _ in range(20):
            telemetry.emit(object())
        telemetry.emit(culled(1))
        assert telemetry.flush(LONG)
    assert sequences(sink) == [1]


def test_fast_mode_stops_emission_and_can_be_switched_off():
    sink = MemorySink()
    with Telemetry([sink], fast_mode=True) as telemetry:
        telemetry.emit(culled(0))
        assert telemetry.flush(LONG)
        assert sink.events == []
        telemetry.fast_mode = False
        telemetry.emit(culled(1))
    assert sequences(sink) == [1]
    assert telemetry.dropped == (0,)


def test_close_delivers_what_waits_closes_sinks_and_drops_what_comes_later():
    sink = GatedSink()
    telemetry = Telemetry([sink])
    for i in range(10):
        telemetry.emit(alpha(i))
    assert not telemetry.close(0.0)
    assert not sink.closed.is_set()
    sink.gate.set()
    assert telemetry.close(LONG)
    assert sink.closed.is_set()
    telemetry.emit(alpha(10))
    assert telemetry.close(LONG)
    assert sequences(sink) == list(range(10))
    assert telemetry.dropped == (1,)


def test_a_sink_that_was_never_used_is_closed_too():
    sink = GatedSink()
    assert Telemetry([sink]).close(LONG)
    assert sink.closed.is_set()


def test_a_sink_that_flushes_or_emits_does_not_wait_for_itself():
    telemetry = None
    results = []

    def sink(event):
        results.append(telemetry.flush(LONG))
        if event.sequence == 0:
            telemetry.emit(alpha(1))

    telemetry = Telemetry([sink])
    telemetry.emit(alpha(0))
    assert telemetry.flush(LONG)
    assert telemetry.close(LONG)
    assert results == [False, False]


def test_forgotten_telemetry_delivers_closes_and_ends_its_threads():
    sink = GatedSink()
    telemetry = Telemetry([sink])
    telemetry.emit(culled(0))
    reference = weakref.ref(telemetry)
    del telemetry
    gc.collect()
    assert reference() is None
    sink.gate.set()
    assert sink.closed.wait(LONG)
    assert sequences(sink) == [0]


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_a_copy_has_no_sinks_and_emits_nothing(copied):
    sink = MemorySink()
    with Telemetry([sink], queue_size=7, batch_size=3, fast_mode=True) as telemetry:
        telemetry.fast_mode = False
        telemetry.emit(alpha(0))
        twin = copied({"telemetry": telemetry})["telemetry"] if copied is not copy.copy else copied(telemetry)
        assert (twin.queue_size, twin.batch_size, twin.fast_mode) == (7, 3, False)
        assert twin.sinks == ()
        twin.emit(culled(1))
        assert twin.close(LONG)
        telemetry.emit(alpha(2))
    assert sequences(sink) == [0, 2]


def run_script(script, *args):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *args],
        timeout=90,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_end_of_the_process_delivers_what_waits(tmp_path):
    script = (
        "import sys\n"
        "from kasmina_core.events import SeedCulled\n"
        "from kasmina_core.telemetry import JsonLinesSink, Telemetry\n"
        "telemetry = Telemetry([JsonLinesSink(sys.argv[1])])\n"
        "for i in range(500):\n"
        "    telemetry.emit(SeedCulled(blueprint_id='b', reason='r', stage='TRAINING', sequence=i))\n"
        "assert 'torch' not in sys.modules\n"
    )
    path = tmp_path / "events.jsonl"
    done = run_script(script, str(path))
    assert done.returncode == 0, done.stderr
    assert len(path.read_text().splitlines()) == 500


def test_the_end_of_the_process_does_not_wait_for_ever_for_a_blocked_sink():
    script = (
        "import threading\n"
        "from kasmina_core.events import AlphaChanged\n"
        "from kasmina_core.telemetry import Telemetry, delivery\n"
        "delivery.EXIT_TIMEOUT = 0.05\n"
        "telemetry = Telemetry([lambda event: threading.Event().wait()])\n"
        "telemetry.emit(AlphaChanged(alpha=0.5, progress=0.5))\n"
    )
    assert run_script(script).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_delivers_its_own_events_only(tmp_path):
    script = (
        "import os, sys, threading\n"
        "from kasmina_core.events import AlphaChanged\n"
        "from kasmina_core.telemetry import JsonLinesSink, Telemetry\n"
        "entered, gate = threading.Event(), threading.Event()\n"
        "class Slow:\n"
        "    def __init__(self, inner): self.inner = inner\n"
        "    def write(self, batch):\n"
        "        if batch[0].sequence == 0:\n"
        "            entered.set(); gate.wait()\n"
        "        self.inner.write(batch)\n"
        "    def close(self): self.inner.close()\n"
        "telemetry = Telemetry([Slow(JsonLinesSink(sys.argv[1]))])\n"
        "for i in range(3): telemetry.emit(AlphaChanged(alpha=0.5, progress=0.5, sequence=i))\n"
        "assert entered.wait(30)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    telemetry.emit(AlphaChanged(alpha=0.5, progress=0.5, sequence=100))\n"
        "    os._exit(0 if telemetry.flush(30) and telemetry.close(30) else 1)\n"
        "status = os.waitpid(pid, 0)[1]\n"
        "gate.set()\n"
        "assert telemetry.close(30)\n"
        "sys.exit(os.waitstatus_to_exitcode(status))\n"
    )
    path = tmp_path / "events.jsonl"
    done = run_script(script, str(path))
    assert done.returncode == 0, done.stderr
    from kasmina_core.telemetry import JsonLinesSink

    assert [event["sequence"] for event in JsonLinesSink.read(path)] == [100, 0, 1, 2]


class CountsLooks:
    """An event that counts how often somebody asks what it is."""

    looks = 0

    def __init__(self, event):
        self._event = event

    def __getattr__(self, name):
        CountsLooks.looks += name == "type"
        return getattr(self._event, name)


def test_each_terminal_event_at_a_blocked_sink_costs_the_same_however_many_wait():
    sink, number = GatedSink(), 500
    telemetry = Telemetry([sink], queue_size=200)
    telemetry.emit(culled(0))
    assert sink.entered.wait(LONG)
    for sequence in range(1, 100):
        telemetry.emit(CountsLooks(alpha(sequence)))
    CountsLooks.looks = 0
    for sequence in range(100, 100 + number):
        telemetry.emit(CountsLooks(culled(sequence)))
    assert CountsLooks.looks <= 4 * number
    sink.gate.set()
    assert telemetry.close(LONG)
    assert sequences(sink) == [0, *range(100, 100 + number)]
    assert telemetry.dropped == (99,)
