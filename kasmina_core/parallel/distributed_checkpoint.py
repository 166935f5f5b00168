"""Checkpoints of many processes, by torch.distributed.checkpoint; their number may change."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from torch.optim.lr_scheduler import LRScheduler

from kasmina_core.checkpoints.files import (
    DISTRIBUTED,
    NewFolder,
    identity,
    plain_refusals,
    present,
    read_manifest,
    write_manifest,
)
from kasmina_core.checkpoints.random_states import InexactResume
from kasmina_core.checkpoints.run_state import (
    Remembers,
    Run,
    apply,
    collect,
    unwrapped,
)
from kasmina_core.errors import CheckpointError, DistributedError, warn_caller
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.plain_data import from_json, meaning, to_json
from kasmina_core.growth.reverting import contributing_tensors
from kasmina_core.parallel.checkpoint_reader import CheckpointReader
from kasmina_core.parallel.distributed import DistributedGrowth
from kasmina_core.parallel.team import Team
from kasmina_core.sharding import reshard
from kasmina_core.slotted import SLOTS_KEY
from kasmina_core.state_keys import plain_name

_PER_RANK: Final = ("rng", "generators")
"""Parts that differ between the processes."""


def save_distributed(
    folder: str | os.PathLike[str],
    model: nn.Module | DistributedGrowth,
    *,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    schedulers: LRScheduler | Iterable[LRScheduler] = (),
    policy: object = None,
    scaler: Remembers | None = None,
    rng: Collection[str] = ("torch",),
    generators: Mapping[str, torch.Generator] | None = None,
    extra: object = None,
    keep_previous: bool = True,
) -> Path:
    """Write a checkpoint of a model that grows in many processes; every process calls it and writes its part.

    The folder, which all must see, holds the tensors as ``torch.distributed.checkpoint`` writes them and a manifest
    with all else that `save_checkpoint` saves. It is written beside and renamed, so that an interrupted save leaves
    what was there.

    Args:
        folder: Where to. What is there becomes ``<folder>.previous``.
        model: What `distribute` returned, or the model.
        optimizer: The optimiser, or several; saved by the names of its parameters.
        schedulers: Learning-rate schedulers, as rank 0 has them.
        policy: What decides on growth, as rank 0 has it.
        scaler: A ``torch.amp.GradScaler``, as rank 0 has it.
        rng: Whose global random numbers to save, for each process; see `save_checkpoint`.
        generators: Generators of your own, for each process; all give the same names.
        extra: Anything else of plain data and tensors, as rank 0 has it, such as where the data loader is.
        keep_previous: Whether the checkpoint that was there is kept.

    Returns:
        The folder.

    Raises:
        CheckpointError: If it cannot be written; what is there stays.
        DistributedError: If a process is missing.
    """
    inner = _inner(model)
    team = _team(inner)
    rank = 0 if team is None else team.rank
    run = Run.of(inner, optimizer, schedulers, policy, scaler, generators)
    with team.attempt("save_distributed()") if team is not None else nullcontext():
        reshard(inner)
        tensors = {f"model/{name}": tensor for name, tensor in _tensors(inner).items()}

        def keep(name: str, tensor: Tensor) -> None:
            tensors[f"training/{name}"] = tensor

        data = collect(run, rng=rng, extra=extra if rank == 0 else None)
        own = to_json({name: data.pop(name) for name in _PER_RANK}, f"ranks[{rank}]", keep)
        step = "what each rank of save_distributed() has"
        data["ranks"] = [own] if team is None else team.everyone(step, own)
        text = to_json(data, "The checkpoint", keep)
        with NewFolder(Path(folder), keep_previous) if rank == 0 else nullcontext() as path:
            # Nobody writes before all have come.
            path = team.first("the folder of save_distributed()", path) if team is not None else path
            with _as_checkpoint_error(f"The checkpoint cannot be written to {folder}"):
                save(
                    tensors,
                    storage_writer=FileSystemWriter(cast("Path", path), sync_files=True),
                    process_group=team.process_group if team is not None else None,
                    no_dist=team is None,
                )
            if rank == 0:
                write_manifest(cast("Path", path), text)
        if team is not None:
            team.first("the end of save_distributed()")
    return Path(folder)


@plain_refusals()
def load_distributed(
    folder: str | os.PathLike[str],
    model: nn.Module | DistributedGrowth,
    *,
    optimizer: Optimizer | Iterable[Optimizer] = (),
    schedulers: LRScheduler | Iterable[LRScheduler] = (),
    policy: object = None,
    scaler: Remembers | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    rng: bool = True,
) -> Any:
    """Make a model, and its optimiser, what they were when `save_distributed` was called, in any number of processes.

    Build host, model and optimiser as at the start of the run, shard the host if it shall be, call `distribute` and
    `tie_optimizer`, and load: seeds are built anew, sharded like the host, and the tensors are read in place, each
    process its part.

    Args:
        folder: The checkpoint.
        model: What `distribute` returned, or the model; of the same host and points, fresh or grown.
        optimizer: The optimiser, or several in the order in which they were saved.
        schedulers: In the order in which they were saved.
        policy: What decided on growth.
        scaler: A ``torch.amp.GradScaler``.
        generators: Generators by the names under which they were saved; only in as many processes as saved them.
        rng: Whether each process restores the global random numbers that it saved.

    Returns:
        What was given as ``extra``.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, foreign or newer, or does not fit; in one process or in
            all. Model and optimisers are then as before.
        DistributedError: If a process is missing.

    Warns:
        InexactResume: If random numbers were saved by another number of processes; they are then left as they are.
    """
    inner = _inner(model)
    team = _team(inner)
    run = Run.of(inner, optimizer, schedulers, policy, scaler, generators)
    with team.attempt("load_distributed()") if team is not None else nullcontext():
        place = present(Path(folder))
        before = identity(place)
        raw = read_manifest(place, DISTRIBUTED)
        reader = CheckpointReader(place)
        with _as_checkpoint_error(f"The checkpoint in {place} cannot be read"):
            wanted = _Wanted(reader.stored_tensors())
        data = _meaning(place, raw, wanted.stand_in)
        data |= _of_this_rank(data["ranks"], team, run.generators, rng, wanted.stand_in)

        def load_weights(records: dict[str, Any]) -> Mapping[str, Any]:
            inner.load_state_dict(records, strict=False)
            reshard(inner)
            own = {f"model/{name}": tensor for name, tensor in _tensors(inner).items()}
            wanted.compare(own, "model/")
            wanted.read |= {name: torch.empty_like(tensor) for name, tensor in own.items()}
            filled: Mapping[str, Any] = wanted.filled(data, _known(inner))
            if team is not None:
                team.first("reading in load_distributed()")  # torch's messages take the same group as ours
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
            return filled

        def agree() -> None:
            if identity(place) != before:
                raise CheckpointError(
                    f"The checkpoint {folder} was replaced while it was read: load it again."
                )
            if team is not None:
                team.first("the end of load_distributed()")

        def room(slot: str) -> int:
            return wanted.values_under(f"model/{SLOTS_KEY}.{slot}.seed.")

        return apply(run, data, load_weights, agree, rng=rng, room=room)["extra"]


@final
class _Wanted:
    """The tensors of a checkpoint that are to be read, and their targets."""

    def __init__(self, stored: Mapping[str, TensorStorageMetadata]) -> None:
        self._stored = stored
        self._stand_ins: dict[int, tuple[Tensor, str]] = {}
        self.read: dict[str, Tensor] = {}

    def stand_in(self, name: str) -> Tensor:
        """Return a tensor without values for the one of this name, until its device and sharding are known."""
        name = f"training/{name}"
        if name not in self._stored:
            raise CheckpointError(f"The checkpoint lacks the tensor '{name:.80}'.")
        found = self._stored[name]
        tensor = torch.empty(found.size, dtype=found.properties.dtype, device="meta")
        self._stand_ins[id(tensor)] = tensor, name
        return tensor

    def filled(self, value: Any, known: Mapping[str, Tensor], like: Tensor | None = None) -> Any:
        """Return data with tensors that will be read in place of its stand-ins.

        A tensor of the shape of ``like`` is placed, and sharded, as that is; others are whole and on the CPU. Below a key
        that names one of the ``known`` tensors of the model, ``like`` is that one.
        """
        if isinstance(value, dict):
            return {key: self.filled(item, known, known.get(key, like)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.filled(item, known, like) for item in value)
        if id(value) not in self._stand_ins:
            return value
        stand_in, name = self._stand_ins[id(value)]
        self.read[name] = (
            torch.empty_like(like, dtype=stand_in.dtype, requires_grad=False)
            if like is not None and like.shape == stand_in.shape
            else torch.empty_like(stand_in, device="cpu")
        )
        return self.read[name]

    def values_under(self, prefix: str) -> int:
        """Return the number of values in the checkpoint's tensors with this prefix."""
        return sum(found.size.numel() for name, found in self._stored.items() if name.startswith(prefix))

    def compare(self, own: Mapping[str, Tensor], prefix: str) -> None:
        """Raise a CheckpointError unless the checkpoint holds exactly these tensors under a prefix."""
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


