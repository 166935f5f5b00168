"""A convolution through a narrow waist as a seed."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_cnn.layers import FeatureNorm, zero_init_
from kasmina_cnn.sizes import bottleneck_refusal, require_at_least, waist_width


@final
class BottleneckSeed(nn.Module):
    """A 3x3 convolution through a narrow waist: few parameters at large widths.

    ``y = x + conv1x1(silu(norm(conv3x3(silu(norm(conv1x1(x)))))))``, with the last convolution 0 at birth.

    Args:
        dim: Number of channels ``c``, at least 2.
        reduction: How many times narrower than ``dim`` the waist is, at least 1; a waist narrower than 4 channels
            is widened to 4, or to ``dim``.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2, or ``reduction`` of at least 1.

    Source: He et al. 2015, https://arxiv.org/abs/1512.03385
    """

    def __init__(self, dim: int, *, reduction: int = 4) -> None:
        super().__init__()
        owner = "Blueprint 'bottleneck'"
        require_at_least(owner, "dim", dim, 1)
        require_at_least(owner, "reduction", reduction, 1)
        if (reason := bottleneck_refusal(dim)) is not None:
            raise ValueError(f"{owner} does not take width {dim}: {reason}")
        m = waist_width(dim, reduction)
        self.narrow = nn.Conv2d(dim, m, 1, bias=False)
        self.narrow_norm = FeatureNorm(m)
        self.spread = nn.Conv2d(m, m, 3, padding=1, bias=False)
        self.spread_norm = FeatureNorm(m)
        self.widen = nn.Conv2d(m, dim, 1)
        zero_init_(self.widen)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the branch."""
        waist = F.silu(self.narrow_norm(self.narrow(x)))  # (b, m, h, w)
        waist = F.silu(self.spread_norm(self.spread(waist)))
        branch: Tensor = self.widen(waist)
        return x + branch
