"""What the site of the docs holds: every public name, once, and every page."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import kasmina_core

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_has_every_public_name_once() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md")]
    described = Counter(
        name for page in pages for name in re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.MULTILINE)
    )
    listed = Counter(name for page in pages for name in re.findall(r"^   (\w+)$", page, re.MULTILINE))
    public = [name for name in kasmina_core.__all__ if not name.startswith("__")]
    assert described == listed == Counter(public)


def test_the_index_leads_to_every_page() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    named = {
        line
        for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
        for line in block.splitlines()
    }
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert pages - named == set()


def test_every_warning_and_error_is_explained() -> None:
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    raised = [
        name
        for name in kasmina_core.__all__
        if isinstance(kind := getattr(kasmina_core, name), type) and issubclass(kind, Exception)
    ]
    assert [name for name in raised if f"`{name}`" not in text] == []
