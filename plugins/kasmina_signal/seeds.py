"""Seeds for signals. Each keeps the length, and looks at no later time step in a causal host."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from kasmina_layers import features
from kasmina_layers.layers import zero_init_
from kasmina_layers.sizes import layer_norm_refusal, require_at_least, require_width
from torch import Tensor, nn

from kasmina_signal.layers import StepNorm, TimeConv
from kasmina_signal.sizes import DEPTHWISE_KERNEL, DILATION, KERNEL


@final
class BottleneckSeed(features.BottleneckSeed):
    """Two linear maps through a narrow waist, with a nonlinearity between, at each time step by itself.

    ``y = x + W2 gelu(W1 x + b1) + b2``, with ``W2`` and ``b2`` 0 at birth.

    Args:
        dim: Number of channels ``c``, at least 1.
        reduction: How many times narrower than ``dim`` the waist is, at least 1; a waist narrower than 4 channels
            is widened to 4, or to ``dim``.

    Shape:
        ``(b, c, t)`` to the same.

    Raises:
        ValueError: If ``dim`` or ``reduction`` is not a whole number of at least 1.

    Source: Houlsby et al. 2019, https://arxiv.org/abs/1902.00751
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + W2 gelu(W1 x + b1) + b2``."""
        return super().forward(x.mT).mT


@final
class NormSeed(features.NormSeed):
    """Learned mixture of the features and the layer normalisation of each time step.

    ``y = x + a x + g norm(x) + s``, with ``a``, ``g``, ``s`` per channel, all 0 at birth. ``norm`` is over the channels
    of a step, so that no step depends on another; ``a = -1, g = 1`` is plain layer normalisation.

    Args:
        dim: Number of channels ``c``, at least 2.

    Shape:
        ``(b, c, t)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2.

    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + a x + g norm(x) + s``."""
        return super().forward(x.mT).mT


class _StepConvSeed(nn.Module):
    """``y = x + conv1(silu(norm(conv(x))))``, which `ConvSeed` and `DepthwiseSeed` document."""

    def __init__(self, owner: str, dim: int, kernel: int, dilation: int, causal: bool, groups: int) -> None:
        super().__init__()
        require_width(owner, dim, layer_norm_refusal)
        require_at_least(owner, "kernel", kernel, 1)
        require_at_least(owner, "dilation", dilation, 1)
        self.spread = TimeConv(dim, dim, kernel, dilation=dilation, causal=causal, groups=groups, bias=False)
        self.norm = StepNorm(dim)
        self.merge = nn.Conv1d(dim, dim, 1)
        zero_init_(self.merge)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + conv1(silu(norm(conv(x))))``."""
        branch: Tensor = self.merge(F.silu(self.norm(self.spread(x))))
        return x + branch


@final
class ConvSeed(_StepConvSeed):
    """Residual convolution along time.

    ``y = x + conv1(silu(norm(conv(x))))``, with the pointwise convolution ``conv1`` 0 at birth and a layer
    normalisation per time step.

    Args:
        dim: Number of channels ``c``, at least 2.
        kernel: Time steps that it looks at, at least 1.
        dilation: How many steps they are apart, at least 1.
        causal: Whether a step sees itself and those before it alone.

    Shape:
        ``(b, c, t)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2, or ``kernel`` or ``dilation`` of at least 1.

    Source: Bai et al. 2018, https://arxiv.org/abs/1803.01271
    """

    def __init__(self, dim: int, *, kernel: int = KERNEL, dilation: int = 1, causal: bool = False) -> None:
        super().__init__("Blueprint 'conv'", dim, kernel, dilation, causal, groups=1)


@final
class DepthwiseSeed(_StepConvSeed):
    """Depthwise separable convolution along time: one per channel, then one across channels.

    ``y = x + conv1(silu(norm(depthwise(x))))``, with the pointwise convolution ``conv1`` 0 at birth and a layer
    normalisation per time step.

    Args:
        dim: Number of channels ``c``, at least 2.
        kernel: Time steps that it looks at, at least 1.
        dilation: How many steps they are apart, at least 1.
        causal: Whether a step sees itself and those before it alone.

    Shape:
        ``(b, c, t)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2, or ``kernel`` or ``dilation`` of at least 1.

    Source: Kaiser et al. 2017, https://arxiv.org/abs/1706.03059
    """

    def __init__(
        self, dim: int, *, kernel: int = DEPTHWISE_KERNEL, dilation: int = 1, causal: bool = False
    ) -> None:
        super().__init__("Blueprint 'depthwise'", dim, kernel, dilation, causal, groups=dim)


@final
class DilatedSeed(nn.Module):
    """Gated dilated convolution along time, without normalisation: sees far with few weights, and takes one channel.

    ``y = x + conv1(tanh(f) sigmoid(g))``, with ``f`` and ``g`` dilated convolutions of ``x`` and ``conv1`` pointwise,
    0 at birth.

    Args:
        dim: Number of channels ``c``, at least 1.
        kernel: Time steps that it looks at, at least 1.
        dilation: How many steps they are apart, at least 1.
        causal: Whether a step sees itself and those before it alone.

    Shape:
        ``(b, c, t)`` to the same.

    Raises:
        ValueError: If ``dim``, ``kernel`` or ``dilation`` is not a whole number of at least 1.

    Source: van den Oord et al. 2016, https://arxiv.org/abs/1609.03499
    """

    def __init__(
        self, dim: int, *, kernel: int = KERNEL, dilation: int = DILATION, causal: bool = False
    ) -> None:
        super().__init__()
        owner = "Blueprint 'dilated'"
        require_width(owner, dim)
        require_at_least(owner, "kernel", kernel, 1)
        require_at_least(owner, "dilation", dilation, 1)
        self.spread = TimeConv(dim, 2 * dim, kernel, dilation=dilation, causal=causal)
        self.merge = nn.Conv1d(dim, dim, 1)
        zero_init_(self.merge)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + conv1(tanh(f) sigmoid(g))``."""
        f, g = self.spread(x).chunk(2, dim=1)  # (b, c, t) each
        branch: Tensor = self.merge(f.tanh() * g.sigmoid())
        return x + branch
