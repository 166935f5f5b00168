"""Which packs are installed, read from the metadata of distributions alone: no pack is imported, and torch is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, final

import importlib_metadata

from kasmina_core.blueprints import NAME_PATTERN
from kasmina_core.errors import NameConflictError

GROUP: Final = "kasmina.plugins"
"""The entry-point group in which a distribution names its pack."""

_OWN_DISTRIBUTION: Final = "kasmina"  # names that it claims cannot be taken over


@final
class PackState(StrEnum):
    """What is known of a pack.

    - ``discovered``: its metadata names it; none of its code was imported.
    - ``active``: it is loaded and what it declares is registered.
    - ``blocked``: the user asked for it not to be loaded.
    - ``incompatible``: it implements hooks that this version does not have, or with other arguments.
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
    """Why a pack is not active."""

    BLOCKED = "blocked"
    DAMAGED_METADATA = "damaged_metadata"
    BAD_NAME = "bad_name"
    DUPLICATE_PACK = "duplicate_pack"
    BUNDLED_NAME = "bundled_name"
    IMPORT_FAILED = "import_failed"
    NO_HOOK = "no_hook"
    UNKNOWN_HOOK = "unknown_hook"
    HOOK_FAILED = "hook_failed"
    WRONG_TYPE = "wrong_type"
    DUPLICATE_ID = "duplicate_id"
    CHECK_FAILED = "check_failed"


