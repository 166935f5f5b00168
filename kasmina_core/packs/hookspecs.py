"""Hooks of packs. Each returns declarations; none is called from ``forward``.

A pack is a module or object with functions marked `hookimpl`, named by one entry point of the group
``kasmina.plugins``:

>>> class MyPack:
...     @hookimpl
...     def kasmina_blueprints(self):
...         return [BlueprintSpec("scale", Topology.CNN, "my_pack.seeds:Scale", lambda dim: dim)]

An entry point of the same name in the group ``kasmina.api`` declares the version of these hooks that the pack is written
for; without one it counts as ``v1``. In its ``pyproject.toml``:

```toml
[project.entry-points."kasmina.plugins"]
mine = "my_pack"
[project.entry-points."kasmina.api"]
mine = "v1"
```

That version, and what the package requires, are compared with what is installed before any of its code is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from kasmina_core.blueprints.declarations import BlueprintSpec, HostSpec
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    from kasmina_core.gates.checks import GateCheckSpec
    from kasmina_core.policies.protocol import Policy

__all__ = ["BlueprintSpec", "HostSpec", "Topology", "hookimpl", "hookspec"]

PROJECT_NAME = "kasmina"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def kasmina_topologies() -> Iterable[Topology]:  # type: ignore[empty-body]  # a hook declaration
    """Return the topologies that the pack adds; it is called before the hooks for blueprints and hosts.

    Each becomes known by its name, which belongs to one pack. Blueprints and hosts of other packs may be for it: they
    import it from this one, and do not return it again.

    >>> GRAPH = Topology.declare("graph", "bnf", width="f")  # (b, n, f): nodes without an order
    >>> @hookimpl
    ... def kasmina_topologies():
    ...     return [GRAPH]
    """


@hookspec
def kasmina_blueprints() -> Iterable[BlueprintSpec]:  # type: ignore[empty-body]  # a hook declaration
    """Return the blueprints that the pack offers.

    >>> @hookimpl
    ... def kasmina_blueprints():
    ...     return [BlueprintSpec("scale", Topology.CNN, "my_pack.seeds:Scale", lambda dim: dim)]
    """


@hookspec
def kasmina_hosts() -> Iterable[HostSpec]:  # type: ignore[empty-body]  # a hook declaration
    """Return the hosts that the pack offers.

    >>> @hookimpl
    ... def kasmina_hosts():
    ...     return [HostSpec("tiny", "my_pack.hosts:TinyHost", Topology.CNN)]
    """


@hookspec
def kasmina_gate_checks() -> Iterable[GateCheckSpec]:  # type: ignore[empty-body]  # a hook declaration
    """Return further checks for gates. They may veto a transition, never force one.

    They judge every seed of a model whose registry holds the pack, unless ``GrowthConfig(pack_gate_checks=False)``
    leaves them out.

    >>> @hookimpl
    ... def kasmina_gate_checks():
    ...     from kasmina_core import GateCheckSpec, GateLevel
    ...     return [GateCheckSpec("not_on_friday", (GateLevel.G5,), lambda evidence: 1.0, minimum=1.0)]
    """


@hookspec
def kasmina_policies() -> Mapping[str, Callable[..., Policy]]:  # type: ignore[empty-body]  # a hook declaration
    """Return policies by name.

    >>> @hookimpl
    ... def kasmina_policies():
    ...     from kasmina_core import PlateauPolicy
    ...     return {"eager": lambda **options: PlateauPolicy(patience=1, **options)}
    """


@hookspec
def kasmina_tasks() -> Mapping[str, Callable[..., Any]]:  # type: ignore[empty-body]  # a hook declaration
    """Return tasks by name, for ``kasmina grow --task mine:rings``.

    The value returns a `Task`; it is called with ``seed`` and ``data_dir`` if it takes them, when somebody names it.

    >>> @hookimpl
    ... def kasmina_tasks():
    ...     from kasmina_core.experiments.example_task import rings
    ...     return {"rings": rings}
    """


@hookspec
def kasmina_sinks(config: Mapping[str, Any]) -> Mapping[str, Callable[..., Any]]:  # type: ignore[empty-body]  # a hook declaration
    """Return telemetry sinks by name; one is made only when somebody names it.

    ``Telemetry(["mine:print"], sink_config={...})`` does, and ``kasmina grow --sink mine:print``. The value is called
    without arguments and returns a `Sink` or a function of one event.

    Args:
        config: The user's settings for sinks; the command gives ``task``, ``seed`` and ``folder``, that of the
            run, which is made before the first event.

    >>> @hookimpl
    ... def kasmina_sinks(config):
    ...     return {"print": lambda: print}
    """
