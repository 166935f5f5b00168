"""A small temporal convolutional network that can grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from kasmina_layers.layers import spread_values
from kasmina_layers.sizes import require_at_least
from torch import Tensor, nn

from kasmina_core import HookedHost, InjectionPoint, Topology
from kasmina_signal.layers import StepNorm, TimeConv


class TimeBlock(nn.Module):
    """``x + merge(relu(norm(conv(x))))``, with a dilated convolution along time.

    Args:
        channels: Number of channels ``c``.
        kernel: Time steps that the convolution looks at.
        dilation: How many steps they are apart.
        causal: Whether a step sees itself and those before it alone.

    Shape:
        ``(b, c, t)`` to the same.
    """

    def __init__(self, channels: int, kernel: int, dilation: int, causal: bool) -> None:
        super().__init__()
        self.conv = TimeConv(channels, channels, kernel, dilation=dilation, causal=causal, bias=False)
        self.norm = StepNorm(channels)
        self.merge = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features."""
        branch: Tensor = self.merge(F.relu(self.norm(self.conv(x))))
        return x + branch


class TCNHost(HookedHost, nn.Module):
    """A small temporal convolutional network that classifies each time step; a slot after every block.

    Block ``i`` of 1, 2, … looks at steps ``2**(i - 1)`` apart. The points are ``block1``, ``block2``, …, all of width
    ``channels``, and causal if the host is. The last step of a causal host has seen the whole signal:
    ``host(x)[..., -1]`` classifies signals.

    Args:
        in_channels: Channels of the signals.
        num_classes: Number of classes, or of values to predict.
        n_blocks: Number of blocks.
        channels: Width of the blocks, at least 2.
        kernel: Time steps that a convolution looks at.
        causal: Whether the logits of a step depend on that step and those before it alone.

    Shape:
        ``(b, in_channels, t)``, any ``t``, to logits ``(b, num_classes, t)``.

    Raises:
        ValueError: If a number is below its minimum.

    Source: Bai et al. 2018, https://arxiv.org/abs/1803.01271

    >>> host = TCNHost(n_blocks=2, channels=8)
    >>> [(point.name, point.dim, point.causal) for point in host.injection_points()]
    [('block1', 8, True), ('block2', 8, True)]
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        *,
        n_blocks: int = 3,
        channels: int = 16,
        kernel: int = 3,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = require_at_least("TCNHost", "in_channels", in_channels, 1)
        require_at_least("TCNHost", "num_classes", num_classes, 1)
        require_at_least("TCNHost", "n_blocks", n_blocks, 1)
        self.channels = require_at_least("TCNHost", "channels", channels, 2)  # of one the norm is constant
        require_at_least("TCNHost", "kernel", kernel, 1)
        self.causal = causal
        self.lift = nn.Conv1d(in_channels, channels, 1)
        self.blocks = nn.ModuleList(TimeBlock(channels, kernel, 2**i, causal) for i in range(n_blocks))
        self.head = nn.Conv1d(channels, num_classes, 1)

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return ``block1``, ``block2``, …, each at the output of its block."""
        return [
            InjectionPoint(f"block{i + 1}", f"blocks.{i}", self.channels, Topology.SIGNAL, causal=self.causal)
            for i in range(len(self.blocks))
        ]

    def example_inputs(self) -> tuple[Tensor]:
        """Return two signals of 16 time steps, on the model's device and of its dtype, always the same ones."""
        return (spread_values((2, self.in_channels, 16), self.head.weight),)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each time step of ``x``."""
        x = self.lift(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits
