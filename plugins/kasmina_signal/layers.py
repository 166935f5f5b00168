"""Layers shared by the pack's seeds and host."""

from __future__ import annotations

from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn


@final
class TimeConv(nn.Conv1d):
    """A convolution along time that keeps the length, for every kernel and dilation.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Time steps that it looks at, ``dilation`` apart.
        dilation: See ``kernel``.
        causal: Whether it looks at a step and those before it alone; else as far back as ahead, or with an even kernel
            and an odd dilation one step farther back.

    Shape:
        ``(b, in_channels, t)`` to ``(b, out_channels, t)``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        causal: bool,
        dilation: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, dilation=dilation, **options)
        reach = (kernel - 1) * dilation
        self.ahead = 0 if causal else reach // 2
        self.back = reach - self.ahead

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x``, which is 0 before its start and behind its end."""
        return super().forward(F.pad(x, (self.back, self.ahead)))


@final
class StepNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each time step: a step's features depend on no other step."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the features ``(b, c, t)``, normalised."""
        return super().forward(x.mT).mT
