"""Normalisation as a seed."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from kasmina_cnn.layers import FeatureNorm
from kasmina_cnn.sizes import require_at_least


@final
class NormSeed(nn.Module):
    """Learned mixture of the features and their group normalisation.

    ``y = x + a x + g norm(x) + s``, with ``a``, ``g``, ``s`` per channel, all 0 at birth. It is linear in what it
    learns, so that no factor hides another's gradient; ``a = -1, g = 1`` is plain group normalisation.

    Args:
        dim: Number of channels ``c``, at least 1.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 1.

    Source: Wu & He 2018, https://arxiv.org/abs/1803.08494
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_at_least("Blueprint 'norm'", "dim", dim, 1)
        self.norm = FeatureNorm(dim, affine=False)
        self.keep = nn.Parameter(torch.zeros(dim))
        self.gain = nn.Parameter(torch.zeros(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + a x + g norm(x) + s``."""
        a, g, s = (p.view(1, -1, 1, 1) for p in (self.keep, self.gain, self.shift))
        branch: Tensor = a * x + g * self.norm(x) + s
        return x + branch
