"""Loading of plugin packs one by one, and the registry of what they offer.

A pack is loaded whole or not at all. An unusable one leaves a `PackRecord` with its cause, which is raised when somebody
asks for what it offered. Where packs are only declared (`PluginRegistry.declare_installed`), the checks of a pack run
before the first thing of it, or its record, is given out.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from kasmina_core.blueprints.catalogue import BlueprintRegistry, Catalogue, HostRegistry
from kasmina_core.blueprints.declarations import NAME_PATTERN, NAME_RULE
from kasmina_core.blueprints.foreign import contained, described, shown
from kasmina_core.checks.global_state import SharedParts, preserved_global_state
from kasmina_core.errors import KasminaError, NameConflictError, PluginError, UnknownNameError, did_you_mean
from kasmina_core.events import BlueprintRegistered
from kasmina_core.packs.offers import (
    Offer,
    RefusalError,
    collect_offer,
    import_plugin,
    mapping_of_callables,
    new_manager,
)
from kasmina_core.packs.scanning import PackReason, PackRecord, PackState, scan_packs, unwanted
from kasmina_core.packs.switches import ENVIRONMENT, Switches
from kasmina_core.telemetry.bundled import BUNDLED_SINKS
from kasmina_core.telemetry.sinks import Sink, as_sink

if TYPE_CHECKING:
    import importlib_metadata

    from kasmina_core.checks.reports import ValidationReport
    from kasmina_core.gates.checks import GateCheckSpec
    from kasmina_core.policies.protocol import Policy


SLOW_LOAD: Final = 15.0
"""Seconds after which a pack that is still being loaded is named on stderr."""


class PluginRegistry:
    """The packs that were loaded, and what they offer.

    Args:
        checks: Whether `check_blueprint_spec` runs for every blueprint, without those checks that take long.
        device: Where they run. ``None`` for the CPU and, where this process uses it already, CUDA: loading packs never
            initialises CUDA, because a process that did can no longer fork workers that use it.
        allow: What may be loaded; see `Switches` for this and the following. Here the environment is not read: only
            `default_registry` does that.
        block: Like ``allow``, it holds for packs that are registered by hand as well.
        autoload: Whether `load_installed` loads packs other than the bundled ones.
        prefer: Distributions that win a conflict.
        strict: Whether `load_installed` raises if any pack cannot be used.

    Attributes:
        blueprints: The blueprints of active packs, and their gate checks: what `MorphogeneticModel` takes from a registry.
        hosts: Their hosts.
        switches: The switches in force.

    Raises:
        SwitchError: If a switch cannot be used.

    >>> from kasmina_core import HostSpec, Topology, hookimpl
    >>> class Pack:
    ...     @hookimpl
    ...     def kasmina_hosts(self):
    ...         return [HostSpec("tiny", "my_pack.hosts:TinyHost", Topology.CNN)]
    >>> registry = PluginRegistry()
    >>> registry.register_pack("mine", Pack()).hosts
    ('mine:tiny',)
    """

    def __init__(
        self,
        *,
        checks: bool = True,
        device: str | None = None,
        allow: Collection[str] | None = None,
        block: Collection[str] = (),
        autoload: bool = True,
        prefer: Collection[str] = (),
        strict: bool = False,
    ) -> None:
        self._checks = checks
        self._device = device
        self.switches = Switches(allow, block, autoload, prefer, strict)
        self._lock = threading.RLock()
        self._manager = new_manager()
        self._records: dict[tuple[str, str, str], PackRecord] = {}
        self._offers: dict[tuple[str, str, str], Offer] = {}
        self._reports: dict[str, ValidationReport] = {}
        self._unavailable: dict[str, PluginError] = {}
        self._unchecked: dict[
            str, PackRecord
        ] = {}  # by name of the pack: declared, and active once it is checked
        self._checked_now = ""
        facts: tuple[Any, ...] = (self._unavailable, self._settle)
        self.blueprints = BlueprintRegistry(*facts)
        self._gate_checks: Catalogue[GateCheckSpec] = Catalogue("gate check", *facts)
        self.blueprints.gate_checks = self._gate_checks
        self._policies: Catalogue[Callable[..., Policy]] = Catalogue("policy", *facts)
        self._tasks: Catalogue[Callable[..., Any]] = Catalogue("task", *facts)
        self.hosts = HostRegistry(*facts)
        self._catalogues: dict[str, Catalogue[Any]] = {
            "hosts": self.hosts,
            "gate_checks": self._gate_checks,
            "policies": self._policies,
            "tasks": self._tasks,
        }
        self._events: list[BlueprintRegistered] = []

    @property
    def events(self) -> list[BlueprintRegistered]:
        """A `BlueprintRegistered` for each blueprint, in order."""
        self._settle(None)
        return self._events

    @property
    def packs(self) -> list[PackRecord]:
        """Every pack that was seen, sorted by name."""
        with self._lock:
            self._settle(None)
            return self._seen()

    def _seen(self) -> list[PackRecord]:
        return [self._records[key] for key in sorted(self._records)]

    def pack(self, name: str) -> PackRecord:
        """Return the record of a pack; of several claims to one name the active one, else the first.

        Raises:
            UnknownNameError: If no pack of that name was seen.
        """
        named = [record for record in self.packs if record.name == name]
        if not named:
            raise UnknownNameError(f"No pack '{name}'.{did_you_mean(name, [r.name for r in self.packs])}")
        return self._active(name) or named[0]

    def _active(self, name: str) -> PackRecord | None:
        self._settle([name])
        return next((r for r in self._seen() if r.name == name and r.state is PackState.ACTIVE), None)

    def report(self, blueprint_id: str) -> ValidationReport | None:
        """Return the registration report of a full id, also of one that was refused; ``None`` if none was made."""
        self._settle([blueprint_id])
        return self._reports.get(blueprint_id)

    def load_installed(self) -> list[PackRecord]:
        """Load every installed pack that was not seen yet, the bundled ones first, then by name.

        A pack that cannot be used stops nothing: its record has the cause.

        Raises:
            PluginError: Under ``strict``, if any pack cannot be used; the message names each. What can be used is loaded.
        """
        with self._lock:
            self.declare_installed()
            if self.switches.strict and (bad := [record for record in self.packs if record.is_bad]):
                rows = "".join(f"\n{r.name} ({_place(r)}), {r.state.value}: {r.cause}" for r in bad)
                error = PluginError(
                    f"{len(bad)} of {len(self._records)} packs cannot be used (strict is on):{rows}"
                )
                raise error from bad[0].error
            return self.packs

    def declare_installed(self) -> None:
        """Take what every installed pack declares, as `load_installed`, and leave the checks of each to its first use.

        That is when something of it, or its record, is asked for: nothing is given out before. Then it is active, or it
        is refused whole with the cause, which asking raises. Packs that add topologies are checked at once.
        """
        with self._lock:
            for record, entry in sorted(scan_packs(self.switches), key=lambda claim: not claim[0].is_bundled):
                if record.key not in self._records:
                    self._take(record, entry, wait=True)

    def load_pack(self, name: str) -> PackRecord:
        """Load one installed pack, also where packs are not loaded by themselves; one that is active stays as it is.

        Raises:
            PluginError: If it cannot be used; the cause is chained and kept in its record.
            UnknownNameError: If no pack of that name is installed.
        """
        with self._lock:
            claims = [c for c in scan_packs(replace(self.switches, autoload=True)) if c[0].name == name]
            if (active := self._active(name)) is not None:
                return active
            if not claims:
                known = {r.name for r in self.packs}
                raise UnknownNameError(f"No pack '{name}' is installed.{did_you_mean(name, known)}")
            self._forget(name)
            for claim in claims:
                self._take(*claim)
            if (active := self._active(name)) is None:
                raise self._unavailable[name].with_traceback(None)
            return active

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
        kind = type(plugin)
        module = plugin.__name__ if inspect.ismodule(plugin) else f"{kind.__module__}.{kind.__qualname__}"
        record = PackRecord(name, module, distribution, version)
        with self._lock:
            if (taken := self._active(name)) is not None:
                cause = (
                    f"2 claims to the pack name '{name}':\n  {taken.origin} ({taken.module})\n"
                    f"  {record.origin} ({record.module})\nThe first stays. Rename the second, or unregister the first."
                )
                raise PluginError(cause) from NameConflictError(cause)
            self._forget(name)
            if not NAME_PATTERN.fullmatch(name):
                cause = f"{name!r} is not a pack name: {NAME_RULE}"
                record = self._refuse(record.refused(PackReason.BAD_NAME, cause), Offer())
            elif refused := unwanted(record, self.switches):
                record = self._refuse(refused, Offer())
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
            for full in record.blueprints:
                self._reports.pop(full, None)
            self.blueprints.mark_available(name)
            del self._records[record.key]
            return record

    def _withdraw(self, record: PackRecord) -> None:
        """Take back everything that a pack offers."""
        self._manager.unregister(name=_plugin_name(record))
        for full in record.blueprints:
            if full in self.blueprints:
                self.blueprints.unregister(full)
        for kind, catalogue in self._catalogues.items():
            for full in getattr(record, kind):
                catalogue.discard(full)
        self._offers.pop(record.key).withdraw_topologies()

    def gate_checks(self) -> list[GateCheckSpec]:
        """Return the gate checks of every pack, sorted; each is named by its full id, ``pack:name``."""
        return list(self._gate_checks.values())

    def policies(self) -> Mapping[str, Callable[..., Policy]]:
        """Return policy factories by full id; looking up a short name works where it is unique."""
        return self._policies

    def tasks(self) -> Mapping[str, Callable[..., Any]]:
        """Return functions that make tasks by full id; looking up a short name works where it is unique."""
        return self._tasks

    def create_sink(self, name: str, config: Mapping[str, Any] | None = None) -> Sink:
        """Make a sink by id or unique short name.

        Args:
            name: ``pack:name`` or ``name``.
            config: See `sinks`.

        Raises:
            PluginError: If its pack is not available, or its factory raises or makes no sink; the cause is chained.
            UnknownNameError: If nobody offers it.
        """
        make: Callable[[], Any]
        if name in BUNDLED_SINKS:
            full, make = name, lambda: BUNDLED_SINKS[name](config or {})
        else:
            offered = self.sinks(config)
            full = self._sink_named(name, offered)
            make = offered[full]
        try:
            with contained():
                return as_sink(make())
        except Exception as error:
            raise PluginError(f"Sink '{full}' could not be made: {shown(error)}") from error

    @staticmethod
    def _sink_named(name: str, offered: Catalogue[Callable[..., Any]]) -> str:
        try:
            return offered.resolve(name)
        except UnknownNameError as error:
            if ":" in name:
                raise
            raise UnknownNameError(f"{error} Bundled: {', '.join(sorted(BUNDLED_SINKS))}.") from error

    def sinks(self, config: Mapping[str, Any] | None = None) -> Catalogue[Callable[..., Any]]:
        """Return sink factories by full id; looking up a short name works where it is unique.

        A pack whose hook raises or returns something else offers none; asking for one of its sinks raises the cause.

        Args:
            config: Settings for sinks; each pack gets them all.
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
                    offered = mapping_of_callables(hook, "kasmina_sinks", config=dict(config or {}))
                except RefusalError as refusal:
                    error = PluginError(
                        f"Pack '{record.name}' ({record.origin}) offers no sinks: {refusal.cause}"
                    )
                    error.__cause__ = refusal.error
                    unavailable[record.name] = error
                else:
                    for name, factory in offered.items():
                        if not self.switches.withholds(f"{record.name}:{name}", record.distribution):
                            found.add(f"{record.name}:{name}", factory)
        return found

    # -- one pack -----------------------------------------------------------------------------------------------------

    def _take(
        self, record: PackRecord, entry: importlib_metadata.EntryPoint | None, wait: bool = False
    ) -> PackRecord:
        """Load what the scan found, or keep the record of why not."""
        return self._refuse(record, Offer()) if entry is None else self._load(record, entry.load, wait)

    def _load(self, record: PackRecord, load_plugin: Callable[[], object], wait: bool = False) -> PackRecord:
        """Take a pack whole or not at all, and keep the record of that; under ``wait`` its checks may come later."""
        offer = Offer(f"pack '{record.name}' ({_place(record)})")
        withheld: tuple[str, ...] = ()
        try:
            with contained(), _named_if_slow(record), self._guard():
                plugin = import_plugin(load_plugin)
                collect_offer(plugin, offer)
                withheld = self._withhold(record, offer)
                wait = wait and self._checks and bool(offer.blueprints) and not offer.topologies
                if self._checks and not wait:
                    self._examine(record, offer)
            self._commit(record, plugin, offer)
        except Exception as error:
            offer.withdraw_topologies()
            return self._refuse(_refused(record, error), offer)
        record = replace(_with_ids(record, offer), state=PackState.ACTIVE, withheld=withheld)
        self._records[record.key] = record
        self._offers[record.key] = offer
        if wait:
            self._unchecked[record.name] = record
        else:
            self._announce(record, offer)
        self.blueprints.mark_available(record.name)
        for full in withheld:
            self.blueprints.mark_unavailable(
                full,
                PluginError(f"'{full}' ({record.origin}) is left out: see the switches block and allow."),
            )
        return record

    @property
    def is_checking(self) -> bool:
        """Whether the checks of a pack are running."""
        return bool(self._checked_now)

    def _settle(self, ids: Collection[str] | None) -> bool:
        """Check the packs of these ids, or all, that are not checked yet; return whether there were any."""
        if not self._unchecked:
            return False
        with self._lock:
            names = {full.partition(":")[0] for full in (self._unchecked if ids is None else ids)}
            waiting = sorted(names & self._unchecked.keys())
            if self._checked_now and (self._checked_now in waiting or ids is None):
                raise PluginError(
                    f"Pack '{self._checked_now}' is being checked: its blueprints may not ask for what it offers."
                )
            before = self._checked_now
            for name in waiting:
                self._checked_now = name
                try:
                    self._check_late(self._unchecked[name])
                finally:
                    self._checked_now = before
            return bool(waiting)

    def _check_late(self, record: PackRecord) -> None:
        """Run the checks of a pack that was only declared, and take all of it back if one fails."""
        offer = self._offers[record.key]
        try:
            with contained(), _named_if_slow(record), self._guard():
                self._examine(record, offer)
        except Exception as error:
            del self._unchecked[record.name]
            self._withdraw(record)
            self._refuse(_refused(record, error), offer)
        else:
            del self._unchecked[record.name]
            self._announce(record, offer)

    def _announce(self, record: PackRecord, offer: Offer) -> None:
        """Keep the reports, and an event for each blueprint."""
        self._reports |= {f"{record.name}:{short}": report for short, report in offer.reports.items()}
        for name in sorted(offer.blueprints):
            report = offer.reports.get(name)
            self._events.append(
                BlueprintRegistered(
                    blueprint_id=f"{record.name}:{name}",
                    distribution=record.distribution,
                    verdict=report.verdict.value if report is not None else "not run",
                    sequence=len(self._events),
                )
            )

    def _withhold(self, record: PackRecord, offer: Offer) -> tuple[str, ...]:
        """Take out of an offer what a switch leaves out, and return the ids of that."""
        left_out = set()
        for things in offer.by_kind().values():
            for name in list(things):
                if self.switches.withholds(full := f"{record.name}:{name}", record.distribution):
                    del things[name]
                    left_out.add(full)
        return tuple(sorted(left_out))

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Keep foreign code from changing random numbers, torch's settings, and what every module of torch shares."""
        if self._checks:
            import torch  # noqa: F401  # so that the state before the pack's own import is known
        torch_before = SharedParts() if "torch" in sys.modules else None
        try:
            with preserved_global_state():
                yield
        finally:
            if torch_before is not None and (changed := torch_before.put_back()):
                names = f"{', '.join(changed[:8])}{' and more' if len(changed) > 8 else ''}"
                cause = f"It changes what all modules share: {names}. That was put back."
                raise RefusalError(PackReason.GLOBAL_STATE, cause)

    def _examine(self, record: PackRecord, offer: Offer) -> None:
        from kasmina_core.checks.blueprints import check_blueprint_spec

        device = self._device
        if device is None and not sys.modules["torch"].cuda.is_initialized():
            device = "cpu"  # even asking whether there is a CUDA device would spoil a later fork
        failed: list[KasminaError] = []
        for _, spec in sorted(offer.blueprints.items()):
            report = check_blueprint_spec(spec, device=device, origin=record.origin, full=False)
            offer.reports[spec.name] = report
            try:
                report.raise_if_failed()
            except KasminaError as error:
                failed.append(error)
        if failed:  # all of them: whoever writes the pack mends them at once
            raise RefusalError(PackReason.CHECK_FAILED, "\n".join(map(str, failed)), failed[0]) from failed[0]

    def _commit(self, record: PackRecord, plugin: object, offer: Offer) -> None:
        """Register everything; whatever goes wrong, nothing of the pack is left behind."""

        def forget_plugin() -> None:
            if self._manager.has_plugin(name):  # also half registered, as some versions of pluggy leave it
                self._manager.unregister(name=name)

        name = _plugin_name(record)
        for topology in offer.topologies:
            for other in self._seen():
                if other.state is PackState.ACTIVE and topology in other.topologies:
                    cause = (
                        f"2 packs add the topology '{topology}':\n  {other.name} ({_place(other)})\n"
                        f"  {record.name} ({_place(record)})\nLet one of them import that of the other, and not return it."
                    )
                    raise RefusalError(PackReason.DUPLICATE_ID, cause, NameConflictError(cause))
        try:
            with ExitStack() as undo:
                undo.callback(forget_plugin)
                self._manager.register(plugin, name=name)
                for _, spec in sorted(offer.blueprints.items()):
                    entry = self.blueprints.register(
                        spec, pack=record.name, distribution=record.distribution, version=record.version
                    )
                    undo.callback(self.blueprints.unregister, entry.id)
                undo.pop_all()
        except NameConflictError as error:
            raise RefusalError(PackReason.DUPLICATE_ID, str(error), error) from error
        except ValueError as error:  # pluggy: the object is registered already
            cause = (
                f"'{record.module}' is loaded already under another name. Name it in one entry point only."
            )
            raise RefusalError(PackReason.DUPLICATE_PACK, cause, error) from error
        for check_name, check in offer.gate_checks.items():
            offer.gate_checks[check_name] = replace(check, name=f"{record.name}:{check_name}")
        for kind, catalogue in self._catalogues.items():
            for short, thing in getattr(offer, kind).items():
                catalogue.add(f"{record.name}:{short}", thing)

    def _refuse(self, record: PackRecord, offer: Offer) -> PackRecord:
        """Keep the record of a pack that is not taken, and let questions for what it offered raise the cause."""
        record = _with_ids(record, offer)
        self._records[record.key] = record
        self._reports |= {f"{record.name}:{name}": report for name, report in offer.reports.items()}
        if self._active(record.name) is not None:
            return record
        error = PluginError(
            f"Pack '{record.name}' ({_place(record)}) is not available ({record.state.value}).\n{record.cause}"
        )
        error.__cause__ = record.error
        for claim in (record.name, *record.offered):
            self.blueprints.mark_unavailable(claim, error)
        return record

    def _forget(self, name: str) -> None:
        """Forget earlier refusals of a pack, so that it can be tried again."""
        for key in [key for key in self._records if key[0] == name]:
            for full in self._records.pop(key).blueprints:
                self._reports.pop(full, None)
        self.blueprints.mark_available(name)


