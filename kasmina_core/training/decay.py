"""Ends of a run at any budget: a copy whose learning rates decay, while the run goes on at its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.quiet import devices_of
from kasmina_core.sharding import sharded_modules
from kasmina_core.training.optim import tie_copies


@final
@dataclass(frozen=True, slots=True)
class DecayBranch:
    """A copy of a run whose learning rates decay.

    Attributes:
        model: The copy of the model: weights, buffers, seeds and counters. It has no evaluator, sinks or snapshots, so it
            does not grow further.
        optimizers: The copies of the optimisers, with their state, tied to ``model``.
        schedulers: What lets their rates decay.
    """

    model: MorphogeneticModel
    optimizers: tuple[Optimizer, ...]
    schedulers: tuple[LRScheduler, ...]

    def step(self) -> None:
        """Step all optimisers, and then their rates."""
        for optimizer in self.optimizers:
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


@contextmanager
def decay_branch(
    model: MorphogeneticModel, *optimizers: Optimizer, steps: int, final: float = 0.0
) -> Iterator[DecayBranch]:
    """Give a copy of a run whose rates decay over the next steps; the run goes on from where it is, bit for bit.

    The ``k``-th step of the branch, from 0, has the present rates times ``1 - (1 - final) * k / steps``; from step
    ``steps`` on they stay at ``final``. So one run at a constant rate can end at any budget: branch off when a part of the
    budget is left, such as a quarter, and train the branch for that. Torch's global random numbers are in the end what they
    were; a loader's generator or Python's and numpy's random numbers are the caller's.

    Args:
        model: The model, not one that was compiled or wrapped; compile ``branch.model`` if need be.
        optimizers: Its optimisers.
        steps: Steps of the decay, at least 1.
        final: Share of the rates in the end, in [0, 1].

    Raises:
        TypeError: If the model is none, or an optimiser is none.
        ValueError: If there is no optimiser, a number is out of range, the parameters are spread over processes, or an
            optimiser holds parameters that are not the model's.

    Source: Hägele et al. 2024, https://arxiv.org/abs/2405.18392
    """
    if not isinstance(model, MorphogeneticModel):
        raise TypeError(
            f"decay_branch copies a MorphogeneticModel, not {type(model).__name__}; give what was compiled or wrapped."
        )
    if odd := [one for one in optimizers if not isinstance(one, Optimizer)]:
        raise TypeError(f"decay_branch takes optimisers of torch.optim, not {odd[0]!r:.200}.")
    if not optimizers:
        raise ValueError("decay_branch needs the optimisers: decay_branch(model, optimizer, steps=500).")
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}.")
    if not 0.0 <= final <= 1.0:
        raise ValueError(f"final must be in [0, 1], not {final!r}.")
    if sharded_modules(model):
        raise ValueError(
            "Parameters that are spread over processes cannot be copied here: save_distributed, and let another job decay."
        )
    known = {id(p) for p in model.parameters()}
    foreign = sum(
        id(p) not in known for one in optimizers for group in one.param_groups for p in group["params"]
    )
    if foreign:
        raise ValueError(
            f"decay_branch copies a model with its optimisers, and these hold {foreign} parameters of something else."
        )
    # One copy of all: the optimisers' parameters become those of the model's copy.
    copied, own = copy.deepcopy((model, optimizers))
    schedulers = tuple(LinearLR(one, start_factor=1.0, end_factor=final, total_iters=steps) for one in own)
    tie_copies(model, optimizers, copied, own)
    cuda = [device for device in devices_of(model) if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        yield DecayBranch(copied, own, schedulers)