def _meaning(folder: Path, raw: dict[str, Any], fetch: Callable[[str], Tensor]) -> dict[str, Any]:
    data: dict[str, Any] = meaning(raw, f"The manifest in {folder}", fetch)
    if not all(isinstance(data.get(key), kind) for key, kind in (("topology", dict), ("ranks", list))):
        raise CheckpointError(f"The manifest in {folder} is damaged: it lacks the topology or the ranks.")
    return {"extra": None} | data


def _of_this_rank(
    ranks: list[Any],
    team: Team | None,
    generators: Mapping[str, torch.Generator],
    rng: bool,
    fetch: Callable[[str], Tensor],
) -> dict[str, Any]:
    """Return the random numbers and generators that this process saved."""
    rank, size = (0, 1) if team is None else (team.rank, team.process_group.size())
    if ranks and len(ranks) != size:
        numbers = f"  saved by: {len(ranks)} processes\n  here:     {size}"
        if generators:
            raise CheckpointError(
                f"Each process saved its own generators, and there are others now.\n{numbers}\n"
                "Leave generators= out, and seed them anew."
            )
        if rng:
            warn_caller(
                f"The random numbers of each process go on otherwise than in the saved run.\n{numbers}",
                InexactResume,
            )
        return {name: {} for name in _PER_RANK}
    own = from_json(ranks[rank], f"ranks[{rank}]", fetch) if ranks and isinstance(ranks[rank], str) else {}
    return {name: own.get(name, {}) for name in _PER_RANK}


def _known(model: MorphogeneticModel) -> dict[str, Tensor]:
    """Return the tensors of a model by all names under which an optimiser's state or a copy of the host has them."""
    named: dict[str, Tensor] = {plain_name(name): p for name, p in model.named_parameters()}
    for slot in model.slots.values():
        named |= contributing_tensors(model.host, model.slots.values(), slot)
    return named


def _tensors(model: MorphogeneticModel) -> dict[str, Tensor]:
    """Return the tensors of a model's state by plain names, without the slots' records, which are in the topology."""
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


@contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    """Turn torch's exceptions, which come from any process, into a CheckpointError."""
    alone = ".*assuming the intent is to (save|load) in a single process"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=alone)
            yield
    except CheckpointError:
        raise
    except (CheckpointException, RuntimeError, ValueError, OSError, KeyError, EOFError, TypeError) as error:
        raise CheckpointError(f"{what}: {' '.join(str(error).split())[:600]}") from error
    except (pickle.UnpicklingError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{what}: its description is damaged ({error})") from error
