"""Seeds that were forgotten: trainable, and held by no optimiser."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import final

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from kasmina_core.errors import warn_caller
from kasmina_core.growth.watching.living import living
from kasmina_core.slotted import SlottedModel


class UntrackedSeedWarning(UserWarning):
    """A seed's parameters are trainable, the model was trained, and no optimiser holds them: the seed does not learn."""


@final
class UntrackedSeeds:
    """Notices new seeds that nothing trains, by watching which optimisers step while they are new.

    While there is no new seed nothing is watched. A seed is new until an optimiser that holds it is found, or until one
    of the host's stepped and none holds it, of which one warning is given. There is none while nothing steps.

    Args:
        slots: Names of slots whose seeds are new.

    Attributes:
        forgotten: Slots whose seeds had parameters that no optimiser held when it was last looked.
    """

    def __init__(self, slots: Iterable[str] = ()) -> None:
        self.forgotten: set[str] = set()
        self._new = set(slots)
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._unhook: weakref.finalize[..., UntrackedSeeds] | None = None

    def seed_added(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        """Watch a slot's new seed; only optimisers that step from now on count."""
        self._new.add(slot)
        self.forgotten.discard(slot)
        self._stepped.clear()

    def seed_removed(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        """Forget a slot; whether a new seed is still there is looked up when it matters."""
        self.forgotten.discard(slot)

    def look(self, model: SlottedModel, tied: Collection[Optimizer]) -> None:
        """Settle what can be known of new seeds by now; warn of those that nothing holds.

        Args:
            model: The model.
            tied: Optimisers that are known to hold seeds.
        """
        if self.forgotten:
            optimizers = [*tied, *living(Optimizer)]
            self.forgotten = {
                slot for slot in self.forgotten if _missing(_trainable(model, slot), optimizers)
            }
        if not self._new:
            return
        trained = any(_trains(optimizer, model) for optimizer in self._stepped)
        forgotten: dict[str, tuple[int, int]] = {}
        for slot in sorted(self._new):
            trainable = _trainable(model, slot)
            missing = _missing(trainable, [*tied, *self._stepped])
            if missing and trained:
                # One that has not stepped yet may hold it; to look at every object is slow, but done once a seed.
                missing = _missing(missing, living(Optimizer))
                if missing:
                    forgotten[slot] = len(missing), len(trainable)
            if trained or not missing:
                self._new.discard(slot)
        self._watch(bool(self._new))
        self.forgotten |= set(forgotten)
        if forgotten:
            lines = "".join(
                f"  slot '{slot}': {n} of {all_} parameters\n" for slot, (n, all_) in forgotten.items()
            )
            warn_caller(
                "An optimiser of this model has stepped, and no optimiser holds what seeds have to learn.\n"
                f"{lines}"
                "Use tie_optimizer(model, optimizer), which adds and removes the groups of seeds, or add them yourself: "
                "optimizer.add_param_group({'params': model.seed_parameters(slot)}).",
                UntrackedSeedWarning,
            )

    def _watch(self, wanted: bool) -> None:
        if wanted and self._unhook is None:
            stepped = self._stepped
            handle = register_optimizer_step_post_hook(
                lambda optimizer, _args, _kwargs: stepped.add(optimizer)
            )
            self._unhook = weakref.finalize(self, handle.remove)  # the hook must not outlive the model
            self._unhook.atexit = False
        elif not wanted and self._unhook is not None:
            self._unhook()
            self._unhook = None
        if not wanted:
            self._stepped.clear()


def _trains(optimizer: Optimizer, model: SlottedModel) -> bool:
    """Whether an optimiser is one of this model's: it holds parameters of the host, or of seeds if the host is frozen."""
    held = _held([optimizer])
    host = model.host_parameters()
    if any(p.requires_grad for p in host):
        return any(id(p) in held for p in host)
    return not held or any(id(p) in held for p in [*host, *model.seed_parameters()])


def _trainable(model: SlottedModel, slot: str) -> list[nn.Parameter]:
    return [p for p in model.seed_parameters(slot) if p.requires_grad]


def _missing(parameters: Sequence[nn.Parameter], optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    held = _held(optimizers)
    return [p for p in parameters if id(p) not in held]


def _held(optimizers: Iterable[Optimizer]) -> set[int]:
    # An optimiser that is being made or was emptied has no groups.
    groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]
    return {id(p) for group in groups for p in group["params"]}
