"""What a slot asks of the model around it, and the commands on which the processes of a job agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, TypeVar

if TYPE_CHECKING:
    from kasmina_core.slots.slot import SeedSlot

_Slot = TypeVar("_Slot", bound="SeedSlot")
_Result = TypeVar("_Result")


def shared_command(
    method: Callable[Concatenate[_Slot, ...], _Result],
) -> Callable[Concatenate[_Slot, ...], _Result]:
    """Make a slot's method a command on which the processes of a job agree."""

    @wraps(method)
    def agreed(self: _Slot, *args: Any, **kwargs: Any) -> _Result:
        if self._owner is None:
            return method(self, *args, **kwargs)
        name = method.__name__
        # An epoch's metric is each process's own; it is reduced by the model.
        given = [] if name == "step_epoch" else [*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())]
        with self._owner.command(self, f"{name}({', '.join([repr(self.name), *given])})"):
            return method(self, *args, **kwargs)

    return agreed
