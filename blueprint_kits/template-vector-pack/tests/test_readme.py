"""The code blocks of the README run."""

from __future__ import annotations

from pathlib import Path
from types import CodeType

from kasmina_core.testing import parametrize_examples


@parametrize_examples(Path(__file__).parents[1] / "README.md")
def test_example_runs(example: CodeType) -> None:
    exec(example, {})
