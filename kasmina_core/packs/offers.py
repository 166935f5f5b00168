"""Collecting the declarations of one pack alone; an unusable pack is refused with reason and cause."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pluggy

from kasmina_core.blueprints.declarations import NAME_PATTERN, BlueprintSpec, HostSpec
from kasmina_core.blueprints.foreign import EscapeError, cleaned, contained, described, shown
from kasmina_core.errors import NameConflictError
from kasmina_core.packs import hookspecs
from kasmina_core.packs.scanning import PackReason
from kasmina_core.topology import Topology, admit, withdraw

if TYPE_CHECKING:
    from kasmina_core.checks.reports import ValidationReport
    from kasmina_core.gates.checks import GateCheckSpec
    from kasmina_core.policies.protocol import Policy

HOOKS: Final = tuple(name for name in vars(hookspecs) if name.startswith("kasmina_"))


def new_manager() -> pluggy.PluginManager:
    """Return a plugin manager that knows the hooks and no plugin."""
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    return manager


class RefusalError(Exception):
    """A pack is not taken: the reason, a cause for people, and the exception behind it."""

    def __init__(self, reason: PackReason, cause: str, error: BaseException | None = None) -> None:
        super().__init__(cause)
        self.reason, self.cause = reason, cause
        self.error = error.__cause__ if isinstance(error, EscapeError) else error


KINDS: Final = ("blueprints", "hosts", "gate_checks", "policies", "tasks")
"""Kinds of declarations, as fields of `Offer` and `PackRecord`; sinks depend on a config and are not among them."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Offer:
    """Declarations of one pack, by short name.

    Attributes:
        origin: The pack, for messages.
        topologies: Those it adds, by name. These, and those that its blueprints and hosts are for, are known by name as
            long as the offer lives and is not withdrawn.
    """

    origin: str = ""
    topologies: dict[str, Topology] = field(default_factory=dict)
    blueprints: dict[str, BlueprintSpec] = field(default_factory=dict)
    hosts: dict[str, HostSpec] = field(default_factory=dict)
    gate_checks: dict[str, GateCheckSpec] = field(default_factory=dict)
    policies: dict[str, Callable[..., Policy]] = field(default_factory=dict)
    tasks: dict[str, Callable[..., Any]] = field(default_factory=dict)
    reports: dict[str, ValidationReport] = field(default_factory=dict)

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """Return the declarations of each of `KINDS`."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def needed_topologies(self) -> set[Topology]:
        """Those it adds, and those that its blueprints and hosts are for."""
        specs: tuple[BlueprintSpec | HostSpec, ...] = (*self.blueprints.values(), *self.hosts.values())
        return {*self.topologies.values(), *(spec.topology for spec in specs)}

    def admit_topologies(self) -> None:
        """Make its topologies known by name; raises `RefusalError` if a name is another's."""
        try:
            for topology in self.needed_topologies:
                admit(topology, self)
        except NameConflictError as error:
            raise RefusalError(PackReason.DUPLICATE_ID, str(error), error) from error

    def withdraw_topologies(self) -> None:
        """Undo `admit_topologies`."""
        for topology in self.needed_topologies:
            withdraw(topology, self)

    def __str__(self) -> str:
        return self.origin


def import_plugin(load_plugin: Callable[[], object]) -> object:
    """Return the module or object that an entry point names; raises `RefusalError`."""
    try:
        with contained():
            plugin = load_plugin()
    except Exception as error:
        cause = f"Its import raised {described(error)}"
        raise RefusalError(PackReason.IMPORT_FAILED, cause, error) from error
    if plugin is None or inspect.isclass(plugin):
        cause = f"The entry point names {shown(plugin)}. Name a module, or an instance of the class."
        raise RefusalError(PackReason.WRONG_TYPE, cause)
    return plugin


