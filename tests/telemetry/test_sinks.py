"""What each sink does with a batch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kasmina_core.events import AlphaChanged, GateEvaluated, SeedCulled
from kasmina_core.telemetry import CallableSink, JsonLinesSink, MemorySink, Sink


def strict_loads(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def alpha(value, sequence=0):
    return AlphaChanged(slot="s", alpha=value, progress=0.5, sequence=sequence)


@pytest.mark.parametrize("sink", [MemorySink(), CallableSink(print)])
def test_bundled_sinks_have_the_protocol(sink):
    assert isinstance(sink, Sink)


def test_memory_sink_keeps_the_last_events_up_to_its_limit():
    sink = MemorySink(limit=2)
    sink.write([alpha(0.1, 0)])
    sink.write([alpha(0.2, 1), alpha(0.3, 2)])
    assert [event.sequence for event in sink.events] == [1, 2]


def test_memory_sink_refuses_a_limit_that_keeps_nothing():
    with pytest.raises(ValueError, match="0"):
        MemorySink(limit=0)


def test_json_lines_sink_writes_one_object_a_line_in_new_folders(tmp_path):
    path = tmp_path / "new" / "folder" / "events.jsonl"
    sink = JsonLinesSink(path)
    check = {"name": "gain", "value": math.nan, "threshold": 0.02, "verdict": "never measured"}
    gate = GateEvaluated(
        slot="a\nb", seed_id="s1", gate="G2", passed=False, reason="é\u2028", checks=(check,)
    )
    sink.write([gate, alpha(1.0, 1)])
    sink.close()
    first, second = [strict_loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert first["type"] == "gate_evaluated"
    assert first["slot"] == "a\nb"
    assert first["reason"] == "é\u2028"
    assert first["checks"] == [check | {"value": "NaN"}]
    assert second == {
        "type": "alpha_changed",
        "slot": "s",
        "seed_id": "",
        "epoch": 0,
        "sequence": 1,
        "alpha": 1.0,
        "progress": 0.5,
    }


@pytest.mark.parametrize(
    ("value", "written"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"), (0.25, 0.25)]
)
def test_json_lines_sink_writes_what_json_has_no_number_for_as_a_string(tmp_path, value, written):
    sink = JsonLinesSink(tmp_path / "events.jsonl")
    sink.write([alpha(value)])
    sink.close()
    assert strict_loads((tmp_path / "events.jsonl").read_text())["alpha"] == written


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([Sink, object, {1, 2}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(value=plain_values, name=st.text())
def test_every_event_becomes_one_line_of_strict_json(tmp_path_factory, value, name):
    path = tmp_path_factory.mktemp("json") / "events.jsonl"
    sink = JsonLinesSink(path)
    sink.write([GateEvaluated(slot=name, gate="G2", passed=True, reason="", checks=({"value": value},))])
    sink.close()
    text = path.read_bytes()
    assert text.count(b"\n") == 1
    assert text.endswith(b"\n")
    assert strict_loads(text)["slot"] == name


def test_json_lines_sink_appends_and_never_joins_a_line_that_was_cut(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"type": "whole"}\n{"type": "cu')
    sink = JsonLinesSink(path)
    sink.write([alpha(0.5)])
    sink.close()
    assert [event["type"] for event in JsonLinesSink.read(path)] == ["whole", "alpha_changed"]


def test_a_write_that_fails_part_way_does_not_spoil_the_next_line(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    sink = JsonLinesSink(path)
    real_write = os.write
    monkeypatch.setattr(
        os, "write", lambda fd, data: real_write(fd, data[:10]) if len(data) > 10 else _full()
    )
    with pytest.raises(OSError, match="full"):
        sink.write([SeedCulled(blueprint_id="b", reason="r", stage="TRAINING")] * 2)
    monkeypatch.undo()
    sink.write([alpha(0.5)])
    sink.close()
    assert [event["type"] for event in JsonLinesSink.read(path)][-1] == "alpha_changed"


def _full():
    raise OSError("disk full")


def test_a_batch_is_one_append(tmp_path, monkeypatch):
    appends = []
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: appends.append(len(data)) or real_write(fd, data))
    sink = JsonLinesSink(tmp_path / "events.jsonl")
    sink.write([alpha(0.1 * i, i) for i in range(5)])
    sink.close()
    assert appends == [(tmp_path / "events.jsonl").stat().st_size]


def test_a_closed_json_lines_sink_refuses_to_write(tmp_path):
    sink = JsonLinesSink(tmp_path / "events.jsonl")
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match=r"events\.jsonl"):
        sink.write([alpha(0.5)])


def test_a_killed_process_leaves_every_written_batch_readable(tmp_path):
    script = (
        "import os, sys\n"
        "from kasmina_core.events import AlphaChanged\n"
        "from kasmina_core.telemetry import JsonLinesSink\n"
        "sink = JsonLinesSink(sys.argv[1])\n"
        "sink.write([AlphaChanged(alpha=0.5, progress=0.5, sequence=i) for i in range(20)])\n"
        "os._exit(9)\n"
    )
    path = tmp_path / "events.jsonl"
    done = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60, check=False)
    assert done.returncode == 9
    assert [event["sequence"] for event in JsonLinesSink.read(path)] == list(range(20))
