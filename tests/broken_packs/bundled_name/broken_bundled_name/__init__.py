"""Claims the name of a bundled pack."""

from __future__ import annotations

raise AssertionError("this pack must not be imported")
