"""Parameter counts of the pack's seeds, as arithmetic: needs no torch."""

from __future__ import annotations

from kasmina_layers.sizes import waist_width


def bottleneck_params(dim: int) -> int:
    """1x1x1 in, 3x3x3, 1x1x1 out with bias, and two norms, with the waist ``m``: ``2 dim m + 27 m² + 4 m + dim``."""
    m = waist_width(dim)
    return 2 * dim * m + 27 * m * m + 4 * m + dim


def conv_params(dim: int) -> int:
    """3x3x3, norm, 1x1x1 with bias: ``28 dim² + 3 dim``."""
    return 28 * dim * dim + 3 * dim


def depthwise_params(dim: int) -> int:
    """3x3x3 per channel, norm, 1x1x1 with bias: ``dim² + 30 dim``."""
    return dim * dim + 30 * dim
