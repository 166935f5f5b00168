"""Default kernels and parameter counts of the pack's seeds, as arithmetic: needs no torch."""

from __future__ import annotations

from typing import Final

KERNEL: Final = 3
DEPTHWISE_KERNEL: Final = 7
DILATION: Final = 4


def conv_params(dim: int) -> int:
    """Kernel of 3, norm, pointwise with bias: ``4 dim² + 3 dim``."""
    return (KERNEL + 1) * dim * dim + 3 * dim


def depthwise_params(dim: int) -> int:
    """Kernel of 7 per channel, norm, pointwise with bias: ``dim² + 10 dim``."""
    return dim * dim + (DEPTHWISE_KERNEL + 3) * dim


def dilated_params(dim: int) -> int:
    """Kernel of 3 to twice as many channels, pointwise, both with bias: ``7 dim² + 3 dim``."""
    return (2 * KERNEL + 1) * dim * dim + 3 * dim
