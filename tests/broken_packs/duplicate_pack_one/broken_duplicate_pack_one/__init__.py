"""Claims the name of another distribution's pack."""

from __future__ import annotations

raise AssertionError("this pack must not be imported")
