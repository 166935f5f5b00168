"""Plugin packs: which are installed, and what those that load offer.

`list_packs` reads the metadata of installed distributions and imports neither torch nor any pack. `PluginRegistry`
loads packs one by one. Each is taken whole or not at all: a pack that cannot be used leaves nothing behind but a
`PackRecord` with its cause, and asking for something it offered raises that cause.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, final

import importlib_metadata
import pluggy

from kasmina_core import hookspecs
from kasmina_core.blueprints import (
    NAME_PATTERN,
    BlueprintRegistry,
    BlueprintSpec,
    RegisteredBlueprint,
    import_factory,
)
from kasmina_core.errors import (
    AmbiguousNameError,
    HostError,
    KasminaError,
    NameConflictError,
    PluginError,
    UnknownNameError,
    did_you_mean,
)
from kasmina_core.events import BlueprintRegistered
from kasmina_core.hosts import HostSpec

if TYPE_CHECKING:
    from torch import nn

    from kasmina_core.checks import RegistrationReport
    from kasmina_core.gates import GateCheckSpec
    from kasmina_core.policy import Policy

GROUP: Final = "kasmina.plugins"
"""The entry-point group in which a distribution names its pack."""

_OWN_DISTRIBUTION: Final = "kasmina"  # names that it claims cannot be taken over
_HOOKS: Final = tuple(name for name in vars(hookspecs) if name.startswith("kasmina_"))

T = TypeVar("T")


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
    return [record for record, _ in _scan()]


# -- scanning -------------------------------------------------------------------------------------------------------

_Found = tuple[PackRecord, "importlib_metadata.EntryPoint | None"]
_Distribution = Any  # the class or the protocol, by version of importlib_metadata


def _scan() -> list[_Found]:
    """Return a record and entry point of each claim to be a pack, in an order that is the same on every machine."""
    found: dict[PackRecord, _Found] = {}
    for distribution in _distributions_with_packs():
        for record, entry in _claims(distribution):
            found.setdefault(record, (record, entry))
    by_name: dict[str, list[_Found]] = {}
    for key in sorted(found, key=lambda r: (r.name, r.distribution, r.version, r.module)):
        by_name.setdefault(key.name, []).append(found[key])
    return [settled for claims in by_name.values() for settled in _settle(claims)]


def _distributions_with_packs() -> Iterator[_Distribution]:
    """Yield each distribution that may hold a pack once: the one found first on ``sys.path``."""
    seen: set[str] = set()
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
        name = _distribution_name(distribution)
        if (key := _normalized(name)) in seen:
            continue
        seen.add(key)
        try:
            yield importlib_metadata.distribution(name)
        except Exception:
            yield distribution


def _claims(distribution: _Distribution) -> Iterator[_Found]:
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


def _settle(claims: list[_Found]) -> list[_Found]:
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


# -- what is found by id ----------------------------------------------------------------------------------------------


@final
class Catalogue(Mapping[str, T], Generic[T]):
    """Things by id ``pack:name``; a short name resolves when it is unique.

    Iteration gives full ids in order. ``catalogue[name]`` raises `UnknownNameError` for a name that nobody offers,
    `AmbiguousNameError` for a short name that fits more than one, and `PluginError` for a pack that is not available.
    """

    def __init__(self, kind: str, unavailable: Mapping[str, PluginError]) -> None:
        self._kind = kind
        self._things: dict[str, T] = {}
        self._unavailable = unavailable

    def __getitem__(self, name: str) -> T:
        return self._things[self.resolve(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._things))

    def __len__(self) -> int:
        return len(self._things)

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def resolve(self, name: str) -> str:
        """Return the full id of ``name``.

        Raises:
            PluginError: If it belongs to a pack that is not available: the cause of that.
            UnknownNameError: If nobody offers it.
            AmbiguousNameError: If a short name fits more than one id.
        """
        if name in self._things:
            return name
        fitting = [full for full in self if full.partition(":")[2] == name]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise AmbiguousNameError(f"'{name}' is offered more than once. Use one of: {', '.join(fitting)}.")
        for claim in sorted(self._unavailable):
            if claim in (name, name.partition(":")[0]) or claim.partition(":")[2] == name:
                raise self._unavailable[claim].with_traceback(None)
        absent = sorted(claim for claim in self._unavailable if ":" not in claim)
        known = list(self) if ":" in name else [full.partition(":")[2] for full in self]
        raise UnknownNameError(
            f"No {self._kind} '{name}' is registered.{did_you_mean(name, known)}"
            + (f" Not available: pack {', '.join(absent)}." if absent else "")
        )

    def _add(self, full: str, thing: T) -> None:
        self._things[full] = thing

    def _discard(self, full: str) -> None:
        self._things.pop(full, None)


@final
class HostRegistry:
    """Hosts by id. Ids are ``pack:name``; a short name resolves when it is unique."""

    def __init__(self, unavailable: Mapping[str, PluginError]) -> None:
        self._specs: Catalogue[HostSpec] = Catalogue("host", unavailable)

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, host_id: object) -> bool:
        return host_id in self._specs

    def get(self, host_id: str) -> HostSpec:
        """Return the declaration of a host.

        Raises:
            PluginError: If it belongs to a pack that is not available: the cause of that.
            UnknownNameError: If nobody offers it.
            AmbiguousNameError: If a short name fits more than one id.
        """
        return self._specs[host_id]

    def resolve(self, host_id: str) -> str:
        """Return the full id of a host; raises as `get`."""
        return self._specs.resolve(host_id)

    def ids(self) -> list[str]:
        """Return every full id, sorted."""
        return list(self._specs)

    def list_all(self) -> list[HostSpec]:
        """Return every declaration, sorted by id."""
        return [self._specs[full] for full in self._specs]

    def create(self, host_id: str, **options: Any) -> nn.Module:
        """Build a host. The caller owns the random number generator it draws from.

        Raises:
            PluginError: If its pack is not available, or its factory cannot be imported; the cause is chained.
            UnknownNameError: If nobody offers it.
            HostError: If the factory does not take the options; the cause is chained.
        """
        full = self.resolve(host_id)
        factory = import_factory(f"Host '{full}'", self._specs[full].factory)
        try:
            host: nn.Module = factory(**options)
        except (TypeError, ValueError) as error:
            raise HostError(
                f"Host '{full}' could not be built with {options or 'its defaults'}: {error}"
            ) from error
        return host


# -- loading ----------------------------------------------------------------------------------------------------------


class _RefusalError(Exception):
    """A pack is not taken: state, reason and a cause for people."""

    def __init__(self, state: PackState, reason: PackReason, cause: str, error: BaseException | None) -> None:
        super().__init__(cause)
        self.state, self.reason, self.cause, self.error = state, reason, cause, error


@dataclass(slots=True)
class _Offer:
    """What one pack declares, by short name."""

    blueprints: list[BlueprintSpec] = field(default_factory=list)
    hosts: list[HostSpec] = field(default_factory=list)
    gate_checks: list[GateCheckSpec] = field(default_factory=list)
    policies: dict[str, Callable[..., Policy]] = field(default_factory=dict)
    reports: dict[str, RegistrationReport] = field(default_factory=dict)


class PluginRegistry:
    """The packs that were loaded, and what they offer.

    Args:
        checks: Whether the registration checks of `check_blueprint_spec` run for every blueprint.
        device: Where they run; ``None`` for the CPU and, where there is one, CUDA.
        block: Names of packs that are not loaded.

    Attributes:
        blueprints: The blueprints of active packs.
        hosts: Their hosts.
        events: A `BlueprintRegistered` for each blueprint, in order.

    >>> class Pack:
    ...     @hookspecs.hookimpl
    ...     def kasmina_hosts(self):
    ...         return [HostSpec("tiny", "my_pack.hosts:TinyHost", hookspecs.Topology.CNN)]
    >>> registry = PluginRegistry()
    >>> registry.register_pack("mine", Pack()).hosts
    ('mine:tiny',)
    """

    def __init__(
        self, *, checks: bool = True, device: str | None = None, block: Collection[str] = ()
    ) -> None:
        self._checks = checks
        self._device = device
        self._block = frozenset(block)
        self._lock = threading.RLock()
        self._manager = _new_manager()
        self._records: dict[tuple[str, str, str], PackRecord] = {}
        self._reports: dict[str, RegistrationReport] = {}
        self._unavailable: dict[str, PluginError] = {}
        self._gate_checks: Catalogue[GateCheckSpec] = Catalogue("gate check", self._unavailable)
        self._policies: Catalogue[Callable[..., Policy]] = Catalogue("policy", self._unavailable)
        self.blueprints = BlueprintRegistry()
        self.hosts = HostRegistry(self._unavailable)
        self.events: list[BlueprintRegistered] = []

    @property
    def packs(self) -> list[PackRecord]:
        """Every pack that was seen, sorted by name."""
        with self._lock:
            return [self._records[key] for key in sorted(self._records)]

    def pack(self, name: str) -> PackRecord:
        """Return the record of a pack; of several claims to one name the active one, else the first.

        Raises:
            UnknownNameError: If no pack of that name was seen.
        """
        named = [record for record in self.packs if record.name == name]
        if not named:
            raise UnknownNameError(f"No pack '{name}'.{did_you_mean(name, [r.name for r in self.packs])}")
        return next((r for r in named if r.state is PackState.ACTIVE), named[0])

    def report(self, blueprint_id: str) -> RegistrationReport | None:
        """Return the registration report of a full id, also of one that was refused; ``None`` if none was made."""
        return self._reports.get(blueprint_id)

    def load_installed(self) -> list[PackRecord]:
        """Load every installed pack that was not seen yet, one by one in the order of their names.

        A pack that cannot be used stops nothing: its record says why.
        """
        with self._lock:
            for record, entry in _scan():
                key = (record.name, record.distribution, record.module)
                if key in self._records:
                    continue
                if entry is None:
                    self._refuse(record, _Offer())
                else:
                    self._load(record, entry.load)
            return self.packs

    def register_pack(
        self, name: str, plugin: object, distribution: str = "", version: str = ""
    ) -> PackRecord:
        """Register a pack object or module that comes from no installed distribution.

        Args:
            name: Name of the pack: the part before the colon in its ids.
            plugin: Module or object with hook implementations.
            distribution: Distribution to report, if any.
            version: Version to report, if any.

        Raises:
            PluginError: If it cannot be used; the cause is chained and kept in its record. Nothing of it is registered.
                Also if an active pack has the name: then that one stays.
        """
        module = (
            plugin.__name__
            if inspect.ismodule(plugin)
            else f"{type(plugin).__module__}.{type(plugin).__qualname__}"
        )
        record = PackRecord(name, module, distribution, version)
        with self._lock:
            taken = [r for r in self.packs if r.name == name and r.state is PackState.ACTIVE]
            if taken:
                cause = (
                    f"2 claims to the pack name '{name}':\n  {taken[0].origin} ({taken[0].module})\n"
                    f"  {record.origin} ({record.module})\nThe first stays. Rename the second, or unregister the first."
                )
                raise PluginError(cause) from NameConflictError(cause)
            self._forget(name)
            if not NAME_PATTERN.fullmatch(name):
                record = replace(
                    record,
                    state=PackState.INVALID,
                    reason=PackReason.BAD_NAME,
                    cause=f"{name!r} is not a pack name: use lower case letters, digits, '_' and '-', a letter first.",
                )
                self._refuse(record, _Offer())
            else:
                record = self._load(record, lambda: plugin)
            if record.state is not PackState.ACTIVE:
                raise self._unavailable[name].with_traceback(None)
            return record

    def unregister_pack(self, name: str) -> PackRecord:
        """Remove an active pack and everything it offers; seeds and hosts made of it live on.

        Raises:
            UnknownNameError: If no pack of that name is active.
        """
        with self._lock:
            active = {r.name: r for r in self.packs if r.state is PackState.ACTIVE}
            if name not in active:
                raise UnknownNameError(f"No pack '{name}' is active.{did_you_mean(name, active)}")
            record = active[name]
            self._withdraw(record)
            del self._records[record.name, record.distribution, record.module]
            return record

    def gate_checks(self) -> list[GateCheckSpec]:
        """Return the gate checks of every pack, sorted; each is named by its full id, ``pack:name``."""
        return list(self._gate_checks.values())

    def policies(self) -> Mapping[str, Callable[..., Policy]]:
        """Return policy factories by full id; looking up a short name works where it is unique."""
        return self._policies

    def sinks(self, config: Mapping[str, Any] | None = None) -> Mapping[str, Callable[..., Any]]:
        """Return sink factories by full id; looking up a short name works where it is unique.

        A pack whose hook raises or returns something else offers none; asking for one of its sinks raises the cause.

        Args:
            config: What the packs may want to know; handed to each as it is.
        """
        unavailable = dict(self._unavailable)
        found: Catalogue[Callable[..., Any]] = Catalogue("sink", unavailable)
        with self._lock:
            for record in self.packs:
                if record.state is not PackState.ACTIVE:
                    continue
                own = self._manager.get_plugin(_plugin_name(record))
                others = [plugin for plugin in self._manager.get_plugins() if plugin is not own]
                hook = self._manager.subset_hook_caller("kasmina_sinks", others)
                try:
                    offered = _mapping_of_callables(hook, "kasmina_sinks", config=dict(config or {}))
                except _RefusalError as refusal:
                    error = PluginError(
                        f"Pack '{record.name}' ({record.origin}) offers no sinks: {refusal.cause}"
                    )
                    error.__cause__ = refusal.error
                    unavailable[record.name] = error
                else:
                    for name, factory in offered.items():
                        found._add(f"{record.name}:{name}", factory)
        return found

    # -- one pack -----------------------------------------------------------------------------------------------------

    def _load(self, record: PackRecord, load_plugin: Callable[[], object]) -> PackRecord:
        """Take a pack whole or not at all, and keep the record of that."""
        offer = _Offer()
        if record.name in self._block:
            record = replace(
                record,
                state=PackState.BLOCKED,
                reason=PackReason.BLOCKED,
                cause=f"Pack '{record.name}' is blocked. Take its name out of block to use it.",
            )
            return self._refuse(record, offer)
        try:
            with self._guard():
                plugin = _import(load_plugin)
                _collect(plugin, offer)
                if self._checks:
                    self._examine(record, offer)
            self._commit(record, plugin, offer)
        except _RefusalError as refusal:
            record = replace(
                record,
                state=refusal.state,
                reason=refusal.reason,
                cause=refusal.cause,
                error=refusal.error,
            )
            return self._refuse(record, offer)
        record = replace(_with_ids(record, offer), state=PackState.ACTIVE)
        self._records[record.name, record.distribution, record.module] = record
        self._clear_unavailable(record.name)
        return record

    def _guard(self) -> Any:
        """Return a context that keeps foreign code from changing random numbers and torch's settings."""
        if self._checks:
            import torch  # noqa: F401  # so that the state before the pack's own import is known
        from kasmina_core.checks import preserved_global_state

        return preserved_global_state()

    def _examine(self, record: PackRecord, offer: _Offer) -> None:
        from kasmina_core.checks import check_blueprint_spec

        for spec in offer.blueprints:
            report = check_blueprint_spec(spec, device=self._device, origin=record.origin)
            offer.reports[spec.name] = report
            try:
                report.raise_if_failed()
            except KasminaError as error:
                raise _RefusalError(PackState.INVALID, PackReason.CHECK_FAILED, str(error), error) from error

    def _commit(self, record: PackRecord, plugin: object, offer: _Offer) -> None:
        """Register everything; whatever goes wrong, nothing of the pack is left behind."""
        begun = len(self.events)
        named = _with_ids(record, offer)
        try:
            self._manager.register(plugin, name=_plugin_name(record))
            for spec in offer.blueprints:
                entry = self.blueprints.register(
                    spec, pack=record.name, distribution=record.distribution, version=record.version
                )
                self._announce(entry, offer.reports.get(spec.name))
            for host in offer.hosts:
                self.hosts._specs._add(f"{record.name}:{host.name}", host)
            for check in offer.gate_checks:
                full = f"{record.name}:{check.name}"
                self._gate_checks._add(full, replace(check, name=full))
            for name, factory in offer.policies.items():
                self._policies._add(f"{record.name}:{name}", factory)
        except BaseException as error:
            del self.events[begun:]
            self._withdraw(named)
            if not isinstance(error, Exception):
                raise
            twice = isinstance(error, ValueError)  # pluggy: the object or name is registered already
            raise _RefusalError(
                PackState.CONFLICT if twice else PackState.INVALID,
                PackReason.DUPLICATE_PACK if twice else PackReason.WRONG_TYPE,
                f"'{record.module}' is loaded already under another name. Name it in one entry point only."
                if twice
                else str(error),
                error,
            ) from error
        self._reports |= {f"{record.name}:{name}": report for name, report in offer.reports.items()}

    def _announce(self, entry: RegisteredBlueprint, report: RegistrationReport | None) -> None:
        self.events.append(
            BlueprintRegistered(
                blueprint_id=entry.id,
                distribution=entry.distribution,
                verdict=report.verdict.value if report is not None else "not run",
                sequence=len(self.events),
            )
        )

    def _withdraw(self, record: PackRecord) -> None:
        """Remove what a pack registered, however far that went."""
        name = _plugin_name(record)
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)
        for full in record.blueprints:
            if full in self.blueprints:
                self.blueprints.unregister(full)
            self._reports.pop(full, None)
        for full in record.hosts:
            self.hosts._specs._discard(full)
        for full in record.gate_checks:
            self._gate_checks._discard(full)
        for full in record.policies:
            self._policies._discard(full)

    def _refuse(self, record: PackRecord, offer: _Offer) -> PackRecord:
        """Keep the record of a pack that is not taken, and let questions for what it offered raise the cause."""
        record = _with_ids(record, offer)
        self._records[record.name, record.distribution, record.module] = record
        self._reports |= {f"{record.name}:{name}": report for name, report in offer.reports.items()}
        if any(r.name == record.name and r.state is PackState.ACTIVE for r in self._records.values()):
            return record
        error = PluginError(
            f"Pack '{record.name}' ({_place(record)}) is not available ({record.state.value}).\n{record.cause}"
        )
        error.__cause__ = record.error
        claims = (record.name, *record.blueprints, *record.hosts, *record.gate_checks, *record.policies)
        for claim in claims:
            self._unavailable[claim] = error
        for claim in (record.name, *record.blueprints):
            self.blueprints.mark_unavailable(claim, error)
        return record

    def _forget(self, name: str) -> None:
        """Forget earlier refusals of a pack, so that it can be tried again."""
        for key in [key for key in self._records if key[0] == name]:
            for full in self._records.pop(key).blueprints:
                self._reports.pop(full, None)
        self._clear_unavailable(name)

    def _clear_unavailable(self, name: str) -> None:
        for claim in [claim for claim in self._unavailable if claim.partition(":")[0] == name]:
            del self._unavailable[claim]
        self.blueprints.mark_available(name)


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    return manager


