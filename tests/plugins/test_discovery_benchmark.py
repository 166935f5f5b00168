"""The benchmark of discovery runs; what it measures is for people to read."""

from __future__ import annotations

import json
import subprocess
import sys

from projects import ROOT


def test_the_benchmark_runs_and_gives_every_figure() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.discovery", "--fast", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (size,) = result["discovery"]
    assert size["packs"] == 3
    assert set(size["seconds"]) == {"scan", "list", "scan+import", "load"}
    assert all(middle > 0 for middle, _, _ in size["ratio_to_scan"].values())
    assert 0 < size["first_germination_over_importing_torch"][0] < 100
    assert {"no checks", "checks as packs load", "every check"} == set(result["registration_per_blueprint"])
    assert result["machine"]["cores"]
