"""A folder of fake distributions at the head of ``sys.path``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_packs import Site

from kasmina_core import reset_default_registry


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty folder at the head of ``sys.path``; a ``kasmina`` without packs there hides the real one's."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    new = Site(tmp_path)
    new.install("kasmina", b"", version="0.0")
    new.distributions.clear()
    yield new
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def fresh_default_registry() -> Iterator[None]:
    """Let the test load the registry of the process, and the next one load its own."""
    reset_default_registry()
    yield
    reset_default_registry()
