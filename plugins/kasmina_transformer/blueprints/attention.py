"""Self-attention as a seed."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from kasmina_layers.layers import zero_init_
from kasmina_layers.sizes import layer_norm_refusal, require_width
from torch import Tensor, nn

from kasmina_core import WHOLE_SEQUENCES, SeedContext
from kasmina_transformer.layers import merge_heads, split_heads
from kasmina_transformer.sizes import default_heads, require_divisor


@final
class AttentionSeed(nn.Module):
    """Self-attention with pre-normalisation.

    ``y = x + W softmax(q kᵀ / sqrt(d / heads)) v + b``, with ``q, k, v`` linear in ``norm(x)`` and ``W``, ``b`` 0 at
    birth.

    Args:
        dim: Number of features ``d``, at least 2.
        heads: Number of heads, a divisor of ``dim``; ``None`` for the largest one up to 4.
        causal: Whether a position attends to itself and those before it alone.

    Shape:
        ``(b, t, d)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2, or ``heads`` does not divide it.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
    """

    def __init__(self, dim: int, *, heads: int | None = None, causal: bool = False) -> None:
        super().__init__()
        owner = "Blueprint 'attention'"
        require_width(owner, dim, layer_norm_refusal)
        self.heads = default_heads(dim) if heads is None else require_divisor(owner, "heads", heads, dim)
        self.causal = causal
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        zero_init_(self.out)

    def forward(self, x: Tensor, context: SeedContext = WHOLE_SEQUENCES) -> Tensor:
        """Return ``x`` plus what each position gathers from those it may see.

        Args:
            x: The features.
            context: Which positions are real, of one document, and cached.
        """
        q, k, v = split_heads(self.qkv(self.norm(x)), self.heads)  # (b, heads, t, d / heads)
        k, v = (context.with_past(name, new, dim=2) for name, new in (("keys", k), ("values", v)))
        seen = context.visible(x, causal=self.causal)
        gathered = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=self.causal and seen is None
        )
        branch: Tensor = self.out(merge_heads(gathered))
        return x + branch
