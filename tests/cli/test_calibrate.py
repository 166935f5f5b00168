"""`kasmina calibrate` as somebody meets it at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kasmina_core.cli import main

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
    assert result.exit_code in (1, 2)
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
