"""Optimisers that grow with the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from kasmina_core.errors import GerminationError
from kasmina_core.growth.arguments import require_model
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.reverting import KeptOptimizerState
from kasmina_core.growth.watching.living import one_look
from kasmina_core.slotted import held_weakly
from kasmina_core.training.averaging import warn_of_averages
from kasmina_core.training.schedulers import FollowingSchedulers, follow, group_settings, unfound, unwrapped

PerSeed = float | Callable[[str, str], float]
"""A number for all seeds, or a function of a seed's slot and blueprint id."""


@final
class _TiedOptimizer:
    """Gives each seed a parameter group of its own and takes it back."""

    def __init__(
        self,
        model: MorphogeneticModel,
        optimizer: Optimizer,
        lr_factor: PerSeed,
        weight_decay: PerSeed | None,
        takes: Callable[[nn.Parameter], bool] | None,
        schedulers: FollowingSchedulers,
    ) -> None:
        self.optimizer = optimizer
        self._model = held_weakly(model)
        self._lr_factor = lr_factor
        self._weight_decay = weight_decay
        self._takes = takes
        self._schedulers = schedulers

    def of_copies(self, model: MorphogeneticModel, optimizer: Optimizer) -> _TiedOptimizer:
        """Return what ties a copy of the optimiser to a copy of the model."""
        schedulers = FollowingSchedulers(None, optimizer)
        return _TiedOptimizer(model, optimizer, self._lr_factor, self._weight_decay, self._takes, schedulers)

    def seed_added(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        own = [p for p in self._without_host(parameters) if self._takes is None or self._takes(p)]
        if not own:
            return
        groups = self.optimizer.param_groups
        _refuse_what_muon_refuses(slot, self.optimizer, own)
        with one_look(AveragedModel, LRScheduler):
            warn_of_averages(self._model())
            schedulers = self._schedulers.now(slot)
        before = list(groups)
        factor = self._value("lr_factor", self._lr_factor, slot)
        shared = {name: groups[0][name] for name in self.optimizer.defaults if name in groups[0]}
        group = {"params": own, "kasmina_slot": slot, **shared, **group_settings(groups[0], factor)}
        if self._weight_decay is not None:
            group["weight_decay"] = self._value("weight_decay", self._weight_decay, slot)
        if any("param_names" in g for g in groups):
            group["param_names"] = self._names(own)
        self._drop(own)
        self.optimizer.add_param_group(group)
        _begin_adagrad(self.optimizer, group)
        # A state_dict knows parameters by position: an order that does not depend on who grew first keeps it right.
        groups.sort(key=lambda g: str(g.get("kasmina_slot", "")))
        follow(schedulers, before, groups, factor)

    def seed_removed(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        before = list(self.optimizer.param_groups)
        grown = {id(p) for group in before if "kasmina_slot" in group for p in group["params"]}
        # The groups of seeds hold nothing of the host's, so where they hold all of it the host need not be asked.
        own = parameters if all(id(p) in grown for p in parameters) else self._without_host(parameters)
        schedulers = self._schedulers.now()
        self._drop(own)
        follow(schedulers, before, self.optimizer.param_groups)
        # Memory is freed only when both the groups and the state let go.
        for parameter in own:
            self.optimizer.state.pop(parameter, None)

    def keep(self, parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
        return KeptOptimizerState.of(self.optimizer, parameters)

    def _without_host(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        host = {id(p) for p in self._model().host_parameters()}
        return [p for p in parameters if id(p) not in host]

    def _drop(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take parameters out of every group, and groups of seeds that are then empty out of the optimiser."""
        gone = {id(p) for p in parameters}
        groups = self.optimizer.param_groups
        for group in groups:
            stays = [id(p) not in gone for p in group["params"]]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [item for item, kept in zip(group[key], stays, strict=True) if kept]
        groups[:] = [g for g in groups if g["params"] or "kasmina_slot" not in g]

    def _value(self, name: str, setting: PerSeed, slot: str) -> float:
        if not callable(setting):
            return setting
        state = self._model().slots[slot].state
        return _checked(name, setting(slot, state.blueprint_id if state is not None else ""))

    def _names(self, parameters: Sequence[nn.Parameter]) -> list[str]:
        """Return the names in the model's `named_parameters`, behind the prefix that the optimiser knows them by."""
        known = {id(p): name for name, p in self._model().named_parameters()}
        prefix = ""
        for group in self.optimizer.param_groups:
            for name, p in zip(group.get("param_names", ()), group["params"], strict=False):
                if id(p) in known and str(name).endswith(known[id(p)]):
                    prefix = str(name).removesuffix(known[id(p)])
        return [prefix + known[id(p)] for p in parameters]


def tie_optimizer(
    model: MorphogeneticModel,
    optimizer: Optimizer,
    *,
    lr_factor: PerSeed = 1.0,
    weight_decay: PerSeed | None = None,
    takes: Callable[[nn.Parameter], bool] | None = None,
    schedulers: Iterable[Any] | None = None,
) -> Optimizer:
    """Keep an optimiser's parameter groups in step with a model's seeds from now on.

    Each germination adds a group ``{"kasmina_slot": name, ...}``; a cull removes it with its state; fossilisation
    changes nothing. State of other parameters is untouched. The groups of seeds come after the others, sorted by
    slot, so that the optimiser's ``state_dict`` fits a model that was loaded, whichever seed was germinated first.
    Its settings (betas, momentum, weight decay) are those of the first group. An optimiser of named parameters gets a
    seed's names as ``model.named_parameters()`` has them.

    Schedulers continue as if the group had always been there: a seed's learning rate, and its bounds where the scheduler
    keeps them per group, are those of the first group times ``lr_factor``. A bound that all groups share, such as
    ``eta_min``, stays shared. A germination that a scheduler could not follow is refused. Schedulers of torch need no
    name: those made for the optimiser, also after it was tied, are found while they are alive.

    Tying an optimiser again replaces its tie. What accelerate prepared is tied as what it wraps.

    Args:
        model: The model; seeds that are already there get a group of their own now.
        optimizer: The optimiser of the host. For a frozen host, ``SGD([{"params": []}], lr)`` and its like.
        lr_factor: Learning rate of seeds over that of the first group, at least 0; a number, or a function of slot
            and blueprint id.
        weight_decay: Weight decay of seeds, at least 0; a number, or a function of slot and blueprint id. Default that
            of the first group.
        takes: Returns whether this optimiser holds a parameter of a seed; default all. With two optimisers, such as
            Muon for matrices and AdamW for the rest, tie each to its share.
        schedulers: Learning-rate schedulers of this optimiser that must be followed, of torch's classes or made of what
            those keep per group. Others that are found are followed as far as what they keep is known. ``None``
            requires it of all that are found; ``()`` of none.

    Returns:
        The optimiser, as it was given.

    Raises:
        TypeError: If the model or the optimiser is none, one of the schedulers is none of torch's, or the optimiser
            takes one group only (LBFGS).
        ValueError: If the optimiser holds parameters and none of them is this model's, a scheduler was made for another
            optimiser or left its mark on this one and is not found, or a number is negative or not finite.
        GerminationError: If a scheduler, or Muon, cannot take the seeds that are already there.
    """
    given, optimizer = optimizer, unwrapped(optimizer)
    _check_what_is_tied(model, optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            f"{type(optimizer).__name__} steps its first parameter group alone, and a seed needs one of its own.\n"
            "Train seeds with another optimiser, tied beside it: "
            "tie_optimizer(model, torch.optim.AdamW([{'params': []}], lr=1e-3))."
        )
    for name, setting in (("lr_factor", lr_factor), ("weight_decay", weight_decay)):
        if setting is not None and not callable(setting):
            _checked(name, setting)
    following = FollowingSchedulers(schedulers, optimizer)
    if schedulers is None and following.are_expected and not following.now():
        raise ValueError(unfound(optimizer))
    tied = _TiedOptimizer(model, optimizer, lr_factor, weight_decay, takes, following)
    for slot in model.slots:
        if parameters := model.seed_parameters(slot):
            tied.seed_added(slot, parameters)
    untie_optimizer(model, optimizer)
    model.listen(tied)
    return given


def _check_what_is_tied(model: object, optimizer: object) -> None:
    if isinstance(model, Optimizer):
        raise TypeError(
            f"The model comes first: tie_optimizer(model, optimizer), not a {type(model).__name__} and then a "
            f"{type(optimizer).__name__}."
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"tie_optimizer ties an optimiser of torch.optim, not {optimizer!r:.200}.")
    known = {id(p) for p in require_model(model, "tie_optimizer").parameters()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held and not held & known:
        raise ValueError(
            f"The {type(optimizer).__name__} holds parameters, and none of them is this model's: it trains another one, "
            "or this one's were replaced since it was made.\n"
            f"  parameters it holds: {len(held)}\n"
            "Make it of model.host_parameters() and tie it again."
        )


def untie_optimizer(model: MorphogeneticModel, optimizer: Optimizer) -> None:
    """Stop an optimiser from following the model's seeds; it keeps its groups."""
    listeners, optimizer = model.growth.listeners, unwrapped(optimizer)
    tied = [one for one in listeners if isinstance(one, _TiedOptimizer) and one.optimizer is optimizer]
    listeners[:] = [one for one in listeners if one not in tied]


def tie_copies(
    model: MorphogeneticModel,
    optimizers: Sequence[Optimizer],
    copied: MorphogeneticModel,
    copies: Sequence[Optimizer],
) -> None:
    """Let copies of a model's tied optimisers follow the seeds of a copy of the model in the same way."""
    counterparts = {id(one): other for one, other in zip(optimizers, copies, strict=True)}
    for tied in [one for one in model.growth.listeners if isinstance(one, _TiedOptimizer)]:
        if (other := counterparts.get(id(tied.optimizer))) is not None:
            copied.listen(tied.of_copies(copied, other))


def _checked(name: str, value: Any) -> float:
    if not (isinstance(value, (int, float)) and 0.0 <= value < math.inf):
        raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}.")
    return value


def _begin_adagrad(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Give a new group the state that Adagrad's constructor makes; torch 2.11 steps no group without it."""
    if isinstance(optimizer, torch.optim.Adagrad):
        settings = {name: group[name] for name in optimizer.defaults}
        optimizer.state.update(torch.optim.Adagrad(group["params"], **settings).state)


def _refuse_what_muon_refuses(slot: str, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Raise if Muon, which checks parameters only in its constructor, would fail at its next step."""
    others = [tuple(p.shape) for p in parameters if p.ndim != 2]
    if isinstance(optimizer, torch.optim.Muon) and others:
        raise GerminationError(
            f"{type(optimizer).__name__} steps matrices only, and the seed of slot '{slot}' has others.\n"
            f"  parameters that are no matrix: {len(others)} of {len(parameters)}, such as {others[0]}\n"
            "Tie it with takes=lambda p: p.ndim == 2, and tie an AdamW with takes=lambda p: p.ndim != 2 for the rest."
        )
