"""Trainers in two processes grow alike, judge by the samples of both, and go on from their checkpoints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from in_many_processes import differing

HERE = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def under_torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    for _ in range(3):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node=2",
                *map(str, arguments),
            ],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if (
            "SIGABRT" not in done.stderr
        ):  # gloo's threads may abort a process whose peer leaves at that moment
            break
    return done


def ranks(folder: Path, what: str) -> list[dict[str, Any]]:
    done = under_torchrun(folder, HERE / "in_many_processes.py", what, folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("trainer", "needs"), [("lightning", "lightning"), ("huggingface", "transformers")])
def test_a_trainer_in_two_processes_grows_alike_and_resumes_exactly(
    tmp_path: Path, trainer: str, needs: str
) -> None:
    pytest.importorskip(needs)
    one, other = ranks(tmp_path, trainer)
    assert one == other
    assert set(one["stages"].values()) == {"FOSSILIZED"}
    assert set(one["samples"].values()) == {8}
    assert one["is alone again"]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    buffers = re.compile(r"running_|num_batches")  # BatchNorm's are each rank's own where DDP sends none
    for found in (first, second):
        found["weights"] = {k: v for k, v in found["weights"].items() if not buffers.search(k)}
    assert differing(first, second) == []
    assert one["differs"] == []


def test_a_model_that_was_wrapped_by_hand_is_refused_at_germination(tmp_path: Path) -> None:
    for found in ranks(tmp_path, "by_hand"):
        assert found["said"].startswith("GerminationError: A seed cannot germinate in one of 2 processes")
        assert "distribute(model, wrap='outside')" in found["said"]
        assert found["stage"] == "DORMANT"


def test_what_shards_the_model_outside_is_refused_by_name(tmp_path: Path) -> None:
    for found in ranks(tmp_path, "sharded"):
        assert found["said"].startswith("GerminationError: ")
        assert "this one is in FSDP2" in found["said"]
        assert found["stage"] == "DORMANT"


def test_the_documented_loop_grows_alike_under_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    document = (HERE.parents[1] / "docs" / "accelerate.md").read_text(encoding="utf-8")
    script = re.search(r"<!-- file: train.py -->\n```python\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)
    assert script is not None
    (tmp_path / "train.py").write_text(script.group(1), encoding="utf-8")
    logs = tmp_path / "logs"
    done = under_torchrun(tmp_path, "--redirects=3", f"--log-dir={logs}", "train.py")
    assert done.returncode == 0, (
        done.stderr + "".join(p.read_text() for p in logs.rglob("stderr.log"))[-5000:]
    )
    said = [path.read_text(encoding="utf-8") for path in logs.rglob("stdout.log")]
    found = dict(part for text in said for part in re.findall(r"rank (\d) of 2\n((?:.+\n)+)", text))
    assert set(found) == {"0", "1"}
    assert found["0"] == found["1"]
    assert "cnn:conv_light" in found["0"]
    assert (tmp_path / "digits" / "manifest.json").is_file()
