"""The benchmark of kasmina-rl's environments runs, where that package is installed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("kasmina_rl")
ROOT = Path(__file__).parents[2]

if str(ROOT) not in sys.path:  # benchmarks are no part of what is installed
    sys.path.append(str(ROOT))


def test_each_way_to_play_is_compared_with_an_epoch_of_the_host(capsys):
    importlib.import_module("benchmarks.environment").main(["--fast", "--json", "--whole-heap"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    bare = [row for row in rows if row["over"] == "an epoch of the host alone"]
    assert len(bare) == 3
    assert all(row["goal"] == 1.6 and "steps per CPU second" in row["note"] for row in bare)
    alone, known, _ = (row["ratio"][0] for row in bare)
    assert min(alone, known) > 0
