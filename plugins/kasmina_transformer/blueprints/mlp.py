"""A feed-forward network as a seed."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_transformer.layers import zero_init_
from kasmina_transformer.sizes import DEFAULT_EXPANSION, layer_norm_refusal, require_at_least


@final
class MLPSeed(nn.Module):
    """Position-wise feed-forward network with pre-normalisation.

    ``y = x + W2 gelu(W1 norm(x) + b1) + b2``, with ``W2`` and ``b2`` 0 at birth.

    Args:
        dim: Number of features ``d``, at least 2.
        expansion: How many times wider than ``dim`` the network is inside, at least 1.

    Shape:
        ``(b, t, d)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2, or ``expansion`` of at least 1.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
    """

    def __init__(self, dim: int, *, expansion: int = DEFAULT_EXPANSION) -> None:
        super().__init__()
        owner = "Blueprint 'mlp'"
        require_at_least(owner, "dim", dim, 1)
        require_at_least(owner, "expansion", expansion, 1)
        if (reason := layer_norm_refusal(dim)) is not None:
            raise ValueError(f"{owner} does not take width {dim}: {reason}")
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        zero_init_(self.contract)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the branch."""
        branch: Tensor = self.contract(F.gelu(self.expand(self.norm(x))))
        return x + branch
