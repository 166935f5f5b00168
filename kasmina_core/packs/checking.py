"""Checks of installed packs, in this process or each pack in its own child process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

from kasmina_core.blueprints.declarations import import_factory
from kasmina_core.checks.reports import CheckResult, CheckStatus, Report, ValidationReport
from kasmina_core.errors import KasminaError, PluginError, UnknownNameError
from kasmina_core.packs.scanning import PackRecord, PackState, list_packs
from kasmina_core.packs.switches import ENVIRONMENT, Switches

Tell = Callable[[str], None]
"""Called with the id of what is checked next."""

GIB: Final = 1 << 30

_CHILD: Final = (
    "import json, sys; order = json.loads(sys.stdin.readline()); sys.path[:] = order['path']; "
    "from kasmina_core.packs.checking import answer; answer(order)"
)
_LAST_WORDS: Final = 12


@final
@dataclass(frozen=True)
class PackReport(Report):
    """Results of the checks of one pack, or of one claim to its name.

    Attributes:
        pack: Name of the pack.
        origin: The distribution and version that installed it; its name if it came from none.
        checks: Checks of the pack itself: that it loads, that its hosts can be imported, that its process lives.
        blueprints: The report of each blueprint, by full id.
        hosts: The report of each host, by full id, where hosts were built and run.
        state: See `PackState`.
        named: Whether the user asked for it by name.
    """

    kind = "pack"
    error = PluginError
    pack: str
    origin: str
    checks: tuple[CheckResult, ...]
    blueprints: Mapping[str, ValidationReport] = field(default_factory=dict)
    hosts: Mapping[str, Report] = field(default_factory=dict)
    state: PackState = PackState.ACTIVE
    named: bool = True

    @property
    def is_skipped(self) -> bool:
        """Whether a switch keeps it out and nobody asked for it."""
        return self.state is PackState.BLOCKED and not self.named

    @property
    def children(self) -> tuple[Report, ...]:
        """The reports of its blueprints and hosts."""
        return (*self.blueprints.values(), *self.hosts.values())

    @property
    def subject(self) -> str:
        """The pack as the start of a sentence."""
        return f"Pack '{self.pack}' ({self.origin})"

    @property
    def headline(self) -> str:
        """The pack and the verdict in one line."""
        return f"{self.pack} ({self.origin}): {self.verdict.value}"


def installed_packs() -> list[PackRecord]:
    """Return the installed packs from metadata, including those that are not loaded automatically."""
    return list_packs(replace(Switches.from_environment(), autoload=True))


# -- in this process --------------------------------------------------------------------------------------------------


def check_pack_here(
    name: str,
    ids: Sequence[str],
    *,
    named: bool,
    device: str | None,
    tell: Tell,
    keep: Callable[[str, ValidationReport], None] | None = None,
) -> list[PackReport]:
    """Load one installed pack and run all checks of its blueprints.

    Args:
        name: Name of the pack.
        ids: Full ids of the blueprints to check; all if empty.
        named: Whether the user asked for it.
        device: See `check_blueprint_spec`.
        tell: Called with each id before its checks run.
        keep: Called with each id and report as soon as it is made.

    Raises:
        UnknownNameError: If the pack does not offer an id.
    """
    tell(name)
    claims = [record for record in installed_packs() if record.name == name]
    if claims and all(record.state is not PackState.DISCOVERED for record in claims):
        return [unusable(record, named) for record in claims]

    import torch  # noqa: F401  # so that the registry keeps its settings while the pack is imported

    from kasmina_core.checks.blueprints import check_blueprint_spec
    from kasmina_core.packs.discovery import PluginRegistry

    switches = replace(Switches.from_environment(), strict=False)
    registry = PluginRegistry(checks=False, **{key: getattr(switches, key) for key in ENVIRONMENT})
    with contextlib.suppress(PluginError):  # the record keeps the cause
        registry.load_pack(name)
    outcomes = []
    for record in [r for r in registry.packs if r.name == name]:
        if record.state is not PackState.ACTIVE:
            outcomes.append(unusable(record, named))
            continue
        checks = [CheckResult("loads", CheckStatus.PASSED, measured="active")]
        if not ids:
            for full in record.hosts:
                tell(full)
                checks.append(_check_host_factory(full, registry.hosts.get(full).factory))
        reports = {}
        for full in ids or record.blueprints:
            try:
                spec = registry.blueprints.get(full).spec
            except PluginError as error:
                checks.append(CheckResult("blueprint", CheckStatus.NOT_RUN, where=full, hint=str(error)))
                continue
            tell(full)
            reports[full] = check_blueprint_spec(spec, device=device, origin=record.origin)
            if keep is not None:
                keep(full, reports[full])
        outcomes.append(
            PackReport(name, record.origin, tuple(checks), reports, state=record.state, named=named)
        )
    return outcomes


def unusable(record: PackRecord, named: bool = True) -> PackReport:
    """Return the report on a pack that cannot be used, or that a switch keeps out."""
    blocked = record.state is PackState.BLOCKED
    check = CheckResult(
        "loads",
        CheckStatus.NOT_RUN if blocked else CheckStatus.FAILED,
        expected="a pack that can be used",
        measured=record.reason.value if record.reason is not None else record.state.value,
        hint=record.cause,
        claim=f"is not available ({record.state.value})",
        error=record.error,
    )
    return PackReport(record.name, record.origin, (check,), state=record.state, named=named)


def _check_host_factory(full: str, factory: Any) -> CheckResult:
    error: KasminaError | None = None
    try:
        import_factory(f"Host '{full}'", factory)
    except KasminaError as raised:
        error = raised
    return CheckResult.judged(
        "host_factory",
        error is None,
        "offers a host that cannot be built",
        "factory reads 'package.module:attribute'; what it imports is a requirement of the pack.",
        where=full,
        expected="a factory that can be imported",
        measured=str(error or "imported"),
        error=error,
    )


# -- in a child process -----------------------------------------------------------------------------------------------


def check_pack_apart(
    name: str, ids: Sequence[str], *, named: bool, device: str | None, tell: Tell, timeout: float, memory: int
) -> list[PackReport]:
    """Check one installed pack as `check_pack_here` does, in a process whose end is not the end of this one.

    Args, in addition to those of `check_pack_here`:
        timeout: Seconds after which the process is ended.
        memory: Bytes of memory that it may use, where the system can limit that.

    Raises:
        UnknownNameError: If the pack does not offer an id.
    """
    with tempfile.TemporaryDirectory(prefix="kasmina-check-") as folder:
        answers, output = Path(folder, "answers"), Path(folder, "output")
        answers.touch()
        asked = {"name": name, "ids": list(ids), "named": named, "device": device}
        order = {"path": sys.path, "answers": str(answers), "memory": memory, "asked": asked}
        listener = _Listener(answers, tell)
        with open(output, "wb") as file:
            ended = _run_child(order, file, listener, timeout)
        listener.read()
        said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if listener.unknown:
        raise UnknownNameError(listener.unknown)
    life = CheckResult("own_process", CheckStatus.PASSED, measured="ended by itself")
    if listener.is_complete:
        return [replace(outcome, checks=(*outcome.checks, life)) for outcome in listener.outcomes]
    at = f" while checking {listener.last}" if listener.last else ""
    words = "\n".join(_last_words(said))
    life = CheckResult(
        "own_process",
        CheckStatus.FAILED,
        where=listener.last,
        expected="a process that ends by itself",
        measured=f"{ended}{at}",
        hint="Its last words:\n" + words if words else "It printed nothing.",
        claim="ended the process that checked it",
    )
    records = [record for record in installed_packs() if record.name == name]
    origin = records[0].origin if records else name
    return [PackReport(name, origin, (life,), listener.reports, state=PackState.FAILED, named=named)]


def _last_words(said: Sequence[str]) -> Sequence[str]:
    """Return Python's report of a crash, else the last lines."""
    for number, line in enumerate(said):
        if line.startswith(("Fatal Python error", "Traceback (most recent")):
            return said[number : number + _LAST_WORDS]
    return said[-_LAST_WORDS:]


