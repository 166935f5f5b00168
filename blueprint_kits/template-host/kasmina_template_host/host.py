"""The host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_core import HookedHost, InjectionPoint, Topology


class Block(nn.Module):
    """``x + conv(relu(norm(x)))``.

    Shape:
        ``(b, c, h, w)`` to the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features."""
        return x + self.conv(F.relu(self.norm(x)))


class TemplateHost(HookedHost, nn.Module):
    """A small residual classifier of images; a slot after every block.

    `HookedHost` hangs the slots on the outputs of the submodules that ``injection_points`` names. They are called once
    in every forward pass and return the features.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        channels: Channels of the features.
        n_blocks: Number of blocks, and of slots.

    Shape:
        ``(b, in_channels, h, w)`` to logits ``(b, num_classes)``.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, *, channels: int = 8, n_blocks: int = 2
    ) -> None:
        super().__init__()
        self.in_channels, self.channels = in_channels, channels
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(n_blocks))
        self.head = nn.Linear(channels, num_classes)

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return ``block1``, ``block2``, …, each at the output of its block.

        A path may name an element of the output, ``"blocks.0:1"`` or ``"blocks.0:hidden"``, and ``layout="bhwc"`` another
        order of its axes. A host with positions says what they mean in a method ``context_reader()``.
        """
        return [
            InjectionPoint(f"block{i + 1}", f"blocks.{i}", self.channels, Topology.CNN)
            for i in range(len(self.blocks))
        ]

    def example_inputs(self) -> tuple[Tensor]:
        """Return two images of the model's device and dtype, for the forward pass that proves the points."""
        weight = self.head.weight
        values = torch.linspace(-1.0, 1.0, 2 * self.in_channels * 64, device=weight.device)
        return (values.reshape(2, self.in_channels, 8, 8).to(weight.dtype),)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images ``x``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))
