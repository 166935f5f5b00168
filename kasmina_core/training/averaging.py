"""Averaged weights (EMA, SWA) of a model that grows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from kasmina_core.errors import HostError, MisuseWarning, warn_caller
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.slot import SeedSlot
from kasmina_core.growth.watching.living import living
from kasmina_core.hosts import SlotHook
from kasmina_core.lifecycle import SeedStage

Pairs = list[tuple[Tensor, Tensor]]
AverageOne = Callable[[Tensor, Tensor, Tensor | int], Tensor]
AverageMany = Callable[[list[Tensor], list[Tensor], Tensor | int], None]


@final
class GrowingAveragedModel(AveragedModel):
    """torch's `AveragedModel` whose average grows, and loses seeds, with the model.

    torch's own pairs the two models' parameters by position, so after a germination it silently averages wrong pairs.
    Here each `update_parameters` first copies seeds, stages and alphas to the average's slots. A new seed's average
    starts at its present weights and counts its updates from there, so that an equal average (SWA) covers the seed's
    life and not the host's.

    ``state_dict`` and a strict ``load_state_dict`` rebuild the average with its seeds.

    Args:
        model: A `MorphogeneticModel`, or a module that holds one.
        device: Device of the average; default that of the model.
        avg_fn: ``(average, present, updates) -> average`` of one tensor. Default the equal average.
        multi_avg_fn: The same in place on lists, such as ``torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)``.
        use_buffers: Whether buffers are averaged; if not, they are the model's.

    Source: Izmailov et al. 2018, https://arxiv.org/abs/1803.05407
    """

    seed_updates: Tensor

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | int | None = None,
        avg_fn: AverageOne | None = None,
        multi_avg_fn: AverageMany | None = None,
        use_buffers: bool = False,
    ) -> None:
        super().__init__(
            model, cast("Any", device), cast("Any", avg_fn), cast("Any", multi_avg_fn), use_buffers
        )
        # One number per slot, whether it holds a seed or not: the keys do not change as the model grows.
        self.register_buffer(
            "seed_updates", torch.zeros(len(_slots(model)), dtype=torch.long, device=self.n_averaged.device)
        )
        self.register_load_state_dict_pre_hook(_take_length)  # type: ignore[no-untyped-call]  # torch
        self.register_load_state_dict_post_hook(_demand_length)  # type: ignore[no-untyped-call]  # torch

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Follow the model's growth, then take its present weights into the average.

        Args:
            model: The model that was given, or a wrapper of it.

        Raises:
            HostError: If it has other slots than the model that was given.
        """
        self._follow(model)
        parts: dict[int | None, Pairs] = {}
        both = (_tensors(module, self.use_buffers) for module in (self.module, model))
        for (index, average), (_, present) in zip(*both, strict=True):
            parts.setdefault(index, []).append((average.detach(), present.detach().to(average.device)))
        for index, pairs in parts.items():
            count = self.n_averaged if index is None else self.seed_updates[index]
            if int(count) == 0:
                _copy(pairs)
            else:
                self._average(pairs, count)
        # A slot's own buffers hold its seed's stage and alpha: they are never averaged.
        copied = [_slots(module) if self.use_buffers else [module] for module in (self.module, model)]
        for ours, theirs in zip(*copied, strict=True):
            _copy(zip(ours.buffers(not self.use_buffers), theirs.buffers(not self.use_buffers), strict=True))
        for index, slot in enumerate(_slots(self.module)):
            self.seed_updates[index] += slot.seed is not None
        self.n_averaged += 1

    def _average(self, pairs: Pairs, count: Tensor) -> None:
        alike: dict[tuple[torch.device, torch.dtype], Pairs] = {}
        for pair in pairs:
            alike.setdefault((pair[0].device, pair[0].dtype), []).append(pair)
        for (device, dtype), group in alike.items():
            if not dtype.is_floating_point:  # a count of batches has no average
                _copy(group)
            elif self.multi_avg_fn is not None:
                averages, presents = zip(*group, strict=True)
                self.multi_avg_fn(list(averages), list(presents), count.to(device))
            else:
                average_one = self.avg_fn or get_swa_avg_fn()  # type: ignore[no-untyped-call]  # torch
                _copy(
                    (average, average_one(average, present, count.to(device))) for average, present in group
                )

    def _follow(self, model: nn.Module) -> None:
        self._nest(model)
        ours, theirs = _slots(self.module), _slots(model)
        if [slot.point for slot in ours] != [slot.point for slot in theirs]:
            raise HostError(
                "The average was made of a model with other slots.\n"
                f"  average: {', '.join(slot.name for slot in ours) or 'none'}\n"
                f"  model:   {', '.join(slot.name for slot in theirs) or 'none'}"
            )
        for index, (twin, slot) in enumerate(zip(ours, theirs, strict=True)):
            if twin.state is None and slot.state is None:
                continue
            if slot.seed is None:
                twin.seed = None
                self.seed_updates[index] = 0
            elif twin.seed is None or _identity(twin) != _identity(slot):
                # What a seed shares with the host, its copy shares with the host's average.
                hosts = ([t for i, t in _tensors(m, buffers=True) if i is None] for m in (model, self.module))
                shared: dict[int, Any] = {id(a): b for a, b in zip(*hosts, strict=True)}
                seed = copy.deepcopy(slot.seed, shared)
                if twin.alpha_buffer.dtype != slot.alpha_buffer.dtype:
                    seed = seed.to(twin.alpha_buffer.dtype)
                twin.seed = seed.to(twin.device).train(twin.training)
                twin.takes_context = slot.takes_context
                self.seed_updates[index] = 0
            if _identity(twin) != _identity(slot) or _place(twin) != _place(slot):
                twin.state, twin.schedule = copy.deepcopy(slot.state), slot.schedule
                twin.options, twin.germinations = copy.deepcopy(slot.options), slot.germinations
                twin.alpha_buffer.copy_(slot.alpha_buffer)
                twin.refresh_mode()

    def _nest(self, model: nn.Module) -> None:
        """Open and close slots behind others as in the model; counts of updates stay with their slots."""
        has_behind = {slot.name: bool(slot.behind) for slot in _slots(model)}
        before = {slot: int(self.seed_updates[i]) for i, slot in enumerate(_slots(self.module))}
        for part in self.module.modules():
            if isinstance(part, MorphogeneticModel):
                part.nest(lambda name: has_behind.get(name, False))
        now = [before.get(slot, 0) for slot in _slots(self.module)]
        if len(now) != len(before):
            self.seed_updates = torch.tensor(now, dtype=torch.long, device=self.seed_updates.device)


