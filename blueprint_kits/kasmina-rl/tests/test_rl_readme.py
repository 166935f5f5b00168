"""The code of the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = dict(re.findall(r"<!-- code: (\w+) -->\n```python\n(.*?)```", README.read_text(), re.DOTALL))


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_the_code_of_the_readme_runs(name, capsys):
    assert set(BLOCKS) == {"events", "play"}
    exec(compile(BLOCKS[name], name, "exec"), {"__name__": "readme"})
    if name == "play":
        assert "of the budget, value" in capsys.readouterr().out
