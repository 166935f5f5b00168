"""A small convolutional classifier that can grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_cnn.layers import FeatureNorm
from kasmina_cnn.sizes import require_at_least
from kasmina_core import HookedHost, InjectionPoint, Topology

_NORMS: dict[str, type[nn.BatchNorm2d] | type[FeatureNorm]] = {"batch": nn.BatchNorm2d, "group": FeatureNorm}


class ConvBlock(nn.Module):
    """``relu(norm(conv3x3(x)))``, after halving the image if ``pool``.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        norm: ``"batch"`` or ``"group"``.
        pool: Whether to halve height and width first (2x2 maximum, rounded up, so that 1x1 stays 1x1).

    Shape:
        ``(b, in_channels, h, w)`` to ``(b, channels, h', w')``.
    """

    def __init__(self, in_channels: int, channels: int, *, norm: str, pool: bool) -> None:
        super().__init__()
        self.pool = pool
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = _NORMS[norm](channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features."""
        if self.pool:
            x = F.max_pool2d(x, 2, ceil_mode=True)
        return F.relu(self.norm(self.conv(x)))


class CNNHost(HookedHost, nn.Module):
    """A small convolutional classifier; a slot after every block but the first.

    Block ``i`` of 1, 2, … has ``base_channels * width_factor**(i - 1)`` channels, and every block but the first works
    on an image half as high and wide as the one before. The last features are averaged over the image and mapped to
    the classes. The points are ``block2``, ``block3``, … with the width of their block.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        n_blocks: Number of blocks, at least 2.
        base_channels: Channels of the first block.
        width_factor: How many times wider each block is than the one before; 1 keeps the width.
        norm: ``"batch"`` for batch normalisation, ``"group"`` for group normalisation, which keeps no statistics and
            does not mix the samples of a batch.

    Shape:
        ``(b, in_channels, h, w)``, any ``h`` and ``w``, to logits ``(b, num_classes)``.

    Raises:
        ValueError: If a number is below its minimum or ``norm`` is not one of the two.

    >>> host = CNNHost(n_blocks=3, base_channels=8)
    >>> [(point.name, point.dim) for point in host.injection_points()]
    [('block2', 16), ('block3', 32)]
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        *,
        n_blocks: int = 3,
        base_channels: int = 8,
        width_factor: int = 2,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        require_at_least("CNNHost", "in_channels", in_channels, 1)
        require_at_least("CNNHost", "num_classes", num_classes, 1)
        require_at_least("CNNHost", "n_blocks", n_blocks, 2)  # with one block there is no place for a slot
        require_at_least("CNNHost", "base_channels", base_channels, 1)
        require_at_least("CNNHost", "width_factor", width_factor, 1)
        if norm not in _NORMS:
            raise ValueError(
                "CNNHost cannot use the norm it was given.\n"
                f"  given:   norm={norm!r}\n"
                f"  allowed: {', '.join(repr(name) for name in _NORMS)}\n"
                "Give norm='batch', or norm='group' for batches of one."
            )
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.widths = tuple(base_channels * width_factor**i for i in range(n_blocks))
        self.blocks = nn.ModuleList(
            ConvBlock(before, width, norm=norm, pool=i > 0)
            for i, (before, width) in enumerate(
                zip((in_channels, *self.widths[:-1]), self.widths, strict=True)
            )
        )
        self.head = nn.Linear(self.widths[-1], num_classes)

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return ``block2``, ``block3``, …, each at the output of its block."""
        return [
            InjectionPoint(f"block{i + 1}", f"blocks.{i}", width, Topology.CNN)
            for i, width in enumerate(self.widths)
            if i > 0
        ]

    def example_inputs(self) -> tuple[Tensor]:
        """Return two 8x8 images of the model's device and dtype, always the same ones."""
        shape = (2, self.in_channels, 8, 8)
        weight = self.head.weight
        values = torch.linspace(-1.0, 1.0, 2 * self.in_channels * 64, device=weight.device)
        return (values.reshape(shape).to(weight.dtype),)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images ``x``."""
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits
