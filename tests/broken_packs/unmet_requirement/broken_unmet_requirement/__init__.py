"""Requires what is not installed: told from the metadata, and never imported."""

from __future__ import annotations

raise AssertionError("this pack must not be imported")
