"""Checkpoints: everything a run needs to go on as if nothing had happened."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kasmina_core._version import __version__
from kasmina_core.checkpoints.files import (
    TRAINING,
    WEIGHTS,
    NewFolder,
    Unchanged,
    new_id,
    previous_of,
    read_manifest,
    read_tensors,
    write_manifest,
    write_tensors,
)
from kasmina_core.checkpoints.growth_state import rebuilding, topology_of
from kasmina_core.checkpoints.optimizer_names import load_named_optimizer_state, named_optimizer_state
from kasmina_core.checkpoints.random_states import random_states, restore_random_states
from kasmina_core.checkpoints.scheduler_states import load_scheduler_states, scheduler_states
from kasmina_core.errors import CheckpointError, KasminaError
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.reverting import HostSnapshot, KeptSeed, contributing_tensors
from kasmina_core.growth.undo import AttributesBefore, OptimizerBefore
from kasmina_core.lifecycle import SeedStage
from kasmina_core.plain_data import meaning, to_json
from kasmina_core.state_keys import WRAPPER, plain_name


class InterruptedSave(UserWarning):
    """A save was interrupted just before its last step; the checkpoint before it is loaded."""


class Remembers(Protocol):
    """What has a state: a policy, a GradScaler."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Take the state."""
        ...


