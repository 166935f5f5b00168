"""The README's code runs."""

from __future__ import annotations

import re
from pathlib import Path
from types import CodeType

import pytest
from kasmina_core.testing import parametrize_examples


@parametrize_examples(Path(__file__).parents[1] / "README.md")
def test_the_example_runs_and_generates(example: CodeType, capsys: pytest.CaptureFixture[str]) -> None:
    exec(example, {})
    printed = capsys.readouterr().out
    assert re.search(r"layer2 +TRAINING +transformer:mlp", printed)
    assert re.search(r"layer4 +DORMANT", printed)
    assert re.search(r"tensor\(\[\[( *\d+,){7} *\d+\]\]\)", printed)
