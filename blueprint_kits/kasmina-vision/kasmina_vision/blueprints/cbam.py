"""Channel and spatial attention as a seed."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_vision.layers import zero_init_
from kasmina_vision.sizes import CBAM_KERNEL, CBAM_REDUCTION, require_at_least, waist_width


@final
class CBAMSeed(nn.Module):
    """Convolutional block attention: scales each channel by what the image holds, then each pixel by its surroundings.

    ``u = x + x tanh(W2 (silu(W1 mean(x) + b1) + silu(W1 max(x) + b1)) + b2)``, mean and maximum over the image;
    ``y = u + u tanh(conv7x7([mean(u), max(u)]))``, mean and maximum over the channels. ``W2``, ``b2`` and the
    convolution are 0 at birth. ``1 + tanh(z)`` is the paper's sigmoid gate, stretched to (0, 2) so that it can start
    at 1; SiLU stands for its ReLU, which could leave every unit of a narrow waist without gradient; and the batch
    normalisation after its convolution is left out, since a convolution that starts at 0 has nothing to normalise.

    Args:
        dim: Number of channels ``c``, at least 1.
        reduction: How many times narrower than ``dim`` the waist is, at least 1; a waist narrower than 4 channels
            is widened to 4, or to ``dim``.

    Shape:
        ``(b, c, h, w)`` to the same.

    Raises:
        ValueError: If ``dim`` or ``reduction`` is not a whole number of at least 1.

    Source: Woo et al. 2018, https://arxiv.org/abs/1807.06521
    """

    def __init__(self, dim: int, *, reduction: int = CBAM_REDUCTION) -> None:
        super().__init__()
        owner = "Blueprint 'cbam'"
        require_at_least(owner, "dim", dim, 1)
        require_at_least(owner, "reduction", reduction, 1)
        m = waist_width(dim, reduction)
        self.squeeze = nn.Linear(dim, m)
        self.excite = nn.Linear(m, dim)
        self.spatial = nn.Conv2d(2, 1, CBAM_KERNEL, padding=CBAM_KERNEL // 2)
        zero_init_(self.excite)
        zero_init_(self.spatial)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, scaled by channel and then by pixel."""
        mean, peak = x.mean(dim=(2, 3)), x.amax(dim=(2, 3))  # (b, c)
        z = self.excite(F.silu(self.squeeze(mean)) + F.silu(self.squeeze(peak)))
        x = x + x * torch.tanh(z)[:, :, None, None]
        maps = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)  # (b, 2, h, w)
        return x + x * torch.tanh(self.spatial(maps))
