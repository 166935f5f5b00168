"""Checkpoints that many processes write and read together, by torch.distributed.checkpoint; the number may change."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.optim import Optimizer

from kasmina_core.checkpoint import unwrapped
from kasmina_core.checkpoint_files import MANIFEST, NewFolder, previous_of
from kasmina_core.distributed import DistributedGrowth
from kasmina_core.errors import CheckpointError, DistributedError
from kasmina_core.growth_state import rebuild_topology, topology_of
from kasmina_core.model import SLOTS_KEY, MorphogeneticModel
from kasmina_core.optimizer_names import load_named_optimizer_state, named_optimizer_state
from kasmina_core.plain_data import from_json, to_json
from kasmina_core.sharding import reshard
from kasmina_core.state_keys import plain_name
from kasmina_core.team import Team
from kasmina_core.unchanged import OptimizerBefore

FORMAT: Final = "kasmina distributed checkpoint"
FORMAT_VERSION: Final = 1

_HARMLESS: Final = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}
"""What torch's own description of a checkpoint is made of."""


def save_distributed(
    folder: str | os.PathLike[str],
    model: nn.Module | DistributedGrowth,
    *,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    extra: object = None,
    keep_previous: bool = True,
) -> Path:
    """Write a checkpoint of a model that grows in many processes; every process calls it and writes its part.

    The folder, which all must see, holds the tensors as ``torch.distributed.checkpoint`` writes them and a manifest
    with the topology. It is written beside and renamed, so that an interrupted save leaves what was there.

    Args:
        folder: Where to. What is there becomes ``<folder>.previous``.
        model: What `distribute` returned, or the model.
        optimizer: The optimiser, or several; saved by the names of its parameters.
        extra: Anything else of plain data, as rank 0 has it.
        keep_previous: Whether the checkpoint that was there is kept.

    Returns:
        The folder.

    Raises:
        CheckpointError: If it cannot be written; what is there stays.
        DistributedError: If a process is missing.
    """
    inner = _inner(model)
    team, first = _team(inner), _is_first()
    with team.attempt("save_distributed()") if team is not None else nullcontext():
        reshard(inner)
        tensors = {f"model/{name}": tensor for name, tensor in _tensors(inner).items()}

        def keep(tensor: Tensor) -> str:
            name = f"training/{len(tensors)}"
            tensors[name] = tensor
            return name

        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "topology": topology_of(inner),
            "optimizers": [named_optimizer_state(inner, one) for one in _several(optimizer)],
            "extra": extra if first else None,
        }
        text = to_json(manifest, "The checkpoint", keep)
        with NewFolder(Path(folder), keep_previous) if first else nullcontext() as path:
            # Nobody writes before all have come.
            path = team.first("the folder of save_distributed()", path) if team is not None else path
            with _as_checkpoint_error(f"The checkpoint cannot be written to {folder}"):
                save(
                    tensors,
                    storage_writer=FileSystemWriter(cast("Path", path), sync_files=True),
                    process_group=team.process_group if team is not None else None,
                    no_dist=team is None,
                )
            if first:
                (cast("Path", path) / MANIFEST).write_text(text, encoding="utf-8")
        if team is not None:
            team.first("the end of save_distributed()")
    return Path(folder)


def load_distributed(
    folder: str | os.PathLike[str],
    model: nn.Module | DistributedGrowth,
    *,
    optimizer: Optimizer | Iterable[Optimizer] = (),
) -> Any:
    """Make a model, and its optimiser, what they were when `save_distributed` was called, in any number of processes.

    Build host, model and optimiser as at the start of the run, shard the host if it shall be, call `distribute` and
    `tie_optimizer`, and load: seeds are built anew, sharded like the host, and the tensors are read in place, each
    process its part.

    Args:
        folder: The checkpoint.
        model: What `distribute` returned, or the model; of the same host and points, fresh or grown.
        optimizer: The optimiser, or several in the order in which they were saved.

    Returns:
        What was given as ``extra``.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, foreign or newer, or does not fit; in one process or in
            all. Model and optimisers are then as before.
        DistributedError: If a process is missing.
    """
    inner = _inner(model)
    team = _team(inner)
    with team.attempt("load_distributed()") if team is not None else nullcontext():
        path = Path(folder)
        place = path if path.is_dir() else previous_of(path)
        reader = _Reader(place)
        with _as_checkpoint_error(f"The checkpoint in {folder} cannot be read"):
            known = {
                name: found
                for name, found in reader.read_metadata().state_dict_metadata.items()
                if isinstance(found, TensorStorageMetadata)
            }
        waiting: dict[int, tuple[Tensor, str]] = {}

        def fetch(name: str) -> Tensor:
            if name not in known:
                raise CheckpointError(f"The checkpoint in {folder} lacks the tensor '{name:.80}'.")
            stand_in = torch.empty(known[name].size, dtype=known[name].properties.dtype, device="meta")
            waiting[id(stand_in)] = (stand_in, name)
            return stand_in

        manifest = _manifest(place, fetch)
        optimizers = _several(optimizer)
        saved = manifest["optimizers"]
        if len(saved) < len(optimizers):
            raise CheckpointError(
                f"The checkpoint holds fewer optimisers than asked for.\n  saved: {len(saved)}\n"
                f"  here:  {len(optimizers)}"
            )
        with _undone_on_error(inner, optimizers):
            rebuild_topology(inner, manifest["topology"])
            reshard(inner)
            own = _tensors(inner)
            _compare(own, {n.removeprefix("model/"): m for n, m in known.items() if n.startswith("model/")})
            read = {f"model/{name}": torch.empty_like(tensor) for name, tensor in own.items()}
            parameters = {plain_name(name): p for name, p in inner.named_parameters()}

            def real(value: Any, parameter: Tensor | None = None) -> Any:
                if isinstance(value, dict):
                    return {key: real(item, parameter) for key, item in value.items()}
                if isinstance(value, list | tuple):
                    return type(value)(real(item, parameter) for item in value)
                if id(value) not in waiting:
                    return value
                stand_in, name = waiting[id(value)]
                is_like = parameter is not None and stand_in.shape == parameter.shape
                read[name] = (
                    torch.empty_like(cast("Tensor", parameter), dtype=stand_in.dtype, requires_grad=False)
                    if is_like
                    else torch.empty_like(stand_in, device="cpu")
                )
                return read[name]

            states = []
            for state in saved[: len(optimizers)]:
                values = state.get("state", {}) if isinstance(state, dict) else {}
                by_name = {name: real(value, parameters.get(name)) for name, value in values.items()}
                states.append({**state, "state": by_name} if isinstance(state, dict) else state)
            states = [
                {**real({k: v for k, v in s.items() if k != "state"}), "state": s["state"]} for s in states
            ]
            extra = real(manifest["extra"])
            with _as_checkpoint_error(f"The checkpoint in {folder} cannot be read"):
                load(
                    read,
                    storage_reader=reader,
                    process_group=team.process_group if team is not None else None,
                    no_dist=team is None,
                )
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(read[f"model/{name}"])
            for one, state in zip(optimizers, states, strict=True):
                load_named_optimizer_state(inner, one, state)
            if team is not None:
                team.first("the end of load_distributed()")
    return extra


