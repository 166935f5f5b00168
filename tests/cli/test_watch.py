"""``kasmina watch``: a page that follows runs by their files."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from click.testing import CliRunner
from kasmina_cnn import CNNHost

from kasmina_core import JsonLinesSink, MorphogeneticModel, Telemetry, __version__
from kasmina_core.cli import main
from kasmina_core.cli.watch import Board, make_server
from kasmina_core.experiments.following import FollowedRun


@contextmanager
def served(*paths):
    board = Board([FollowedRun(path) for path in paths])
    board.look()
    server = make_server(board, 0)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def get(path, host=None):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
        return connection.getresponse()

    try:
        yield board, get
    finally:
        server.shutdown()
        server.server_close()


def grow_a_little(telemetry, epochs):
    model = MorphogeneticModel(CNNHost(base_channels=4), ["block2"], telemetry=telemetry)
    model.germinate("block2", "norm")
    for i in range(epochs):
        model.step_epoch(1.0 / (i + 1))
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    result = CliRunner().invoke(main, ["grow", "--epochs", "2", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


def test_the_file_of_any_loop_is_followed_while_it_grows(tmp_path):
    path = tmp_path / "mine.jsonl"
    with Telemetry([JsonLinesSink(path)]) as telemetry:
        model = grow_a_little(telemetry, 2)
        telemetry.flush()
        with served(path) as (board, get):
            first = json.loads(get("/data?run=0").read())
            assert first["charts"]["epochs"] == [1, 2]
            assert first["charts"]["lines"][0]["y"] == [1.0, 0.5]
            assert [seed["blueprint"] for seed in first["charts"]["slots"][0]["seeds"]] == ["norm"]
            changes = get("/changes")
            before = board.version
            model.step_epoch(0.25)
            telemetry.flush()
            board.look()
            assert board.version == before + 1
            assert changes.readline() == b"data: new\n"
            assert json.loads(get("/data?run=0").read())["charts"]["lines"][0]["y"] == [1.0, 0.5, 0.25]
            board.look()
            assert board.version == before + 1
            assert "mine.jsonl" in get("/").read().decode()


def test_a_run_that_has_ended_shows_its_report_and_its_files(run):
    with served(run) as (_, get):
        shown = json.loads(get("/data?run=0").read())
        assert shown["state"] == "The run has ended."
        assert "Comparison on the test samples" in shown["html"]
        for name in ("run.json", "config.json", "metrics.csv", "events.jsonl", "report.png"):
            assert f"name={name}" in shown["html"]
            assert get(f"/file?run=0&name={name}").read() == (run / name).read_bytes()


def test_a_run_that_goes_on_has_the_losses_of_its_table(run, tmp_path):
    for name in ("events.jsonl", "metrics.csv"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with served(tmp_path) as (_, get):
        shown = json.loads(get("/data?run=0").read())
    with served(run) as (_, get):
        whole = json.loads(get("/data?run=0").read())
    assert shown["charts"]["lines"] == whole["charts"]["lines"]
    assert shown["charts"]["slots"] == whole["charts"]["slots"]
    assert shown["charts"]["parameters"] == whole["charts"]["parameters"]
    assert [line["name"] for line in shown["charts"]["parameters"]["lines"]] == ["grown", "host alone"]
    assert "the page follows" in shown["state"]
    made_with = f"kasmina grow --epochs 2 --out {run}"
    for html in (shown["html"], whole["html"]):
        for said in (
            made_with,
            torch.__version__,
            __version__,
            "cnn:cnn",
            "block2",
            "gates.thresholds.min_samples",
        ):
            assert said in html


def test_fixed_sizes_of_a_run_that_goes_on_are_drawn_as_they_are_trained(run, tmp_path):
    (tmp_path / "events.jsonl").write_bytes((run / "events.jsonl").read_bytes())
    rows = (run / "metrics.csv").read_text().splitlines()
    alone = [row for row in rows if row.startswith("host alone,")]
    size = alone[0].replace("host alone", "900 parameters", 1)
    (tmp_path / "metrics.csv").write_text("\n".join([*rows, size, ""]))
    with served(tmp_path) as (_, get):
        sizes = json.loads(get("/data?run=0").read())["charts"]["sizes"]
    assert [line["name"] for line in sizes["lines"]] == ["grown", "host alone", "900 parameters"]
    assert sizes["lines"][2]["y"] == sizes["lines"][1]["y"][:1]
    assert len({line["colour"] for line in sizes["lines"]}) == 3


def test_several_runs_are_compared(run, tmp_path):
    path = tmp_path / "mine.jsonl"
    with Telemetry([JsonLinesSink(path)]) as telemetry:
        grow_a_little(telemetry, 3)
    with served(run, path) as (_, get):
        shown = json.loads(get("/data").read())
        assert '<td data-head="policy">plateau</td>' in shown["html"]
        assert "2 of 2" in shown["html"]
        assert [line["name"] for line in shown["charts"]["lines"]] == ["1: digits", "2: mine.jsonl"]
        assert 'href="/?run=1"' in get("/").read().decode()
        assert "all runs" in get("/?run=1").read().decode()


@pytest.mark.parametrize(
    ("path", "host", "status"),
    [
        ("/data", "evil.example:80", 403),
        ("/data?run=7", None, 404),
        ("/data?run=-1", None, 404),
        ("/file?run=0&name=model.pt", None, 404),
        ("/file?run=0&name=../config.json", None, 404),
        ("/etc/passwd", None, 404),
    ],
)
def test_nothing_else_is_served(run, path, host, status):
    with served(run) as (_, get):
        assert get(path, host).status == status


def test_hostile_lines_are_passed_over_and_hostile_names_are_text(tmp_path):
    path = tmp_path / "mine.jsonl"
    with Telemetry([JsonLinesSink(path)]) as telemetry:
        grow_a_little(telemetry, 1)
    lines = path.read_text().splitlines()
    hostile = [line.replace("block2", "</script><script>alert(1)") for line in lines]
    junk = [
        '{"type": "epoch_ended"}',
        '{"type": ["x"]}',
        "[" * 100_000,
        "null",
        '{"type": "epoch_ended", "epoch": "x"}',
        "{",
    ]
    path.write_text("\n".join([*junk, *hostile, ""]))
    with served(path) as (_, get):
        page = get("/").read().decode()
        assert page.count("<script") == 2  # the data, and ours
        assert json.loads(get("/data?run=0").read())["charts"]["epochs"] == [1]


def test_a_file_that_begins_anew_is_read_anew(tmp_path):
    path = tmp_path / "mine.jsonl"
    followed = None
    for epochs in (3, 1):
        path.unlink(missing_ok=True)
        with Telemetry([JsonLinesSink(path)]) as telemetry:
            grow_a_little(telemetry, epochs)
        followed = followed or FollowedRun(path)
        assert followed.update()
        assert len(followed.record().epochs) == epochs


@pytest.mark.parametrize("there", ["nothing", "folder", "file"])
def test_what_is_no_run_is_refused(tmp_path, there):
    path = tmp_path / "nothing"
    if there == "folder":
        path.mkdir()
    elif there == "file":
        path.write_text("import torch\n")
    result = CliRunner().invoke(main, ["watch", str(path)])
    assert result.exit_code == 2
    said = {
        "nothing": "no such folder or file",
        "folder": "no folder of a run",
        "file": "none of its 1 lines",
    }
    assert said[there] in result.output


def test_a_run_without_news_is_not_said_to_go_on(run, tmp_path):
    (tmp_path / "events.jsonl").write_bytes((run / "events.jsonl").read_bytes())
    with served(tmp_path) as (board, get):
        assert "the page follows" in json.loads(get("/data?run=0").read())["state"]
        before = board.version
        os.utime(tmp_path / "events.jsonl", (time.time() - 600,) * 2)
        board.look()
        assert board.version == before + 1
        state = json.loads(get("/data?run=0").read())["state"]
        assert "no news since" in state
        assert f"kasmina grow --resume {tmp_path}" in state
        board.look()
        assert board.version == before + 1


def test_a_file_of_something_else_is_refused_at_once(tmp_path):
    (tmp_path / "mine.txt").write_text("hello")
    result = CliRunner().invoke(main, ["watch", str(tmp_path / "mine.txt")])
    assert result.exit_code == 2
    assert "holds no lines of events" in result.output
