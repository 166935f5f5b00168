"""Normalisation as a seed."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from kasmina_transformer.sizes import layer_norm_refusal, require_at_least


@final
class NormSeed(nn.Module):
    """Learned mixture of the features and their layer normalisation.

    ``y = x + a x + g norm(x) + s``, with ``a``, ``g``, ``s`` per feature, all 0 at birth. It is linear in what it
    learns, so that no factor hides another's gradient; ``a = -1, g = 1`` is plain layer normalisation.

    Args:
        dim: Number of features ``d``, at least 2.

    Shape:
        ``(b, t, d)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2.

    Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_at_least("Blueprint 'norm'", "dim", dim, 1)
        if (reason := layer_norm_refusal(dim)) is not None:
            raise ValueError(f"Blueprint 'norm' does not take width {dim}: {reason}")
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.keep = nn.Parameter(torch.zeros(dim))
        self.gain = nn.Parameter(torch.zeros(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + a x + g norm(x) + s``."""
        branch: Tensor = self.keep * x + self.gain * self.norm(x) + self.shift
        return x + branch
