"""The README's code and the examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from types import CodeType

import pytest
import timm_cases  # noqa: F401  # skips this module where timm and torchvision cannot be imported
from kasmina_core.testing import parametrize_examples


@parametrize_examples(Path(__file__).parents[1] / "README.md")
def test_the_example_runs_and_tells_what_grew(example: CodeType, capsys: pytest.CaptureFixture[str]) -> None:
    exec(example, {})
    printed = capsys.readouterr().out
    assert re.search(r"layer3 +TRAINING +cnn:conv_light", printed)
    assert re.search(r"layer1 +DORMANT", printed)


@pytest.mark.parametrize("module", ["structure", "growing", "positions"])
def test_examples_in_docstrings_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"kasmina_timm.{module}"))
    assert found.attempted > 0
    assert found.failed == 0
