"""Its seed does not have the size that it declares."""

from __future__ import annotations

from collections.abc import Iterable

from kasmina_core import BlueprintSpec, Topology, hookimpl


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return a seed of ``dim`` parameters, declared with twice as many."""
    return [BlueprintSpec("scale", Topology.CNN, "broken_check_failed.seeds:Scale", lambda dim: 2 * dim)]
