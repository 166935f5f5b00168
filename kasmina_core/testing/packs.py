"""Checks of a pack: it loads, it imports no torch to list, and everything it offers passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from kasmina_core.checks.blueprints import check_blueprint_spec
from kasmina_core.checks.reports import CheckResult, CheckStatus
from kasmina_core.packs.checking import PackReport as PackReport
from kasmina_core.packs.checking import unusable
from kasmina_core.testing.offered import registry_of, registry_with, run_alone

if TYPE_CHECKING:
    import torch

    from kasmina_core.packs.discovery import PluginRegistry

_ALONE: Final = """
import sys
import pkgutil
import pluggy
from kasmina_core.packs import hookspecs

if "torch" in sys.modules:
    sys.exit("the interpreter itself starts with torch")
plugin = pkgutil.resolve_name(sys.argv[1])
manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
manager.add_hookspecs(hookspecs)
manager.register(plugin)
for offered in (*manager.hook.kasmina_blueprints(), *manager.hook.kasmina_hosts()):
    list(offered)
print("torch" in sys.modules)
"""


def check_pack(
    pack: str | ModuleType | object,
    *,
    host_options: Mapping[str, Mapping[str, Any]] | None = None,
    device: str | torch.device | None = None,
) -> PackReport:
    """Load a pack alone, check everything it offers, and report what was found.

    Each blueprint gets the registration checks, each host those of `check_host`. The pack itself (`PACK_CHECKS`):

    - ``loads``: it is installed, imported, and what its hooks return can be used.
    - ``offers_something``: a blueprint, a host, a gate check, a policy or a sink.
    - ``declarations_repeat``: asked again, its hooks declare the same names.
    - ``imports_no_torch``: its module and its declarations need no torch, so that listing stays quick. Seen in a
      process of its own; left out for an object that no module name leads to.

    Args:
        pack: The name of an installed pack, or a module or object with hooks.
        host_options: Options for the factories of hosts that need some, by the host's short name.
        device: Where modules run; ``None`` for blueprints on the CPU and, where there is one, CUDA, and hosts where
            they are built.

    Raises:
        UnknownNameError: If no pack of that name is installed.
    """
    from kasmina_core.testing.hosts import check_host

    if isinstance(pack, str):
        name, registry = pack, registry_of(pack)
        module = registry.pack(pack).module
    else:
        name, registry = registry_with(pack)
        module = pack.__name__ if isinstance(pack, ModuleType) else ""
    record = registry.pack(name)
    if record.reason is not None:
        rest = ("offers_something", "declarations_repeat", *(["imports_no_torch"] if module else []))
        unrun = [CheckResult(check, CheckStatus.NOT_RUN, hint="it does not load") for check in rest]
        unloaded = unusable(record)
        return replace(unloaded, checks=(*unloaded.checks, *unrun))
    again = registry_of(pack) if isinstance(pack, str) else registry_with(pack)[1]
    names = _declared(registry)
    checks = [
        CheckResult("loads", CheckStatus.PASSED, measured=record.state.value),
        _offers(names),
        _repeats(names, _declared(again)),
        *([_alone(module)] if module else []),
    ]
    reports = {
        entry.id: check_blueprint_spec(entry.spec, device=device, origin=record.origin)
        for entry in registry.blueprints.list_all()
    }
    hosts = {}
    for full in registry.hosts:
        spec = registry.hosts.get(full)
        report = check_host(spec, options=(host_options or {}).get(spec.name), device=device)
        hosts[full] = replace(report, host=full, origin=record.origin)
    return PackReport(name, record.origin, tuple(checks), reports, hosts)


def _declared(registry: PluginRegistry) -> list[str]:
    return [
        *(topology for record in registry.packs for topology in record.topologies),
        *(entry.id for entry in registry.blueprints.list_all()),
        *registry.hosts,
        *(check.name for check in registry.gate_checks()),
        *registry.policies(),
        *registry.sinks(),
    ]


def _offers(names: Sequence[str]) -> CheckResult:
    return CheckResult.judged(
        "offers_something",
        bool(names),
        "offers nothing",
        "Return a BlueprintSpec from kasmina_blueprints, or a HostSpec from kasmina_hosts.",
        expected="at least one declaration",
        measured=f"{len(names)} declarations",
    )


def _repeats(first: Sequence[str], second: Sequence[str]) -> CheckResult:
    return CheckResult.judged(
        "declarations_repeat",
        list(first) == list(second),
        "declares something else when it is asked again",
        "Return a new list at each call; a generator that is kept is empty the second time.",
        expected=", ".join(first) or "no names",
        measured=", ".join(second) or "no names",
    )


def _alone(module: str) -> CheckResult:
    """Import the pack in a fresh process and see whether torch came with it."""
    name = "imports_no_torch"
    done = run_alone(_ALONE, module)
    answer = done.stdout.strip().rpartition("\n")[2]
    if done.returncode or answer not in ("True", "False"):
        lines = done.stderr.strip().splitlines() or ["no output"]
        why = f"it cannot be imported in a new process: {lines[-1]}"
        return CheckResult(name, CheckStatus.NOT_RUN, hint=why)
    return CheckResult.judged(
        name,
        answer == "False",
        "imports torch to say what it offers",
        "Name factories as text, 'package.module:attribute', and import torch in that module only.",
        expected="declarations without torch",
        measured="torch was imported" if answer == "True" else "torch was not imported",
    )
