"""The seeds. Each returns exactly its input at birth, and every one of its last weights has a gradient then."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_core import Topology

AXIS = Topology.VECTOR.feature_dim
"""The axis of the features."""


class ScaleSeed(nn.Module):
    """``x + scale x``, one factor per feature; 0 at birth.

    Args:
        dim: Number of features.

    Shape:
        ``(b, d)`` to the same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(Topology.VECTOR.shape(dim)[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled features."""
        return x + self.scale * x


class WaistSeed(nn.Module):
    """``x + expand(gelu(narrow(x)))`` through ``width`` features, for each position by itself.

    Only ``expand``, the last layer, is zero at birth: were ``narrow`` zero too, neither would ever get a gradient.

    Args:
        dim: Number of features.
        width: Features of the waist, at least 1.

    Shape:
        ``(b, d)`` to the same.

    Raises:
        ValueError: If ``width`` is below 1.
    """

    def __init__(self, dim: int, width: int = 4) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"The waist must have at least 1 feature, not {width}.")
        self.narrow = nn.Linear(dim, width)
        self.expand = nn.Linear(width, dim)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features with what the network adds."""
        hidden = F.gelu(self.narrow(x.movedim(AXIS, -1)))
        return x + self.expand(hidden).movedim(-1, AXIS)
