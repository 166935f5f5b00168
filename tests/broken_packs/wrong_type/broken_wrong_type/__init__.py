"""Its hook returns a name where a declaration is wanted."""

from __future__ import annotations

from collections.abc import Iterable

from kasmina_core import hookimpl


@hookimpl
def kasmina_blueprints() -> Iterable[str]:
    """Return names, which are no declarations."""
    return ["scale"]
