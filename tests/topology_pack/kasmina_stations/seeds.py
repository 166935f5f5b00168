"""Seeds for features ``(b, n, f, t)``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_stations import norm_refusal, waist


def _over_features(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer of the last axis to the features."""
    y: Tensor = layer(x.movedim(2, -1))
    return y.movedim(-1, 2)


class NormSeed(nn.Module):
    """``y = x + g norm(x) + s``, per feature, both 0 at birth.

    Args:
        dim: Number of features, at least 2.

    Shape:
        ``(b, n, f, t)`` to the same.

    Raises:
        ValueError: If ``dim`` is below 2.

    Source: https://arxiv.org/abs/1607.06450
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if (refusal := norm_refusal(dim)) is not None:
            raise ValueError(refusal)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.gain = nn.Parameter(torch.zeros(dim, 1))
        self.shift = nn.Parameter(torch.zeros(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.gain * _over_features(self.norm, x).to(self.gain.dtype) + self.shift
        return x + branch.to(x.dtype)


class BottleneckSeed(nn.Module):
    """``y = x + W2 gelu(W1 x + b1) + b2``, with ``W2`` and ``b2`` 0 at birth.

    Args:
        dim: Number of features.

    Shape:
        ``(b, n, f, t)`` to the same.

    Raises:
        RuntimeError: If ``dim`` is below 0.

    Source: https://arxiv.org/abs/1902.00751
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, waist(dim)), nn.Linear(waist(dim), dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.down(x.movedim(2, -1)))
        return x + self.up(hidden).movedim(-1, 2).to(x.dtype)


class ConvSeed(nn.Module):
    """``y = x + conv(x)``: a convolution of three steps over the time of each station, 0 at birth.

    Args:
        dim: Number of features.
        causal: Whether it looks back only.

    Shape:
        ``(b, n, f, t)`` to the same.

    Raises:
        ValueError: If ``dim`` is below 1.

    Source: https://arxiv.org/abs/1609.03499
    """

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__()
        self.pad = (2, 0) if causal else (1, 1)
        self.conv = nn.Conv1d(dim, dim, 3)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv(F.pad(x.flatten(0, 1), self.pad))  # (b*n, f, t)
        return x + branch.unflatten(0, x.shape[:2]).to(x.dtype)
