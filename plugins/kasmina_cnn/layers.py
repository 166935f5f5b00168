"""Layers shared by the pack's seeds and host."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from kasmina_cnn.sizes import group_count


@final
class FeatureNorm(nn.GroupNorm):
    """Group normalisation that also takes a group of a single value.

    ``nn.GroupNorm`` raises where batch, channels of a group and image are all of size 1. Here such a value normalises
    to 0, as the formula says, so that a network works whatever its input has shrunk to.

    Args:
        channels: Number of channels of the ``(b, c, h, w)`` features; the groups follow from `group_count`.
        affine: Whether to learn a scale and a shift per channel.

    Source: Wu & He 2018, https://arxiv.org/abs/1803.08494
    """

    def __init__(self, channels: int, *, affine: bool = True) -> None:
        super().__init__(group_count(channels), channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(x - mean) / sqrt(var + eps)`` over each group of channels and the image, scaled and shifted."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def zero_init_(layer: nn.Conv2d | nn.Linear) -> None:
    """Set weight and bias of a branch's last layer to zero, in place.

    The branch then adds nothing at birth, and yet the layer's own gradient is not zero, since its input is not: it
    moves in the first step, and the layers before it from the second on.
    """
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
