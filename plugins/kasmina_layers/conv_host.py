"""A small convolutional classifier that can grow, for images and volumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Final

import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_core import HookedHost, InjectionPoint, Topology
from kasmina_layers.layers import Convolution, FeatureNorm, spread_values
from kasmina_layers.sizes import require_at_least

NORMS: Final = ("batch", "group")


class ConvBlock(nn.Module):
    """``relu(norm(conv(x)))``, of the pool's output if there is one.

    Args:
        conv: The convolution.
        norm: The normalisation of its output.
        pool: What comes first.

    Shape:
        ``(b, in_channels, …)`` to ``(b, channels, …)``.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module, pool: nn.Module | None) -> None:
        super().__init__()
        self.pool = pool
        self.conv = conv
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features."""
        if self.pool is not None:
            x = self.pool(x)
        return F.relu(self.norm(self.conv(x)))


class ConvHost(HookedHost, nn.Module):
    """A small convolutional classifier; a slot after every block but the first.

    Block ``i`` of 1, 2, … has ``base_channels * width_factor**(i - 1)`` channels, and every block but the first halves
    each axis of space first (rounded up, so that 1 stays 1). The last features are averaged over space and mapped to
    the classes. The points are ``block2``, ``block3``, … with the width of their block.

    Attributes:
        conv, batch_norm, max_pool: The layers of the layout.
        topology: The layout of the features, which is that of the inputs.

    Args:
        in_channels: Channels of the inputs.
        num_classes: Number of classes.
        n_blocks: Number of blocks, at least 2.
        base_channels: Channels of the first block.
        width_factor: How many times wider each block is than the one before; 1 keeps the width.
        norm: ``"batch"`` for batch normalisation, ``"group"`` for group normalisation, which keeps no statistics and
            does not mix the samples of a batch.

    Shape:
        ``(b, in_channels, …)``, any size in space, to logits ``(b, num_classes)``.

    Raises:
        ValueError: If a number is below its minimum or ``norm`` is not one of the two.
    """

    conv: ClassVar[type[Convolution]]
    batch_norm: ClassVar[Callable[[int], nn.Module]]
    max_pool: ClassVar[Callable[..., nn.Module]]
    topology: ClassVar[Topology]

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
        owner = type(self).__name__
        require_at_least(owner, "in_channels", in_channels, 1)
        require_at_least(owner, "num_classes", num_classes, 1)
        require_at_least(owner, "n_blocks", n_blocks, 2)  # with one block there is no place for a slot
        require_at_least(owner, "base_channels", base_channels, 1)
        require_at_least(owner, "width_factor", width_factor, 1)
        if norm not in NORMS:
            raise ValueError(
                f"{owner} cannot use the norm it was given.\n"
                f"  given:   norm={norm!r}\n"
                f"  allowed: {', '.join(repr(name) for name in NORMS)}\n"
                "Give norm='batch', or norm='group' for batches of one."
            )
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.widths = tuple(base_channels * width_factor**i for i in range(n_blocks))
        normalise = self.batch_norm if norm == "batch" else FeatureNorm
        self.blocks = nn.ModuleList(
            ConvBlock(
                self.conv(before, width, 3, padding=1, bias=False),
                normalise(width),
                self.max_pool(2, ceil_mode=True) if i > 0 else None,
            )
            for i, (before, width) in enumerate(
                zip((in_channels, *self.widths[:-1]), self.widths, strict=True)
            )
        )
        self.head = nn.Linear(self.widths[-1], num_classes)

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return ``block2``, ``block3``, …, each at the output of its block."""
        return [
            InjectionPoint(f"block{i + 1}", f"blocks.{i}", width, self.topology)
            for i, width in enumerate(self.widths)
            if i > 0
        ]

    def example_inputs(self) -> tuple[Tensor]:
        """Return two inputs of 8 positions along each axis, on the model's device, always the same ones."""
        shape = (2, self.in_channels, *[8] * (self.topology.ndim - 2))
        return (spread_values(shape, self.head.weight),)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of inputs ``x``."""
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(dim=tuple(range(2, x.ndim))))
        return logits
