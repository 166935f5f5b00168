"""Whole layers as a seed."""

from __future__ import annotations

from typing import final

from kasmina_layers.features import MLPSeed
from kasmina_layers.sizes import (
    DEFAULT_COPIES,
    DEFAULT_EXPANSION,
    layer_norm_refusal,
    require_at_least,
    require_width,
)
from torch import Tensor, nn

from kasmina_core import WHOLE_SEQUENCES, SeedContext
from kasmina_transformer.blueprints.attention import AttentionSeed
from kasmina_transformer.sizes import require_divisor


@final
class BlockSeed(nn.Module):
    """Whole layers in a row, each self-attention and then a feed-forward network, with pre-normalisation.

    Per layer ``h = x + A softmax(q kᵀ / sqrt(d / heads)) v + a`` and ``y = h + W2 gelu(W1 norm(h) + b1) + b2``, with
    ``q, k, v`` linear in ``norm(x)`` and ``A``, ``a``, ``W2``, ``b2`` 0 at birth. Every layer is the identity then, so
    each is given ``x`` and the whole gradient of the output: the first step moves the zero layers of all of them, the
    second everything.

    Args:
        dim: Number of features ``d``, at least 2.
        heads: Number of heads, a divisor of ``dim``; ``None`` for the largest one up to 4.
        expansion: How many times wider than ``dim`` the feed-forward network is inside, at least 1.
        copies: Number of layers, at least 1.
        causal: Whether a position attends to itself and those before it alone.

    Shape:
        ``(b, t, d)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2, ``heads`` does not divide it, or another number is
            below 1.

    Source: Xiong et al. 2020, https://arxiv.org/abs/2002.04745
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        expansion: int = DEFAULT_EXPANSION,
        copies: int = DEFAULT_COPIES,
        causal: bool = False,
    ) -> None:
        super().__init__()
        owner = "Blueprint 'block'"
        require_width(owner, dim, layer_norm_refusal)
        if heads is not None:
            require_divisor(owner, "heads", heads, dim)
        require_at_least(owner, "expansion", expansion, 1)
        require_at_least(owner, "copies", copies, 1)
        self.layers = nn.ModuleList(_Layer(dim, heads, expansion, causal) for _ in range(copies))

    def forward(self, x: Tensor, context: SeedContext = WHOLE_SEQUENCES) -> Tensor:
        """Return the features behind all layers.

        Args:
            x: The features.
            context: Which positions are real, of one document, and cached.
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, context.part(f"layer{i}"))
        return x


@final
class _Layer(nn.Module):
    """``mlp(attention(x))``."""

    def __init__(self, dim: int, heads: int | None, expansion: int, causal: bool) -> None:
        super().__init__()
        self.attention = AttentionSeed(dim, heads=heads, causal=causal)
        self.mlp = MLPSeed(dim, expansion=expansion)

    def forward(self, x: Tensor, context: SeedContext) -> Tensor:
        """Return the layer's features."""
        grown: Tensor = self.mlp(self.attention(x, context))
        return grown
