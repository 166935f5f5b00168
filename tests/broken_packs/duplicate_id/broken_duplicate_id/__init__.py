"""Two of its seeds have one name."""

from __future__ import annotations

from collections.abc import Iterable

from kasmina_core import BlueprintSpec, Topology, hookimpl


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return one name twice."""
    return [
        BlueprintSpec("scale", Topology.CNN, "broken_duplicate_id.seeds:Scale", lambda dim: dim),
        BlueprintSpec(
            "scale", Topology.CNN, "broken_duplicate_id.seeds:Scale", lambda dim: dim, "the second"
        ),
    ]
