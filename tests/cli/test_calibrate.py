"""`kasmina calibrate` as somebody meets it at the command line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kasmina_core.checkpoints import atomic
from kasmina_core.checkpoints.atomic import write_atomically
from kasmina_core.cli import INTERRUPTED, main
from kasmina_core.experiments import record as recording
from kasmina_core.experiments import report

SHORT = ("--seeds", "3", "--looks", "2", "--epochs", "2", "--blueprint", "norm")


def _calibrate(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["calibrate", *arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    result = _calibrate("--out", str(folder), "--effect", "0.05", *SHORT)
    assert result.exit_code == 0, result.stderr
    return folder, result


def test_the_noise_floor_is_shown_look_by_look_with_what_follows(run: tuple[Path, Result]) -> None:
    folder, result = run
    assert "3 placebo seeds, 200 held-out samples" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()[:2] in ("1 ", "2 ")]
    assert [row[0] for row in rows] == ["1", "2"]
    assert "accepted placebos" in result.stdout
    assert "asked for at most 5%" in result.stdout
    assert "GateThresholds(min_gain=" in result.stdout
    assert "To find a gain of 0.05 at the first look in 80 of 100 cases takes" in result.stdout
    assert str(folder) in result.stdout
    assert "raising 3 placebo seeds: 100 %" in result.stderr


def test_the_files_hold_the_figures_and_the_picture(run: tuple[Path, Result]) -> None:
    folder, _ = run
    assert sorted(path.name for path in folder.iterdir()) == ["calibration.json", "calibration.png"]
    assert (folder / "calibration.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "calibration.json").read_text())
    assert len(record["placebos"]) == 3
    assert record["proposal"]["samples_for_effect"] > 0
    assert record["resampled"]["trials"] == 300
    assert record["task"] == "digits"


def test_json_is_the_record_and_the_same_for_the_same_seed(run: tuple[Path, Result], tmp_path: Path) -> None:
    result = _calibrate("--out", str(tmp_path / "again"), "--effect", "0.05", "--json", *SHORT)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((run[0] / "calibration.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--task", "digit"), "Did you mean 'digits'?"),
        (("--blueprint", "nrm"), "'nrm'"),
        (("--seeds", "1"), "1 is not in the range x>=2"),
        (("--effect", "inf"), "give finite numbers above 0"),
        (("--slots", "nowhere"), "nowhere"),
    ],
)
def test_wrong_input_is_answered_with_what_is_wrong(
    arguments: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    result = _calibrate("--out", str(tmp_path / "run"), *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_a_full_disk_takes_files_and_not_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...]
) -> None:
    def write(path: Path, content: str | bytes) -> None:
        if path.name == "calibration.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_atomically(path, content)

    for module in (report, recording, atomic):  # both imported before, so that each gets its own back
        monkeypatch.setattr(module, "write_atomically", write)
    folder = tmp_path / "run"
    result = _calibrate("--out", str(folder), *SHORT, *how)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"Not every file could be written to {folder}: No space left on device." in result.stderr
    assert [path.name for path in folder.iterdir()] == ["calibration.png"]
    if how:
        assert len(json.loads(result.stdout)["placebos"]) == 3
    else:
        assert "accepted placebos" in result.stdout


def test_ctrl_c_says_that_nothing_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kasmina_core.evidence.calibration.calibrate", interrupted)
    result = _calibrate("--out", str(tmp_path / "run"), *SHORT)
    assert result.exit_code == INTERRUPTED
    assert "Nothing was kept" in result.stderr
    assert not (tmp_path / "run").exists()
