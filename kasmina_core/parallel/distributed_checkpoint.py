"""Checkpoints that many processes write and read together, by torch.distributed.checkpoint; the number may change."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from kasmina_core.checkpoints.checkpoint import present
from kasmina_core.checkpoints.files import MANIFEST, NewFolder
from kasmina_core.checkpoints.growth_state import growth_of, rebuilding
from kasmina_core.checkpoints.optimizer_names import load_named_optimizer_state, named_optimizer_state
from kasmina_core.checkpoints.run_state import unwrapped
from kasmina_core.errors import CheckpointError, DistributedError
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.undo import OptimizerBefore
from kasmina_core.parallel.checkpoint_reader import CheckpointReader
from kasmina_core.parallel.distributed import DistributedGrowth
from kasmina_core.parallel.team import Team
from kasmina_core.plain_data import from_json, to_json
from kasmina_core.sharding import reshard
from kasmina_core.slotted import SLOTS_KEY
from kasmina_core.state_keys import plain_name

FORMAT: Final = "kasmina distributed checkpoint"
FORMAT_VERSION: Final = 1


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
    team = _team(inner)
    first = team is None or team.rank == 0
    with team.attempt("save_distributed()") if team is not None else nullcontext():
        reshard(inner)
        tensors = {f"model/{name}": tensor for name, tensor in _tensors(inner).items()}

        def keep(name: str, tensor: Tensor) -> None:
            tensors[f"training/{name}"] = tensor

        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "topology": growth_of(inner),
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
        place = present(Path(folder))
        reader = CheckpointReader(place)
        with _as_checkpoint_error(f"The checkpoint in {place} cannot be read"):
            wanted = _Wanted(reader.stored_tensors())
        manifest = _manifest(place, wanted.stand_in)
        optimizers, saved = _several(optimizer), manifest["optimizers"]
        if len(saved) < len(optimizers):
            raise CheckpointError(
                "The checkpoint holds fewer optimisers than are to be loaded.\n"
                f"  saved: {len(saved)}\n  here:  {len(optimizers)}"
            )
        with _undone_on_error(inner, optimizers), rebuilding(inner, manifest["topology"]) as records:
            inner.load_state_dict(records, strict=False)
            reshard(inner)
            own = {f"model/{name}": tensor for name, tensor in _tensors(inner).items()}
            wanted.compare(own, "model/")
            wanted.read |= {name: torch.empty_like(tensor) for name, tensor in own.items()}
            parameters = {plain_name(name): p for name, p in inner.named_parameters()}
            states = [wanted.of_optimizer(state, parameters) for state in saved[: len(optimizers)]]
            extra = wanted.filled(manifest["extra"])
            if team is not None:
                team.first("reading in load_distributed()")  # torch's words take the same way as ours
            with _as_checkpoint_error(f"The checkpoint in {place} cannot be read"):
                load(
                    wanted.read,
                    storage_reader=reader,
                    process_group=team.process_group if team is not None else None,
                    no_dist=team is None,
                )
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(wanted.read[name])
            for one, state in zip(optimizers, states, strict=True):
                load_named_optimizer_state(inner, one, state)
            if team is not None:
                team.first("the end of load_distributed()")
    return extra


@final
class _Wanted:
    """The tensors of a checkpoint that are to be read, and where to.

    Args:
        stored: What the checkpoint holds.
    """

    def __init__(self, stored: Mapping[str, TensorStorageMetadata]) -> None:
        self._stored = stored
        self._stand_ins: dict[int, tuple[Tensor, str]] = {}
        self.read: dict[str, Tensor] = {}

    def stand_in(self, name: str) -> Tensor:
        """Return a tensor without values for the one of this name, until it is known where its values shall be."""
        name = f"training/{name}"
        if name not in self._stored:
            raise CheckpointError(f"The checkpoint lacks the tensor '{name:.80}'.")
        found = self._stored[name]
        tensor = torch.empty(found.size, dtype=found.properties.dtype, device="meta")
        self._stand_ins[id(tensor)] = tensor, name
        return tensor

    def filled(self, value: Any, parameter: Tensor | None = None) -> Any:
        """Return data with tensors that will be read for the stand-ins in it.

        Args:
            value: The data.
            parameter: Tensors of its shape are placed, and sharded, as it is; others are whole and on the CPU.
        """
        if isinstance(value, dict):
            return {key: self.filled(item, parameter) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.filled(item, parameter) for item in value)
        if id(value) not in self._stand_ins:
            return value
        stand_in, name = self._stand_ins[id(value)]
        like = parameter if parameter is not None and parameter.shape == stand_in.shape else None
        self.read[name] = (
            torch.empty_like(like, dtype=stand_in.dtype, requires_grad=False)
            if like is not None
            else torch.empty_like(stand_in, device="cpu")
        )
        return self.read[name]

    def of_optimizer(self, saved: Any, parameters: Mapping[str, Tensor]) -> Any:
        """Return an optimiser's state, each parameter's tensors where the parameter is."""
        if not isinstance(saved, dict) or not isinstance(state := saved.get("state"), dict):
            return saved
        rest = self.filled({key: value for key, value in saved.items() if key != "state"})
        return {
            **rest,
            "state": {name: self.filled(values, parameters.get(name)) for name, values in state.items()},
        }

    def compare(self, own: Mapping[str, Tensor], prefix: str) -> None:
        """Require that the checkpoint holds exactly these tensors under a prefix.

        Raises:
            CheckpointError: If not.
        """
        faults = [f"  {n}: saved, not here" for n in self._stored if n.startswith(prefix) and n not in own]
        for name, tensor in own.items():
            saved = self._stored.get(name)
            if saved is None:
                faults.append(f"  {name}: here, not saved")
            elif saved.size != tensor.shape:
                faults.append(f"  {name}: {tuple(saved.size)} saved, {tuple(tensor.shape)} here")
        if faults:
            more = f"\n  … and {len(faults) - 6} more" if len(faults) > 6 else ""
            raise CheckpointError("The checkpoint is of another host.\n" + "\n".join(faults[:6]) + more)


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


def _inner(model: nn.Module | DistributedGrowth) -> MorphogeneticModel:
    return model.model if isinstance(model, DistributedGrowth) else unwrapped(model)


def _team(model: MorphogeneticModel) -> Team | None:
    if isinstance(model.growth.agreement, Team):
        return model.growth.agreement
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise DistributedError("The processes do not know each other yet: call distribute(model) first.")
    return None


def _several(given: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    return list(given) if isinstance(given, Iterable) else [given]


@contextmanager
def _undone_on_error(model: MorphogeneticModel, optimizers: Iterable[Optimizer]) -> Iterator[None]:
    undo = [OptimizerBefore(one).put_back for one in optimizers]
    try:
        with model.growth.undone_on_error():
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
