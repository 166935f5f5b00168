"""Seeds that work on each feature vector by itself, for every layout whose width is the last axis."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_layers.layers import zero_init_
from kasmina_layers.sizes import (
    DEFAULT_EXPANSION,
    DEFAULT_REDUCTION,
    layer_norm_refusal,
    require_at_least,
    require_width,
    waist_width,
)


class NormSeed(nn.Module):
    """Learned mixture of the features and their layer normalisation.

    ``y = x + a x + g norm(x) + s``, with ``a``, ``g``, ``s`` per feature, all 0 at birth. It is linear in what it
    learns, so that no factor hides another's gradient; ``a = -1, g = 1`` is plain layer normalisation.

    Args:
        dim: Number of features ``d``, at least 2.

    Shape:
        ``(b, …, d)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2.

    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_width("Blueprint 'norm'", dim, layer_norm_refusal)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.keep = nn.Parameter(torch.zeros(dim))
        self.gain = nn.Parameter(torch.zeros(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + a x + g norm(x) + s``."""
        branch: Tensor = self.keep * x + self.gain * self.norm(x) + self.shift
        return x + branch


class BottleneckSeed(nn.Module):
    """Two linear maps through a narrow waist, with a nonlinearity between: few parameters at large widths.

    ``y = x + W2 gelu(W1 x + b1) + b2``, with ``W2`` and ``b2`` 0 at birth.

    Args:
        dim: Number of features ``d``, at least 1.
        reduction: How many times narrower than ``dim`` the waist is, at least 1; a waist narrower than 4 features
            is widened to 4, or to ``dim``.

    Shape:
        ``(b, …, d)`` to the same.

    Raises:
        ValueError: If ``dim`` or ``reduction`` is not a whole number of at least 1.

    Source: Houlsby et al. 2019, https://arxiv.org/abs/1902.00751
    """

    def __init__(self, dim: int, *, reduction: int = DEFAULT_REDUCTION) -> None:
        super().__init__()
        owner = "Blueprint 'bottleneck'"
        require_width(owner, dim)
        require_at_least(owner, "reduction", reduction, 1)
        m = waist_width(dim, reduction)
        self.narrow = nn.Linear(dim, m)
        self.widen = nn.Linear(m, dim)
        zero_init_(self.widen)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + W2 gelu(W1 x + b1) + b2``."""
        branch: Tensor = self.widen(F.gelu(self.narrow(x)))
        return x + branch


@final
class MLPSeed(nn.Module):
    """Feed-forward network with pre-normalisation, applied to each feature vector by itself.

    ``y = x + W2 gelu(W1 norm(x) + b1) + b2``, with ``W2`` and ``b2`` 0 at birth.

    Args:
        dim: Number of features ``d``, at least 2.
        expansion: How many times wider than ``dim`` the network is inside, at least 1.

    Shape:
        ``(b, …, d)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2, or ``expansion`` of at least 1.

    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
    """

    def __init__(self, dim: int, *, expansion: int = DEFAULT_EXPANSION) -> None:
        super().__init__()
        owner = "Blueprint 'mlp'"
        require_width(owner, dim, layer_norm_refusal)
        require_at_least(owner, "expansion", expansion, 1)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        zero_init_(self.contract)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + W2 gelu(W1 norm(x) + b1) + b2``."""
        branch: Tensor = self.contract(F.gelu(self.expand(self.norm(x))))
        return x + branch
