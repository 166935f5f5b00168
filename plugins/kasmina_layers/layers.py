"""Layers shared by the bundled seeds and hosts."""

from __future__ import annotations

from typing import TypeAlias, final

import torch
from torch import Tensor, nn

from kasmina_layers.sizes import group_count

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


@final
class FeatureNorm(nn.GroupNorm):
    """Group normalisation that also takes a group of a single value.

    ``nn.GroupNorm`` raises where batch, channels of a group and positions are all of size 1. Here such a value normalises
    to 0, as the formula says, so that a network works whatever its input has shrunk to.

    Args:
        channels: Number of channels of the ``(b, c, …)`` features; the groups follow from `group_count`.
        affine: Whether to learn a scale and a shift per channel.

    Source: Wu & He 2018, https://arxiv.org/abs/1803.08494
    """

    def __init__(self, channels: int, *, affine: bool = True) -> None:
        super().__init__(group_count(channels), channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(x - mean) / sqrt(var + eps)`` over each group of channels and all positions, scaled and shifted."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def zero_init_(layer: Convolution | nn.Linear) -> None:
    """Set weight and bias of a branch's last layer to zero, in place.

    The branch then adds nothing at birth, and yet the layer's own gradient is not zero, since its input is not: it
    moves in the first step, and the layers before it from the second on.
    """
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def spread_values(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return a tensor of values from -1 to 1, on the device and of the dtype of another."""
    values = torch.linspace(-1.0, 1.0, torch.Size(shape).numel(), device=like.device)
    return values.reshape(shape).to(like.dtype)
