"""The counterfactual pass: a seed learns from the loss that its own output would give, and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from kasmina_core.errors import HostError, MisuseWarning, warn_caller
from kasmina_core.growth.config import GrowthConfig
from kasmina_core.quiet import devices_of, kept_buffers, parameters_by_id, private_rng
from kasmina_core.sharding import reshard, sharded_modules
from kasmina_core.slots.forward import ForwardMode, Part, PartTooSmall
from kasmina_core.slots.settings import Incubation
from kasmina_core.slots.slot import SeedSlot
from kasmina_core.slotted import SlottedModel

_ADVICE: Final = (
    "A host with gradient checkpointing must use use_reentrant=False (transformers: "
    "gradient_checkpointing_enable({'use_reentrant': False})), or GrowthConfig(incubation='straight-through')."
)

_COUPLED: Final = (
    "joint_incubation: what the seed in slot '{slot}' learns from its samples changes with the other samples of the batch, "
    "through the loss or the host. So it learns from whole batches, in a pass of its own.\n"
    "A loss that is a mean over samples, each by itself, lets seeds share a pass."
)
_NOT_ASKED, _UNCOUPLED, _UNDECIDED, _COUPLES = -1.0, 0.0, 1.0, 2.0
_TOLERANCE: Final = 1e-3


def incubate(
    model: SlottedModel, config: GrowthConfig, closure: Callable[[], Tensor], scaler: Any
) -> dict[str, Tensor]:
    """Let each incubating seed learn from the loss its own output would give. See `MorphogeneticModel.incubate`."""
    if not callable(closure):
        raise TypeError(
            "incubate takes a function that returns the loss of this model on a batch: it runs once more for each seed.\n"
            f"  given: {closure!r:.200}\n"
            "Write model.incubate(lambda: loss_of(model(x), y))."
        )
    losses: dict[str, Tensor] = {}
    kept: dict[nn.Parameter, Tensor | None] = {}
    if config.incubation is not Incubation.COUNTERFACTUAL:
        return losses
    incubating = [slot for slot in model.slots.values() if slot.is_incubating]
    if not incubating:
        return losses
    passes = _Passes(model, closure, scaler)
    with ExitStack() as undo:
        learning: list[SeedSlot] = []
        for slot in incubating:
            undo.callback(setattr, slot.notes, "incubations", slot.notes.incubations)
            learns = slot.notes.incubations % slot.config.incubate_every == 0
            slot.notes.incubations += 1
            if not learns or not passes.trainable(slot):
                for parameter in slot.seed_parameters():
                    if parameter.grad is not None and not parameter.grad.any():
                        parameter.grad = None  # on a gradient of zeros an optimiser still makes a step
                continue
            for noted in (slot.training_deviation, slot.has_training_deviation):
                undo.callback(noted.copy_, noted.clone())
            learning.append(slot)
        if learning:
            for slot in learning:
                _set_gradients_aside(passes.own(slot), kept, undo)
            with model.evaluation():  # modes are switched once for all passes
                shared = passes.to_share(learning) if config.joint_incubation else []
                if shared and passes.learn_jointly(shared, losses):
                    learning = [slot for slot in learning if slot not in shared]
                for slot in learning:
                    losses[slot.name] = passes.learn([slot], ForwardMode.REPLACE)
        undo.pop_all()  # nothing raised: what the passes did stays
    for parameter, gradient in kept.items():
        if gradient is not None:
            new = parameter.grad
            parameter.grad = gradient if new is None else gradient.add_(new)
    return losses


def _set_gradients_aside(
    parameters: Iterable[nn.Parameter], kept: dict[nn.Parameter, Tensor | None], undo: ExitStack
) -> None:
    """Let a pass begin without gradients, so that one that raises can be undone without a copy of them."""
    for parameter in parameters:
        if parameter not in kept:
            kept[parameter] = parameter.grad
            undo.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None


class _Passes:
    """Passes of one call of `incubate`: over whole batches for one seed, or shared by several."""

    def __init__(self, model: SlottedModel, closure: Callable[[], Tensor], scaler: Any) -> None:
        self._model, self._closure, self._scaler = model, closure, scaler

    @cached_property
    def _devices(self) -> list[torch.device]:
        return devices_of(self._model)

    @cached_property
    def _is_sharded(self) -> bool:
        return bool(sharded_modules(self._model))

    @cached_property
    def _host(self) -> Mapping[int, nn.Parameter]:
        return parameters_by_id(self._model.host)

    def own(self, slot: SeedSlot) -> list[nn.Parameter]:
        """Return the parameters that the seed of a slot added."""
        if self._is_sharded:  # a forward puts others in their place, in the host too
            return self._model.seed_parameters(slot.name)
        return [p for p in slot.seed_parameters() if id(p) not in self._host]

    def trainable(self, slot: SeedSlot) -> list[nn.Parameter]:
        """Return those that learn."""
        return [p for p in self.own(slot) if p.requires_grad]

    def to_share(self, slots: Sequence[SeedSlot]) -> list[SeedSlot]:
        """Return the slots whose seeds may share a pass; empty if fewer than two may."""
        may = [slot for slot in slots if slot.has_proved_layout and slot.notes.is_coupled is not True]
        return may if len(may) > 1 and not self._is_sharded else []

    def learn(self, slots: Sequence[SeedSlot], mode: ForwardMode) -> Tensor:
        """Add the gradient of one pass, with the seeds of these slots in place, to their parameters; return the loss."""
        model = self._model
        if model.training or model.host.training:  # the closure has switched them
            model.eval()
        with ExitStack() as stack:
            stack.enter_context(private_rng(None, *self._devices))
            stack.enter_context(torch.enable_grad())
            for slot in slots:
                seed = cast("nn.Module", slot.seed)
                stack.callback(seed.eval)
                stack.enter_context(_kept_whole(seed))
                stack.enter_context(slot.forced(mode))
                seed.train()
            try:
                loss = self._closure()
                scaled = self._scaler.scale(loss) if self._scaler is not None else loss
                # Asked after the forward, which puts whole parameters in the place of shards.
                give_gradient(scaled, [p for slot in slots for p in self.trainable(slot)])
            finally:
                if self._is_sharded:
                    reshard(model)
        return loss.detach()

    def learn_jointly(self, slots: Sequence[SeedSlot], losses: dict[str, Tensor]) -> bool:
        """Let seeds learn in as few passes as the size of the batch allows; return whether they could.

        If not, no gradient is left of it. The first time of a seed it is tried whether other samples change what it
        learns; all processes of a job come to one answer.
        """
        untried = [slot for slot in slots if slot.notes.is_coupled is None]
        findings = dict.fromkeys(untried, _UNDECIDED)
        found = self._learn_in_groups(slots, losses, findings)
        for slot in untried:
            worst = slot.owner.largest(slot, "dependence on other samples", findings[slot])
            if worst == _UNCOUPLED:
                slot.notes.is_coupled = False
            elif worst == _UNDECIDED:
                found = False
            elif worst == _COUPLES:
                slot.notes.is_coupled, found = True, False
                warn_caller(_COUPLED.format(slot=slot.name), MisuseWarning)
        if not found:
            self._forget_gradients(slots)
            losses.clear()
        return found

    def _learn_in_groups(
        self, slots: Sequence[SeedSlot], losses: dict[str, Tensor], findings: dict[SeedSlot, float]
    ) -> bool:
        size = len(slots)
        while size > 1:
            try:
                for group in _groups(slots, size):
                    losses |= dict.fromkeys((slot.name for slot in group), self._learn_together(group))
                    for slot in group:
                        if slot in findings and len(group) == 1:
                            findings[slot] = _NOT_ASKED
                        elif slot in findings:
                            findings[slot] = self._dependence(slot, group, losses[slot.name])
            except PartTooSmall as small:
                self._forget_gradients(slots)
                size = min(size - 1, small.seeds)
            else:
                return True
        return False

    def _learn_together(self, group: Sequence[SeedSlot], disturbed: SeedSlot | None = None) -> Tensor:
        first = group[0].notes.incubations // group[0].config.incubate_every
        least = max(_samples_needed(slot) for slot in group)
        for number, slot in enumerate(group):  # in turn, so that no seed sees one kind of samples alone
            slot.part = Part((number + first) % len(group), len(group), least, slot is disturbed)
        loss = self.learn(group, ForwardMode.PART)
        for slot in group:
            for parameter in self.trainable(slot):
                if parameter.grad is not None and slot.part.mine:
                    parameter.grad.mul_(slot.part.samples / slot.part.mine)  # of a mean over its own samples
        return loss

    def _dependence(self, slot: SeedSlot, group: Sequence[SeedSlot], loss: Tensor) -> float:
        """Return whether what a seed learned changes with the other samples, by a pass that disturbs them."""
        parameters = [p for other in group for p in self.trainable(other)]
        learned = {p: p.grad for p in parameters}
        with ExitStack() as undo:
            for parameter, gradient in learned.items():
                undo.callback(setattr, parameter, "grad", gradient)
                parameter.grad = None
            for other in group:
                undo.enter_context(kept_buffers(other))
            disturbed = self._learn_together(group, slot)
            now = {p: p.grad for p in self.trainable(slot)}
        pairs = [(g, now[p]) for p, g in learned.items() if p in now and g is not None]
        norm = math.hypot(*(float(g.float().norm()) for g, _ in pairs))
        apart = math.hypot(*(float((g - n).float().norm()) if n is not None else norm for g, n in pairs))
        if not 0.0 < norm < math.inf or not apart < math.inf or bool(disturbed == loss):
            return _UNDECIDED
        return _UNCOUPLED if apart <= _TOLERANCE * norm else _COUPLES

    def _forget_gradients(self, slots: Sequence[SeedSlot]) -> None:
        for slot in slots:
            for parameter in self.trainable(slot):
                parameter.grad = None


def _samples_needed(slot: SeedSlot) -> int:
    """Return how many samples a seed learns from at least: batch normalisation needs two."""
    layers = cast("nn.Module", slot.seed).modules()
    return 1 + any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers)


def _groups(slots: Sequence[SeedSlot], size: int) -> list[Sequence[SeedSlot]]:
    """Return the slots in as few groups of at most ``size`` as can be, of nearly equal sizes."""
    count = -(-len(slots) // size)
    ends = [len(slots) * number // count for number in range(count + 1)]
    return [slots[start:end] for start, end in pairwise(ends)]


@contextmanager
def _kept_whole(module: nn.Module) -> Iterator[None]:
    """Within the block a forward of the module leaves whole parameters, to which a gradient can be asked for."""
    inside = sharded_modules(module)
    for sharded in inside:
        sharded.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for sharded in inside:
            sharded.set_reshard_after_forward(True, recurse=False)


def give_gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Add a loss's gradient to the parameters' and to no other's.

    Raises:
        HostError: If the loss does not depend on anything that learns, or the host recomputes its features in a way that
            cannot give the gradient to chosen parameters.
    """
    if not loss.requires_grad:
        raise HostError(
            "The loss of a counterfactual pass depends on nothing that learns: the seed cannot learn from it.\n"
            f"Return the loss itself from the closure, without detach or no_grad. {_ADVICE}"
        )
    try:
        loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]  # torch
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise HostError(
            "Counterfactual incubation gives a gradient to the seed alone, and reentrant gradient checkpointing cannot "
            f"give one to chosen parameters.\n{_ADVICE}"
        ) from error