def _plugin_name(record: PackRecord) -> str:
    return f"{record.distribution}:{record.name}"


def _place(record: PackRecord) -> str:
    installed = f"{record.distribution} {record.version}".strip()
    return ", ".join(filter(None, (installed, f"module {record.module}" if record.module else "")))


def _with_ids(record: PackRecord, offer: _Offer) -> PackRecord:
    def ids(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(f"{record.name}:{name}" for name in set(names)))

    return replace(
        record,
        blueprints=ids(spec.name for spec in offer.blueprints),
        hosts=ids(spec.name for spec in offer.hosts),
        gate_checks=ids(spec.name for spec in offer.gate_checks),
        policies=ids(offer.policies),
    )


def _import(load_plugin: Callable[[], object]) -> object:
    try:
        plugin = load_plugin()
    except (Exception, SystemExit) as error:
        raise _RefusalError(
            PackState.FAILED,
            PackReason.IMPORT_FAILED,
            f"Its import raised {type(error).__name__}: {error}",
            error,
        ) from error
    if plugin is None or inspect.isclass(plugin):
        raise _RefusalError(
            PackState.INVALID,
            PackReason.WRONG_TYPE,
            f"The entry point names {plugin!r}. Name a module, or an instance of the class.",
            None,
        )
    return plugin


