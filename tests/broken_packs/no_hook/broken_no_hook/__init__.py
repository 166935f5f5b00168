"""Its hook lacks the mark ``@hookimpl``."""

from __future__ import annotations

from collections.abc import Iterable

from kasmina_core import BlueprintSpec, Topology


def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return a seed that nobody will ask for."""
    return [BlueprintSpec("scale", Topology.CNN, "broken_no_hook.seeds:Scale", lambda dim: dim)]
