"""State of a run: all that it needs to resume exactly, collected from a model and what trains it, and applied again.

A container (a folder, a distributed checkpoint, a trainer's checkpoint) writes what `collect` returns, and the model's
tensors in its own way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kasmina_core._version import __version__
from kasmina_core.checkpoints.growth_state import (
    growth_of,
    present_counters,
    rebuilding,
    restore_counters,
    set_counters,
)
from kasmina_core.checkpoints.migrations import part
from kasmina_core.checkpoints.optimizer_names import load_named_optimizer_state, named_optimizer_state
from kasmina_core.checkpoints.random_states import InexactResume, random_states, restore_random_states
from kasmina_core.checkpoints.scheduler_states import load_scheduler_states, scheduler_states
from kasmina_core.errors import CheckpointError, warn_caller
from kasmina_core.growth.agreement import no_inference_mode
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.reverting import HostSnapshot, KeptSeed, contributing_tensors
from kasmina_core.growth.undo import undo_of_attributes, undo_of_optimizer
from kasmina_core.lifecycle import REVERTIBLE, SeedStage
from kasmina_core.state_keys import WRAPPER
from kasmina_core.training.schedulers import unwrapped as without_accelerate

_MANIFEST: Final = "The manifest"


class Remembers(Protocol):
    """An object with a state, such as a policy or a GradScaler."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Take the state."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Run:
    """A model and all that trains it; optimisers are those that accelerate wraps, if it does."""

    model: MorphogeneticModel
    optimizers: list[Optimizer] = field(default_factory=list)
    schedulers: list[LRScheduler] = field(default_factory=list)
    policy: object = None
    scaler: Remembers | None = None
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: MorphogeneticModel,
        optimizer: Any = None,
        schedulers: Any = None,
        policy: object = None,
        scaler: Remembers | None = None,
        generators: Mapping[str, torch.Generator] | None = None,
    ) -> Run:
        """Return a run of one optimiser and scheduler, several or none."""
        optimizers = [without_accelerate(one) for one in several(optimizer)]
        return cls(model, optimizers, several(schedulers), policy, scaler, generators or {})


def several(given: Any) -> list[Any]:
    """Return one optimiser or scheduler, or several, as a list."""
    return list(given) if isinstance(given, Iterable) else [given] if given is not None else []


def unwrapped(model: nn.Module) -> MorphogeneticModel:
    """Return the model inside of ``torch.compile(model)`` and ``DistributedDataParallel(model)``.

    Raises:
        TypeError: If there is none.
    """
    inner: object = model
    while isinstance(inner, nn.Module) and not isinstance(inner, MorphogeneticModel):
        inner = inner._modules.get(WRAPPER) or inner._modules.get("module")
    if not isinstance(inner, MorphogeneticModel):
        raise TypeError(
            f"{type(model).__name__} is not a MorphogeneticModel, nor compiled or distributed from one."
        )
    return inner


def collect(
    run: Run, *, rng: Collection[str] = ("torch",), data_position: object = None, extra: object = None
) -> dict[str, Any]:
    """Return all that a run needs except the model's tensors, as plain data and tensors.

    Raises:
        CheckpointError: If a seed is being germinated.

    Warns:
        InexactResume: If what was kept for a revert cannot be saved.
    """
    model = run.model
    for slot in model.slots.values():
        if slot.state is not None and slot.stage is SeedStage.DORMANT:
            raise CheckpointError(
                f"The seed of slot '{slot.name}' is being germinated: half of that cannot be saved.\n"
                "Save when germinate has returned, not from a sink that is called within."
            )
    return {
        "kasmina": __version__,
        "torch": str(torch.__version__),
        "topology": growth_of(model),
        "kept_seeds": {slot: kept.to_dict() for slot, kept in model.growth.kept_seeds.items()},
        "snapshots": _snapshots_of(run),
        "optimizers": [named_optimizer_state(model, one) for one in run.optimizers],
        "schedulers": scheduler_states(run.schedulers),
        "policy": memory_of(run.policy),
        "policy_class": None if run.policy is None else type(run.policy).__name__,
        "scaler": run.scaler.state_dict() if run.scaler is not None else None,
        "rng": random_states(rng),
        "generators": {name: one.get_state() for name, one in run.generators.items()},
        "data_position": data_position,
        "extra": extra,
    }


