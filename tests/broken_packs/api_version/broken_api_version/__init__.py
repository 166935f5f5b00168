"""Written for a plugin API that does not exist yet: told from the metadata, and never imported."""

from __future__ import annotations

raise AssertionError("this pack must not be imported")
