"""Convolutions as seeds."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from kasmina_layers import convolutions
from kasmina_layers.layers import FeatureNorm, zero_init_
from kasmina_layers.sizes import DEFAULT_COPIES, require_at_least, require_width
from torch import Tensor, nn


@final
class BlockSeed(nn.Module):
    """Whole residual blocks in a row, each of two convolutions with pre-normalisation.

    Per block ``y = x + conv3x3(silu(norm(conv3x3(silu(norm(x))))))``, with the last convolution 0 at birth. Every block
    is the identity then, so each is given ``x`` and the whole gradient of the output: the first step moves the zero
    layers of all of them, the second everything.

    Args:
        dim: Number of channels ``c``, at least 1.
        copies: Number of blocks, at least 1.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If ``dim`` or ``copies`` is not a whole number of at least 1.

    Source: He et al. 2016, https://arxiv.org/abs/1603.05027
    """

    def __init__(self, dim: int, *, copies: int = DEFAULT_COPIES) -> None:
        super().__init__()
        owner = "Blueprint 'block'"
        require_width(owner, dim)
        require_at_least(owner, "copies", copies, 1)
        self.blocks = nn.Sequential(*(_Block(dim) for _ in range(copies)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features behind all blocks."""
        grown: Tensor = self.blocks(x)
        return grown


@final
class _Block(nn.Module):
    """``x + conv3x3(silu(norm(conv3x3(silu(norm(x))))))``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first_norm = FeatureNorm(dim)
        self.first = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.second_norm = FeatureNorm(dim)
        self.second = nn.Conv2d(dim, dim, 3, padding=1)
        zero_init_(self.second)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features."""
        inner = self.first(F.silu(self.first_norm(x)))
        branch: Tensor = self.second(F.silu(self.second_norm(inner)))
        return x + branch


# Without docstrings of their own the next three show those of the modules that they specialise.


@final
class BottleneckSeed(convolutions.BottleneckSeed):
    conv = nn.Conv2d


@final
class ConvLightSeed(convolutions.ConvLightSeed):
    conv = nn.Conv2d
    owner = "Blueprint 'conv_light'"


@final
class DepthwiseSeed(convolutions.DepthwiseSeed):
    conv = nn.Conv2d


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
        require_width("Blueprint 'conv_heavy'", dim)
        self.spread = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = FeatureNorm(dim)
        self.merge = nn.Conv2d(dim, dim, 3, padding=1)
        zero_init_(self.merge)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + conv3x3(silu(norm(conv3x3(x))))``."""
        branch: Tensor = self.merge(F.silu(self.norm(self.spread(x))))
        return x + branch
