"""Installed packs, from the metadata of distributions alone: no pack is imported, and torch is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Annotated, Any, Final, Self, final

import importlib_metadata

from kasmina_core.blueprints.declarations import NAME_PATTERN, NAME_RULE
from kasmina_core.blueprints.foreign import cleaned
from kasmina_core.errors import NameConflictError
from kasmina_core.packs.compatibility import API_GROUP, Environment, UnreadableRequirementError, api_problem
from kasmina_core.packs.installed import (
    Installed,
    folder_name,
    is_plain,
    read_entry_points,
    read_file,
    read_header,
)
from kasmina_core.packs.switches import ENVIRONMENT, Switches, normalized
from kasmina_core.records import Mark, Record

GROUP: Final = "kasmina.plugins"
"""The entry-point group in which a distribution names its pack."""

_OWN_DISTRIBUTION: Final = "kasmina"  # names that it claims cannot be taken over


@final
class PackState(StrEnum):
    """State of a pack.

    - ``discovered``: its metadata names it; none of its code was imported.
    - ``active``: it is loaded and what it declares is registered.
    - ``blocked``: the user asked for it not to be loaded (see `Switches`); none of its code was imported.
    - ``incompatible``: it is written for another plugin API, or requires what is not installed, by its metadata: none
      of its code was imported. Or it implements hooks that this version does not have.
    - ``conflict``: something else claims its name, or two things in it have one name.
    - ``failed``: its import or one of its hooks raised.
    - ``invalid``: its metadata is damaged, it declares something unusable, or a blueprint fails its checks.
    """

    DISCOVERED = "discovered"
    ACTIVE = "active"
    BLOCKED = "blocked"
    INCOMPATIBLE = "incompatible"
    CONFLICT = "conflict"
    FAILED = "failed"
    INVALID = "invalid"


@final
class PackReason(StrEnum):
    """Reason why a pack is not active.

    - ``blocked``, ``not_allowed``, ``autoload_off``: the switch of that name keeps it from being loaded.
    - ``damaged_metadata``, ``bad_name``: its metadata cannot be read, or gives it a name that cannot be used.
    - ``api_version``: it declares a version of the plugin API that is not supported (see `kasmina_core.packs.hookspecs`).
    - ``unmet_requirement``: something that its metadata requires is not installed, or in another version.
    - ``duplicate_pack``: another distribution claims its name, or its module is loaded under another name.
    - ``bundled_name``: it claims the name of a bundled pack.
    - ``import_failed``: importing its module raised.
    - ``no_hook``: it implements no hook, or a hook lacks its mark.
    - ``unknown_hook``: it implements a hook that does not exist, or with an argument that does not.
    - ``hook_failed``: one of its hooks raised.
    - ``wrong_type``: a hook returned something else than declarations.
    - ``duplicate_id``: two things in it have one name.
    - ``global_state``: loading it changes what all modules share, such as a class of ``torch.nn`` or a global hook.
    - ``check_failed``: a blueprint failed the registration checks.
    """

    state: PackState
    """The state of a pack that is not active for this reason."""

    def __new__(cls, value: str, state: PackState) -> Self:
        member = str.__new__(cls, value)
        member._value_, member.state = value, state
        return member

    BLOCKED = "blocked", PackState.BLOCKED
    NOT_ALLOWED = "not_allowed", PackState.BLOCKED
    AUTOLOAD_OFF = "autoload_off", PackState.DISCOVERED
    DAMAGED_METADATA = "damaged_metadata", PackState.INVALID
    BAD_NAME = "bad_name", PackState.INVALID
    API_VERSION = "api_version", PackState.INCOMPATIBLE
    UNMET_REQUIREMENT = "unmet_requirement", PackState.INCOMPATIBLE
    DUPLICATE_PACK = "duplicate_pack", PackState.CONFLICT
    BUNDLED_NAME = "bundled_name", PackState.CONFLICT
    IMPORT_FAILED = "import_failed", PackState.FAILED
    NO_HOOK = "no_hook", PackState.INVALID
    UNKNOWN_HOOK = "unknown_hook", PackState.INCOMPATIBLE
    HOOK_FAILED = "hook_failed", PackState.FAILED
    WRONG_TYPE = "wrong_type", PackState.INVALID
    DUPLICATE_ID = "duplicate_id", PackState.CONFLICT
    GLOBAL_STATE = "global_state", PackState.INVALID
    CHECK_FAILED = "check_failed", PackState.INVALID


@final
@dataclass(frozen=True, slots=True)
class PackRecord(Record):
    """Record of one pack.

    Attributes:
        name: Its entry-point name: the part before the colon in its ids.
        module: What the entry point names.
        distribution: The distribution that installed it; empty for one registered by hand.
        version: Version of that distribution.
        state: See `PackState`.
        reason: Why it is not active, as a code; ``None`` if it is, or was not loaded yet.
        cause: Why it is not active, for people.
        topologies: Names of the topologies it adds; they are known only if it is active.
        blueprints: Ids of the blueprints it declared; likewise.
        hosts: Ids of the hosts it declared; likewise.
        gate_checks: Ids of its gate checks; likewise.
        policies: Ids of its policies; likewise.
        tasks: Ids of its tasks; likewise.
        withheld: Ids that a switch leaves out of what it offers.
        error: The exception behind ``cause``.
    """

    name: str
    module: str
    distribution: str = ""
    version: str = ""
    state: PackState = PackState.DISCOVERED
    reason: PackReason | None = None
    cause: str = ""
    topologies: tuple[str, ...] = ()
    blueprints: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    gate_checks: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()
    error: Annotated[BaseException | None, Mark.UNWRITTEN] = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("name", "module", "distribution", "version", "cause"):  # metadata may hold anything
            text = getattr(self, name)
            if (clean := cleaned(text, 4000, lines=True) if name == "cause" else cleaned(text)) != text:
                object.__setattr__(self, name, clean)

    def refused(self, reason: PackReason, cause: str, error: BaseException | None = None) -> PackRecord:
        """Return the record of this pack when it is not taken."""
        return replace(self, state=reason.state, reason=reason, cause=cause, error=error)

    @property
    def key(self) -> tuple[str, str, str]:
        """Name, distribution and module: no two claims share all three."""
        return self.name, self.distribution, self.module

    @property
    def offered(self) -> tuple[str, ...]:
        """Ids of all that it declared."""
        return (*self.blueprints, *self.hosts, *self.gate_checks, *self.policies, *self.tasks)

    @property
    def origin(self) -> str:
        """The distribution and version for messages, or the name if it came from none."""
        return f"{self.distribution} {self.version}".strip() or self.name

    @property
    def is_bad(self) -> bool:
        """Whether it cannot be used, and no switch of the user is the cause."""
        return self.state not in (PackState.DISCOVERED, PackState.ACTIVE, PackState.BLOCKED)

    @property
    def is_bundled(self) -> bool:
        """Whether it comes with the library itself."""
        return normalized(self.distribution) == _OWN_DISTRIBUTION


def list_packs(switches: Switches | None = None) -> list[PackRecord]:
    """Return the installed packs, sorted by name; nothing of them is imported, and torch is not either.

    State is ``discovered``, or ``blocked``, ``conflict``, ``incompatible`` and ``invalid`` where switches and metadata
    alone tell. A distribution that is found more than once (an editable install, a directory twice on ``sys.path``)
    counts once, as the first found: the one that ``import`` takes. Damaged metadata of one distribution does not hide
    the others.

    Args:
        switches: Which packs may be loaded; ``None`` for what the environment says.

    Raises:
        SwitchError: If a switch in the environment cannot be read.

    Source: https://packaging.python.org/en/latest/specifications/entry-points/
    """
    return [record for record, _ in scan_packs(Switches.from_environment() if switches is None else switches)]


# -- scanning -------------------------------------------------------------------------------------------------------

_INCOMPLETE: Final = "METADATA lacks a name or a version"

Found = tuple[PackRecord, "importlib_metadata.EntryPoint | None"]
_Distribution = Any  # the class or the protocol, by version of importlib_metadata


def scan_packs(switches: Switches) -> list[Found]:
    """Return a record of each claim to be a pack, in an order that is the same on every machine.

    With it comes the entry point, unless the pack is not to be loaded.
    """
    found: dict[PackRecord, Found] = {}
    installed = Installed.on_path()
    environment = Environment(installed.version) if installed is not None else Environment()
    for facts in _facts_of_all(installed):
        for record, entry in _claims(facts, switches, environment):
            found.setdefault(record, (record, entry))
    by_name: dict[str, list[Found]] = {}
    for claim in sorted(found.values(), key=_order):
        by_name.setdefault(claim[0].name, []).append(claim)
    settled = [claim for claims in by_name.values() for claim in _settle(claims, switches)]
    return settled if switches.autoload else [_kept_waiting(record, entry) for record, entry in settled]


def _order(claim: Found) -> tuple[str, str, str, str]:
    record = claim[0]
    return record.name, record.distribution, record.version, record.module


@dataclass(frozen=True, slots=True)
class _Facts:
    """The metadata of a distribution that may hold a pack.

    Attributes:
        name: Its name.
        version: Its version.
        entries: The entry points of the groups of packs and of their API versions; ``None`` if they cannot be read.
        requirements: Each ``Requires-Dist``.
        requires_python: ``Requires-Python``, ``None`` without one.
        problem: Why its metadata is damaged; ``""`` if it is not.
    """

    name: str
    version: str
    entries: Sequence[importlib_metadata.EntryPoint] | None
    requirements: Sequence[str]
    requires_python: str | None
    problem: str


def _facts_of_all(installed: Installed | None) -> Iterator[_Facts]:
    """Yield the metadata of each distribution that may hold a pack."""
    if installed is None:
        for distribution in every_distribution():
            if (with_pack := _distribution_with_pack(distribution)) is not None:
                yield _facts(with_pack)
        return
    for path in installed:
        plain = is_plain(path)
        raw = read_file(path, "entry_points.txt") if plain else b""
        if plain and (raw is None or GROUP.encode() not in raw):
            continue
        if plain and (facts := _plain_facts(installed, path, raw or b"")) is not None:
            yield facts
            continue
        with_pack = _distribution_with_pack(importlib_metadata.Distribution.at(path))
        if with_pack is not None:
            yield _facts(with_pack)


def _plain_facts(installed: Installed, path: str, raw: bytes) -> _Facts | None:
    """Return what `_facts` would, read by hand; ``None`` where that cannot be relied on."""
    header, entries = read_header(path), read_entry_points(raw, (GROUP, API_GROUP))
    if header is None or entries is None:
        return None
    name = header.name or folder_name(path)
    if installed.named(name) != path:  # also where several have that name
        return None
    problem = "" if header.name and header.version else _INCOMPLETE
    return _Facts(name, header.version, entries, header.requirements, header.requires_python, problem)


def _distribution_with_pack(distribution: _Distribution) -> _Distribution | None:
    """Return a distribution if it may hold a pack; of several of its name the one that ``import`` takes."""
    if is_left_over(distribution):
        return None
    try:
        mentions = GROUP in (distribution.read_text("entry_points.txt") or "")
    except UnicodeDecodeError as error:
        mentions = GROUP.encode() in error.object
    except Exception:
        mentions = False
    if not mentions:
        return None
    try:
        name = distribution.metadata.get("Name")
    except Exception:
        name = None
    try:
        return importlib_metadata.distribution(name or distribution_name(distribution))
    except Exception:
        return distribution


def every_distribution(on_error: Callable[[Exception], None] = lambda error: None) -> Iterator[_Distribution]:
    """Yield the installed distributions.

    Args:
        on_error: Called if a foreign finder raises; what it had left cannot be listed.
    """
    try:
        yield from importlib_metadata.distributions()
    except Exception as error:
        on_error(error)


def is_left_over(distribution: _Distribution) -> bool:
    """Return whether it is what an interrupted upgrade left behind: pip renames the old ``x`` to ``~x`` and ignores it."""
    return distribution_name(distribution).startswith("~")


def _facts(distribution: _Distribution) -> _Facts:
    """Return the metadata of a distribution, as importlib_metadata reads it."""
    name = version = problem = ""
    metadata: Any = {}
    try:
        metadata = distribution.metadata
        name, version = metadata.get("Name") or "", metadata.get("Version") or ""
        if not (name and version):
            problem = _INCOMPLETE
    except Exception as error:
        problem = f"METADATA cannot be read, {type(error).__name__}: {error}"
    name = name or distribution_name(distribution)
    entries: list[importlib_metadata.EntryPoint] | None = None
    requirements: Sequence[str] | None = ()
    python: str | None = None
    try:
        every = distribution.entry_points
        entries = [*every.select(group=GROUP), *every.select(group=API_GROUP)]
    except Exception as error:
        problem = f"entry_points.txt cannot be read, {type(error).__name__}: {error}"
    if not problem and entries:
        requirements = metadata.get_all("Requires-Dist")
        if requirements is None:  # none, or in a file of their own, as setuptools leaves them in a checkout
            requirements = distribution.requires or ()
        python = metadata.get("Requires-Python")
    return _Facts(name, version, entries, requirements or (), python, problem)


def _claims(facts: _Facts, switches: Switches, environment: Environment) -> Iterator[Found]:
    name, version, problem = facts.name, facts.version, facts.problem
    if facts.entries is None:
        record = PackRecord(name, "", name, version)
        yield (unwanted(record, switches) or _damaged(record, problem), None)
        return
    entries = [entry for entry in facts.entries if entry.group == GROUP]
    declared: dict[str, list[str]] = {}  # of each pack, its versions of the plugin API
    for entry in facts.entries:
        if entry.group == API_GROUP:
            declared.setdefault(entry.name, []).append(entry.value)
    unmet: str | None = None
    if not problem and entries:
        try:
            unmet = environment.requirement_problem(
                f"'{name} {version}'", facts.requirements, facts.requires_python
            )
        except UnreadableRequirementError as error:
            problem = str(error)
    for entry in entries:
        record = PackRecord(str(entry.name), str(entry.value), name, version)
        if refused := unwanted(record, switches):
            yield (refused, None)
        elif problem:
            yield (_damaged(record, problem), None)
        elif not NAME_PATTERN.fullmatch(record.name):
            yield (
                record.refused(PackReason.BAD_NAME, f"{record.name!r} is not a pack name: {NAME_RULE}"),
                None,
            )
        elif cause := api_problem(
            f"Pack '{record.name}' from '{record.origin}'", declared.get(record.name, [])
        ):
            yield (record.refused(PackReason.API_VERSION, cause), None)
        elif unmet is not None:
            yield (record.refused(PackReason.UNMET_REQUIREMENT, unmet), None)
        else:
            yield (record, entry)


def unwanted(record: PackRecord, switches: Switches) -> PackRecord | None:
    """Return the record of a pack that is blocked or not allowed, ``None`` for another."""
    if switches.blocks(record.name, record.distribution):
        cause = f"Pack '{record.name}' is blocked. Take it out of {_switch('block')}."
        return record.refused(PackReason.BLOCKED, cause)
    if not switches.allows(record.name, record.distribution):
        cause = f"Pack '{record.name}' is not among those allowed. Add it to {_switch('allow')}."
        return record.refused(PackReason.NOT_ALLOWED, cause)
    return None


def _switch(name: str) -> str:
    return f"{name} ({ENVIRONMENT[name]})"


def _damaged(record: PackRecord, problem: str) -> PackRecord:
    cause = f"The metadata of distribution '{record.distribution}' is damaged: {problem}. Install it again."
    return record.refused(PackReason.DAMAGED_METADATA, cause)


def _kept_waiting(record: PackRecord, entry: importlib_metadata.EntryPoint | None) -> Found:
    """Packs of others are not loaded by themselves; whatever else is known of them stays."""
    if entry is None or record.is_bundled:
        return (record, entry)
    cause = (
        f"Packs are not loaded by themselves: {_switch('autoload')} is off. "
        f"Load it with PluginRegistry.load_pack('{record.name}')."
    )
    return (record.refused(PackReason.AUTOLOAD_OFF, cause), None)


def distribution_name(distribution: _Distribution) -> str:
    """Return a name to look it up by: that of the folder, which is quick and is there where METADATA is damaged."""
    for attribute in ("_normalized_name", "name"):
        try:
            if name := getattr(distribution, attribute):
                return str(name)
        except Exception:
            continue
    return "?"


def _settle(claims: list[Found], switches: Switches) -> list[Found]:
    """Of several claims to one pack name let the core's own win, or the preferred; else none. Each record names them all.

    A bundled name is held also where the bundled pack itself is blocked or damaged.
    """
    if len(claims) == 1:
        return claims
    bundled = [record for record, _ in claims if record.is_bundled]
    live = [record for record, _ in claims if record.state is PackState.DISCOVERED]
    intruders = [record for record in live if bundled and record not in bundled]
    losers: dict[PackRecord, PackRecord] = {}
    if intruders:
        ending = "A bundled name cannot be taken over: rename the other pack."
        losers = _losing(intruders, PackReason.BUNDLED_NAME, [*bundled, *intruders], ending)
    rest = [record for record in live if record not in losers]
    if len(rest) > 1:
        preferred = [record for record in rest if switches.prefers(record.distribution)]
        if len(preferred) == 1:
            ending = f"'{preferred[0].distribution}' is preferred."
        elif preferred:
            ending = f"More than one of them is in {_switch('prefer')}, so none is loaded: prefer one."
        else:
            ending = (
                "None is loaded: rename one, uninstall its distribution, or name the distribution that must win in "
                f"{_switch('prefer')}."
            )
        lost = [record for record in rest if len(preferred) != 1 or record is not preferred[0]]
        losers |= _losing(lost, PackReason.DUPLICATE_PACK, rest, ending)
    return [(losers[record], None) if record in losers else (record, entry) for record, entry in claims]


def _losing(
    losers: list[PackRecord], reason: PackReason, claims: list[PackRecord], ending: str
) -> dict[PackRecord, PackRecord]:
    """Return the new record of each pack that loses a conflict."""
    rows = "".join(f"\n  {record.origin} ({record.module})" for record in claims)
    cause = f"{len(claims)} claims to the pack name '{claims[0].name}':{rows}\n{ending}"
    error = NameConflictError(cause)
    return {record: record.refused(reason, cause, error) for record in losers}