@final
@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """What a checkpoint says beside what was loaded.

    Attributes:
        folder: Where it was.
        data_position: What was given to `save_checkpoint`.
        extra: What was given to `save_checkpoint`.
        versions: Of kasmina and torch, when it was saved.
    """

    folder: Path
    data_position: Any = None
    extra: Any = None
    versions: Mapping[str, str] = field(default_factory=dict)


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    schedulers: LRScheduler | Iterable[LRScheduler] = (),
    policy: object = None,
    scaler: Remembers | None = None,
    data_position: object = None,
    rng: Collection[str] = ("torch",),
    generators: Mapping[str, torch.Generator] | None = None,
    extra: object = None,
    keep_previous: bool = True,
) -> Path:
    """Write a checkpoint from which `load_checkpoint` goes on exactly.

    The folder holds ``weights.safetensors`` (the model's ``state_dict``), ``training.safetensors`` (tensors of the
    optimiser and of random numbers) and ``manifest.json``. It is written beside, flushed to the disk and renamed; what
    was there becomes ``<folder>.previous``. Interrupted at any instant, one of the two is a whole checkpoint, and
    `load_checkpoint` finds it. Of several processes that train the same model, let one save.

    Args:
        folder: Where to. A folder that is there must be a checkpoint, or empty.
        model: A `MorphogeneticModel`; compiled, or in ``DistributedDataParallel``, too.
        optimizer: The optimiser, or several; saved by the names of its parameters.
        schedulers: Learning-rate schedulers.
        policy: What decides on growth, if it has ``state_dict`` and ``load_state_dict``; one that has none is taken to
            remember nothing.
        scaler: A ``torch.amp.GradScaler``.
        data_position: Where the data loader is: plain data and tensors.
        rng: Whose global random numbers to save: ``"torch"`` (CPU and accelerator), ``"python"``, ``"numpy"``.
        generators: Generators of your own, such as a data loader's.
        extra: Anything else of plain data and tensors, such as the ``state_dict`` of an averaged model.
        keep_previous: Whether the checkpoint that was there is kept.

    Returns:
        The folder.

    Raises:
        CheckpointError: If something cannot be written, or what is at ``folder`` is no checkpoint. What is there stays.
        TypeError: If ``model`` holds no `MorphogeneticModel`.
    """
    inner = unwrapped(model)
    _refuse_half_a_germination(inner)
    kept: dict[str, Tensor] = {}
    identity = new_id()
    weights, other = _split(inner.state_dict())
    data = {
        "id": identity,
        "kasmina": __version__,
        "torch": str(torch.__version__),
        "topology": topology_of(inner),
        "kept_seeds": {slot: kept.to_dict() for slot, kept in inner._kept_seeds.items()},
        "snapshots": _saved_snapshots(inner, _several(optimizer)),
        "host": {"class": type(inner.host).__name__, "other_state": other},
        "optimizers": [named_optimizer_state(inner, one) for one in _several(optimizer)],
        "schedulers": scheduler_states(_several(schedulers)),
        "policy": _memory(policy),
        "policy_class": None if policy is None else type(policy).__name__,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "rng": random_states(rng),
        "generators": {name: one.get_state() for name, one in (generators or {}).items()},
        "data_position": data_position,
        "extra": extra,
    }
    parts = {key: to_json(value, key, kept.__setitem__) for key, value in data.items()}
    metadata = {"checkpoint": identity}
    target = Path(folder)
    with NewFolder(target, keep_previous) as path:
        shared = {WEIGHTS: write_tensors(path / WEIGHTS, weights, metadata, named=target / WEIGHTS)}
        if kept:
            shared[TRAINING] = write_tensors(path / TRAINING, kept, metadata, named=target / TRAINING)
        parts["shared"] = to_json(shared, "shared")
        write_manifest(path, "{" + ", ".join(f'"{key}": {text}' for key, text in parts.items()) + "}")
    return target


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    schedulers: LRScheduler | Iterable[LRScheduler] = (),
    policy: object = None,
    scaler: Remembers | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    rng: bool = True,
) -> LoadedCheckpoint:
    """Make a model, and what trains it, what they were when `save_checkpoint` was called.

    Build model, optimiser and schedulers as at the start of the run, tie them (`tie_optimizer`), and load. Another
    device or dtype is that of the model given here. What is not given is not loaded.

    Args:
        folder: The checkpoint.
        model: A model of the same host and points, fresh or grown; its seeds are replaced.
        optimizer: The optimiser, or several in the order in which they were saved.
        schedulers: In the order in which they were saved.
        policy: What decided on growth.
        scaler: A ``torch.amp.GradScaler``.
        generators: Generators by the names under which they were saved.
        rng: Whether to restore the global random numbers that were saved.

    Returns:
        The data position, and what else was given to `save_checkpoint`.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, foreign or newer, does not fit, or lacks what is asked
            for. Model, optimisers, schedulers and random numbers are then as before.
        TypeError: If ``model`` holds no `MorphogeneticModel`.

    Warns:
        InterruptedSave: If the folder was being replaced when the process ended, and the previous one is loaded.
        InexactResume: If accelerators' random numbers were saved that cannot be restored here.
        OtherBlueprintVersion: If a seed was saved with another version of its pack, and fits.
    """
    inner = unwrapped(model)
    place = _present(Path(folder))
    raw = read_manifest(place)
    if not isinstance(identity := raw.get("id"), str):
        raise CheckpointError(f"The manifest in {place} is damaged: id cannot be {identity!r:.80}.")
    metadata = {"checkpoint": identity}
    unchanged = Unchanged(place, raw["crc32"])
    shared = _shared(raw)
    tensors = {}
    if TRAINING in raw["files"]:
        tensors = _with_shared(read_tensors(place / TRAINING, metadata, apart=True), shared.get(TRAINING, {}))
    data: dict[str, Any] = meaning(raw, f"The manifest in {place}", tensors.pop)  # each is used once
    weights = _with_shared(read_tensors(place / WEIGHTS, metadata), shared[WEIGHTS])
    host = data.get("host")
    if not isinstance(host, dict) or not isinstance(host.get("other_state"), dict):
        raise CheckpointError(f"The manifest in {place} is damaged: host cannot be {host!r:.80}.")
    optimizers, followers = list(_several(optimizer)), list(_several(schedulers))
    kept_seeds = _kept_seeds(inner, data.get("kept_seeds"))
    things = [one for one in (policy, scaler) if one is not None]
    with (
        _put_back_on_error(optimizers, followers, things, generators or {}),
        inner._undone_on_error(),
        rebuilding(inner, data.get("topology", {})) as records,
    ):
        _load_weights(inner, {**weights, **host["other_state"], **records})
        orders = _load_optimizers(inner, optimizers, data.get("optimizers"))
        if followers:
            load_scheduler_states(followers, data.get("schedulers"), orders)
        _recall("policy", policy, data.get("policy"), data.get("policy_class"))
        _recall("scaler", scaler, data.get("scaler"))
        _load_generators(generators or {}, data.get("generators"))
        if rng:
            restore_random_states(_mapping("rng", data.get("rng")))
        snapshots = _snapshots(inner, data.get("snapshots", {}), optimizers)
        unchanged.demand()  # within the block: what was loaded of a damaged file is undone
    inner._kept_seeds, inner._snapshots = kept_seeds, snapshots  # last: a load forgets those that were here
    return LoadedCheckpoint(
        place,
        data.get("data_position"),
        data.get("extra"),
        {name: str(data.get(name)) for name in ("kasmina", "torch")},
    )


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


# -- parts -------------------------------------------------------------------------------------------------------------


def _refuse_half_a_germination(model: MorphogeneticModel) -> None:
    for slot in model.slots.values():
        if slot.state is not None and slot.stage is SeedStage.DORMANT:
            raise CheckpointError(
                f"The seed of slot '{slot.name}' is being germinated: half of that cannot be saved.\n"
                "Save when germinate has returned, not in what hears of it on the way."
            )


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, Iterable) else [given] if given is not None else []


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def _memory(thing: Any) -> Any:
    return thing.state_dict() if callable(getattr(thing, "state_dict", None)) else None


def _present(folder: Path) -> Path:
    """Return the folder, or the one before it if the process ended while it was being replaced."""
    previous = previous_of(Path(os.path.realpath(folder)))
    if os.path.lexists(folder) or not previous.is_dir():
        return folder
    warnings.warn(
        f"{folder} was being replaced when the process ended; {previous}, the checkpoint before it, is loaded.",
        InterruptedSave,
        stacklevel=3,
    )
    return previous


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"The manifest is damaged: {name} cannot be {value!r:.80}.")
    return value


