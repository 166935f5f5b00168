"""Optimisers that grow with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import nn
from torch.optim import Optimizer

from kasmina_core.model import MorphogeneticModel


@final
class _TiedOptimizer:
    """Gives each seed a parameter group of its own and takes it back."""

    def __init__(self, optimizer: Optimizer, lr_factor: float, weight_decay: float | None) -> None:
        self._optimizer = optimizer
        self._lr_factor = lr_factor
        self._weight_decay = weight_decay

    def seed_added(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        fresh = [p for p in parameters if id(p) not in held]
        if not fresh:
            return
        group = {
            "params": fresh,
            "kasmina_slot": slot,
            "lr": self._optimizer.param_groups[0]["lr"] * self._lr_factor,
        }
        if self._weight_decay is not None:
            group["weight_decay"] = self._weight_decay
        self._optimizer.add_param_group(group)

    def seed_removed(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        gone = {id(p) for p in parameters}
        groups = self._optimizer.param_groups
        # Memory is freed only when both the group and the state let go.
        groups[:] = [
            g for g in groups if g.get("kasmina_slot") != slot or not gone & {id(p) for p in g["params"]}
        ]
        for parameter in parameters:
            self._optimizer.state.pop(parameter, None)


def tie_optimizer(
    model: MorphogeneticModel,
    optimizer: Optimizer,
    *,
    lr_factor: float = 1.0,
    weight_decay: float | None = None,
) -> Optimizer:
    """Keep an optimiser's parameter groups in step with a model's seeds from now on.

    Each germination adds a group ``{"kasmina_slot": name, ...}``; a cull removes it with its state; fossilisation
    changes nothing. Groups and state of other parameters are untouched.

    Args:
        model: The model; seeds that are already there are added now.
        optimizer: The optimiser of the host.
        lr_factor: Learning rate of seeds over that of the first group.
        weight_decay: Weight decay of seeds; default the optimiser's.

    Returns:
        The same optimiser.
    """
    tied = _TiedOptimizer(optimizer, lr_factor, weight_decay)
    for slot in model.slots:
        if parameters := model.seed_parameters(slot):
            tied.seed_added(slot, parameters)
    model.listen(tied)
    return optimizer