def _collect(plugin: object, offer: _Offer) -> None:
    """Ask a pack alone, in a manager of its own, what it declares: nothing that is kept can be half changed."""
    trial = _new_manager()
    try:
        trial.register(plugin, name="trial")
        trial.check_pending()
        implemented = {name for name in _HOOKS if getattr(trial.hook, name).get_hookimpls()}
        unmarked = [
            name for name in _HOOKS if name not in implemented and callable(getattr(plugin, name, None))
        ]
    except pluggy.PluginValidationError as error:
        raise _RefusalError(
            PackState.INCOMPATIBLE,
            PackReason.UNKNOWN_HOOK,
            f"It does not fit the hooks of this version: {error}\n  hooks: {', '.join(_HOOKS)}",
            error,
        ) from error
    except (Exception, SystemExit) as error:
        raise _RefusalError(
            PackState.FAILED,
            PackReason.HOOK_FAILED,
            f"Reading its hooks raised {type(error).__name__}: {error}",
            error,
        ) from error
    if unmarked or not implemented:
        what = f"{', '.join(unmarked)} lacks the mark @hookimpl" if unmarked else "It implements no hook"
        raise _RefusalError(
            PackState.INVALID, PackReason.NO_HOOK, f"{what}. Hooks: {', '.join(_HOOKS)}.", None
        )
    for name in sorted(implemented):
        for impl in getattr(trial.hook, name).get_hookimpls():
            if impl.hookwrapper or getattr(impl, "wrapper", False):
                raise _RefusalError(
                    PackState.INVALID,
                    PackReason.WRONG_TYPE,
                    f"{name} is a hook wrapper. A pack returns declarations of its own and wraps nobody's.",
                    None,
                )
    _gather(trial, "kasmina_blueprints", BlueprintSpec, offer.blueprints)
    _gather(trial, "kasmina_hosts", HostSpec, offer.hosts)
    if "kasmina_gate_checks" in implemented:
        from kasmina_core.gates import GateCheckSpec

        _gather(trial, "kasmina_gate_checks", GateCheckSpec, offer.gate_checks)
    offer.policies |= _mapping_of_callables(trial.hook.kasmina_policies, "kasmina_policies")


