"""The script of docs/distributed.md runs under torchrun; the code that cannot run here is Python and names what exists."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import environment

import kasmina_core

DOCUMENT = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_script_grows_alike_under_torchrun(tmp_path: Path) -> None:
    script = re.search(r"<!-- file: train.py -->\n```python\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
    command = re.search(r"<!-- command: torchrun -->\n```sh\n(.*?)\n```", DOCUMENT)
    (tmp_path / "train.py").write_text(script.group(1), encoding="utf-8")
    program, *arguments = shlex.split(command.group(1))
    assert program == "torchrun"
    for attempt in range(3):
        logs = tmp_path / str(attempt)
        run = subprocess.run(
            # What ranks print at the same moment would be mixed: a file for each.
            [sys.executable, "-m", "torch.distributed.run", "--redirects=3", f"--log-dir={logs}", *arguments],
            cwd=tmp_path,
            env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=200,
        )
        if (
            "SIGABRT" not in run.stderr
        ):  # gloo's threads may abort a process whose peer leaves at the same moment
            break
    assert run.returncode == 0, run.stdout + run.stderr
    said = [path.read_text(encoding="utf-8") for path in logs.rglob("stdout.log")]
    tables = dict(found for text in said for found in re.findall(r"rank (\d) of 2\n((?:.+\n)+)", text))
    assert set(tables) == {"0", "1"}
    assert tables["0"] == tables["1"]
    assert "cnn:conv_light" in tables["0"]


@pytest.mark.parametrize("code", re.findall(r"^```py\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE))
def test_code_for_what_is_not_installed_is_python_that_names_what_exists(code: str) -> None:
    tree = ast.parse(code)
    ours = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "kasmina_core"
        for alias in node.names
    }
    assert ours <= set(kasmina_core.__all__)