def _take_length(average: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_others: object) -> None:
    """Make room for the counts of a saved average with other slots behind others, which the load opens."""
    average, saved = cast("GrowingAveragedModel", average), state_dict.get(f"{prefix}seed_updates")
    if isinstance(saved, Tensor) and saved.dim() == 1 and saved.dtype == torch.long:
        average.seed_updates = average.seed_updates.new_zeros(len(saved))


def _demand_length(average: nn.Module, _keys: object) -> None:
    average = cast("GrowingAveragedModel", average)
    if len(average.seed_updates) != (here := len(_slots(average.module))):
        raise RuntimeError(
            "The saved average is of a model with another number of slots.\n"
            f"  saved: {len(average.seed_updates)}\n  here:  {here}\n"
            "Make the model as it was, with the same GrowthConfig(nested_slots=...)."
        )


def pairs_by_position(average: object, model: MorphogeneticModel) -> bool:
    """Whether it is torch's own average of this model, of a module around it or of its host."""
    if not isinstance(average, AveragedModel) or isinstance(average, GrowingAveragedModel):
        return False
    return not _origins(average).isdisjoint(_origins(model))


def warn_of_averages(model: MorphogeneticModel) -> None:
    """Warn if torch's own average of a model that is about to grow is alive."""
    # An average holds a copy of the model. To look at every object for one is slow.
    if not any(hook.is_copied for hook in _hooks(model)):
        return
    if any(pairs_by_position(average, model) for average in living(AveragedModel)):
        warn_caller(
            "torch's AveragedModel holds an average of this model, and the model grows: parameters are paired by "
            "position, so that wrong pairs are averaged or seeds are left out.\n"
            "Use GrowingAveragedModel, which takes the same arguments and follows.",
            MisuseWarning,
        )


def _origins(module: nn.Module) -> set[str]:
    return {hook.origin for hook in _hooks(module)}


def _hooks(module: nn.Module) -> list[SlotHook]:
    hooks = [hook for part in module.modules() for hook in part._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, SlotHook)]


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for average, present in pairs:
        average.copy_(present)


def _slots(module: nn.Module) -> list[SeedSlot]:
    return [part for part in module.modules() if isinstance(part, SeedSlot)]


def _tensors(module: nn.Module, buffers: bool) -> list[tuple[int | None, Tensor]]:
    """Return parameters, and buffers if asked, each with the number of the slot whose seed it came with, if any."""
    prefixes = [f"{name}." for name, part in module.named_modules() if isinstance(part, SeedSlot)]
    named: list[tuple[str, Tensor]] = list(module.named_parameters())
    named += module.named_buffers() if buffers else []
    return [
        (next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), None), tensor)
        for name, tensor in named
    ]


def _identity(slot: SeedSlot) -> tuple[int, str]:
    return slot.germinations, slot.state.seed_id if slot.state is not None else ""


def _place(slot: SeedSlot) -> tuple[SeedStage, float, bool]:
    return slot.stage, slot.alpha, slot.state is not None and slot.state.is_paused
