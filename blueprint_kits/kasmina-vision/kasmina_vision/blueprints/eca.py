"""Efficient channel attention as a seed."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from kasmina_vision.layers import zero_init_
from kasmina_vision.sizes import eca_kernel_size, require_at_least, require_odd


@final
class ECASeed(nn.Module):
    """Efficient channel attention: scales each channel by what the whole image holds in it and in its neighbours.

    ``y = x + x tanh(conv1d(mean(x)))``, with one kernel that runs over the channels and is 0 at birth. ``1 + tanh(z)``
    is the paper's sigmoid gate, stretched to (0, 2) so that it can start at 1.

    Args:
        dim: Number of channels ``c``, at least 1.
        kernel_size: How many neighbouring channels, odd; ``None`` for the paper's ``(log2(c) + 1) / 2``, made odd.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 1, or ``kernel_size`` no odd one.

    Source: Wang et al. 2020, https://arxiv.org/abs/1910.03151
    """

    def __init__(self, dim: int, *, kernel_size: int | None = None) -> None:
        super().__init__()
        owner = "Blueprint 'eca'"
        require_at_least(owner, "dim", dim, 1)
        k = eca_kernel_size(dim) if kernel_size is None else require_odd(owner, "kernel_size", kernel_size)
        self.mix = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)
        zero_init_(self.mix)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + x tanh(z)`` with one ``z`` per sample and channel."""
        z = self.mix(x.mean(dim=(2, 3)).unsqueeze(1)).squeeze(1)  # (b, c)
        return x + x * torch.tanh(z)[:, :, None, None]
