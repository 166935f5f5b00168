"""Its ``entry_points.txt`` does not parse once it is installed (see ``dist-info`` beside this)."""

from __future__ import annotations

raise AssertionError("this pack must not be imported")
