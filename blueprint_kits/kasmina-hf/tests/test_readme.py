"""The README's code runs, one block after another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from kasmina_core.testing import parametrize_examples

EXAMPLES = parametrize_examples(Path(__file__).parents[1] / "README.md").args[1]


def test_the_examples_run_generate_and_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for example in EXAMPLES:
        exec(example, names)
    printed = capsys.readouterr().out
    assert re.search(r"layer2 +TRAINING +transformer:mlp", printed)
    assert re.search(r"layer4 +DORMANT", printed)
    assert re.search(r"tensor\(\[\[( *\d+,){7} *\d+\]\]\)", printed)
    assert re.search(r"^G2 (passed|failed|waiting)", printed, flags=re.MULTILINE)
    assert names["losses"]().shape == (100,)
