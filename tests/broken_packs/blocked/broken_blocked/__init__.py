"""There is nothing wrong with it but that the user blocks it: it must never be imported."""

from __future__ import annotations

raise AssertionError("this pack must not be imported")
