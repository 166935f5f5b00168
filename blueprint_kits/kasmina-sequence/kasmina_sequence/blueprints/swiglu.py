"""A gated feed-forward network as a seed."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_sequence.layers import RMSNorm, zero_init_
from kasmina_sequence.sizes import SWIGLU_EXPANSION, require_at_least, require_width, swiglu_hidden


@final
class SwiGLUSeed(nn.Module):
    """Feed-forward network whose hidden features are gated, as in recent language models.

    ``y = x + W (silu(G norm(x)) * V norm(x))``, without biases, with ``W`` 0 at birth. Inside it is
    ``2 expansion d / 3`` wide, rounded down, so that it has as many parameters as a plain feed-forward network that is
    ``expansion`` times as wide as ``dim``.

    Args:
        dim: Number of features ``d``, at least 2.
        expansion: Expansion of the plain network of the same size, at least 1.

    Shape:
        ``(b, t, d)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2, or ``expansion`` of at least 1.

    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202
    """

    def __init__(self, dim: int, *, expansion: int = SWIGLU_EXPANSION) -> None:
        super().__init__()
        owner = "Blueprint 'swiglu'"
        require_width(owner, dim)
        h = swiglu_hidden(dim, require_at_least(owner, "expansion", expansion, 1))
        self.norm = RMSNorm(dim)
        self.gate = nn.Linear(dim, h, bias=False)
        self.value = nn.Linear(dim, h, bias=False)
        self.out = nn.Linear(h, dim, bias=False)
        zero_init_(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the branch."""
        n = self.norm(x)
        branch: Tensor = self.out(F.silu(self.gate(n)) * self.value(n))
        return x + branch
