"""First-order evidence: the gains of all seeds at a small alpha, in one forward and one backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kasmina_core.gates.sequential import PairedGain
from kasmina_core.sharding import sharded_modules
from kasmina_core.slots.forward import ForwardMode
from kasmina_core.slots.slot import SeedSlot

if TYPE_CHECKING:
    from kasmina_core.evidence.measuring import GateSamples, Processes
    from kasmina_core.slotted import SlottedModel


def screen(
    model: SlottedModel, samples: GateSamples, slots: Sequence[str], processes: Processes
) -> dict[str, PairedGain]:
    """Return the first-order gain of the seeds in some slots.

    Each slot's output becomes ``host + eps * (seed(host) - host)`` with one ``eps = 0`` per sample, so the forward is
    that of the host; with ``g`` the gradient of a sample's loss at the slot and ``f`` the seed's change there::

        gain = -d loss / d eps = -<g, f>

    That is what the seed gains per unit of alpha as it begins to blend. Where the loss is convex in alpha, the gain
    at any alpha is at most alpha times that: a seed that is harmful to first order cannot help.

    The graph from the first slot to the loss is kept for all samples until the backward. No parameter gets a gradient.

    Args:
        model: The model.
        samples: What to measure on; the evaluator must run the model with gradients as it finds them, not under
            ``no_grad``.
        slots: Names of slots with active seeds.
        processes: The processes that measure together.

    Raises:
        ValueError: If the losses carry no graph back to the slots, or are not one per sample.
    """
    chosen = [model.slots[name] for name in slots]
    if sharded_modules(model):
        raise ValueError("First-order gains cannot be measured in a model whose parameters are sharded.")
    with model.evaluation(), torch.enable_grad(), _frozen(model), ExitStack() as stack:
        weights = [stack.enter_context(_weighed(slot)) for slot in chosen]
        losses = samples.losses()
        if not losses.requires_grad or losses.dim() != 1:
            raise ValueError(
                "First-order gains need one loss per sample, with its graph.\n"
                f"  losses: shape {tuple(losses.shape)}, requires_grad={losses.requires_grad}\n"
                "The evaluator must not detach them, nor run under torch.no_grad(), and the host must not use gradient "
                "checkpointing with use_reentrant=True."
            )
        # Gradient checkpointing runs parts of the host again in the backward: it needs the modes of the forward, and
        # makes further weights, which no gradient reaches.
        inputs = [tuple(each) for each in weights]
        reached = torch.autograd.grad(losses.sum(), [w for own in inputs for w in own], allow_unused=True)
    sign = 1.0 if samples.higher_is_better else -1.0
    found = iter(reached)
    gains = {}
    for slot, own in zip(chosen, inputs, strict=True):
        parts = [g if (g := next(found)) is not None else torch.zeros_like(w) for w in own]
        gradient = torch.cat(parts) if parts else losses.new_zeros(0)
        if gradient.shape != losses.shape:
            raise ValueError(
                f"First-order gains need one loss for each sample that passes slot '{slot.name}'.\n"
                f"  samples: {gradient.numel()}\n  losses:  {losses.numel()}"
            )
        gain = sign * gradient.detach().float()
        counts = processes.counts([losses.detach(), gain])
        gains[slot.name] = PairedGain.of(processes.samples(gain if counts else gain[:0]))
    return gains


@contextmanager
def _weighed(slot: SeedSlot) -> Iterator[list[Tensor]]:
    """Let the slot add its seed's change with a weight of 0 per sample; give the weights, one tensor per forward."""
    weights: list[Tensor] = []
    batch = slot.point.axes.index("b")

    def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        features = args[0]
        weight = features.new_zeros(features.shape[batch], requires_grad=True)
        weights.append(weight)
        sizes = [-1 if axis == batch else 1 for axis in range(features.dim())]
        return features + weight.view(sizes) * (output - features).detach()

    with slot.forced(ForwardMode.MEASURE):
        handle = slot.register_forward_hook(add)
        try:
            yield weights
        finally:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient, so that no graph is kept for them."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
