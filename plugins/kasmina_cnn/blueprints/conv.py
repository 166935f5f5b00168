"""Residual convolution as a seed, in two sizes."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_cnn.layers import FeatureNorm, zero_init_
from kasmina_cnn.sizes import require_at_least


@final
class ConvLightSeed(nn.Module):
    """Residual convolution, the small one: sees 3x3 pixels.

    ``y = x + conv1x1(silu(norm(conv3x3(x))))``, with the 1x1 convolution 0 at birth.

    Args:
        dim: Number of channels ``c``, at least 1.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 1.

    Source: He et al. 2016, https://arxiv.org/abs/1603.05027
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_at_least("Blueprint 'conv_light'", "dim", dim, 1)
        self.spread = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = FeatureNorm(dim)
        self.merge = nn.Conv2d(dim, dim, 1)
        zero_init_(self.merge)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the branch."""
        branch: Tensor = self.merge(F.silu(self.norm(self.spread(x))))
        return x + branch


@final
class ConvHeavySeed(nn.Module):
    """Residual convolution, the large one: sees 5x5 pixels.

    ``y = x + conv3x3(silu(norm(conv3x3(x))))``, with the last convolution 0 at birth.

    Args:
        dim: Number of channels ``c``, at least 1.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 1.

    Source: He et al. 2016, https://arxiv.org/abs/1603.05027
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_at_least("Blueprint 'conv_heavy'", "dim", dim, 1)
        self.spread = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = FeatureNorm(dim)
        self.merge = nn.Conv2d(dim, dim, 3, padding=1)
        zero_init_(self.merge)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the branch."""
        branch: Tensor = self.merge(F.silu(self.norm(self.spread(x))))
        return x + branch
