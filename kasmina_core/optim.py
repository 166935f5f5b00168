"""Optimisers that grow with the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kasmina_core.model import MorphogeneticModel
from kasmina_core.schedulers import FollowingSchedulers, group_settings


@final
class _TiedOptimizer:
    """Gives each seed a parameter group of its own and takes it back."""

    def __init__(
        self,
        host: nn.Module,
        optimizer: Optimizer,
        lr_factor: float,
        weight_decay: float | None,
        schedulers: FollowingSchedulers,
    ) -> None:
        self._host = host
        self._optimizer = optimizer
        self._lr_factor = lr_factor
        self._weight_decay = weight_decay
        self._schedulers = schedulers

    def holds(self, optimizer: Optimizer) -> bool:
        return self._optimizer is optimizer

    def seed_added(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        own = self._without_host(parameters)
        if not own:
            return
        groups = self._optimizer.param_groups
        self._schedulers.check(slot, groups)
        before = list(groups)
        group = {"params": own, "kasmina_slot": slot, **group_settings(groups[0], self._lr_factor)}
        if self._weight_decay is not None:
            group["weight_decay"] = self._weight_decay
        self._drop(own)
        self._optimizer.add_param_group(group)
        # A state_dict knows parameters by position: an order that does not depend on who grew first keeps it right.
        groups.sort(key=lambda g: str(g.get("kasmina_slot", "")))
        self._schedulers.follow(before, groups)

    def seed_removed(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        own = self._without_host(parameters)
        before = list(self._optimizer.param_groups)
        self._drop(own)
        self._schedulers.follow(before, self._optimizer.param_groups)
        # Memory is freed only when both the groups and the state let go.
        for parameter in own:
            self._optimizer.state.pop(parameter, None)

    def _without_host(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        host = {id(p) for p in self._host.parameters()}
        return [p for p in parameters if id(p) not in host]

    def _drop(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take parameters out of every group, and groups of seeds that are then empty out of the optimiser."""
        gone = {id(p) for p in parameters}
        groups = self._optimizer.param_groups
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        groups[:] = [g for g in groups if g["params"] or "kasmina_slot" not in g]


def tie_optimizer(
    model: MorphogeneticModel,
    optimizer: Optimizer,
    *,
    lr_factor: float = 1.0,
    weight_decay: float | None = None,
    schedulers: Iterable[LRScheduler] = (),
) -> Optimizer:
    """Keep an optimiser's parameter groups in step with a model's seeds from now on.

    Each germination adds a group ``{"kasmina_slot": name, ...}``; a cull removes it with its state; fossilisation
    changes nothing. State of other parameters is untouched. The groups of seeds come after the others, sorted by
    slot, so that the optimiser's ``state_dict`` fits a model that was loaded, whichever seed was germinated first.

    Schedulers go on as if the group had always been there: a seed's learning rate, and its bounds where the scheduler
    keeps them per group, are those of the first group times ``lr_factor``. A bound that all groups share, such as
    ``eta_min``, stays shared. A germination that a scheduler could not follow is refused.

    Tying an optimiser again replaces its tie, for schedulers that were made later.

    Args:
        model: The model; seeds that are already there get a group of their own now.
        optimizer: The optimiser of the host.
        lr_factor: Learning rate of seeds over that of the first group.
        weight_decay: Weight decay of seeds; default the optimiser's.
        schedulers: Learning-rate schedulers of this optimiser, of torch's classes or made of what those keep per group.

    Returns:
        The same optimiser.

    Raises:
        TypeError: If one of the schedulers is none of torch's.
        ValueError: If one was made for another optimiser.
        GerminationError: If a scheduler cannot follow the groups of seeds that are already there.
    """
    following = FollowingSchedulers(schedulers, optimizer, lr_factor)
    tied = _TiedOptimizer(model.host, optimizer, lr_factor, weight_decay, following)
    for slot in model.slots:
        if parameters := model.seed_parameters(slot):
            tied.seed_added(slot, parameters)
    for listener in list(model._listeners):
        if isinstance(listener, _TiedOptimizer) and listener.holds(optimizer):
            model._listeners.remove(listener)
    model.listen(tied)
    return optimizer
