"""The gated attention unit as a seed."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_core import WHOLE_SEQUENCES, SeedContext
from kasmina_sequence.layers import RMSNorm, zero_init_
from kasmina_sequence.sizes import GAU_EXPANSION, default_key_dim, require_at_least, require_width


@final
class GAUSeed(nn.Module):
    """Gated attention unit: attention and feed-forward network in one, with a single head.

    ``y = x + W (u * softmax(q kᵀ / sqrt(s)) v) + b``, with ``u``, ``v`` and ``z`` each SiLU of a linear map of
    ``norm(x)``, ``q = a1 z + c1``, ``k = a2 z + c2``, and ``W``, ``b`` 0 at birth. Softmax stands for the paper's
    squared ReLU, of which a whole row can be 0; and there is no bias for relative positions, so positions are told
    apart by what the host gives them.

    Args:
        dim: Number of features ``d``, at least 2.
        expansion: How many times wider than ``dim`` ``u`` and ``v`` are, at least 1.
        key_dim: Number of features ``s`` of queries and keys, at least 1; ``None`` for 128, or ``dim`` where that is
            less.
        causal: Whether a position attends to itself and those before it alone.

    Shape:
        ``(b, t, d)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2, or ``expansion`` or ``key_dim`` of at least 1.

    Source: Hua et al. 2022, https://arxiv.org/abs/2202.10447
    """

    def __init__(
        self,
        dim: int,
        *,
        expansion: int = GAU_EXPANSION,
        key_dim: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        owner = "Blueprint 'gau'"
        require_width(owner, dim)
        e = require_at_least(owner, "expansion", expansion, 1) * dim
        s = default_key_dim(dim) if key_dim is None else require_at_least(owner, "key_dim", key_dim, 1)
        self.widths = [e, e, s]
        self.causal = causal
        self.norm = RMSNorm(dim)
        self.spread = nn.Linear(dim, sum(self.widths))
        self.scales = nn.Parameter(torch.ones(2, s))
        self.shifts = nn.Parameter(torch.zeros(2, s))
        self.out = nn.Linear(e, dim)
        zero_init_(self.out)

    def forward(self, x: Tensor, context: SeedContext = WHOLE_SEQUENCES) -> Tensor:
        """Return ``x`` plus what each position gathers from those it may see, gated by itself.

        Args:
            x: The features.
            context: Which positions are real, of one document, and cached.
        """
        parts = F.silu(self.spread(self.norm(x)))  # (b, t, e + e + s)
        u, v, z = torch.split(parts, self.widths, dim=-1)
        q, k = (z.unsqueeze(-2) * self.scales + self.shifts).unbind(-2)  # (b, t, s)
        k, v = context.with_past("keys", k), context.with_past("values", v)
        seen = context.visible(x, causal=self.causal)
        # torch's fused kernels take features with heads: here one, (b, 1, t, ...).
        gathered = F.scaled_dot_product_attention(
            q[:, None], k[:, None], v[:, None], attn_mask=seen, is_causal=self.causal and seen is None
        )
        branch: Tensor = self.out(u * gathered[:, 0])
        return x + branch
