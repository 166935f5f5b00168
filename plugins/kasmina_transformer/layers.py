"""Heads of attention, for the pack's seeds and host."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``(b, t, 3 d)`` into queries, keys and values, each ``(b, heads, t, d / heads)``."""
    b, t, width = x.shape
    q, k, v = x.view(b, t, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """Turn ``(b, heads, t, d / heads)`` back into ``(b, t, d)``."""
    return x.transpose(1, 2).flatten(2)