def collect_offer(plugin: object, offer: Offer) -> None:
    """Ask a pack alone, in a manager of its own, what it declares: nothing that is kept can be half changed."""
    trial = new_manager()
    try:
        with contained():
            trial.register(plugin, name="trial")
            trial.check_pending()
            implemented = {name for name in HOOKS if getattr(trial.hook, name).get_hookimpls()}
            unmarked = [
                name for name in HOOKS if name not in implemented and callable(getattr(plugin, name, None))
            ]
    except pluggy.PluginValidationError as error:
        cause = f"It does not fit the hooks of this version: {error}\n  hooks: {', '.join(HOOKS)}"
        raise RefusalError(PackReason.UNKNOWN_HOOK, cause, error) from error
    except Exception as error:
        cause = f"Reading its hooks raised {described(error)}"
        raise RefusalError(PackReason.HOOK_FAILED, cause, error) from error
    if unmarked or not implemented:
        what = f"{', '.join(unmarked)} lacks the mark @hookimpl" if unmarked else "It implements no hook"
        raise RefusalError(PackReason.NO_HOOK, f"{what}. Hooks: {', '.join(HOOKS)}.")
    for name in sorted(implemented):
        for impl in getattr(trial.hook, name).get_hookimpls():
            if impl.hookwrapper or getattr(impl, "wrapper", False):
                cause = (
                    f"{name} is a hook wrapper. A pack returns declarations of its own and wraps nobody's."
                )
                raise RefusalError(PackReason.WRONG_TYPE, cause)
    _gather(trial, "kasmina_topologies", Topology, offer.topologies)
    offer.admit_topologies()  # its other hooks may ask for them by name
    _gather(trial, "kasmina_blueprints", BlueprintSpec, offer.blueprints)
    _gather(trial, "kasmina_hosts", HostSpec, offer.hosts)
    offer.admit_topologies()
    if "kasmina_gate_checks" in implemented:
        from kasmina_core.gates.checks import GateCheckSpec

        _gather(trial, "kasmina_gate_checks", GateCheckSpec, offer.gate_checks)
    offer.policies |= mapping_of_callables(trial.hook.kasmina_policies, "kasmina_policies")
    offer.tasks |= mapping_of_callables(trial.hook.kasmina_tasks, "kasmina_tasks")


def _gather(trial: pluggy.PluginManager, hook: str, kind: type[Any], kept: dict[str, Any]) -> None:
    """Put what a hook returns into ``kept`` by name; what came before a failure is put there as well."""
    for value in _ask(getattr(trial.hook, hook), hook):
        if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
            raise _wrong_type(hook, f"an iterable of {kind.__name__}", value)
        try:
            with contained():
                for thing in value:
                    if not isinstance(thing, kind):
                        raise _wrong_type(hook, f"only {kind.__name__}", thing)
                    if isinstance(thing, Topology):  # it cannot have been changed
                        _keep(kept, hook, thing.value, thing)
                        continue
                    kind.__post_init__(thing)  # it may have been changed since it was made
                    if cleaned(thing.name, 100) != thing.name or thing.name.split() != [thing.name]:
                        raise _wrong_type(
                            hook, "names of at most 100 printable characters without blanks", thing.name
                        )
                    _keep(kept, hook, thing.name, thing)
        except RefusalError:
            raise
        except Exception as error:
            raise _hook_failed(hook, error) from error


def mapping_of_callables(
    hook: pluggy.HookCaller, name: str, **arguments: Any
) -> dict[str, Callable[..., Any]]:
    """Return what a hook that gives a mapping from names to callables returns."""
    kept: dict[str, Callable[..., Any]] = {}
    for value in _ask(hook, name, **arguments):
        if not isinstance(value, Mapping):
            raise _wrong_type(name, "a mapping from names to callables", value)
        try:
            with contained():
                items = list(value.items())
        except Exception as error:
            raise _hook_failed(name, error) from error
        for key, factory in items:
            if not isinstance(key, str) or not NAME_PATTERN.fullmatch(key):
                raise _wrong_type(name, "names of lower case letters, digits, '_' and '-'", key)
            if not callable(factory):
                raise _wrong_type(name, f"a callable for '{key}'", factory)
            _keep(kept, name, key, factory)
    return kept


def _keep(kept: dict[str, Any], hook: str, name: str, thing: Any) -> None:
    if name in kept:
        both = f"  {shown(kept[name], 1000)}\n  {shown(thing, 1000)}"
        cause = f"{hook} declares the name '{name}' more than once:\n{both}\nRename all but one."
        raise RefusalError(PackReason.DUPLICATE_ID, cause, NameConflictError(cause))
    kept[name] = thing


def _ask(hook: pluggy.HookCaller, name: str, **arguments: Any) -> list[Any]:
    """Call a hook and return one value of each implementation; they must not return ``None``."""
    try:
        with contained():
            values: list[Any] = hook(**arguments)
    except Exception as error:
        raise _hook_failed(name, error) from error
    if len(values) < len(hook.get_hookimpls()):
        raise _wrong_type(name, "its declarations", None)
    return values


def _wrong_type(hook: str, wanted: str, found: object) -> RefusalError:
    cause = f"{hook} must return {wanted}.\n  found: {shown(found)}, of type {type(found).__name__}"
    return RefusalError(
        PackReason.WRONG_TYPE, cause, TypeError(f"{hook} must return {wanted}, not {shown(found)}")
    )


def _hook_failed(hook: str, error: BaseException) -> RefusalError:
    return RefusalError(PackReason.HOOK_FAILED, f"{hook} raised {described(error)}", error)
