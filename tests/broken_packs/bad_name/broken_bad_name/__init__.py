"""Its entry point has a name that no pack can have."""

from __future__ import annotations

raise AssertionError("this pack must not be imported")
