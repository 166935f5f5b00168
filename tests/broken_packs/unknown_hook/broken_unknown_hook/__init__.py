"""Its hook has a name that does not exist: the ``s`` is missing."""

from __future__ import annotations

from collections.abc import Iterable

from kasmina_core import BlueprintSpec, Topology, hookimpl


@hookimpl
def kasmina_blueprint() -> Iterable[BlueprintSpec]:
    """Return a seed that nobody will ask for."""
    return [BlueprintSpec("scale", Topology.CNN, "broken_unknown_hook.seeds:Scale", lambda dim: dim)]
