"""Channel attention as a seed."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from kasmina_layers.layers import zero_init_
from kasmina_layers.sizes import DEFAULT_REDUCTION, require_at_least, require_width, waist_width
from torch import Tensor, nn


@final
class AttentionSeed(nn.Module):
    """Channel attention (squeeze and excite): scales each channel by what the whole image holds.

    ``y = x + x tanh(W2 silu(W1 mean(x) + b1) + b2)``, with ``W2`` and ``b2`` 0 at birth. ``1 + tanh(z)`` is the
    paper's sigmoid gate, stretched to (0, 2) so that it can start at 1.

    Args:
        dim: Number of channels ``c``, at least 1.
        reduction: How many times narrower than ``dim`` the waist is, at least 1; a waist narrower than 4 channels
            is widened to 4, or to ``dim``.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If ``dim`` or ``reduction`` is not a whole number of at least 1.

    Source: Hu et al. 2018, https://arxiv.org/abs/1709.01507
    """

    def __init__(self, dim: int, *, reduction: int = DEFAULT_REDUCTION) -> None:
        super().__init__()
        owner = "Blueprint 'attention'"
        require_width(owner, dim)
        require_at_least(owner, "reduction", reduction, 1)
        m = waist_width(dim, reduction)
        self.squeeze = nn.Linear(dim, m)
        self.excite = nn.Linear(m, dim)
        zero_init_(self.excite)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + x tanh(z)`` with one ``z`` per sample and channel."""
        z = self.excite(F.silu(self.squeeze(x.mean(dim=(2, 3)))))  # (b, c)
        return x + x * torch.tanh(z)[:, :, None, None]
