"""Diagnosis of the installed packs: faults, and what to do about them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final, final

import importlib_metadata

from kasmina_core.blueprints.foreign import cleaned
from kasmina_core.errors import SwitchError, did_you_mean
from kasmina_core.packs.compatibility import API_GROUP
from kasmina_core.packs.probe import Probe, probe
from kasmina_core.packs.scanning import (
    GROUP,
    PackReason,
    PackRecord,
    PackState,
    distribution_name,
    every_distribution,
    is_left_over,
    list_packs,
)
from kasmina_core.packs.switches import ENVIRONMENT, Switches, normalized
from kasmina_core.records import Record

SLOW: Final = 0.5
"""Seconds of import from which a pack is called slow."""

_REPORT_IT: Final = (
    "Tell the author of {distribution}; until it is corrected, set KASMINA_PLUGINS_BLOCK={name}."
)
ADVICE: Final[Mapping[PackReason, str]] = {
    PackReason.DAMAGED_METADATA: "Uninstall {distribution}, and install it again from where you have it.",
    PackReason.BAD_NAME: _REPORT_IT.replace("{name}", "{distribution}"),  # the name itself no switch can hold
    PackReason.API_VERSION: "Install releases of kasmina and {distribution} that fit each other.",
    PackReason.UNMET_REQUIREMENT: "Install what is required, or a newer release of {distribution}.",
    PackReason.DUPLICATE_PACK: "Uninstall all but one, or set KASMINA_PLUGINS_PREFER to the distribution that must win.",
    PackReason.BUNDLED_NAME: "pip uninstall {distribution}, or ask its author to rename the pack.",
    PackReason.IMPORT_FAILED: "To see where, import {module} yourself. " + _REPORT_IT,
    PackReason.NO_HOOK: _REPORT_IT,
    PackReason.UNKNOWN_HOOK: "Install releases of kasmina and {distribution} that fit each other. Else: "
    + _REPORT_IT,
    PackReason.HOOK_FAILED: _REPORT_IT,
    PackReason.WRONG_TYPE: _REPORT_IT,
    PackReason.DUPLICATE_ID: _REPORT_IT,
    PackReason.GLOBAL_STATE: _REPORT_IT,
    PackReason.CHECK_FAILED: "See kasmina plugins check {name}. " + _REPORT_IT,
}
"""Advice for a pack that cannot be used, by reason."""


@final
class Severity(StrEnum):
    """Rank of a finding: something does not work, or could be better."""

    PROBLEM = "problem"
    ADVICE = "advice"


@final
@dataclass(frozen=True, slots=True)
class PackFinding(Record):
    """One fault, or one piece of advice.

    Attributes:
        severity: Whether something does not work.
        code: What kind of thing it is: the value of a `PackReason`, or ``bad_switch``, ``misspelt_switch``,
            ``switch_names_nothing``, ``no_own_metadata``, ``unreadable_place``, ``stale_metadata``, ``left_over_metadata``,
            ``misspelt_group``, ``offers_nothing``, ``duplicate_distribution``, ``slow_import``, ``imports_torch``.
        subject: The pack, distribution or switch it is about.
        what: What was found, for people.
        todo: What to do.
    """

    severity: Severity
    code: str
    subject: str
    what: str
    todo: str

    def __post_init__(self) -> None:
        for name in ("subject", "what", "todo"):  # metadata may hold anything, and is printed
            object.__setattr__(self, name, cleaned(getattr(self, name), 4000, lines=name != "subject"))


_problem = partial(PackFinding, Severity.PROBLEM)
_advice = partial(PackFinding, Severity.ADVICE)


@final
@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of `diagnose`.

    Attributes:
        switches: Those in force.
        packs: Every pack, with what its import showed where it was imported.
        findings: Problems first.
    """

    switches: Switches
    packs: tuple[tuple[PackRecord, Probe | None], ...]
    findings: tuple[PackFinding, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether there is no problem; there may be advice."""
        return not any(finding.severity is Severity.PROBLEM for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "healthy": self.is_healthy,
            "switches": self.switches.in_force(),
            "packs": [
                record.to_dict()
                | {
                    "import_seconds": tried.seconds if tried is not None else None,
                    "imports_torch": tried.imports_torch if tried is not None else None,
                }
                for record, tried in self.packs
            ],
            "findings": [finding.to_dict() for finding in self.findings],
        }


def diagnose(
    *,
    environ: Mapping[str, str] | None = None,
    checks: bool = False,
    slow: float = SLOW,
    timeout: float = 60.0,
    progress: Callable[[str], None] = lambda name: None,
) -> Diagnosis:
    """Look for what is wrong with the installed packs.

    Each pack that no switch keeps out is imported in a process of its own. A blocked pack is not imported.

    Args:
        environ: Variables to read the switches from instead of those of the process.
        checks: Whether to load the packs in this process as well, with the registration checks of their blueprints.
        slow: Seconds of import from which a pack is called slow.
        timeout: Seconds after which an import is given up.
        progress: Called with the name of each pack before it is imported.
    """
    environ = os.environ if environ is None else environ
    findings = list(_misspelt_switches(environ))
    try:
        switches = Switches.from_environment(environ)
    except SwitchError as error:
        switches = Switches()
        todo = "Correct it. Until then nothing is loaded; here it was taken as not set, like all others."
        findings.append(_problem("bad_switch", "environment", str(error), todo))
    places, unreadable = _places()
    findings += unreadable
    records = list_packs(switches)
    tried: dict[PackRecord, Probe] = {}
    for record in records:
        if record.state is PackState.DISCOVERED and record.reason is None:
            progress(record.name)
            tried[record] = probe(record, timeout)
    packs: list[_Tried] = []
    for record in records:
        result = tried.get(record)
        if result is not None and result.reason is not None:
            packs.append((record.refused(result.reason, result.cause), result))
        else:
            packs.append((record, result))
    if checks:
        packs = _checked(packs, switches)
    findings += _names_nothing(switches, [record for record, _ in packs], places)
    findings += _copies(places)
    for record, result in packs:
        findings += _of_pack(record, result, slow)
    findings.sort(key=lambda finding: finding.severity is not Severity.PROBLEM)
    return Diagnosis(switches, tuple(packs), tuple(dict.fromkeys(findings)))


_Tried = tuple[PackRecord, Probe | None]


def _checked(packs: Iterable[_Tried], switches: Switches) -> list[_Tried]:
    """Load the packs here, except those that would end this process."""
    from kasmina_core.packs.discovery import PluginRegistry

    packs = list(packs)
    deadly = {record.name for record, result in packs if result is not None and result.ended_process}
    given = {name: getattr(switches, name) for name in ENVIRONMENT}
    registry = PluginRegistry(**given | {"strict": False, "block": {*switches.block, *deadly}})
    registry.load_installed()
    loaded = {record.key: record for record in registry.packs if record.name not in deadly}
    return [(loaded.get(record.key, record), result) for record, result in packs]


# -- packs --------------------------------------------------------------------------------------------------------


def _of_pack(record: PackRecord, result: Probe | None, slow: float) -> Iterable[PackFinding]:
    if result is not None and result.module_is_gone:
        what = f"The metadata of '{record.origin}' names the module {record.module}, which does not exist."
        if held := _modules_of(record.distribution):
            wanted = record.module.partition(":")[0].strip()
            what += f" The distribution holds {', '.join(held[:8])}."
            todo = f"Correct its entry point in the group {GROUP}, and install it again.{did_you_mean(wanted, held)}"
        else:
            todo = f"pip uninstall {record.distribution}, or install it again."
        yield _problem("stale_metadata", record.name, what, todo)
    elif record.is_bad and record.reason is not None:
        advice = ADVICE[record.reason].format(
            distribution=record.distribution, name=record.name, module=record.module.partition(":")[0]
        )
        # A conflict of two packs is one finding, because its cause names both.
        what = record.cause if record.origin in record.cause else f"{record.origin}: {record.cause}"
        yield _problem(record.reason.value, record.name, what, advice)
    if result is None or result.seconds is None:
        return
    if result.imports_torch:
        what = f"{record.origin}: importing {record.module} imports torch ({result.seconds:.2f} s), also where nobody uses it."
        todo = "Ask its author to name factories as text, 'package.module:attribute', and to import torch there only."
        yield _advice("imports_torch", record.name, what, todo)
    elif result.seconds >= slow:
        what = f"{record.origin}: importing {record.module} takes {result.seconds:.2f} s."
        todo = f"See what takes the time: python -X importtime -c 'import {record.module.partition(':')[0]}'"
        yield _advice("slow_import", record.name, what, todo)


def _modules_of(distribution: str) -> list[str]:
    """Return the modules that are there of those that a distribution says it installed, the outer ones first."""
    try:
        files = importlib_metadata.files(distribution) or []
    except Exception:
        return []
    modules = set()
    for file in files:
        path = PurePosixPath(str(file))
        if path.suffix == ".py" and Path(str(file.locate())).exists():
            modules.add(".".join(path.with_suffix("").parts).removesuffix("__init__").rstrip("."))
    return sorted(modules - {""}, key=lambda module: (module.count("."), module))


# -- switches -----------------------------------------------------------------------------------------------------


def _misspelt_switches(environ: Mapping[str, str]) -> Iterable[PackFinding]:
    known = list(ENVIRONMENT.values())
    for variable in sorted(environ):
        if variable in known or not variable.upper().startswith("KASMINA"):
            continue
        if near := get_close_matches(variable.upper(), known, n=1, cutoff=0.85):
            what = f"{variable} is no switch, and does nothing."
            yield _problem("misspelt_switch", variable, what, f"Did you mean {near[0]}?")


def _names_nothing(
    switches: Switches, records: Iterable[PackRecord], places: Mapping[str, list[str]]
) -> Iterable[PackFinding]:
    packs: dict[str, set[str]] = {}
    for record in records:
        packs.setdefault(record.name, set()).update(record.offered, record.withheld)
    distributions = {normalized(record.distribution) for record in records}
    for name in ("allow", "block", "prefer"):
        for entry in sorted(getattr(switches, name) or ()):
            pack = entry.partition(":")[0]
            if (entry in packs and name != "prefer") or (
                ":" not in entry and normalized(entry) in distributions
            ):
                continue
            if ":" in entry and pack in packs and (not packs[pack] or entry in packs[pack]):
                continue  # what a pack offers is known only of those that were loaded
            installed = ":" not in entry and normalized(entry) in places
            what = f"{ENVIRONMENT[name]} names '{entry}': " + (
                "that distribution has no packs." if installed else "nothing of that name is installed."
            )
            known = [*packs, *distributions, *(full for ids in packs.values() for full in ids)]
            todo = f"Correct it, or take it out.{did_you_mean(entry, known)}"
            yield _advice("switch_names_nothing", entry, what, todo)


# -- distributions --------------------------------------------------------------------------------------------------


def _places() -> tuple[dict[str, list[str]], list[PackFinding]]:
    """Return where the metadata of each distribution that has packs, and of our own, lies; and what could not be read."""
    every: dict[str, list[str]] = {}
    with_packs = {"kasmina"}
    findings: list[PackFinding] = []

    def unreadable(error: Exception) -> None:
        what = f"Listing the installed distributions raised {type(error).__name__}: {error}"
        todo = "Packs that would have come after it are not found. Correct or remove what put that finder into sys.meta_path."
        findings.append(_problem("unreadable_place", "sys.meta_path", what, todo))

    for distribution in every_distribution(unreadable):
        try:
            where = str(getattr(distribution, "_path", "")) or repr(distribution)
            is_pack = GROUP in (distribution.read_text("entry_points.txt") or "")
            if is_left_over(distribution):
                if is_pack:
                    findings.append(_interrupted_upgrade(distribution.metadata["Name"], where))
                continue
            name = normalized(distribution_name(distribution))
            if where not in every.setdefault(name, []):
                every[name].append(where)
            if is_pack:
                with_packs.add(name)
            else:
                findings += _offering_nothing(distribution)
        except Exception:  # reported as damaged metadata if it is a pack's
            continue
    if "kasmina" not in every:
        what = "kasmina itself has no metadata here, so that the bundled packs are not found."
        todo = "Install it: pip install -e . in the checkout."
        findings.append(_problem("no_own_metadata", "kasmina", what, todo))
    return {name: every[name] for name in every if name in with_packs}, findings


def _interrupted_upgrade(name: str, where: str) -> PackFinding:
    what = (
        f"An interrupted upgrade of '{name}' left metadata behind, which pip and kasmina ignore:\n  {where}"
    )
    return _advice("left_over_metadata", name, what, "Delete that folder; keep the distribution.")


def _offering_nothing(distribution: importlib_metadata.Distribution) -> Iterable[PackFinding]:
    """Report a distribution that means to be a pack, judged by its requirements or entry points, and is none."""
    name = distribution.metadata["Name"]
    groups = {entry.group for entry in distribution.entry_points} - {GROUP, API_GROUP}
    near = sorted({*get_close_matches(GROUP, groups), *(g for g in groups if g.startswith("kasmina"))})
    declare = f'[project.entry-points."{GROUP}"] in its pyproject.toml, and install it again.'
    if near:
        what = f"Distribution '{name}' has entry points in the group {near[0]!r}, which nothing reads."
        yield _problem("misspelt_group", name, what, f"Did you mean '{GROUP}'? Write {declare}")
    elif any(re.match(r"kasmina(?![\w.-])(?!.*extra)", text, re.I) for text in distribution.requires or ()):
        what = f"Distribution '{name}' requires kasmina and offers no pack: it has no entry point for one."
        todo = f"If it only uses kasmina, nothing. If it is a pack, name its module under {declare}"
        yield _advice("offers_nothing", name, what, todo)


def _copies(places: Mapping[str, list[str]]) -> Iterable[PackFinding]:
    for name, wheres in sorted(places.items()):
        if len(wheres) < 2:
            continue
        rows = "".join(f"\n  {where}" for where in wheres)
        folders = [str(Path(where).resolve().parent) for where in wheres]
        if len(set(folders)) < len(folders):
            what = f"Distribution '{name}' has metadata more than once in one folder, left over from another version:{rows}"
            todo = f"pip uninstall {name}, delete what is left, and install it again."
            yield _problem("left_over_metadata", name, what, todo)
        else:
            what = f"Distribution '{name}' is found {len(wheres)} times; the first is used:{rows}"
            todo = "If the first is the one that you want, nothing. Else uninstall it, or change the order of sys.path."
            yield _advice("duplicate_distribution", name, what, todo)
