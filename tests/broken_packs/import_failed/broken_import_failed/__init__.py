"""Imports what does not exist."""

from __future__ import annotations

import kasmina_no_such_module  # noqa: F401  # not installed, on purpose
