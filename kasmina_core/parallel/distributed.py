"""Growth in many processes under torch's DistributedDataParallel and FSDP2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from enum import Enum
from typing import Any, TypeVar, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kasmina_core.errors import DistributedError, GerminationError
from kasmina_core.growth.agreement import Agreement
from kasmina_core.growth.arguments import require_model
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.slot import SeedSlot
from kasmina_core.growth.watching.living import living
from kasmina_core.lifecycle import CONTRIBUTING
from kasmina_core.outputs import split_path
from kasmina_core.parallel.control import ControlGroup
from kasmina_core.parallel.team import Team
from kasmina_core.sharding import sharded_modules

_T = TypeVar("_T", bound=Tensor)
_IGNORED = "_ddp_params_and_buffers_to_ignore"  # read by DistributedDataParallel when it is made


@final
class Wrap(Enum):
    """Who averages gradients over the processes.

    - ``DDP``: a ``DistributedDataParallel`` made here, and made anew when a seed begins or ceases to contribute.
    - ``FSDP``: ``torch.distributed.fsdp.fully_shard``, which the caller applied to the host; new seeds are sharded too.
    - ``OUTSIDE``: the caller or a trainer wraps the model. Seeds stay outside of that wrapper.
    """

    DDP = "ddp"
    FSDP = "fsdp"
    OUTSIDE = "outside"


@final
class DistributedGrowth:
    """A model that grows alike in every process; made by `distribute`.

    Call it like the model. Commands, ``step``, ``step_epoch``, ``follow`` and ``incubate`` stay the model's own.

    Attributes:
        model: The model of this process.
        wrap: Who averages gradients; ``None`` in a process that is alone.
        rank: Of this process in the group.
        size: Number of processes.
    """

    def __init__(
        self,
        model: MorphogeneticModel,
        wrap: Wrap | None,
        group: dist.ProcessGroup | None,
        timeout: float,
        shard: Callable[[nn.Module], object] | None,
        options: dict[str, Any],
    ) -> None:
        self.model = model
        self.wrap = wrap
        self.rank = dist.get_rank(group) if wrap is not None else 0
        self.size = dist.get_world_size(group) if wrap is not None else 1
        self._group = group
        self._options = options
        self._wrapper: DistributedDataParallel | None = None
        self._wrapped: tuple[int, ...] = ()
        self._was_called = False
        self._host: list[nn.Parameter] = []
        if wrap is None:
            return
        self._control = ControlGroup(group, timeout)
        team = Team(model, self._control, self._shard_seed if wrap is Wrap.FSDP else None, self._average_for)
        self._shard = shard
        if wrap is Wrap.FSDP:
            _begin_sharding(model)
            self._shard_grown_seeds()
        elif grown := [
            t for slot in model.slots.values() if slot.seed is not None for t in _tensors(slot.seed)
        ]:
            team.send_from_first("seeds", grown)
        model.growth.decide_with(team)
        model.listen(self)
        if wrap is Wrap.OUTSIDE:
            self.leave_out_seeds(model)

    # -- the forward pass ------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model; with gradients through the wrapper, without them in this process alone."""
        return (self.module if torch.is_grad_enabled() else self.model)(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        """What a training forward goes through now: the wrapper, brought up to date, or the model itself.

        Every process has to ask when one does, since a new wrapper compares itself with the others.
        """
        self._was_called = True
        if self.wrap is not Wrap.DDP:
            return self.model
        wanted = self._contributing()
        if not wanted:
            return self.model  # nothing that the wrapper could average
        if self._wrapper is None or tuple(map(id, wanted)) != self._wrapped:
            self._wrapper = None
            self._wrapper = self._new_wrapper()
            self._wrapped = tuple(map(id, wanted))
        return self._wrapper

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients apart in the block, for all backward passes of an accumulation but the last."""
        module = self.module
        with module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext():
            yield

    def _new_wrapper(self) -> DistributedDataParallel:
        # This names a missing process within our time limit; the engine's own may be half an hour.
        self._control.exchange("a new DistributedDataParallel")
        with self._ignoring(self.model, _outside_names(self.model, self.model)):
            return DistributedDataParallel(self.model, process_group=self._group, **self._options)

    def _contributing(self) -> list[nn.Parameter]:
        """Return the parameters that the loss of the host's own pass gives a gradient, without those of new seeds."""
        if not self._host:
            self._host = self.model.host_parameters()
        contributing = [name for name, slot in self.model.slots.items() if _contributes(slot)]
        seeds = [p for name in contributing for p in self.model.seed_parameters(name)]
        return [p for p in (*self._host, *seeds) if p.requires_grad]

    @contextmanager
    def _ignoring(self, module: nn.Module, names: list[str]) -> Iterator[None]:
        before = getattr(module, _IGNORED, ())
        setattr(module, _IGNORED, {*before, *names})
        try:
            yield
        finally:
            if before:
                setattr(module, _IGNORED, before)
            else:
                delattr(module, _IGNORED)

    def leave(self) -> None:
        """Let the model decide by itself again; call it in every process, before the group is destroyed."""
        if self in self.model.growth.listeners:
            self.model.growth.listeners.remove(self)
            self.model.growth.decide_with(Agreement())

    def leave_out_seeds(self, module: nn.Module) -> None:
        """Make a ``DistributedDataParallel(module)`` that is created after this ignore seeds.

        With ``wrap="outside"`` the gradients of all seeds are averaged in ``model.step()``. A wrapper that was made
        before a seed germinated does not know it; one that is made while there are seeds must not wait for their
        gradients.

        Args:
            module: What will be wrapped: the model, or a module around it.
        """
        leave_out_seeds(self.model, module)

    # -- gradients of seeds ----------------------------------------------------------------------------------------

    def average_gradients(self) -> None:
        """Average the gradients of seeds that no wrapper averages.

        ``model.step()``, `clip_gradients` and `drop_nonfinite_seed_gradients` do it; call it before anything else that
        looks at them, such as ``GradScaler.unscale_``. Averaging twice changes nothing.
        """
        if self.wrap is not None:
            self._average_seeds()

    def _average_for(self, is_step: bool) -> None:
        """Average for the model; before a step, refuse gradients of ``model(x)`` that went past the wrapper."""
        went_past = is_step and self.wrap is Wrap.DDP and not self._was_called and self.size > 1
        if went_past and any(p.grad is not None for p in self._contributing()):
            raise self._control.give_up(
                DistributedError(
                    f"Rank {self.rank} has gradients that were not averaged: since the last step only the model "
                    "was called.\nCall what distribute() returned, net(x), in the training step."
                )
            )
        if is_step:
            self._was_called = False
        self._average_seeds()

    def _average_seeds(self) -> None:
        seeds = [slot.seed for slot in self.model.slots.values() if slot.seed is not None and slot.is_active]
        host = {id(p) for p in self._host or self.model.host_parameters()}
        known = host | (set(self._wrapped) if self._wrapper is not None else set())
        own = [p for seed in seeds for p in seed.parameters() if p.requires_grad and id(p) not in known]
        with torch.no_grad():
            for parameters in _alike([p for p in own if not _is_sharded(p)]):
                self._average(parameters)
            apart = [seed for seed in seeds if not all(id(p) in known for p in seed.parameters())]
            for buffers in _alike([buffer for seed in apart for buffer in seed.buffers()]):
                flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
                dist.broadcast(flat, group=self._group, group_src=0)
                _scatter_back(flat, buffers)

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their mean over the processes; a process without one counts as zero."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        has_own = [float(p.grad is not None) for p in parameters]
        like = parameters[0]
        # A tensor made from a list would have to be waited for; mostly every gradient is there.
        present = like.new_ones(len(has_own)) if all(has_own) else like.new_tensor(has_own)
        flat = torch.cat([*(g.reshape(-1) for g in gradients), present])
        dist.all_reduce(flat, group=self._group)
        flat, counts = flat[: -len(parameters)].div_(self.size), flat[-len(parameters) :]
        _scatter_back(flat, gradients)
        if all(has_own):
            return
        for p, gradient, anybody in zip(parameters, gradients, (counts != 0).tolist(), strict=True):
            p.grad = gradient if anybody else None

    # -- following the topology ------------------------------------------------------------------------------------

    def seed_added(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        """Leave a new seed out of wrappers that others make.

        Raises:
            GerminationError: If others wrapped the model in something else than DDP.
        """
        if self.wrap is Wrap.OUTSIDE:
            if wrapper := _other_wrapper(self.model):
                raise GerminationError(
                    f"wrap='outside' is for a model in DistributedDataParallel, and this one is in {wrapper}.\n"
                    "For FSDP2 shard the host with fully_shard and call distribute(model) without wrap=: "
                    "docs/distributed.md."
                )
            self.leave_out_seeds(self.model)

    def seed_removed(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        """Drop a wrapper that knew the seed, which frees the seed's memory."""
        if self._wrapper is not None and not {id(p) for p in parameters}.isdisjoint(self._wrapped):
            self._wrapper, self._wrapped = None, ()
        if self.wrap is Wrap.OUTSIDE:
            self.leave_out_seeds(self.model)

    def _shard_grown_seeds(self) -> None:
        for slot in self.model.slots.values():
            seed = slot.seed
            if seed is None or any(map(_is_sharded, seed.parameters())):
                continue
            for listener in self.model.growth.listeners:
                listener.seed_removed(slot.name, list(seed.parameters()))
            self._shard_seed(seed)
            for listener in self.model.growth.listeners:
                listener.seed_added(slot.name, list(seed.parameters()))

    def _shard_seed(self, seed: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        try:
            if self._shard is not None:
                self._shard(seed)
            else:
                host = self.model.host
                policy = _precision_around(seed, self.model)
                options = {"mp_policy": policy} if policy is not None else {}
                fully_shard(seed, mesh=_mesh_of(host), reshard_after_forward=True, **options)
        except (ValueError, NotImplementedError) as error:
            raise GerminationError(f"The seed cannot be sharded: {error}") from error
        for module in sharded_modules(seed):
            # Who asks a seed for its parameters, such as an optimiser, gets the shards at any time.
            module.set_reshard_after_forward(True, recurse=False)


def leave_out_seeds(model: MorphogeneticModel, module: nn.Module) -> None:
    """Make a ``DistributedDataParallel(module)`` that is created after this ignore the seeds of a model in it."""
    setattr(module, _IGNORED, set(_outside_names(model, module, all_seeds=True)))


def _outside_names(model: MorphogeneticModel, module: nn.Module, *, all_seeds: bool = False) -> list[str]:
    """Return names in ``module`` of what its wrapper must not touch: slots, and seeds that do not contribute."""
    outside: set[int] = set()
    for slot in model.slots.values():
        outside |= {id(tensor) for tensor in slot.buffers(recurse=False)}
        if slot.seed is not None and (all_seeds or not _contributes(slot)):
            outside |= {id(tensor) for tensor in _tensors(slot.seed)}
    outside -= {id(tensor) for tensor in _tensors(model.host)}
    named = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, tensor in named if id(tensor) in outside]


def _other_wrapper(model: MorphogeneticModel) -> str:
    """Return what else than DDP spreads a model over processes; empty if nothing does."""
    if sharded_modules(model):
        return "FSDP2"
    known = {
        "FSDP": ("torch.distributed.fsdp", "FullyShardedDataParallel"),
        "DeepSpeed": ("deepspeed", "DeepSpeedEngine"),
    }
    for name, (module, wrapper) in known.items():
        kind = getattr(sys.modules.get(module), wrapper, None)
        if kind is not None and any(part is model for one in living(kind) for part in one.modules()):
            return name
    return ""


def _contributes(slot: SeedSlot) -> bool:
    """Whether the host's own loss depends on the seed, which then belongs in the wrapper."""
    return slot.seed is not None and slot.stage in CONTRIBUTING and slot.alpha > 0.0


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _alike(tensors: Iterable[_T]) -> list[list[_T]]:
    """Return the tensors in groups of one dtype and device, each tensor once, in order."""
    groups: dict[tuple[torch.dtype, torch.device], list[_T]] = {}
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


def _scatter_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def _begin_sharding(model: MorphogeneticModel) -> None:
    """Make FSDP2 choose its roots now: in the first forward, a seed that ran before, alone, could not be in one."""
    settled: set[nn.Module] = set()
    for module in sharded_modules(model):
        if module not in settled:
            settled |= set(module.modules())
            begin = getattr(module._get_fsdp_state(), "_lazy_init", None)
            if begin is not None:
                begin()


def _precision_around(seed: nn.Module, model: MorphogeneticModel) -> Any:
    """Return the mixed precision of the innermost sharded module of the host around a seed; ``None`` for none."""
    path = next(slot.point.path for slot in model.slots.values() if slot.seed is seed)
    modules = dict(model.host.named_modules(remove_duplicate=False))
    names = split_path(path)[0].split(".")
    found: Any = None
    for depth in range(len(names) + 1):
        module: Any = modules[".".join(names[:depth])]
        if hasattr(module, "set_reshard_after_forward"):
            found = getattr(module._get_fsdp_state(), "_mp_policy", found)
    # A seed's output gets the dtype of the features, not that of the layer's output.
    return replace(found, output_dtype=None) if found is not None else None


def _mesh_of(host: nn.Module) -> Any:
    for parameter in host.parameters():
        if _is_sharded(parameter):
            sharded = cast("Any", parameter)
            if sum(placement.is_shard() for placement in sharded.placements) == 1:
                return sharded.device_mesh
            break
    raise DistributedError(
        "How to shard a seed cannot be told from the host: its parameters are not sharded along one mesh dimension.\n"
        "Say it: distribute(model, wrap='fsdp', shard=lambda seed: fully_shard(seed, mesh=mesh))."
    )


def distribute(
    model: MorphogeneticModel,
    *,
    wrap: Wrap | str | None = None,
    process_group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
    shard: Callable[[nn.Module], object] | None = None,
    **ddp_options: Any,
) -> DistributedGrowth:
    """Let a model grow in many processes, with the same decisions in all of them.

    In the training loop two lines change: ``net = distribute(model)`` and ``net(x)`` instead of ``model(x)``. Every
    process calls this, and after it gives the same commands in the same order. Without an initialised process group
    nothing changes, so that the same script runs in one process.

    Held-out losses are gathered from all ranks, in rank order; each rank may hold another number of them. The metric of
    ``step_epoch`` is the mean over the ranks that give one. Of deviations and leaks the largest counts. ``follow``
    carries out what rank 0's policy says. A germination refused on one rank is refused on all. Gradients of seeds that
    incubate are averaged in ``model.step()``, and before `clip_gradients` or `drop_nonfinite_seed_gradients` see them.

    Args:
        model: This process's copy, on its device.
        wrap: Who averages gradients; default FSDP if the host is sharded, else DDP.
        process_group: The processes that hold copies of the model; default all.
        timeout: Seconds to wait for the slowest process before a decision.
        shard: Shards a new seed in place, as the host's layers were; default ``fully_shard`` over the host's mesh,
            in the mixed precision of the layer around the seed.
        ddp_options: Options of ``DistributedDataParallel``.

    Raises:
        DistributedError: If a process is missing, or hosts, slots, settings or seeds differ.
        ValueError: If options do not go with ``wrap``.
        TypeError: If it is no `MorphogeneticModel`.
    """
    require_model(model, "distribute")
    chosen: Wrap | None = None
    if dist.is_available() and dist.is_initialized():
        chosen = Wrap(wrap) if wrap is not None else Wrap.FSDP if sharded_modules(model) else Wrap.DDP
        if ddp_options and chosen is not Wrap.DDP:
            raise ValueError(f"Options of DistributedDataParallel do not go with wrap='{chosen.value}'.")
        if shard is not None and chosen is not Wrap.FSDP:
            raise ValueError(f"shard does not go with wrap='{chosen.value}'.")
    for listener in list(model.growth.listeners):
        if isinstance(listener, DistributedGrowth):
            model.growth.listeners.remove(listener)
    return DistributedGrowth(model, chosen, process_group, timeout, shard, ddp_options)
