"""Decisions of the processes of a job: the questions of a model, and the answers of a process that is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from kasmina_core.errors import GerminationError, warn_caller
from kasmina_core.evidence.measuring import Processes
from kasmina_core.growth.watching.living import living
from kasmina_core.isolation import IsolationReading

if TYPE_CHECKING:
    from kasmina_core.growth.model import MorphogeneticModel
    from kasmina_core.policies.protocol import Command
    from kasmina_core.slots.slot import SeedSlot


class Agreement(Processes):
    """Answers of the processes of a job to a model that decides; here those of a process that decides by itself.

    Every process of a job asks the same, in the same order. A class for several processes overrides every method.
    """

    def command(self, slot: SeedSlot | None, text: str) -> AbstractContextManager[None]:
        """Carry out a command of a slot, or of the model, in every process or in none."""
        return nullcontext()

    def refusals(self, text: str) -> AbstractContextManager[None]:
        """Report an error of the block to the processes that wait for this one to begin a command."""
        return nullcontext()

    def metric(self, value: float | None) -> float | None:
        """Return the metric of all processes."""
        return value

    def isolation(self, slot: SeedSlot, reading: IsolationReading) -> IsolationReading:
        """Return the reading with the largest leak."""
        return reading

    def commands(self, chosen: Sequence[Command]) -> Sequence[Command]:
        """Return the commands to carry out everywhere."""
        return chosen

    def seed_made(self, slot: SeedSlot, seed: nn.Module, blueprint_id: str) -> None:
        """Take a new seed before anybody holds its parameters; may replace them, and may raise to prevent it."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        if (size := distributed.get_world_size()) < 2:
            return
        if _is_wrapped(slot):
            raise GerminationError(
                f"A seed cannot germinate in one of {size} processes whose model is in a DistributedDataParallel: their "
                "seeds, gates and stages would differ, and the wrapper would not know the seed.\n"
                "Use net = distribute(model) and call net(x) instead of model(x); if somebody else wraps the model, "
                "distribute(model, wrap='outside') before that. See docs/distributed.md."
            )
        warn_caller(
            f"A seed germinates in one of {size} processes, and they do not decide together: "
            "their seeds, gates and stages will differ, and a DistributedDataParallel that is there already does not "
            "know the seed. Use net = distribute(model) and call net(x) instead of model(x); if somebody else wraps "
            "the model, distribute(model, wrap='outside'). See docs/distributed.md.",
        )

    def seed_accepted(self, slot: SeedSlot) -> None:
        """Accept the new seed for this process; may raise to prevent it."""

    def gradients(self, *, is_step: bool) -> None:
        """Make the gradients of seeds the same everywhere: for an optimiser step, or before one looks at them."""


def _is_wrapped(slot: SeedSlot) -> bool:
    """Say whether a slot's model is in a ``DistributedDataParallel``."""
    from torch.nn.parallel import DistributedDataParallel

    wrappers = living(DistributedDataParallel)
    return any(module is slot for wrapper in wrappers for module in wrapper.modules())


_Method = TypeVar("_Method", bound=Callable[..., Any])


@contextmanager
def no_inference_mode() -> Iterator[None]:
    """Run the block, or the decorated function, under ``no_grad`` where ``torch.inference_mode`` is on.

    What is made in inference mode, a seed or a restored weight, can never be trained.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def verb(method: _Method) -> _Method:
    """Let a model's method run in inference mode, and report a wrong argument to every process of a job."""

    @wraps(method)
    def told(model: MorphogeneticModel, *args: Any, **kwargs: Any) -> Any:
        with no_inference_mode(), model.growth.agreement.refusals(method.__name__):
            return method(model, *args, **kwargs)

    return cast("_Method", told)
