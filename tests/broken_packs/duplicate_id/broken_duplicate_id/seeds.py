"""A seed without fault."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    """``x (1 + weight)``: a scale per channel, the identity at birth."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight)
