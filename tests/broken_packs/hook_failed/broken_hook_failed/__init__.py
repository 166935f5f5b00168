"""Its hook raises."""

from __future__ import annotations

from collections.abc import Iterable

from kasmina_core import BlueprintSpec, hookimpl


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Raise."""
    raise OSError("the list of seeds is on a disk that is full")