def _gather(trial: pluggy.PluginManager, hook: str, kind: type[Any], kept: list[Any]) -> None:
    """Put what a hook returns into ``kept``, sorted by name; what came before a failure is put there as well."""
    try:
        for value in _ask(getattr(trial.hook, hook), hook):
            if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
                raise _wrong_type(hook, f"an iterable of {kind.__name__}", value)
            for thing in value:
                if not isinstance(thing, kind):
                    raise _wrong_type(hook, f"only {kind.__name__}", thing)
                kept.append(thing)
    except _RefusalError:
        raise
    except (Exception, SystemExit) as error:
        raise _hook_failed(hook, error) from error
    finally:
        kept.sort(key=lambda thing: str(thing.name))
    names = [thing.name for thing in kept]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        both = "\n".join(f"  {thing!r}" for thing in kept if thing.name == twice[0])
        cause = f"{hook} declares the name '{twice[0]}' more than once:\n{both}\nRename all but one."
        raise _RefusalError(PackState.CONFLICT, PackReason.DUPLICATE_ID, cause, NameConflictError(cause))


def _mapping_of_callables(
    hook: pluggy.HookCaller, name: str, **arguments: Any
) -> dict[str, Callable[..., Any]]:
    """Return what a hook that gives a mapping from names to callables returns, sorted by name."""
    kept: dict[str, Callable[..., Any]] = {}
    for value in _ask(hook, name, **arguments):
        if not isinstance(value, Mapping):
            raise _wrong_type(name, "a mapping from names to callables", value)
        try:
            items = list(value.items())
        except (Exception, SystemExit) as error:
            raise _hook_failed(name, error) from error
        for key, factory in items:
            if not isinstance(key, str) or not NAME_PATTERN.fullmatch(key):
                raise _wrong_type(name, "names of lower case letters, digits, '_' and '-'", key)
            if not callable(factory):
                raise _wrong_type(name, f"a callable for '{key}'", factory)
            if key in kept:
                cause = f"{name} declares the name '{key}' more than once:\n  {kept[key]!r}\n  {factory!r}"
                raise _RefusalError(
                    PackState.CONFLICT, PackReason.DUPLICATE_ID, cause, NameConflictError(cause)
                )
            kept[key] = factory
    return dict(sorted(kept.items()))


