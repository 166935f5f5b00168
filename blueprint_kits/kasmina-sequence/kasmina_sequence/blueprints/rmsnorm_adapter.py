"""A low-rank adapter on normalised features as a seed."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_sequence.layers import RMSNorm, zero_init_
from kasmina_sequence.sizes import default_rank, require_at_least, require_width


@final
class RMSNormAdapterSeed(nn.Module):
    """Low-rank network on normalised features: few parameters, and not linear.

    ``y = x + B silu(A norm(x) + a) + b``, with ``A`` of shape ``(rank, d)`` random, and ``B`` of shape ``(d, rank)``
    and ``b`` 0 at birth.

    Args:
        dim: Number of features ``d``, at least 2.
        rank: Width of the network inside, 1 to ``dim``; ``None`` for 8, or ``dim`` where that is less.

    Shape:
        ``(b, t, d)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 2, or ``rank`` not one from 1 to ``dim``.

    Source: Houlsby et al. 2019, https://arxiv.org/abs/1902.00751
    """

    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        super().__init__()
        owner = "Blueprint 'rmsnorm_adapter'"
        require_width(owner, dim)
        r = default_rank(dim) if rank is None else require_at_least(owner, "rank", rank, 1)
        if r > dim:
            raise ValueError(
                f"{owner} cannot have a higher rank than its width.\n"
                f"  rank: {r}\n"
                f"  dim:  {dim}\n"
                f"Give a rank from 1 to {dim}, or leave it out for {default_rank(dim)}."
            )
        self.norm = RMSNorm(dim)
        self.down = nn.Linear(dim, r)  # A
        self.up = nn.Linear(r, dim)  # B
        zero_init_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the branch."""
        branch: Tensor = self.up(F.silu(self.down(self.norm(x))))
        return x + branch
