"""The seeds. Each returns exactly its input at birth, and every one of its last weights has a gradient then."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class EdgeSeed(nn.Module):
    """``x + conv(x)``: a 3x3 convolution per channel that is zero at birth.

    Args:
        dim: Number of channels ``c``.

    Shape:
        ``(b, c, h, w)`` to the same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features with their edges."""
        return x + self.conv(x)


class MixerSeed(nn.Module):
    """``x + expand(relu(narrow(x)))``: 1x1 convolutions through ``dim // reduction`` channels.

    Only ``expand``, the last layer, is zero at birth: were ``narrow`` zero too, neither would ever get a gradient.

    Args:
        dim: Number of channels ``c``, at least 4.
        reduction: How many times narrower the waist is.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If the waist would have no channel.
    """

    def __init__(self, dim: int, reduction: int = 4) -> None:
        super().__init__()
        if reduction < 1 or dim // reduction < 1:
            raise ValueError(
                f"{dim} channels cannot be narrowed {reduction} times: give a smaller reduction."
            )
        self.narrow = nn.Conv2d(dim, dim // reduction, 1)
        self.expand = nn.Conv2d(dim // reduction, dim, 1)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features with their mixture."""
        return x + self.expand(F.relu(self.narrow(x)))
