"""`parametrize_examples`: each Python block of a page is a test case."""

from __future__ import annotations

from pathlib import Path

import pytest

from kasmina_core.testing import parametrize_examples


def test_each_python_block_is_a_case_and_other_blocks_are_none(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("```python\nfound = 1\n```\ntext\n```sh\nexit 1\n```\n```python\nfound = 2\n```\n")
    names, examples = parametrize_examples(page).args
    assert names == "example"
    found = []
    for example in examples:
        scope: dict[str, int] = {}
        exec(example, scope)
        found.append(scope["found"])
    assert found == [1, 2]
    assert examples[0].co_filename == str(page)


def test_a_page_without_code_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("Nothing to run.\n")
    with pytest.raises(ValueError, match="no block of Python"):
        parametrize_examples(page)
