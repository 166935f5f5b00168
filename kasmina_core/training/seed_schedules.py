"""Learning-rate schedules of seeds, from the step at which each begins to learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, final

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.slot import SeedSlot
from kasmina_core.lifecycle import SeedStage

SeedSchedule = Callable[[int], float]
"""Returns the share of its base learning rate that a seed has after so many steps, at least 0."""

STEPS: Final = "kasmina_steps"
RATIO: Final = "kasmina_ratio"


@final
class ConstantRate:
    """The base learning rate at every step, whatever the host's schedule does.

    >>> ConstantRate()(10**6)
    1.0
    """

    def __call__(self, step: int) -> float:
        """Return 1."""
        return 1.0


@final
class WarmupCosine:
    """Rises linearly over ``warmup_steps``, then falls over the rest of ``total_steps`` on half a cosine to ``final``.

    With ``u = (step - warmup) / (total - warmup)``, in [0, 1]: ``final + (1 - final) (1 + cos(pi u)) / 2``.

    Args:
        total_steps: Steps until ``final`` is reached; it stays there.
        warmup_steps: Steps of the rise, less than ``total_steps``; the first step has ``1 / (warmup_steps + 1)``.
        final: Share at the end, in [0, 1].

    Raises:
        ValueError: If a number is out of range.

    >>> schedule = WarmupCosine(100, warmup_steps=9, final=0.1)
    >>> schedule(0), schedule(9), round(schedule(100), 9), round(schedule(10**6), 9)
    (0.1, 1.0, 0.1, 0.1)
    """

    def __init__(self, total_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                f"WarmupCosine needs 0 <= warmup_steps < total_steps, not {warmup_steps!r} and {total_steps!r}."
            )
        if not 0.0 <= final <= 1.0:
            raise ValueError(f"final must be in [0, 1], not {final!r}.")
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.final = final

    def __call__(self, step: int) -> float:
        """Return the share at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * done)) / 2


def schedule_seeds(
    model: MorphogeneticModel, optimizer: Optimizer, schedule: SeedSchedule
) -> tuple[RemovableHandle, RemovableHandle]:
    """Give each seed of a tied optimiser a learning rate that depends on its own age, not on the host's.

    From TRAINING on, at its step ``n``, counted from 0, a seed is trained with::

        lr = base * schedule(n)

    where ``base`` is its group's ``initial_lr`` (its ``lr`` where there is no scheduler): that of the first group times
    the ``lr_factor`` of `tie_optimizer`. Once it is fossilised it goes over to the host's schedule without a jump: its
    rate over the scheduler's stays what it was then. Steps in which the seed is paused do not count.

    The rate is set only during ``optimizer.step()`` and the scheduler's is put back after it, so that every scheduler,
    chained ones too, computes as without it. Steps and ratio are kept in the group, under
    ``kasmina_steps`` and ``kasmina_ratio``, so that the optimiser's ``state_dict`` carries them. A learning rate that is
    a tensor stays the same tensor; use one if you compile ``optimizer.step``.

    Args:
        model: The model.
        optimizer: An optimiser tied to it with `tie_optimizer`; load its ``state_dict`` before or after this.
        schedule: Share of its base rate that a seed gets, such as `WarmupCosine`; called once per step and seed.

    Returns:
        The handles of both hooks; ``remove()`` them to end it.
    """
    schedulers: list[tuple[dict[str, Any], float | Tensor]] = []

    def put_back() -> None:
        while schedulers:
            _set_rate(*schedulers.pop())

    def before(_optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[Any, Any]) -> None:
        put_back()  # after a step that raised
        for group in optimizer.param_groups:
            slot = model.slots[group["kasmina_slot"]] if "kasmina_slot" in group else None
            if slot is None or not slot.is_active:
                continue
            theirs = group["lr"]
            schedulers.append((group, theirs.clone() if isinstance(theirs, Tensor) else theirs))
            _set_rate(group, _rate(group, slot, schedule))

    def after(_optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[Any, Any]) -> None:
        for group, _ in schedulers:
            state = model.slots[group["kasmina_slot"]].state
            if state is not None and not state.is_paused:
                group[STEPS] = group.get(STEPS, 0) + 1
        put_back()

    return optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)


def _rate(group: dict[str, Any], slot: SeedSlot, schedule: SeedSchedule) -> float | Tensor:
    theirs: float | Tensor = group["lr"]
    if RATIO in group:
        return theirs * float(group[RATIO])
    base: float | Tensor = group.get("initial_lr", theirs)
    if slot.stage is not SeedStage.FOSSILIZED:
        return base * schedule(group.get(STEPS, 0))
    last = float(base) * schedule(max(0, group.get(STEPS, 0) - 1))
    # Where the host's schedule is at 0 already, so is the fossil's: no ratio leads from there to anything else.
    group[RATIO] = ratio = last / float(theirs) if float(theirs) > 0.0 else 1.0
    return theirs * ratio


def _set_rate(group: Mapping[str, Any], rate: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate  # type: ignore[index]  # groups are dicts
