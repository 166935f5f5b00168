"""The ConvNeXt block as a seed."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_vision.sizes import (
    CONVNEXT_EXPANSION,
    CONVNEXT_KERNEL,
    convnext_refusal,
    require_at_least,
    require_odd,
)


@final
class ConvNeXtSeed(nn.Module):
    """ConvNeXt block: a large kernel per channel, then a network over the channels of each pixel.

    ``y = x + s (W2 gelu(W1 norm(depthwise(x)) + b1) + b2)``, with layer normalisation over the channels of a pixel
    and a layer scale ``s`` per channel. ``s`` is 0 at birth (the paper: 1e-6) and everything behind it is not, so that
    ``s`` moves in the first step and the rest from the second on.

    Args:
        dim: Number of channels ``c``, at least 3.
        kernel_size: Height and width of the depthwise kernel, odd.
        expansion: How many times wider than ``dim`` the network is inside, at least 1.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 3, ``kernel_size`` no odd one, or ``expansion`` not one
            of at least 1.

    Source: Liu et al. 2022, https://arxiv.org/abs/2201.03545
    """

    def __init__(
        self, dim: int, *, kernel_size: int = CONVNEXT_KERNEL, expansion: int = CONVNEXT_EXPANSION
    ) -> None:
        super().__init__()
        owner = "Blueprint 'convnext'"
        require_at_least(owner, "dim", dim, 1)
        require_odd(owner, "kernel_size", kernel_size)
        require_at_least(owner, "expansion", expansion, 1)
        if (reason := convnext_refusal(dim)) is not None:
            raise ValueError(f"{owner} does not take width {dim}: {reason}")
        self.depthwise = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the branch."""
        pixels = self.depthwise(x).permute(0, 2, 3, 1)  # (b, h, w, c)
        branch: Tensor = self.scale * self.contract(F.gelu(self.expand(self.norm(pixels))))
        return x + branch.permute(0, 3, 1, 2)
