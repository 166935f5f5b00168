"""The code of a README as test cases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def parametrize_examples(page: Path) -> pytest.MarkDecorator:
    """Make a test run once for each Python block of a Markdown page, as the argument ``example``: compiled code.

    Raises:
        ValueError: If the page has none.
    """
    import pytest

    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    if not blocks:
        raise ValueError(f"{page} has no block of Python to run.")
    return pytest.mark.parametrize("example", [compile(block, str(page), "exec") for block in blocks])
