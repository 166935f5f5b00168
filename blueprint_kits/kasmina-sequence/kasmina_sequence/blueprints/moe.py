"""A mixture of experts as a seed."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_sequence.layers import RMSNorm, zero_init_
from kasmina_sequence.sizes import MIN_EXPERTS, MOE_EXPANSION, MOE_EXPERTS, require_at_least, require_width


@final
class MoESeed(nn.Module):
    """Mixture of experts with soft routing: small networks, weighted for each position.

    ``y = x + sum_i p_i W_i gelu(V_i n + a_i) + b``, with ``n = norm(x)``, ``p = softmax(R n)``, and every ``W_i`` and
    ``b`` 0 at birth. Every expert runs and learns at every position: no loss has to balance them, the result depends
    on no order of ties, and the shapes on no data. It computes as much as a feed-forward network of the same size.

    Args:
        dim: Number of features ``d``, at least 2.
        experts: Number of experts, at least 2: with one the router would have no choice.
        expansion: How many times wider than ``dim`` each expert is inside, at least 1.

    Shape:
        ``(b, t, d)`` to the same.

    Raises:
        ValueError: If ``dim`` or ``experts`` is not a whole number of at least 2, or ``expansion`` of at least 1.

    Source: Eigen et al. 2013, https://arxiv.org/abs/1312.4314
    """

    def __init__(self, dim: int, *, experts: int = MOE_EXPERTS, expansion: int = MOE_EXPANSION) -> None:
        super().__init__()
        owner = "Blueprint 'moe'"
        require_width(owner, dim)
        require_at_least(owner, "experts", experts, MIN_EXPERTS)
        require_at_least(owner, "expansion", expansion, 1)
        self.experts = experts
        self.norm = RMSNorm(dim)
        self.router = nn.Linear(dim, experts, bias=False)
        self.expand = nn.Linear(dim, experts * expansion * dim)
        self.contract = nn.Linear(experts * expansion * dim, dim)
        zero_init_(self.contract)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the experts' weighted sum."""
        b, t, _ = x.shape
        n = self.norm(x)
        p = F.softmax(self.router(n), dim=-1)  # (b, t, experts)
        hidden = F.gelu(self.expand(n)).view(b, t, self.experts, -1)  # (b, t, experts, expansion * d)
        branch: Tensor = self.contract((p.unsqueeze(-1) * hidden).flatten(-2))
        return x + branch
