"""Convolutional seeds for images and volumes: the same modules, with the convolution of their layout."""

from __future__ import annotations

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_layers.layers import Convolution, FeatureNorm, zero_init_
from kasmina_layers.sizes import (
    DEFAULT_REDUCTION,
    bottleneck_refusal,
    require_at_least,
    require_width,
    waist_width,
)


@final
class NormSeed(nn.Module):
    """Learned mixture of the features and their group normalisation.

    ``y = x + a x + g norm(x) + s``, with ``a``, ``g``, ``s`` per channel, all 0 at birth. It is linear in what it
    learns, so that no factor hides another's gradient; ``a = -1, g = 1`` is plain group normalisation.

    Args:
        dim: Number of channels ``c``, at least 1.

    Shape:
        ``(b, c, …)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 1.

    Source: Wu & He 2018, https://arxiv.org/abs/1803.08494
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_width("Blueprint 'norm'", dim)
        self.norm = FeatureNorm(dim, affine=False)
        self.keep = nn.Parameter(torch.zeros(dim))
        self.gain = nn.Parameter(torch.zeros(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + a x + g norm(x) + s``."""
        a, g, s = (p.view(-1, *[1] * (x.ndim - 2)) for p in (self.keep, self.gain, self.shift))
        return x + (a * x + g * self.norm(x) + s)


class ConvLightSeed(nn.Module):
    """Residual convolution, the small one: sees 3 positions along each axis.

    ``y = x + conv1(silu(norm(conv3(x))))``, with the pointwise convolution ``conv1`` 0 at birth.

    Attributes:
        conv: The kind of convolution.
        owner: What a refusal begins with.

    Args:
        dim: Number of channels ``c``, at least 1.

    Shape:
        ``(b, c, …)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 1.

    Source: He et al. 2016, https://arxiv.org/abs/1603.05027
    """

    conv: ClassVar[type[Convolution]]
    owner: ClassVar[str]

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_width(self.owner, dim)
        self.spread = self.conv(dim, dim, 3, padding=1, bias=False)
        self.norm = FeatureNorm(dim)
        self.merge = self.conv(dim, dim, 1)
        zero_init_(self.merge)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + conv1(silu(norm(conv3(x))))``."""
        branch: Tensor = self.merge(F.silu(self.norm(self.spread(x))))
        return x + branch


class DepthwiseSeed(nn.Module):
    """Depthwise separable convolution: one over 3 positions along each axis per channel, then one across channels.

    ``y = x + conv1(silu(norm(depthwise3(x))))``, with the pointwise convolution ``conv1`` 0 at birth.

    Attributes:
        conv: The kind of convolution.

    Args:
        dim: Number of channels ``c``, at least 1.

    Shape:
        ``(b, c, …)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 1.

    Source: Howard et al. 2017, https://arxiv.org/abs/1704.04861
    """

    conv: ClassVar[type[Convolution]]

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_width("Blueprint 'depthwise'", dim)
        self.depthwise = self.conv(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = FeatureNorm(dim)
        self.pointwise = self.conv(dim, dim, 1)
        zero_init_(self.pointwise)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + conv1(silu(norm(depthwise3(x))))``."""
        branch: Tensor = self.pointwise(F.silu(self.norm(self.depthwise(x))))
        return x + branch


class BottleneckSeed(nn.Module):
    """A convolution over 3 positions along each axis, through a narrow waist: few parameters at large widths.

    ``y = x + conv1(silu(norm(conv3(silu(norm(conv1(x)))))))``, with the last convolution 0 at birth.

    Attributes:
        conv: The kind of convolution.

    Args:
        dim: Number of channels ``c``, at least 2.
        reduction: How many times narrower than ``dim`` the waist is, at least 1; a waist narrower than 4 channels
            is widened to 4, or to ``dim``.

    Shape:
        ``(b, c, …)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2, or ``reduction`` of at least 1.

    Source: He et al. 2015, https://arxiv.org/abs/1512.03385
    """

    conv: ClassVar[type[Convolution]]

    def __init__(self, dim: int, *, reduction: int = DEFAULT_REDUCTION) -> None:
        super().__init__()
        owner = "Blueprint 'bottleneck'"
        require_width(owner, dim, bottleneck_refusal)
        require_at_least(owner, "reduction", reduction, 1)
        m = waist_width(dim, reduction)
        self.narrow = self.conv(dim, m, 1, bias=False)
        self.narrow_norm = FeatureNorm(m)
        self.spread = self.conv(m, m, 3, padding=1, bias=False)
        self.spread_norm = FeatureNorm(m)
        self.widen = self.conv(m, dim, 1)
        zero_init_(self.widen)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + conv1(silu(norm(conv3(silu(norm(conv1(x)))))))``."""
        waist = F.silu(self.narrow_norm(self.narrow(x)))  # (b, m, …)
        waist = F.silu(self.spread_norm(self.spread(waist)))
        branch: Tensor = self.widen(waist)
        return x + branch