def _shared(raw: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    shared = _mapping("shared", raw.get("shared"))
    for file in raw["files"]:
        for name, other in _mapping("shared", shared.get(file)).items():
            if not isinstance(other, str):
                raise CheckpointError(
                    f"The manifest is damaged: '{name:.80}' cannot be the same as {other!r:.80}."
                )
    return cast("dict[str, dict[str, str]]", shared)


def _with_shared(tensors: dict[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    for name, other in shared.items():
        if other not in tensors or name in tensors:
            raise CheckpointError(
                f"The manifest is damaged: '{name:.80}' cannot be the same as '{other:.80}'."
            )
    return tensors | {name: tensors[other].clone() for name, other in shared.items()}


def _load_weights(model: MorphogeneticModel, state: dict[str, Any]) -> None:
    plain = {plain_name(name): value for name, value in state.items()}

    def same_kinds(loaded: nn.Module, _keys: Any) -> None:
        for name, own in loaded.state_dict().items():
            saved = plain.get(plain_name(name))
            if isinstance(own, Tensor) and isinstance(saved, Tensor) and _kind(own) != _kind(saved):
                raise CheckpointError(
                    f"The saved '{name}' has values of another kind.\n  saved: {saved.dtype}\n  here:  {own.dtype}"
                )

    handle = model.register_load_state_dict_post_hook(same_kinds)  # type: ignore[no-untyped-call]  # torch
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"The saved weights do not fit this model.\n{error}") from error
    except KasminaError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(str(error)) from error
    finally:
        handle.remove()


def _kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def _load_optimizers(
    model: MorphogeneticModel, optimizers: Sequence[Optimizer], saved: Any
) -> dict[int, Sequence[Mapping[str, Any]]]:
    saved = saved if isinstance(saved, list) else []
    if optimizers and len(saved) != len(optimizers):
        raise CheckpointError(
            "The checkpoint was saved with another number of optimisers.\n"
            f"  saved: {len(saved)}\n  here:  {len(optimizers)}"
        )
    return {
        id(one): load_named_optimizer_state(model, one, data)
        for one, data in zip(optimizers, saved, strict=False)
    }


def _recall(name: str, thing: Any, state: Any, saved_class: object = None) -> None:
    if thing is None or not callable(getattr(thing, "load_state_dict", None)):
        return
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


def _kept_seeds(model: MorphogeneticModel, saved: Any) -> dict[str, KeptSeed]:
    found = _mapping("kept_seeds", saved)
    if unknown := [name for name in found if name not in model.slots]:
        raise CheckpointError(
            f"The checkpoint has a seed put aside in slot '{unknown[0]!s:.80}', and this model has no such slot."
        )
    return {str(name): KeptSeed.from_dict(data, str(name)) for name, data in found.items()}


def _saved_snapshots(model: MorphogeneticModel, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    found = {}
    for name, snapshot in model._snapshots.items():
        tensors = contributing_tensors(model.host, model.slots.values(), model.slots[name])
        if (saved := snapshot.to_dict(tensors, optimizers)) is not None:
            found[name] = saved
    return found


def _snapshots(
    model: MorphogeneticModel, saved: Any, optimizers: Sequence[Optimizer]
) -> dict[str, HostSnapshot]:
    found = {}
    for name, data in _mapping("snapshots", saved).items():
        slot = model.slots.get(name)
        if slot is None or not SeedStage.BLENDING <= slot.stage < SeedStage.FOSSILIZED:
            raise CheckpointError(
                f"The checkpoint has a host kept for slot '{name!s:.80}', where no seed blends in."
            )
        tensors = contributing_tensors(model.host, model.slots.values(), slot)
        found[name] = HostSnapshot.from_dict(data, tensors, optimizers, name)
    return found


def _load_generators(generators: Mapping[str, torch.Generator], saved: Any) -> None:
    states = _mapping("generators", saved)
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
def _put_back_on_error(
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[LRScheduler],
    things: Sequence[Any],
    generators: Mapping[str, torch.Generator],
) -> Iterator[None]:
    numbers = random_states(["torch", "python", *(["numpy"] if "numpy" in sys.modules else [])])
    states = [(one, one.get_state()) for one in generators.values()]
    undo: list[Callable[[], None]] = [OptimizerBefore(one).put_back for one in optimizers]
    undo.append(AttributesBefore(schedulers, _inside_a_scheduler).put_back)
    undo.append(AttributesBefore(things, _what_remembers).put_back)
    try:
        yield
    except BaseException:
        for put_back in undo:
            put_back()
        for generator, state in states:
            generator.set_state(state)
        with suppress(CheckpointError):
            restore_random_states(numbers)
        raise


def _what_remembers(thing: Any) -> list[Any]:
    """Return what a policy or a scaler is made of that has a state of its own."""
    return [value for value in vars(thing).values() if callable(getattr(value, "load_state_dict", None))]


def _inside_a_scheduler(scheduler: Any) -> list[Any]:
    values = [value for key, value in vars(scheduler).items() if key != "optimizer"]
    parts = [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]
    plain = (bool, int, float, str, Tensor, Mapping, type(None))
    return [part for part in parts if not isinstance(part, plain) and hasattr(part, "__dict__")]
