"""Learning-rate schedulers' states, checked before a scheduler takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kasmina_core.errors import CheckpointError
from kasmina_core.training.schedulers import follow, with_inner


def scheduler_states(schedulers: Iterable[LRScheduler]) -> list[dict[str, Any]]:
    """Return each scheduler's class and ``state_dict``."""
    return [{"class": type(one).__name__, "state": one.state_dict()} for one in schedulers]


def load_scheduler_states(
    schedulers: Sequence[LRScheduler], data: Any, groups_as_saved: Mapping[int, Sequence[Mapping[str, Any]]]
) -> None:
    """Load what `scheduler_states` returned; lists per group are brought into the present order of the groups.

    ``groups_as_saved`` has, by the ``id`` of each optimiser, its groups in the order in which they were saved.

    Raises:
        CheckpointError: If they are others, or a state is damaged; some may be changed then.
    """
    saved = data if isinstance(data, list) else []
    then = [one.get("class") if isinstance(one, Mapping) else None for one in saved]
    if then != (now := [type(one).__name__ for one in schedulers]):
        raise CheckpointError(
            "The checkpoint was saved with other schedulers.\n"
            f"  saved: {', '.join(f'{name!s:.40}' for name in then) or 'none'}\n"
            f"  here:  {', '.join(now) or 'none'}"
        )
    for scheduler, one in zip(schedulers, saved, strict=True):
        name = type(scheduler).__name__
        _check(name, scheduler.state_dict(), one.get("state"))
        try:
            scheduler.load_state_dict(one["state"])
        except Exception as error:
            raise CheckpointError(f"The saved state of {name} cannot be loaded: {error}") from error
        optimizer: Optimizer = scheduler.optimizer
        if (before := groups_as_saved.get(id(optimizer))) is not None:
            follow(with_inner([scheduler]), before, optimizer.param_groups)


def _check(where: str, here: Mapping[str, Any], saved: Any) -> None:
    """Refuse names a scheduler does not have (they would shadow its methods) and values of another kind."""
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"The saved state of {where} cannot be {saved!r:.80}.")
    if unknown := [key for key in saved if key not in here]:
        raise CheckpointError(f"The saved state of {where} has '{unknown[0]!s:.40}', which it does not know.")
    if missing := sorted(set(here) - set(saved)):
        raise CheckpointError(f"The saved state of {where} lacks '{missing[0]}'.")
    for key, value in saved.items():
        _check_value(f"{where}.{key}", here[key], value)


def _check_value(where: str, here: Any, saved: Any) -> None:
    numbers = (int, float, Tensor)
    if isinstance(here, Mapping) and where.rpartition(".")[0].endswith("]"):
        return _check(where, here, saved)
    if isinstance(here, list) and isinstance(saved, list) and here and isinstance(here[0], Mapping):
        for i, (a, b) in enumerate(zip(here, saved, strict=False)):
            if "last_epoch" in a:  # a scheduler inside of another
                _check(f"{where}[{i}]", a, b)
        return None
    fits = (
        (isinstance(here, numbers) and isinstance(saved, numbers))
        or here is None
        or isinstance(saved, type(here))
        or (isinstance(here, (list, tuple)) and isinstance(saved, (list, tuple)))
    )
    if fits and isinstance(here, (list, tuple)) and here and isinstance(here[0], numbers):
        fits = all(isinstance(value, numbers) for value in saved)
    if not fits:
        raise CheckpointError(f"The saved {where} cannot be {saved!r:.80}; here it is {here!r:.80}.")
    return None