@final
@dataclass(frozen=True, slots=True)
class PackRecord:
    """What is known of one pack.

    Attributes:
        name: Its entry-point name: the part before the colon in its ids.
        module: What the entry point names.
        distribution: The distribution that installed it; empty for one registered by hand.
        version: Version of that distribution.
        state: See `PackState`.
        reason: Why it is not active, as a code; ``None`` if it is, or is only discovered.
        cause: Why it is not active, for people.
        blueprints: Ids of the blueprints it declared; they are available only if it is active.
        hosts: Ids of the hosts it declared; likewise.
        gate_checks: Ids of its gate checks; likewise.
        policies: Ids of its policies; likewise.
        error: The exception behind ``cause``.
    """

    name: str
    module: str
    distribution: str = ""
    version: str = ""
    state: PackState = PackState.DISCOVERED
    reason: PackReason | None = None
    cause: str = ""
    blueprints: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    gate_checks: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    error: BaseException | None = field(default=None, compare=False, repr=False)

    @property
    def origin(self) -> str:
        """The distribution and version for messages, or the name if it came from none."""
        return f"{self.distribution} {self.version}".strip() or self.name

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON, without the exception."""
        return {
            "name": self.name,
            "module": self.module,
            "distribution": self.distribution,
            "version": self.version,
            "state": self.state.value,
            "reason": self.reason.value if self.reason is not None else None,
            "cause": self.cause,
            "blueprints": list(self.blueprints),
            "hosts": list(self.hosts),
            "gate_checks": list(self.gate_checks),
            "policies": list(self.policies),
        }


def list_packs() -> list[PackRecord]:
    """Return the installed packs, sorted by name; nothing of them is imported, and torch is not either.

    State is ``discovered``, or ``conflict`` and ``invalid`` where the metadata alone tells. A distribution that is
    found more than once (an editable install, a directory twice on ``sys.path``) counts once, as the first found: the
    one that ``import`` takes. Damaged metadata of one distribution does not hide the others.

    Source: https://packaging.python.org/en/latest/specifications/entry-points/
    """
    return [record for record, _ in scan_packs()]


# -- scanning -------------------------------------------------------------------------------------------------------

Found = tuple[PackRecord, "importlib_metadata.EntryPoint | None"]
_Distribution = Any  # the class or the protocol, by version of importlib_metadata


def scan_packs() -> list[Found]:
    """Return a record and entry point of each claim to be a pack, in an order that is the same on every machine."""
    found: dict[PackRecord, Found] = {}
    for distribution in _distributions_with_packs():
        for record, entry in _claims(distribution):
            found.setdefault(record, (record, entry))
    by_name: dict[str, list[Found]] = {}
    for key in sorted(found, key=lambda r: (r.name, r.distribution, r.version, r.module)):
        by_name.setdefault(key.name, []).append(found[key])
    return [settled for claims in by_name.values() for settled in _settle(claims)]


def _distributions_with_packs() -> Iterator[_Distribution]:
    """Yield each distribution that may hold a pack: of several of one name, again the first on ``sys.path``."""
    every = iter(importlib_metadata.distributions())
    while True:
        try:
            distribution = next(every)
        except StopIteration:
            return
        except Exception:  # a foreign finder; what it had left cannot be listed
            return
        try:
            mentions = GROUP in (distribution.read_text("entry_points.txt") or "")
        except UnicodeDecodeError as error:
            mentions = GROUP.encode() in error.object
        except Exception:
            mentions = False
        if not mentions:
            continue
        try:
            yield importlib_metadata.distribution(_distribution_name(distribution))
        except Exception:
            yield distribution


def _claims(distribution: _Distribution) -> Iterator[Found]:
    name = _distribution_name(distribution)
    version = problem = ""
    try:
        if not (distribution.metadata["Name"] and distribution.version):
            problem = "METADATA lacks a name or a version"
        version = distribution.version or ""
    except Exception as error:
        problem = f"METADATA cannot be read, {type(error).__name__}: {error}"
    try:
        entries = list(distribution.entry_points.select(group=GROUP))
    except Exception as error:
        problem = f"entry_points.txt cannot be read, {type(error).__name__}: {error}"
        yield (_damaged(PackRecord(name, "", name, version), problem), None)
        return
    for entry in entries:
        record = PackRecord(str(entry.name), str(entry.value), name, version)
        if problem:
            yield (_damaged(record, problem), None)
        elif not NAME_PATTERN.fullmatch(record.name):
            cause = f"{record.name!r} is not a pack name: use lower case letters, digits, '_' and '-', a letter first."
            yield (replace(record, state=PackState.INVALID, reason=PackReason.BAD_NAME, cause=cause), None)
        else:
            yield (record, entry)


def _damaged(record: PackRecord, problem: str) -> PackRecord:
    return replace(
        record,
        state=PackState.INVALID,
        reason=PackReason.DAMAGED_METADATA,
        cause=f"The metadata of distribution '{record.distribution}' is damaged: {problem}. Install it again.",
    )


def _distribution_name(distribution: _Distribution) -> str:
    """Return the name, from the folder where the metadata cannot tell."""
    for attribute in ("name", "_normalized_name"):
        try:
            if name := getattr(distribution, attribute):
                return str(name)
        except Exception:
            continue
    return "?"


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _settle(claims: list[Found]) -> list[Found]:
    """Of several claims to one pack name the core's own wins; else none does, and each record names them all."""
    live = [record for record, _ in claims if record.state is PackState.DISCOVERED]
    if len(live) < 2:
        return claims
    own = [record for record in live if _normalized(record.distribution) == _OWN_DISTRIBUTION]
    if len(own) == 1:
        reason, ending = (
            PackReason.BUNDLED_NAME,
            "A bundled name cannot be taken over: rename the other pack.",
        )
    else:
        reason, ending = (
            PackReason.DUPLICATE_PACK,
            "None is loaded: rename one, or uninstall its distribution.",
        )
    rows = "".join(f"\n  {record.origin} ({record.module})" for record in live)
    cause = f"{len(live)} claims to the pack name '{live[0].name}':{rows}\n{ending}"
    losers = [record for record in live if record not in own or len(own) > 1]
    lost: dict[str, Any] = {
        "state": PackState.CONFLICT,
        "reason": reason,
        "cause": cause,
        "error": NameConflictError(cause),
    }
    return [
        (replace(record, **lost), None) if record in losers else (record, entry) for record, entry in claims
    ]
