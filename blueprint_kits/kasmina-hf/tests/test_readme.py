"""The README's code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_has_an_example() -> None:
    assert len(BLOCKS) == 1


def test_the_example_runs_and_generates(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[0], str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"layer2 +TRAINING +transformer:mlp", printed)
    assert re.search(r"layer4 +DORMANT", printed)
    assert re.search(r"tensor\(\[\[( *\d+,){7} *\d+\]\]\)", printed)
