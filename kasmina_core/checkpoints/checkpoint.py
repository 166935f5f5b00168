"""Checkpoints: everything a run needs to resume exactly."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kasmina_core.checkpoints.files import (
    TRAINING,
    WEIGHTS,
    NewFolder,
    Unchanged,
    new_id,
    plain_refusals,
    read_manifest,
    read_one_version,
    read_tensors,
    with_shared,
    write_manifest,
    write_tensors,
)
from kasmina_core.checkpoints.migrations import part
from kasmina_core.checkpoints.run_state import (
    Remembers,
    Run,
    apply,
    collect,
    unwrapped,
)
from kasmina_core.errors import CheckpointError, KasminaError
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.plain_data import meaning, to_json
from kasmina_core.records import read
from kasmina_core.state_keys import plain_name


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
    """Write a checkpoint from which `load_checkpoint` resumes exactly.

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
    run = Run.of(unwrapped(model), optimizer, schedulers, policy, scaler, generators)
    kept: dict[str, Tensor] = {}
    identity = new_id()
    data = {"id": identity, **collect(run, rng=rng, data_position=data_position, extra=extra)}
    weights, other = _split(run.model.state_dict())
    data["host"] = {"class": type(run.model.host).__name__, "other_state": other}
    parts = {key: to_json(value, key, kept.__setitem__) for key, value in data.items()}
    metadata = {"checkpoint": identity}
    target = Path(folder)
    with NewFolder(target, keep_previous) as path:
        shared: dict[str, dict[str, str]] = {}
        sums: dict[str, int] = {}
        for name, tensors in ((WEIGHTS, weights), (TRAINING, kept)):
            if tensors or name == WEIGHTS:
                shared[name], sums[name] = write_tensors(path / name, tensors, metadata, named=target / name)
        parts["shared"] = to_json(shared, "shared")
        manifest = "{" + ", ".join(f'"{key}": {text}' for key, text in parts.items()) + "}"
        write_manifest(path, manifest, sums)
    return target


@plain_refusals()
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
    run = Run.of(unwrapped(model), optimizer, schedulers, policy, scaler, generators)
    place, data, weights, unchanged = read_one_version(Path(folder), _opened)
    what = f"The manifest in {place}"
    other = part(part(data, "host", dict, what), "other_state", dict, what)

    def load_weights(records: dict[str, Any]) -> dict[str, Any]:
        _load_weights(run.model, {**weights, **other, **records})
        return data

    apply(run, data, load_weights, unchanged.demand, rng=rng)
    versions = {name: str(data.get(name)) for name in ("kasmina", "torch")}
    return LoadedCheckpoint(place, data.get("data_position"), data.get("extra"), versions)


# -- parts -------------------------------------------------------------------------------------------------------------


def _opened(place: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor], Unchanged]:
    """Open all files of a checkpoint; their tensors stay what they are if it is replaced."""
    raw = read_manifest(place)
    metadata = {"checkpoint": part(raw, "id", str, f"The manifest in {place}")}
    unchanged = Unchanged(place, raw["crc32"])
    shared = _shared(raw)
    tensors = {}
    if TRAINING in raw["files"]:
        tensors = with_shared(read_tensors(place / TRAINING, metadata, apart=True), shared.get(TRAINING, {}))
    data: dict[str, Any] = meaning(raw, f"The manifest in {place}", tensors.pop)  # each is used once
    return place, data, with_shared(read_tensors(place / WEIGHTS, metadata), shared[WEIGHTS]), unchanged


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def _shared(raw: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    saved = part(raw, "shared", Mapping, "The manifest")
    shared = {file: saved.get(file) for file in raw["files"]}
    return cast(
        "dict[str, dict[str, str]]", read(dict[str, dict[str, str]], shared, "The manifest", "shared")
    )


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
    except CheckpointError:
        raise
    except RuntimeError as error:
        raise CheckpointError(f"The saved weights do not fit this model.\n{error}") from error
    except KasminaError as error:
        raise CheckpointError(str(error)) from error
    finally:
        handle.remove()


def _kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"
