"""Learning-rate schedulers that follow an optimiser's parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kasmina_core.errors import GerminationError
from kasmina_core.growth.watching.living import living

# What torch's schedulers keep per group, in lists of their own and in the groups.
_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
_COPIES = ("lr_lambdas", "base_momentums", "max_momentums")
_KNOWN = (*_RATES, *_COPIES)
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_GROUP_COPIES = ("base_momentum", "max_momentum")
_CYCLED = ("momentum", "betas")
_NOT_PER_GROUP = ("milestones", "_milestones", "_schedule_phases")


def group_settings(first: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return a new group's schedule settings: those of the ``first`` group, learning rates times ``factor``."""
    settings = {name: first[name] * factor for name in _GROUP_RATES if name in first}
    # A scheduler that cycles the momentum has moved it away from the optimiser's default.
    copies = (*_GROUP_COPIES, *_CYCLED) if "max_momentum" in first else _GROUP_COPIES
    return settings | {name: first[name] for name in copies if name in first}


@final
class FollowingSchedulers:
    """Schedulers whose lists per group are kept in the order of their optimiser's groups.

    Others than those that are named are found among the objects that are alive: unfollowed, one would fail with an error
    of torch at the first step after a germination.

    Args:
        schedulers: Named schedulers, plain or as accelerate prepares them, which must be followable; those inside of them
            (`ChainedScheduler`, `SequentialLR`) follow too. ``None`` if all that are found must be followable.
        optimizer: The optimiser they were made for.

    Raises:
        TypeError: If one is no scheduler of torch.
        ValueError: If one was made for another optimiser.
    """

    def __init__(self, schedulers: Iterable[Any] | None, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._finds_all = schedulers is None
        self._has_found = not self._finds_all
        self._named: list[LRScheduler] = []
        for given in schedulers or ():
            scheduler = given if isinstance(given, LRScheduler) else getattr(given, "scheduler", given)
            if not isinstance(scheduler, LRScheduler):
                raise TypeError(
                    f"{type(scheduler).__name__} is not a torch.optim.lr_scheduler.LRScheduler: "
                    "what it keeps per parameter group is not known.\n"
                    "Leave it out, with schedulers=() if there is no other, and set the rates of seeds' groups in a "
                    "listener (model.listen)."
                )
            self._named.append(scheduler)
        for scheduler in with_inner(self._named):
            theirs = getattr(scheduler, "optimizer", None)
            if unwrapped(theirs) is not optimizer:
                raise ValueError(
                    f"{type(scheduler).__name__} was made for another optimiser than the {type(optimizer).__name__} "
                    f"that is tied: tie its own, scheduler.optimizer ({type(theirs).__name__})."
                )

    @property
    def are_expected(self) -> bool:
        """Whether a scheduler was made for the optimiser: its groups have the rate from which they began."""
        return any("initial_lr" in group for group in self._optimizer.param_groups)

    def now(self, slot: str | None = None) -> list[LRScheduler]:
        """Return all that follow a change of the groups, those that were made since the last one included.

        Raises:
            GerminationError: If ``slot`` is to get a group, and a scheduler keeps a list per group that is not known, has
                lost count of the groups, or was made for the optimiser and is not found.
        """
        named = with_inner(self._named)
        count = len(self._optimizer.param_groups)
        others = self._find(named)
        self._has_found |= bool(named or others)
        if not self._finds_all:
            others = [each for each in others if not _unknown_lists(each, count)]
        if slot is not None:
            self._refuse(slot, named, others, count)
        return named + others

    def _find(self, named: Sequence[LRScheduler]) -> list[LRScheduler]:
        made = [o for o in living(LRScheduler) if unwrapped(vars(o).get("optimizer")) is self._optimizer]
        known = {id(scheduler) for scheduler in named}
        return [scheduler for scheduler in with_inner(made) if id(scheduler) not in known]

    def _refuse(
        self, slot: str, named: Sequence[LRScheduler], others: Sequence[LRScheduler], count: int
    ) -> None:
        for scheduler in named:
            for key, values in _lists(scheduler).items():
                if key in _KNOWN and len(values) != count:
                    raise GerminationError(
                        f"{_cannot_follow(scheduler, slot)}"
                        f"  values in {key}: {len(values)}\n"
                        f"  parameter groups: {count}\n"
                        "Give schedulers to tie_optimizer before seeds get their groups, or make them anew."
                    )
        for scheduler in (*named, *others):
            for key, values in _unknown_lists(scheduler, count).items():
                raise GerminationError(
                    f"{_cannot_follow(scheduler, slot)}"
                    f"  values in {key}: {len(values)}, whose meaning is not known\n"
                    f"  parameter groups: {count}\n"
                    f"  known lists: {', '.join(_KNOWN)}\n"
                    "Name the others, tie_optimizer(..., schedulers=[...]), or none with schedulers=(), and extend this "
                    "one in a listener (model.listen)."
                )
        if self.are_expected and not self._has_found:
            raise GerminationError(unfound(self._optimizer))


def unfound(optimizer: Optimizer) -> str:
    """Return the message about a scheduler that was made for an optimiser and is not found."""
    return (
        f"A scheduler was made for the {type(optimizer).__name__}, whose groups have 'initial_lr', and none of torch's "
        "is to be found: the groups of seeds cannot follow it.\n"
        "If it is alive, name it: tie_optimizer(model, optimizer, schedulers=[scheduler]). If it is gone, or a listener "
        "of yours sees to the seeds' groups: tie_optimizer(model, optimizer, schedulers=())."
    )


def follow(
    schedulers: Iterable[LRScheduler],
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    factor: float = 1.0,
) -> None:
    """Bring schedulers' lists from the order of the groups ``before`` into that of ``after``.

    New groups, which are no object of ``before``, get the first group's values, learning rates times ``factor``.
    """
    for scheduler in schedulers:
        for key in _KNOWN:
            values = vars(scheduler).get(key)
            if values is None or len(values) != len(before):
                continue
            known = {id(group): value for group, value in zip(before, values, strict=True)}
            new = values[0] * factor if key in _RATES else values[0]
            # A scheduler's state_dict shares its lists: they are replaced, never changed.
            setattr(scheduler, key, [known.get(id(group), new) for group in after])


def unwrapped(optimizer: Any) -> Any:
    """Return the optimiser inside of wrappers that share its groups, such as accelerate's; without one itself."""
    inner = getattr(optimizer, "optimizer", None)
    shares = isinstance(inner, Optimizer) and inner.param_groups is getattr(optimizer, "param_groups", None)
    return unwrapped(inner) if shares else optimizer


def with_inner(schedulers: Iterable[LRScheduler]) -> list[LRScheduler]:
    """Return the schedulers and those inside of them, each once."""
    found: dict[int, LRScheduler] = {}
    waiting = list(schedulers)
    while waiting:
        scheduler = waiting.pop()
        if id(scheduler) in found:
            continue
        found[id(scheduler)] = scheduler
        for value in vars(scheduler).values():
            parts = value if isinstance(value, list | tuple) else (value,)
            waiting += [part for part in parts if isinstance(part, LRScheduler)]
    return list(found.values())


def _lists(scheduler: LRScheduler) -> dict[str, Sequence[Any]]:
    return {key: values for key, values in vars(scheduler).items() if isinstance(values, list | tuple)}


def _unknown_lists(scheduler: LRScheduler, count: int) -> dict[str, Sequence[Any]]:
    """Return the lists that have a value for each group and a meaning that is not known."""
    return {
        key: values
        for key, values in _lists(scheduler).items()
        if key not in (*_KNOWN, *_NOT_PER_GROUP)
        and len(values) == count
        and not all(isinstance(value, LRScheduler) for value in values)
    }


def _cannot_follow(scheduler: LRScheduler, slot: str) -> str:
    return f"{type(scheduler).__name__} cannot follow a new parameter group for slot '{slot}'.\n"
