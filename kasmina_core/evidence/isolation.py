"""A monitor of isolation: measures the gradient that a seed sends into its host."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

from kasmina_core.blending import like_host
from kasmina_core.isolation import IsolationReading
from kasmina_core.quiet import parameters_by_id, private_rng

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
        host: The host, or names and parameters of it.
        threshold: Largest relative leak that is not a violation.
    """

    def __init__(
        self, host: nn.Module | Iterable[tuple[str, nn.Parameter]], threshold: float = LEAK_TOLERANCE
    ) -> None:
        self._host = host if isinstance(host, nn.Module) else list(host)
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
            leaves = _leaves_of(output)
            shared = [p for key, p in self._parameters().items() if key in leaves]
            reached = torch.autograd.grad(
                output, [features, *shared], gradient, allow_unused=True, materialize_grads=False
            )
        at_input = reached[0] if reached[0] is not None else torch.zeros_like(gradient)
        parts = {"features": at_input.double() - gradient.double()}
        for parameter, grad in zip(shared, reached[1:], strict=True):
            if grad is not None:
                parts[self._name_of(parameter)] = grad.double()
        sizes = {name: float(torch.linalg.vector_norm(part)) for name, part in parts.items()}
        whole = math.sqrt(sum(size * size for size in sizes.values()))
        leak = whole / max(float(torch.linalg.vector_norm(gradient.double())), 1e-30)
        touched = tuple(name for name, size in sizes.items() if size != 0.0)  # NaN counts
        reading = IsolationReading(leak, self.threshold, touched)
        self.violations += reading.is_violation
        return reading

    def _parameters(self) -> dict[int, nn.Parameter]:
        if isinstance(self._host, nn.Module):
            return parameters_by_id(self._host)
        return {id(parameter): parameter for _, parameter in self._host}

    def _name_of(self, parameter: nn.Parameter) -> str:
        named = self._host.named_parameters() if isinstance(self._host, nn.Module) else self._host
        return next(name for name, candidate in named if candidate is parameter)


def _leaves_of(output: Tensor) -> set[int]:
    """Return the ``id`` of each leaf of the graph that computed a tensor, which requires gradients."""
    leaves, seen, waiting = set[int](), set[Any](), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.add(id(variable))
        waiting.extend(following for following, _ in node.next_functions)
    return leaves