@no_inference_mode()
def apply(
    run: Run,
    data: Mapping[str, Any],
    load_weights: Callable[[dict[str, Any]], Mapping[str, Any]],
    confirm: Callable[[], None],
    *,
    rng: bool = True,
    room: Callable[[str], int] | None = None,
) -> Mapping[str, Any]:
    """Restore a run as `collect` found it; if that fails, it stays as it was.

    Args:
        run: Parts that are not in it are not loaded.
        data: What `collect` returned; its tensors need no values yet.
        load_weights: Loads the model's tensors. It is given the records of the slots, which belong into the same
            ``load_state_dict``, and returns the data with all tensors in it.
        confirm: Called last; if it raises, all is undone.
        rng: Whether to restore the global random numbers that were saved.
        room: Returns how many values were saved of a slot's seed, where ``load_weights`` does not know.

    Returns:
        What ``load_weights`` returned.

    Raises:
        CheckpointError: If the data is damaged, does not fit, or lacks a part that the run has.
    """
    with _undone_on_error(run), rebuilding(run.model, data.get("topology", {}), room) as records:
        data = load_weights(records)
        saved = data.get("optimizers")
        saved = saved if isinstance(saved, list) else []
        if run.optimizers and len(saved) != len(run.optimizers):
            raise CheckpointError(
                "The checkpoint was saved with another number of optimisers.\n"
                f"  saved: {len(saved)}\n  here:  {len(run.optimizers)}"
            )
        orders = {
            id(one): load_named_optimizer_state(run.model, one, state)
            for one, state in zip(run.optimizers, saved, strict=False)
        }
        if run.schedulers:
            load_scheduler_states(run.schedulers, data.get("schedulers"), orders)
        _recall("scaler", run.scaler, data.get("scaler"))
        kept = _restore_rest(run, data, rng)
        confirm()
    growth = run.model.growth
    growth.kept_seeds, growth.snapshots = kept  # last: a load forgets those that were here
    parts = {"optimizer": saved, "schedulers": data.get("schedulers"), "scaler": data.get("scaler")}
    here = {"optimizer": run.optimizers, "schedulers": run.schedulers, "scaler": run.scaler}
    growth.misuse.left_out = [name for name, state in parts.items() if state and not here[name]]
    return data


@no_inference_mode()
def apply_beside_trainer(run: Run, data: Mapping[str, Any]) -> None:
    """Apply what a trainer does not load itself: its part are the model's tensors, optimisers, schedulers and scaler.

    Args:
        run: The run; the trainer has loaded its part.
        data: What `collect` returned, with what `counters_of` returned in place of ``topology``.

    Raises:
        CheckpointError: As `apply`; the run is then as it was before.
    """
    with _undone_on_error(run):
        restore_counters(run.model, data)
        kept = _restore_rest(run, data, rng=True)
    run.model.growth.kept_seeds, run.model.growth.snapshots = kept


def memory_of(thing: Any) -> Any:
    """Return what a policy remembers; ``None`` if it has no ``state_dict``."""
    return thing.state_dict() if callable(getattr(thing, "state_dict", None)) else None


# -- parts -------------------------------------------------------------------------------------------------------------


def _restore_rest(
    run: Run, data: Mapping[str, Any], rng: bool
) -> tuple[dict[str, KeptSeed], dict[str, HostSnapshot]]:
    kept_seeds = _kept_seeds(run.model, part(data, "kept_seeds", Mapping, _MANIFEST))
    snapshots = _snapshots(run, part({"snapshots": {}, **data}, "snapshots", Mapping, _MANIFEST))
    _recall("policy", run.policy, data.get("policy"), data.get("policy_class"))
    if run.policy is not None:
        run.model.growth.misuse.awaits_memory = False
    _load_generators(run.generators, part(data, "generators", Mapping, _MANIFEST))
    if rng:
        restore_random_states(part(data, "rng", Mapping, _MANIFEST))
    return kept_seeds, snapshots


