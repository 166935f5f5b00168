"""The counterfactual pass: a seed learns from the loss that its own output would give, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from kasmina_core.errors import HostError
from kasmina_core.quiet import devices_of, private_rng
from kasmina_core.sharding import reshard, sharded_modules
from kasmina_core.slots.forward import ForwardMode
from kasmina_core.slots.settings import Incubation
from kasmina_core.slots.slot import SeedSlot
from kasmina_core.slotted import SlottedModel

_ADVICE: Final = (
    "A host with gradient checkpointing must use use_reentrant=False (transformers: "
    "gradient_checkpointing_enable({'use_reentrant': False})), or GrowthConfig(incubation='straight-through')."
)


def incubate(
    model: SlottedModel, incubation: Incubation, closure: Callable[[], Tensor], scaler: Any
) -> dict[str, Tensor]:
    """Let each incubating seed learn from the loss its own output would give. See `MorphogeneticModel.incubate`."""
    losses: dict[str, Tensor] = {}
    kept: dict[nn.Parameter, Tensor | None] = {}
    with ExitStack() as undo:
        with ExitStack() as all_passes:
            for name, slot in model.slots.items():
                if incubation is not Incubation.COUNTERFACTUAL or not slot.is_incubating:
                    continue
                undo.callback(setattr, slot.notes, "incubations", slot.notes.incubations)
                learns = slot.notes.incubations % slot.config.incubate_every == 0
                slot.notes.incubations += 1
                if not learns or not any(p.requires_grad for p in model.seed_parameters(name)):
                    for parameter in slot.seed_parameters():
                        if parameter.grad is not None and not parameter.grad.any():
                            parameter.grad = None  # on a gradient of zeros an optimiser still makes a step
                    continue
                for noted in (slot.training_deviation, slot.has_training_deviation):
                    undo.callback(noted.copy_, noted.clone())
                if not losses:  # the first: modes are switched once for all of them
                    all_passes.enter_context(model.evaluation())
                    devices = devices_of(model)
                elif model.training or model.host.training:  # the closure has switched them
                    model.eval()
                _set_gradients_aside(model.seed_parameters(name), kept, undo)
                with private_rng(None, *devices), torch.enable_grad():
                    losses[name] = _learn_once(model, slot, closure, scaler)
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


def _learn_once(model: SlottedModel, slot: SeedSlot, closure: Callable[[], Tensor], scaler: Any) -> Tensor:
    seed = cast("nn.Module", slot.seed)
    with _kept_whole(seed), slot.forced(ForwardMode.REPLACE):
        seed.train()
        try:
            loss = closure()
            scaled = scaler.scale(loss) if scaler is not None else loss
            # Asked after the forward, which puts whole parameters in the place of shards.
            learning = [p for p in model.seed_parameters(slot.name) if p.requires_grad]
            give_gradient(scaled, learning)
        finally:
            seed.eval()
            reshard(model)
    return loss.detach()


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
