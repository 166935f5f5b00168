"""Parameter counts of the pack's seeds, as arithmetic: needs no torch."""

from __future__ import annotations

from kasmina_layers.sizes import waist_width


def block_params(dim: int) -> int:
    """Norm, 3x3, norm, 3x3 with bias: ``18 dim² + 5 dim``."""
    return 18 * dim * dim + 5 * dim


def bottleneck_params(dim: int) -> int:
    """1x1 in, 3x3, 1x1 out with bias, and two norms, with the waist ``m``: ``2 dim m + 9 m² + 4 m + dim``."""
    m = waist_width(dim)
    return 2 * dim * m + 9 * m * m + 4 * m + dim


def conv_heavy_params(dim: int) -> int:
    """3x3, norm, 3x3 with bias: ``18 dim² + 3 dim``."""
    return 18 * dim * dim + 3 * dim


def conv_light_params(dim: int) -> int:
    """3x3, norm, 1x1 with bias: ``10 dim² + 3 dim``."""
    return 10 * dim * dim + 3 * dim


def depthwise_params(dim: int) -> int:
    """3x3 per channel, norm, 1x1 with bias: ``dim² + 12 dim``."""
    return dim * dim + 12 * dim