def _run_child(order: Mapping[str, Any], output: Any, listener: _Listener, timeout: float) -> str:
    """Run the child to its end, and return how it ended."""
    deadline = time.monotonic() + timeout
    child = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    try:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(order).encode() + b"\n")
            child.stdin.close()
        while child.poll() is None:
            if time.monotonic() > deadline:
                return f"ended by us after {timeout:g} seconds"
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.05)
            listener.read()
    finally:
        _end(child)
    if child.returncode < 0:
        try:
            return f"killed by {signal.Signals(-child.returncode).name}"
        except ValueError:
            return f"killed by signal {-child.returncode}"
    return f"exit status {child.returncode}"


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.wait()


class _Listener:
    """Reads what the child has written so far, one line of JSON per message."""

    def __init__(self, path: Path, tell: Tell) -> None:
        self._path = path
        self._tell = tell
        self._read = 0
        self.last = ""
        self.unknown = ""
        self.is_complete = False
        self.reports: dict[str, ValidationReport] = {}
        self.outcomes: list[PackReport] = []

    def read(self) -> None:
        with open(self._path, "rb") as file:
            file.seek(self._read)
            lines = file.read().split(b"\n")
        for line in lines[:-1]:  # the last one is not complete yet
            self._read += len(line) + 1
            self._take(json.loads(line))

    def _take(self, told: dict[str, Any]) -> None:
        match told:
            case {"begin": str(full)}:
                self.last = full
                self._tell(full)
            case {"id": str(full), "report": dict(data)}:
                self.reports[full] = ValidationReport.from_dict(data)
            case {"outcome": dict(data)}:
                self.outcomes.append(PackReport.from_dict(data))
            case {"unknown": str(message)}:
                self.unknown = message
            case {"end": True}:
                self.is_complete = True


def answer(order: Mapping[str, Any]) -> None:
    """In the child: check the pack, and write what is found as it is found."""
    _limit_memory(order["memory"])
    with open(order["answers"], "a", encoding="utf-8", buffering=1) as file:

        def write(**told: Any) -> None:
            file.write(json.dumps(told) + "\n")
            file.flush()

        def keep(full: str, report: ValidationReport) -> None:
            write(id=full, report=report.to_dict())

        try:
            outcomes = check_pack_here(**order["asked"], tell=lambda full: write(begin=full), keep=keep)
        except UnknownNameError as error:
            write(unknown=str(error))
            return
        for outcome in outcomes:
            write(outcome=outcome.to_dict())
        write(end=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # threads that a pack started do not keep the process


def _limit_memory(size: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    # Not RLIMIT_AS: CUDA reserves far more addresses than it uses memory.
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (size, hard))


def default_memory() -> int:
    """Return three quarters of the memory of this machine or container, or 8 GiB where it is unknown."""
    sizes = []
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes) * 3 // 4 if sizes else 8 * GIB
