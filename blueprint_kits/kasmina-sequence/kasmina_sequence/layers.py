"""Layers shared by the pack's seeds."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn


@final
class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation of each position: ``g x / sqrt(mean(x²) + 1e-6)``.

    torch's default eps depends on the dtype; a fixed one lets a seed do the same in each.

    Args:
        dim: Number of features ``d``.

    Shape:
        ``(b, t, d)`` to the same.

    Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised features."""
        # Under autocast the features may be in half precision and the weight not: torch then warns and is slow.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def zero_init_(layer: nn.Linear) -> None:
    """Set weight and bias of a branch's last layer to zero, in place.

    The branch then adds nothing at birth, and yet the layer's own gradient is not zero, since its input is not: it
    moves in the first step, and the layers before it from the second on.
    """
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
