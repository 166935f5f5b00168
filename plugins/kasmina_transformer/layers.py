"""Layers shared by the pack's seeds."""

from __future__ import annotations

from torch import Tensor, nn


def zero_init_(layer: nn.Linear) -> None:
    """Set weight and bias of a branch's last layer to zero, in place.

    The branch then adds nothing at birth, and yet the layer's own gradient is not zero, since its input is not: it
    moves in the first step, and the layers before it from the second on.
    """
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def split_heads(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``(b, t, 3 d)`` into queries, keys and values, each ``(b, heads, t, d / heads)``."""
    b, t, width = x.shape
    q, k, v = x.view(b, t, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """Turn ``(b, heads, t, d / heads)`` back into ``(b, t, d)``."""
    return x.transpose(1, 2).flatten(2)
