"""The inverted residual of MobileNetV2 as a seed."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_vision.layers import group_norm, zero_init_
from kasmina_vision.sizes import INVERTED_EXPANSION, require_at_least


@final
class InvertedResidualSeed(nn.Module):
    """MobileNetV2 block: widens, filters each channel with a 3x3, narrows again.

    ``y = x + conv1x1(silu(norm(depthwise3x3(silu(norm(conv1x1(x)))))))``, with the last convolution 0 at birth.

    Group normalisation stands for the paper's batch normalisation: a seed learns while its output does not reach the
    loss, then blends in, so running statistics gathered on the way would not be those of the network it becomes part
    of; it may see batches of one; and no sample may change what the seed does to another. SiLU stands for ReLU6,
    which has no slope at 0, and the norm after the last convolution is left out, since a convolution that starts at
    0 has nothing to normalise.

    Args:
        dim: Number of channels ``c``, at least 1.
        expansion: How many times wider than ``dim`` the block is inside, at least 1; at least 2 for a single channel,
            which a norm would divide out.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If ``dim`` or ``expansion`` is not a whole number of at least 1, or both are 1.

    Source: Sandler et al. 2018, https://arxiv.org/abs/1801.04381
    """

    def __init__(self, dim: int, *, expansion: int = INVERTED_EXPANSION) -> None:
        super().__init__()
        owner = "Blueprint 'inverted_residual'"
        require_at_least(owner, "dim", dim, 1)
        require_at_least(owner, "expansion", expansion, 2 if dim == 1 else 1)
        h = expansion * dim
        self.widen = nn.Conv2d(dim, h, 1, bias=False)
        self.widen_norm = group_norm(h)
        self.depthwise = nn.Conv2d(h, h, 3, padding=1, groups=h, bias=False)
        self.depthwise_norm = group_norm(h)
        self.narrow = nn.Conv2d(h, dim, 1)
        zero_init_(self.narrow)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the branch."""
        wide = F.silu(self.widen_norm(self.widen(x)))  # (b, expansion * c, h, w)
        wide = F.silu(self.depthwise_norm(self.depthwise(wide)))
        branch: Tensor = self.narrow(wide)
        return x + branch
