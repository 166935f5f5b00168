"""Depthwise separable convolution as a seed."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_cnn.layers import FeatureNorm, zero_init_
from kasmina_cnn.sizes import require_at_least


@final
class DepthwiseSeed(nn.Module):
    """Depthwise separable convolution: a 3x3 per channel, then a 1x1 across channels.

    ``y = x + conv1x1(silu(norm(depthwise3x3(x))))``, with the 1x1 convolution 0 at birth.

    Args:
        dim: Number of channels ``c``, at least 1.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 1.

    Source: Howard et al. 2017, https://arxiv.org/abs/1704.04861
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_at_least("Blueprint 'depthwise'", "dim", dim, 1)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = FeatureNorm(dim)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        zero_init_(self.pointwise)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the branch."""
        branch: Tensor = self.pointwise(F.silu(self.norm(self.depthwise(x))))
        return x + branch