class _Reader(FileSystemReader):
    """Reads what torch wrote, and nothing that a file made up: its description is a pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Harmless(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise CheckpointError(f"{self.path} holds no checkpoint of torch.distributed.checkpoint.")
        for stored in (metadata.storage_data or {}).values():
            where = getattr(stored, "relative_path", None)
            if not isinstance(where, str) or Path(where).name != where:
                raise CheckpointError(f"The checkpoint in {self.path} leads elsewhere: {where!r:.80}.")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Harmless(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _HARMLESS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise CheckpointError(
            f"The checkpoint's description asks for {module[:40]}.{name[:40]}, which is none of its parts; "
            "nothing of it was run."
        )


def _manifest(folder: Path, fetch: Callable[[str], Tensor]) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        data = from_json(file.read_bytes(), str(file), fetch)
    except OSError as error:
        raise CheckpointError(f"{folder} is no checkpoint: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no manifest of a {FORMAT}.")
    if data.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint in {folder} has another version.\n"
            f"  saved:    {data.get('version')!r:.40}\n  readable: {FORMAT_VERSION}"
        )
    if not isinstance(data.get("topology"), dict) or not isinstance(data.get("optimizers"), list):
        raise CheckpointError(f"{file} is damaged: it lacks the topology or the optimisers.")
    return {"extra": None} | data


def _tensors(model: MorphogeneticModel) -> dict[str, Tensor]:
    """Return the tensors of a model's state by plain names; what a slot knows beside its weights is in the topology."""
    records = tuple(f"{SLOTS_KEY}.{name}._extra_state" for name in model.slots)
    named = {plain_name(name): value for name, value in model.state_dict().items() if name not in records}
    return {name: value.detach() for name, value in named.items() if isinstance(value, Tensor)}


def _compare(own: Mapping[str, Tensor], saved: Mapping[str, TensorStorageMetadata]) -> None:
    faults = [f"  {name}: saved, not in this model" for name in saved if name not in own]
    for name, tensor in own.items():
        if name not in saved:
            faults.append(f"  {name}: in this model, not saved")
        elif saved[name].size != tensor.shape:
            faults.append(f"  {name}: {tuple(saved[name].size)} saved, {tuple(tensor.shape)} here")
    if faults:
        more = f"\n  … and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise CheckpointError("The checkpoint is of another host.\n" + "\n".join(faults[:6]) + more)


def _inner(model: nn.Module | DistributedGrowth) -> MorphogeneticModel:
    return model.model if isinstance(model, DistributedGrowth) else unwrapped(model)


def _team(model: MorphogeneticModel) -> Team | None:
    if isinstance(model._agreement, Team):
        return model._agreement
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise DistributedError("The processes do not know each other yet: call distribute(model) first.")
    return None


def _is_first() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _several(given: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    return list(given) if isinstance(given, Iterable) else [given]


@contextmanager
def _undone_on_error(model: MorphogeneticModel, optimizers: Iterable[Optimizer]) -> Iterator[None]:
    undo = [OptimizerBefore(one).put_back for one in optimizers]
    try:
        with model._undone_on_error():
            yield
    except BaseException:
        for put_back in undo:
            put_back()
        raise


@contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    """Say what torch's exceptions, which come from any process, mean here."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*assuming the intent is to (save|load) in a single process"
            )
            yield
    except CheckpointError:
        raise
    except (CheckpointException, RuntimeError, ValueError, OSError, KeyError, EOFError, TypeError) as error:
        raise CheckpointError(f"{what}: {' '.join(str(error).split())[:600]}") from error
    except (pickle.UnpicklingError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{what}: its description is damaged ({error})") from error
