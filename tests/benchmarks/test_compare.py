"""What became slower between two results is told beyond the spread alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # benchmarks are no part of what is installed
    sys.path.append(str(ROOT))

from benchmarks.compare import main  # noqa: E402

Rows = dict[str, list[float] | None]


def written(path: Path, rows: Rows) -> str:
    told = [
        {"part": "cnn", "case": case, "over": "bare host", "ratio": ratio} for case, ratio in rows.items()
    ]
    path.write_text(json.dumps({"rows": told}))
    return str(path)


OLD: Rows = {
    "still": [1.0, 0.9, 1.1],
    "slow": [1.0, 0.9, 1.1],
    "fast": [1.0, 0.9, 1.1],
    "gone": [1.0, 0.9, 1.1],
}


def test_rows_beyond_the_spread_are_told_and_a_slower_one_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = written(tmp_path / "old.json", OLD | {"skipped": None})
    new = written(
        tmp_path / "new.json",
        {
            "still": [1.2, 1.1, 1.3],
            "slow": [1.3, 1.11, 1.4],
            "fast": [0.8, 0.7, 0.89],
            "added": [1.0, 1.0, 1.0],
        },
    )
    with pytest.raises(SystemExit) as ended:
        main([old, new])
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "slower  cnn: slow / bare host: 1.000 (0.900 to 1.100) became 1.300 (1.110 to 1.400)",
        "faster  cnn: fast / bare host: 1.000 (0.900 to 1.100) became 0.800 (0.700 to 0.890)",
        "gone    cnn: gone / bare host: 1.000 (0.900 to 1.100)",
        "new     cnn: added / bare host: 1.000 (1.000 to 1.000)",
        "1 slower beyond the spread, 1 faster, 1 the same",
    ]


def test_what_is_not_slower_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = written(tmp_path / "old.json", OLD)
    main([same, same])
    assert capsys.readouterr().out == "0 slower beyond the spread, 0 faster, 4 the same\n"


def test_files_that_cannot_be_compared_are_said_so(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("[]")
    mine = written(tmp_path / "mine.json", OLD)
    with pytest.raises(SystemExit, match=r"other\.json cannot be read as what a benchmark wrote"):
        main([mine, str(other)])
    with pytest.raises(SystemExit, match="no row in common"):
        main([mine, written(tmp_path / "third.json", {"else": [1.0, 1.0, 1.0]})])
