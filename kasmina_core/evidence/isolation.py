"""A monitor of isolation: measures the gradient that a seed sends into its host."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, final

import torch
from torch import nn

from kasmina_core.blending import like_host
from kasmina_core.isolation import IsolationReading
from kasmina_core.quiet import private_rng

if TYPE_CHECKING:
    from kasmina_core.slots.slot import SeedSlot

LEAK_TOLERANCE: Final = 1e-6
"""Relative leak up to which the host counts as untouched: rounding, not learning."""


@final
class GradientIsolationMonitor:
    """Measures the gradient that a seed in TRAINING sends into its host; the host's own gradient is not in it.

    The slot runs eagerly on one random sample, in its training mode, and a random gradient ``g`` is sent back. The
    host's own share of that is exactly ``g`` at the slot's input and nothing at its parameters, so::

        leak = sqrt(|dL/dinput - g|^2 + sum over host parameters of |dL/dp|^2) / |g|

    is what went through the seed: an input that was not detached, or a parameter that seed and host share. No
    module's buffers, gradients or random numbers change. It costs one forward and backward of the seed on one
    sample, so call it once an epoch, or every few dozen steps.

    Args:
        host_parameters: Names and parameters of the host.
        threshold: Largest relative leak that is not a violation.
    """

    def __init__(
        self, host_parameters: Iterable[tuple[str, nn.Parameter]], threshold: float = LEAK_TOLERANCE
    ) -> None:
        self._host = list(host_parameters)
        self.threshold = threshold
        self.violations = 0

    def measure(self, slot: SeedSlot) -> IsolationReading:
        """Measure one slot that holds a seed, and count a violation if there is one.

        Raises:
            TransitionError: If the slot holds no seed.
        """
        with ExitStack() as stack:
            stack.enter_context(private_rng(0, slot.device))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(slot.device.type, enabled=False))
            shape, dtype = (1, *slot.shape[1:]), slot.alpha_buffer.dtype
            features, gradient = (torch.randn(shape).to(slot.device, dtype) for _ in range(2))
            features.requires_grad_()
            output = like_host(slot.isolated_forward(features), features)
            trainable = [(name, p) for name, p in self._host if p.requires_grad]
            reached = torch.autograd.grad(
                output,
                [features, *(p for _, p in trainable)],
                gradient,
                allow_unused=True,
                materialize_grads=False,
            )
        at_input = reached[0] if reached[0] is not None else torch.zeros_like(gradient)
        parts = {"features": at_input.double() - gradient.double()}
        for (name, _), grad in zip(trainable, reached[1:], strict=True):
            if grad is not None:
                parts[name] = grad.double()
        sizes = {name: float(torch.linalg.vector_norm(part)) for name, part in parts.items()}
        whole = math.sqrt(sum(size * size for size in sizes.values()))
        leak = whole / max(float(torch.linalg.vector_norm(gradient.double())), 1e-30)
        touched = tuple(name for name, size in sizes.items() if size != 0.0)  # NaN counts
        reading = IsolationReading(leak, self.threshold, touched)
        self.violations += reading.is_violation
        return reading
