"""`kasmina grow --resume`: a run that was stopped or killed goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from kasmina_core.cli import main
from kasmina_core.experiments.display import RunDisplay
from kasmina_core.experiments.record import EpochRecord
from kasmina_core.telemetry import JsonLinesSink

LIVELY = (
    *("--epochs", "14", "--batch-size", "128", "--blueprint", "conv_light"),
    *(
        "--policy-option",
        "patience=1",
        "--policy-option",
        "min_delta=1e9",
        "--policy-option",
        "max_probation_epochs=2",
    ),
)


PLANNED = (
    *("--epochs", "7", "--batch-size", "256", "--policy", "plan"),
    *("--policy-option", "at=[2]", "--policy-option", "max_waves=1"),
)


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the folders of own.py, which join ``sys.path``, after each test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def _grow(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["grow", *map(str, arguments)])


class Killed(Exception):
    """What ends the process in the middle of an epoch."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, what: str, call: int) -> None:
    """Let a run end at a call of its display, when the epoch before is kept and its own is not."""
    calls = 0
    before = getattr(RunDisplay, what)

    def dies(display: RunDisplay, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        before(display, *arguments)

    monkeypatch.setattr(RunDisplay, what, dies)


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without what two equal runs differ in: what they took, and the command with its folder."""
    arms = [arm | {"seconds": 0} for arm in record["arms"]]
    return record | {"arms": arms, "made_with": _made_with(record["made_with"])}


def _made_with(made_with: dict[str, Any]) -> dict[str, Any]:
    """Leave out the command, and the policies of topologies: a process may have some of other tests' packs."""
    return made_with | {"command": "", "growth": made_with["growth"] | {"gradient_policies": {}}}


def _same_files(whole: Path, resumed: Path) -> None:
    read = [json.loads((folder / "run.json").read_text()) for folder in (whole, resumed)]
    assert read[0]["notes"] == read[1]["notes"]
    assert _comparable(read[0]) == _comparable(read[1])
    assert (whole / "metrics.csv").read_bytes() == (resumed / "metrics.csv").read_bytes()
    assert (whole / "config.json").read_bytes() == (resumed / "config.json").read_bytes()
    first, second = (torch.load(folder / "model.pt", weights_only=True) for folder in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    events = [
        [{k: v for k, v in e.items() if k != "time"} for e in JsonLinesSink.read(folder / "events.jsonl")]
        for folder in (whole, resumed)
    ]
    for (
        side
    ) in events:  # packs are checked when they are first needed, in this process by another test perhaps
        side.sort(key=lambda event: event["blueprint_id"] if event["type"] == "blueprint_registered" else "~")
        for event in side:
            if event["type"] == "blueprint_registered":
                event["sequence"] = -1
            if event["type"] == "run_started":
                event["made_with"] = _made_with(event["made_with"])
    assert events[0] == events[1]
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in resumed.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = _grow("--out", folder, *LIVELY, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert len(record["seeds"]) >= 2
    assert {epoch["slots"][0]["stage"] for epoch in record["epochs"]} >= {"BLENDING", "PROBATIONARY"}
    return folder


@pytest.mark.parametrize(("what", "calls"), [("epoch", (1,)), ("epoch", (6, 3, 3)), ("advance", (4, 2))])
def test_a_run_that_is_killed_goes_on_bit_for_bit(
    tmp_path: Path, whole: Path, what: str, calls: tuple[int, ...]
) -> None:
    folder = tmp_path / "run"
    asked: tuple[str | Path, ...] = ("--out", folder, *LIVELY, "--json")
    for call in calls:
        with pytest.MonkeyPatch.context() as patch:
            _kill_at(patch, what, call)
            assert isinstance(_grow(*asked).exception, Killed)
        assert not (folder / "run.json").exists()
        asked = ("--resume", folder, "--json")
    result = _grow(*asked)
    assert result.exit_code == 0, result.output
    assert _comparable(json.loads(result.stdout)) == _comparable(json.loads((whole / "run.json").read_text()))
    _same_files(whole, folder)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_sigkill_takes_no_more_than_the_last_epoch(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "kasmina_core", "grow", "--out", str(folder), *LIVELY, "--json"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch  5/"):
                break
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    with (folder / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) >= 5
    result = _grow("--resume", folder, "--json")
    assert result.exit_code == 0, result.output
    assert "epoch  4/14" not in result.stderr
    _same_files(whole, folder)


def test_what_ctrl_c_ended_goes_on(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, epoch = tmp_path / "run", RunDisplay.epoch

    def interrupts(display: RunDisplay, record: EpochRecord) -> None:
        epoch(display, record)
        if record.epoch == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunDisplay, "epoch", interrupts)
        stopped = _grow("--out", folder, *LIVELY)
    assert stopped.exit_code == 130
    assert f"kasmina grow --resume {folder}" in stopped.stderr
    assert json.loads((folder / "run.json").read_text())["interrupted"]
    assert _grow("--resume", folder, "--json").exit_code == 0
    _same_files(whole, folder)
    again = _grow("--resume", folder)
    assert again.exit_code == 2
    assert "this run is done" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--epochs", "20"), "leave out --epochs.\n  the run: 14\n  given:   20"),
        (("--policy-option", "patience=2"), "leave out --policy-options"),
        (("--out", "elsewhere"), "the run goes on in its own folder"),
    ],
)
def test_a_run_goes_on_with_its_own_settings(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        _kill_at(patch, "epoch", 2)
        _grow("--out", folder, *LIVELY)
    result = _grow("--resume", folder, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_bit_that_turned_in_the_host_that_trains_alone_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        _kill_at(patch, "advance", 2)
        _grow("--out", folder, "--epochs", "2", "--batch-size", "512", "--policy", "none")
    file = folder / "host-alone.pt"
    content = bytearray(file.read_bytes())
    weight = next(iter(torch.load(file, weights_only=True)["host"].values()))
    content[content.index(weight.numpy().tobytes())] ^= 64
    file.write_bytes(content)
    result = _grow("--resume", folder)
    assert result.exit_code != 0
    assert "its bytes have changed since it was written" in result.output + str(result.exception)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    result = _grow("--resume", tmp_path)
    assert result.exit_code == 2
    assert "no run can be read there" in result.stderr
    (tmp_path / "config.json").write_text('{"task": "digi')
    result = _grow("--resume", tmp_path)
    assert result.exit_code == 2
    assert f"{tmp_path / 'config.json'} is damaged" in result.stderr


def test_a_folder_never_leads_to_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["new", "task", "own"]).exit_code == 0
    with monkeypatch.context() as patch:
        _kill_at(patch, "epoch", 2)
        _grow("--task", "own.py:own", "--epochs", "3", "--out", "run")
    refused = _grow("--resume", "run")
    assert refused.exit_code == 2
    assert "Name it again: kasmina grow --resume run --task own.py:own" in refused.stderr
    source = Path("own.py").read_text()
    Path("own.py").write_text(source.replace("0.3", "0.31"))
    sys.modules.pop("_kasmina_file_own")
    other = _grow("--resume", "run", "--task", "own.py:own")
    assert other.exit_code == 2
    assert "other data than when it began" in other.stderr
    Path("own.py").write_text(source)
    sys.modules.pop("_kasmina_file_own")
    assert _grow("--resume", "run", "--task", "own.py:own").exit_code == 0


EDITS = {
    "nn.Tanh()": ("nn.ReLU()", "the host computes something else from the same weights"),
    "nn.Linear(4, 2))": ("nn.Linear(4, 2), nn.Dropout(0.5))", "the host computes something else in training"),
    "    return nn.Seq": ("    torch.rand(1)\n    return nn.Seq", "the host begins with other weights"),
    "sample_loss=scaled": ("sample_loss=unscaled", "has another loss of the same outputs"),
    "sample_metric=right": ("sample_metric=wrong", "has another metric of the same outputs"),
}
FIGURES = """
def unscaled(logits, targets):
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def scaled(logits, targets):
    return 2 * unscaled(logits, targets)


def right(logits, targets):
    return (logits.argmax(1) == targets).float()


def wrong(logits, targets):
    return 1 - right(logits, targets)
"""


def _own_task() -> str:
    """Write own.py with a task that says its loss and metric, and return its source."""
    assert CliRunner().invoke(main, ["new", "task", "own"]).exit_code == 0
    source = (
        Path("own.py")
        .read_text()
        .replace(
            "host=net,",
            "host=net, sample_loss=scaled, sample_metric=right, metric_name='accuracy', higher_is_better=True,",
        )
    )
    Path("own.py").write_text(source + FIGURES)
    return source + FIGURES


def _edit(source: str) -> None:
    Path("own.py").write_text(source)
    sys.modules.pop("_kasmina_file_own", None)


def test_a_host_or_loss_that_was_edited_in_between_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("_kasmina_file_own", None)
    source, own = _own_task(), ("--task", "own.py:own")
    with monkeypatch.context() as patch:
        _kill_at(patch, "epoch", 2)
        assert isinstance(_grow(*own, "--epochs", "2", "--out", "run").exception, Killed)
    for old, (new, said) in EDITS.items():
        assert source.count(old) == 1
        _edit(source.replace(old, new))
        refused = _grow("--resume", "run", *own)
        assert refused.exit_code == 2
        assert said in refused.stderr
        then, now = re.findall(r"(?:then|now): +checksum ([0-9a-f]{8})", refused.stderr)
        assert then != now
        assert "Undo what was changed in the task or the host, or begin a new run" in refused.stderr
    _edit(source)
    assert _grow("--resume", "run", *own, "--threads", "2").exit_code == 0


def test_several_seeds_go_on_with_the_host_of_those_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("_kasmina_file_own", None)
    source, own = _own_task(), ("--task", "own.py:own")
    with monkeypatch.context() as patch:
        _kill_at(patch, "epoch", 2)  # the second seed has kept nothing
        assert isinstance(_grow(*own, "--epochs", "1", "--repeat", "2", "--out", "runs").exception, Killed)
    assert Path("runs/seed-0/run.json").exists()
    _edit(source.replace("nn.Tanh()", "nn.ReLU()"))
    refused = _grow("--resume", "runs", *own)
    assert refused.exit_code == 2
    assert "the host computes something else from the same weights" in refused.stderr
    _edit(source)
    assert _grow("--resume", "runs", *own).exit_code == 0


def _stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Press Ctrl-C when a run shows its epoch of that number, counted over all runs."""
    calls, epoch = 0, RunDisplay.epoch

    def interrupts(display: RunDisplay, record: EpochRecord) -> None:
        nonlocal calls
        calls += 1
        epoch(display, record)
        if calls == call:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunDisplay, "epoch", interrupts)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("several", [(), ("--repeat", "2")])
def test_the_command_that_is_shown_after_ctrl_c_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("_kasmina_file_own", None)
    _own_task()
    asked = ("--task", "own.py:own", "--host", "own.py:net", "--slots", "1", "--data", "a folder")
    with monkeypatch.context() as patch:
        _stop_at(patch, 1)
        stopped = _grow(*asked, "--epochs", "2", "--out", "the run", *several)
    assert stopped.exit_code == 130
    (shown,) = [line for line in stopped.stderr.splitlines() if line.startswith("To go on: kasmina grow ")]
    words = shlex.split(shown)[5:]
    assert words == [*("--resume", "the run", *asked[:4]), "--data", "a folder"]
    result = _grow(*words)
    assert result.exit_code == 0, result.output


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_several_seeds_as_json_give_the_records_that_there_are_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("--epochs", "1", "--batch-size", "512", "--repeat", "3", "--json")
    folder = tmp_path / "runs"
    with monkeypatch.context() as patch:
        _stop_at(patch, 2)
        stopped = _grow(*short, "--out", folder)
    assert stopped.exit_code == 130
    found = json.loads(stopped.stdout)
    assert found["interrupted"] is True
    assert [record["interrupted"] for record in found["records"]] == [False, True]
    assert found["records"] == [
        json.loads((folder / f"seed-{seed}" / "run.json").read_text()) for seed in (0, 1)
    ]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_a_run_that_was_stopped_in_its_first_epoch_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = RunDisplay.phase

    def interrupts(display: RunDisplay, *arguments: Any) -> None:
        phase(display, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    asked = ("--epochs", "1", "--batch-size", "512")
    with monkeypatch.context() as patch:
        patch.setattr(RunDisplay, "phase", interrupts)
        assert _grow(*asked, "--out", tmp_path / "run").exit_code == 130
    assert _grow("--resume", tmp_path / "run").exit_code == 0
    assert _grow(*asked, "--out", tmp_path / "whole").exit_code == 0
    _same_files(tmp_path / "whole", tmp_path / "run")


def test_several_seeds_show_their_spread_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ("--epochs", "2", "--batch-size", "256", "--repeat", "3", "--seed", "4")
    folder = tmp_path / "runs"
    with monkeypatch.context() as patch:
        _kill_at(patch, "epoch", 4)
        assert isinstance(_grow("--out", folder, *short).exception, Killed)
    finished = (folder / "seed-4" / "run.json").read_bytes()
    result = _grow("--resume", folder)
    assert result.exit_code == 0, result.output
    assert (folder / "seed-4" / "run.json").read_bytes() == finished
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.json", "repeats.json", "repeats.png", "seed-4", "seed-5", "seed-6")
    ]
    found = json.loads((folder / "repeats.json").read_text())
    saved = []
    for run in found["runs"]:
        record = json.loads((folder / f"seed-{run['seed']}" / "run.json").read_text())
        grown, alone = record["arms"]
        assert (run["grown_loss"], run["alone_loss"]) == (grown["test_loss"], alone["test_loss"])
        saved.append(alone["test_loss"] - grown["test_loss"])
    assert found["saved"]["mean"] == pytest.approx(sum(saved) / 3)
    assert (found["saved"]["least"], found["saved"]["most"]) == (min(saved), max(saved))
    assert "Over 3 seeds, at equal training FLOPs" in " ".join(result.stdout.split())
    assert " ".join(result.stdout.split()).count("mean") >= 2
    single = _grow("--out", tmp_path / "one", *short[:4], "--seed", "5", "--json")
    assert _comparable(json.loads(single.stdout)) == _comparable(
        json.loads((folder / "seed-5" / "run.json").read_text())
    )


def test_a_run_that_is_killed_while_a_fixed_size_is_trained_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert _grow("--out", whole, *PLANNED).exit_code == 0
    record = json.loads((whole / "run.json").read_text())
    (size,) = record["sizes"]
    assert len(record["sizes"][size]) >= 3
    with pytest.MonkeyPatch.context() as patch:
        _kill_at(patch, "advance", len(record["baseline"]) + 2)
        assert isinstance(_grow("--out", folder, *PLANNED).exception, Killed)
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [row["arm"] for row in rows].count(size) == 2
    assert _grow("--resume", folder).exit_code == 0
    _same_files(whole, folder)