@contextmanager
def _named_if_slow(record: PackRecord) -> Iterator[None]:
    """Name a pack on stderr if it does not end: nothing can stop an import from outside of it."""

    def tell() -> None:
        print(
            f"kasmina: pack '{record.name}' ({_place(record)}) has been loading for {SLOW_LOAD:g} seconds. If it does "
            f"not end, press Ctrl-C and set {ENVIRONMENT['block']}={record.name}.",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(SLOW_LOAD, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # a fork while a thread runs is warned of


def _refused(record: PackRecord, error: Exception) -> PackRecord:
    """Return the record of a pack whose loading raised."""
    if not isinstance(error, RefusalError):
        cause = f"Taking what it declares raised {described(error)}"
        error = RefusalError(PackReason.HOOK_FAILED, cause, error)
    return record.refused(error.reason, error.cause, error.error)


def _plugin_name(record: PackRecord) -> str:
    return f"{record.distribution}:{record.name}"


def _place(record: PackRecord) -> str:
    installed = f"{record.distribution} {record.version}".strip()
    return ", ".join(filter(None, (installed, f"module {record.module}" if record.module else "")))


def _with_ids(record: PackRecord, offer: Offer) -> PackRecord:
    ids = {
        kind: tuple(sorted(f"{record.name}:{name}" for name in things))
        for kind, things in offer.by_kind().items()
    }
    topologies = tuple(sorted(offer.topologies))
    return replace(record, topologies=topologies, **ids)  # type: ignore[arg-type]  # of the fields that are tuples


# -- the registry of the process ------------------------------------------------------------------------------------

_default_lock = threading.RLock()
_default: PluginRegistry | None = None
_default_is_loading = False


def default_registry() -> PluginRegistry:
    """Return the registry of this process; the first call loads the installed packs that the environment lets it.

    The checks of a pack run when something of it is first asked for (see `PluginRegistry.declare_installed`).

    Raises:
        PluginError: If a pack calls this while it is being loaded, or under ``KASMINA_PLUGINS_STRICT`` if any pack
            cannot be used.
        SwitchError: If a switch in the environment cannot be read (see `Switches`).
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
            switches = Switches.from_environment()
            registry = PluginRegistry(**{name: getattr(switches, name) for name in ENVIRONMENT})
            if switches.strict:
                registry.load_installed()
            else:
                registry.declare_installed()
            _default = registry
        finally:
            _default_is_loading = False
        return registry


def reset_default_registry() -> None:
    """Let the next `default_registry` load the installed packs afresh; for tests, and after installing a pack."""
    global _default
    with _default_lock:
        _default = None


def _let_a_forked_child_load() -> None:
    """Forget a load that another thread of the parent had begun: in the child nobody ends it, or frees the lock."""
    global _default, _default_lock, _default_is_loading
    _default_lock, _default_is_loading = threading.RLock(), False
    if _default is not None and _default.is_checking:
        _default = None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_a_forked_child_load)
