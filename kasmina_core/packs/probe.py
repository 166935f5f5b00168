"""Import of one pack in a child process: its duration, whether it imports torch, and whether its hooks answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import importlib_metadata

from kasmina_core.packs.scanning import GROUP, PackReason, PackRecord, PackState

_CHILD: Final = (
    "import json, sys; order = json.loads(sys.stdin.readline()); sys.path[:] = order['path']; "
    "from kasmina_core.packs.probe import answer; answer(order)"
)


@final
@dataclass(frozen=True, slots=True)
class Probe:
    """Result of importing a pack alone and calling its hooks.

    Attributes:
        reason: Why it could not be active, as a code; ``None`` if nothing was wrong.
        cause: Likewise, for people.
        seconds: How long the import took, beyond that of the library; ``None`` if it did not end.
        imports_torch: Whether torch was there afterwards.
        module_is_gone: Whether the module that the metadata names does not exist.
        ended_process: Whether it ended the process that imported it, or did not end itself.
    """

    reason: PackReason | None = None
    cause: str = ""
    seconds: float | None = None
    imports_torch: bool = False
    module_is_gone: bool = False
    ended_process: bool = False

    @property
    def state(self) -> PackState:
        """`PackState.DISCOVERED` if nothing was wrong, else what the pack would be."""
        return PackState.DISCOVERED if self.reason is None else self.reason.state


def probe(record: PackRecord, timeout: float) -> Probe:
    """Import a pack in a child process with the ``sys.path`` of this one; the registration checks do not run.

    Args:
        record: The pack.
        timeout: Seconds after which it is given up.
    """
    order = {"path": sys.path, "name": record.name, "module": record.module}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(order) + "\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _ended(f"Its import did not end within {timeout:g} seconds")
    except OSError as error:  # no interpreter to start
        return Probe(cause=f"It was not imported: {error}")
    try:
        told: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines()
        return _ended(
            f"Its import ended the process, exit status {done.returncode}" + (f": {said[-1]}" if said else "")
        )
    reason = told.pop("reason")
    return Probe(PackReason(reason) if reason else None, **told)  # type: ignore[call-arg]  # it looks a member up


def _ended(cause: str) -> Probe:
    return Probe(PackReason.IMPORT_FAILED, cause, ended_process=True)


def answer(order: Mapping[str, str]) -> None:
    """In the child: import the pack, ask it, write a line of JSON, and end without waiting for its threads."""
    ours = os.dup(1)
    os.dup2(2, 1)  # what a pack prints is not the answer
    from kasmina_core.packs.offers import Offer, RefusalError, collect_offer, import_plugin

    entry = importlib_metadata.EntryPoint(order["name"], order["module"], GROUP)
    told: dict[str, Any] = {"reason": None}
    begun = time.perf_counter()
    try:
        plugin = import_plugin(entry.load)
        told["seconds"] = time.perf_counter() - begun
        told["imports_torch"] = "torch" in sys.modules
        collect_offer(plugin, Offer())
    except RefusalError as refusal:
        told.setdefault("seconds", time.perf_counter() - begun)
        told.setdefault("imports_torch", "torch" in sys.modules)
        told |= {"reason": refusal.reason, "cause": refusal.cause}
        told["module_is_gone"] = _is_gone(order["module"], refusal.error)
    with os.fdopen(ours, "w") as out:
        out.write(json.dumps(told))
    os._exit(0)


def _is_gone(value: str, error: BaseException | None) -> bool:
    module = value.partition(":")[0].strip()
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return False
    return f"{module}.".startswith(f"{error.name}.")
