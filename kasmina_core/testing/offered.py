"""The declarations behind a name in a test: a spec, an id or a pack."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import final

from kasmina_core.blueprints.declarations import NAME_PATTERN, BlueprintSpec, HostSpec
from kasmina_core.errors import PluginError, UnknownNameError, did_you_mean
from kasmina_core.packs.discovery import PluginRegistry


@final
@dataclass(frozen=True, slots=True)
class OfferedBlueprint:
    """A blueprint, the name by which a report or a test case calls it, and who offers it."""

    label: str
    spec: BlueprintSpec
    origin: str = ""


def registry_of(pack: str) -> PluginRegistry:
    """Return a registry in which one installed pack is loaded, without registration checks, and no other is.

    Raises:
        UnknownNameError: If no pack of that name is installed.
    """
    registry = PluginRegistry(checks=False, allow={pack})
    registry.load_installed()
    names = {record.name for record in registry.packs}
    if pack not in names:
        raise UnknownNameError(
            f"No pack '{pack}' is installed.{did_you_mean(pack, names)} A pack that is not installed is given as its "
            "module."
        )
    return registry


def registry_with(plugin: object) -> tuple[str, PluginRegistry]:
    """Return a name made of a module or object with hooks, and a registry that holds it alone as the pack of that name.

    A pack that cannot be used is in the registry with its cause.
    """
    name = pack_name_of(plugin)
    registry = PluginRegistry(checks=False)
    with suppress(PluginError):  # the record keeps the cause
        registry.register_pack(name, plugin)
    return name, registry


def pack_name_of(plugin: object) -> str:
    """Return a usable pack name for a module or object.

    >>> import kasmina_core.hosts
    >>> pack_name_of(kasmina_core.hosts)
    'hosts'
    """
    full = plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__name__
    name = full.rpartition(".")[2].lower()
    return name if NAME_PATTERN.fullmatch(name) else "pack"


def run_alone(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a child process with the ``sys.path`` of this one."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def blueprints_of(given: object) -> list[OfferedBlueprint]:
    """Return the blueprints that ``given`` names.

    Args:
        given: A spec, a full id ``pack:name``, the name of an installed pack, a module or object with the hook
            ``kasmina_blueprints``, or an iterable of these.

    Raises:
        UnknownNameError: If a name is nobody's.
        PluginError: If a pack cannot be used.
    """
    if isinstance(given, BlueprintSpec):
        return [OfferedBlueprint(given.name, given)]
    if isinstance(given, str):
        pack, _, short = given.partition(":")
        registry = registry_of(pack)
        if short:
            entry = registry.blueprints.get(given)
            return [OfferedBlueprint(entry.id, entry.spec, entry.origin)]
        return _all_of(pack, registry, by_id=True)
    if hasattr(given, "kasmina_blueprints"):
        name, registry = registry_with(given)
        return _all_of(name, registry, by_id=False)
    if isinstance(given, Iterable):
        return [offered for part in given for offered in blueprints_of(part)]
    raise TypeError(
        f"{given!r} names no blueprints: give a BlueprintSpec, an id, the name of an installed pack, a module with "
        "kasmina_blueprints, or a list of these."
    )


def _all_of(pack: str, registry: PluginRegistry, *, by_id: bool) -> list[OfferedBlueprint]:
    record = registry.pack(pack)
    if record.reason is not None:
        cause = f"Pack '{pack}' ({record.origin}) cannot be used.\n{record.cause}"
        raise PluginError(cause) from record.error
    return [
        OfferedBlueprint(entry.id if by_id else entry.spec.name, entry.spec, entry.origin if by_id else "")
        for entry in registry.blueprints.list_all()
    ]


def host_of(host_id: str) -> tuple[HostSpec, str]:
    """Return the host of a full id ``pack:name``, and who offers it.

    Raises:
        UnknownNameError: If nobody offers it.
        PluginError: If its pack cannot be used.
    """
    pack, colon, _ = host_id.partition(":")
    if not colon:
        raise UnknownNameError(f"'{host_id}' is not the full id of a host: write 'pack:name'.")
    registry = registry_of(pack)
    return registry.hosts.get(host_id), registry.pack(pack).origin
