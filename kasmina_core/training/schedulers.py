"""Learning-rate schedulers that follow an optimiser's parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kasmina_core.errors import GerminationError

# What torch's schedulers keep per group, in lists of their own and in the groups.
_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
_COPIES = ("lr_lambdas", "base_momentums", "max_momentums")
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_GROUP_COPIES = ("base_momentum", "max_momentum")
_CYCLED = ("momentum", "betas")
_NOT_PER_GROUP = ("milestones", "_milestones", "_schedule_phases")


def group_settings(first: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return the settings with which a new group takes part in the schedule of the first one.

    Args:
        first: The first group of the optimiser.
        factor: Learning rates of the new group over those of the first.
    """
    settings = {name: first[name] * factor for name in _GROUP_RATES if name in first}
    # A scheduler that cycles the momentum has moved it away from the optimiser's default.
    copies = (*_GROUP_COPIES, *_CYCLED) if "max_momentum" in first else _GROUP_COPIES
    return settings | {name: first[name] for name in copies if name in first}


@final
class FollowingSchedulers:
    """Schedulers whose lists per group are kept in the order of their optimiser's groups.

    Args:
        schedulers: The schedulers; those inside of them (`ChainedScheduler`, `SequentialLR`) follow too.
        optimizer: The optimiser they were made for.

    Raises:
        TypeError: If one is no scheduler of torch.
        ValueError: If one was made for another optimiser.
    """

    def __init__(self, schedulers: Iterable[LRScheduler], optimizer: Optimizer) -> None:
        self._given = list(schedulers)
        for scheduler in self._given:
            if not isinstance(scheduler, LRScheduler):
                raise TypeError(
                    f"{type(scheduler).__name__} is not a torch.optim.lr_scheduler.LRScheduler: "
                    "what it keeps per parameter group is not known."
                )
        for scheduler in self._all():
            if getattr(scheduler, "optimizer", None) is not optimizer:
                raise ValueError(
                    f"{type(scheduler).__name__} was made for another optimiser than the {type(optimizer).__name__} "
                    "that is tied."
                )

    def check(self, slot: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a new group if a scheduler could not follow it; changes nothing.

        Args:
            slot: Name of the slot that would get a group.
            groups: The groups as they are now.

        Raises:
            GerminationError: If a scheduler keeps a list per group that is not known, or has lost count of the groups.
        """
        count = len(groups)
        for scheduler in self._all():
            name = f"{type(scheduler).__name__} cannot follow a new parameter group for slot '{slot}'.\n"
            for key, values in vars(scheduler).items():
                if not isinstance(values, list | tuple):
                    continue
                if key in _RATES or key in _COPIES:
                    if len(values) != count:
                        raise GerminationError(
                            f"{name}"
                            f"  values in {key}: {len(values)}\n"
                            f"  parameter groups: {count}\n"
                            "Give schedulers to tie_optimizer before seeds get their groups, or make them anew."
                        )
                elif key not in _NOT_PER_GROUP and len(values) == count and not _holds_schedulers(values):
                    raise GerminationError(
                        f"{name}"
                        f"  values in {key}: {len(values)}, whose meaning is not known\n"
                        f"  parameter groups: {count}\n"
                        f"  known lists: {', '.join((*_RATES, *_COPIES))}\n"
                        "Leave it out of tie_optimizer's schedulers and extend it in a listener (model.listen)."
                    )

    def follow(
        self, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], factor: float = 1.0
    ) -> None:
        """Bring the lists into the order of ``after``; new groups get the first group's values.

        Args:
            before: The groups that the lists describe.
            after: The groups now; one that stayed is the same object.
            factor: Learning rates of new groups over those of the first.
        """
        for scheduler in self._all():
            for key in (*_RATES, *_COPIES):
                values = vars(scheduler).get(key)
                if values is None or len(values) != len(before):
                    continue
                known = {id(group): value for group, value in zip(before, values, strict=True)}
                new = values[0] * factor if key in _RATES else values[0]
                # A scheduler's state_dict shares its lists: they are replaced, never changed.
                setattr(scheduler, key, [known.get(id(group), new) for group in after])

    def _all(self) -> list[LRScheduler]:
        """Return the schedulers and those inside of them, each once."""
        found: dict[int, LRScheduler] = {}
        waiting = list(self._given)
        while waiting:
            scheduler = waiting.pop()
            if id(scheduler) in found:
                continue
            found[id(scheduler)] = scheduler
            for value in vars(scheduler).values():
                parts = value if isinstance(value, list | tuple) else (value,)
                waiting += [part for part in parts if isinstance(part, LRScheduler)]
        return list(found.values())


def _holds_schedulers(values: Sequence[object]) -> bool:
    return bool(values) and all(isinstance(value, LRScheduler) for value in values)