def _recall(name: str, thing: Any, state: Any, saved_class: object = None) -> None:
    if thing is None:
        return
    if not callable(getattr(thing, "load_state_dict", None)):
        if state is None:
            return
        raise CheckpointError(
            f"The checkpoint holds the memory of a {name}, which {type(thing).__name__} cannot load: it has no "
            f"load_state_dict. Give the {name} with which the run began."
        )
    if state is None:
        raise CheckpointError(f"The checkpoint was saved without a {name}.")
    try:
        thing.load_state_dict(state)
    except Exception as error:
        here = type(thing).__name__
        lines = [f"The saved {name} cannot be loaded into this {here}: its saved state does not fit."]
        if isinstance(saved_class, str) and saved_class != here:
            lines += [f"  saved: {saved_class:.80}", f"  here:  {here}"]
        lines.append(str(error)[:400] if isinstance(error, CheckpointError) else f"{error!r:.200}")
        raise CheckpointError("\n".join(lines)) from error


def _kept_seeds(model: MorphogeneticModel, found: Mapping[str, Any]) -> dict[str, KeptSeed]:
    if unknown := [name for name in found if name not in model.slots]:
        raise CheckpointError(
            f"The checkpoint has a seed put aside in slot {unknown[0]!r:.80}, and this model has no such slot."
        )
    return {
        str(name): KeptSeed.from_dict(data, f"The seed that was put aside in slot {name!r:.80}")
        for name, data in found.items()
    }


def _snapshots_of(run: Run) -> dict[str, Any]:
    model, found = run.model, {}
    for name, snapshot in model.growth.snapshots.items():
        tensors = contributing_tensors(model.host, model.slots.values(), model.slots[name])
        if (saved := snapshot.to_dict(tensors, run.optimizers)) is not None:
            found[name] = saved
        elif model.can_revert(name):
            warn_caller(
                f"What is kept to cull the seed of slot '{name}' with revert=True is not saved: a listener of the model "
                "that is no tied optimiser keeps something for it, which no file can hold.\n"
                "A resumed run culls this seed without putting the host back; can_revert says so.",
                InexactResume,
            )
    return found


def _snapshots(run: Run, saved: Mapping[str, Any]) -> dict[str, HostSnapshot]:
    model, found = run.model, {}
    for name, data in saved.items():
        slot = model.slots.get(name)
        if slot is None or slot.stage not in REVERTIBLE:
            raise CheckpointError(
                f"The checkpoint has a host kept for slot {name!r:.80}, where no seed blends in."
            )
        tensors = contributing_tensors(model.host, model.slots.values(), slot)
        found[name] = HostSnapshot.from_dict(data, tensors, run.optimizers, name)
    return found


def _load_generators(generators: Mapping[str, torch.Generator], states: Mapping[str, Any]) -> None:
    for name, generator in generators.items():
        if name not in states:
            raise CheckpointError(
                f"The checkpoint has no generator '{name}'; it has: {', '.join(map(str, states)) or 'none'}."
            )
        try:
            generator.set_state(states[name])
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"The saved generator '{name}' cannot be restored: {error}") from error


@contextmanager
def _undone_on_error(run: Run) -> Iterator[None]:
    growth = run.model.growth
    counters = present_counters(run.model)
    numbers = random_states(["torch", "python", *(["numpy"] if "numpy" in sys.modules else [])])
    things = [one for one in (run.policy, run.scaler) if one is not None]
    with ExitStack() as undo:
        undo.callback(_put_back_numbers, numbers)
        for generator in run.generators.values():
            undo.callback(generator.set_state, generator.get_state())
        undo.callback(undo_of_attributes(things, _what_remembers))
        undo.callback(undo_of_attributes(run.schedulers, _inside_a_scheduler))
        for one in run.optimizers:
            undo.callback(undo_of_optimizer(one))
        undo.callback(set_counters, run.model, counters)
        with growth.undone_on_error():
            yield
        undo.pop_all()  # it ended well


def _put_back_numbers(numbers: Mapping[str, Any]) -> None:
    with suppress(CheckpointError):
        restore_random_states(numbers)


def _what_remembers(thing: Any) -> list[Any]:
    """Return what a policy or a scaler is made of that has a state of its own."""
    return [value for value in vars(thing).values() if callable(getattr(value, "load_state_dict", None))]


def _inside_a_scheduler(scheduler: Any) -> list[Any]:
    values = [value for key, value in vars(scheduler).items() if key != "optimizer"]
    parts = [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]
    plain = (bool, int, float, str, Tensor, Mapping, type(None))
    return [part for part in parts if not isinstance(part, plain) and hasattr(part, "__dict__")]
