"""A run that is killed again and again, saving included, goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from run_and_kill import VARIANTS

from kasmina_core import SeedStage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forks"),
]

KILLS = 60


def read(log: Path) -> dict[str, list[str]]:
    """The log by what each line is about: a number of times for what was run again."""
    said = defaultdict(list)
    for line in log.read_text(encoding="utf-8").splitlines():
        kind, key, value = json.loads(line)
        said[json.dumps([kind, key])].append(json.dumps(value))
    return said


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_killed_at_any_moment_equals_the_one_that_is_not(variant: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("run_and_kill.py"), tmp_path, variant, str(KILLS), "7"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["killed"] >= KILLS
    assert report["calls"] >= 12  # more than one save makes

    whole, killed = read(tmp_path / "whole.log"), read(tmp_path / "killed.log")
    resumed = {key for key in killed if key.startswith('["resumed"')}
    assert len(resumed) >= 10
    assert killed.keys() - resumed == whole.keys()
    for key, values in whole.items():
        assert len(values) == 1
        assert set(killed[key]) == set(values), f"{key} came out otherwise after a kill"

    stages = [value[2] for key, values in whole.items() if "step" in key for value in map(json.loads, values)]
    seen = {name for pair in stages for name, _alpha in pair}
    assert seen == {stage.name for stage in SeedStage} - {"UNKNOWN"}
    assert sum("seed_germinated" in value for values in whole.values() for value in values) == 3
    assert sum("seed_fossilized" in value for values in whole.values() for value in values) == 2
    reverted = any('"reverted": true' in value for values in whole.values() for value in values)
    assert reverted == ("put back" in variant)
