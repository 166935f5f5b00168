"""Layers shared by the pack's seeds."""

from __future__ import annotations

from torch import nn

from kasmina_vision.sizes import group_count


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group normalisation for ``(b, c, h, w)`` features; the groups follow from `group_count`.

    Args:
        channels: Number of channels ``c``.

    Source: Wu & He 2018, https://arxiv.org/abs/1803.08494
    """
    return nn.GroupNorm(group_count(channels), channels)


def zero_init_(layer: nn.Conv1d | nn.Conv2d | nn.Linear) -> None:
    """Set weight and bias of a branch's last layer to zero, in place.

    The branch then adds nothing at birth, and yet the layer's own gradient is not zero, since its input is not: it
    moves in the first step, and the layers before it from the second on.
    """
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