def _ask(hook: pluggy.HookCaller, name: str, **arguments: Any) -> list[Any]:
    """Call a hook and return one value of each implementation; they must not return ``None``."""
    try:
        values: list[Any] = hook(**arguments)
    except (Exception, SystemExit) as error:
        raise _hook_failed(name, error) from error
    if len(values) < len(hook.get_hookimpls()):
        raise _wrong_type(name, "its declarations", None)
    return values


def _wrong_type(hook: str, wanted: str, found: object) -> _RefusalError:
    return _RefusalError(
        PackState.INVALID,
        PackReason.WRONG_TYPE,
        f"{hook} must return {wanted}.\n  found: {found!r}, of type {type(found).__name__}",
        TypeError(f"{hook} must return {wanted}, not {found!r}"),
    )


def _hook_failed(hook: str, error: BaseException) -> _RefusalError:
    return _RefusalError(
        PackState.FAILED, PackReason.HOOK_FAILED, f"{hook} raised {type(error).__name__}: {error}", error
    )


# -- the registry of the process ------------------------------------------------------------------------------------

_default_lock = threading.RLock()
_default: PluginRegistry | None = None
_default_is_loading = False


def default_registry() -> PluginRegistry:
    """Return the registry of this process; the first call loads every installed pack.

    Raises:
        PluginError: If a pack calls this while it is being loaded.
    """
    global _default, _default_is_loading
    if _default is not None:
        return _default
    with _default_lock:
        if _default is not None:
            return _default
        if _default_is_loading:
            raise PluginError(
                "The installed packs are being loaded: a pack may not ask for the registry in its import."
            )
        _default_is_loading = True
        try:
            registry = PluginRegistry()
            registry.load_installed()
            _default = registry
        finally:
            _default_is_loading = False
        return registry


def reset_default_registry() -> None:
    """Let the next `default_registry` load the installed packs afresh; for tests, and after installing a pack."""
    global _default
    with _default_lock:
        _default = None
