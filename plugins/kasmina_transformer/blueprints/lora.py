"""A low-rank linear update as a seed."""

from __future__ import annotations

from typing import final

from kasmina_layers.layers import zero_init_
from kasmina_layers.sizes import require_at_least, require_width
from torch import Tensor, nn

from kasmina_transformer.sizes import default_rank


@final
class LoRASeed(nn.Module):
    """Low-rank linear update of the features.

    ``y = x + B A x``, with ``A`` of shape ``(rank, d)`` random and ``B`` of shape ``(d, rank)`` 0 at birth. The
    gradient of ``B`` is not zero then, since ``A x`` is not.

    Args:
        dim: Number of features ``d``, at least 1.
        rank: Rank of the update, 1 to ``dim``; ``None`` for 8, or ``dim`` where that is less.

    Shape:
        ``(b, t, d)`` to the same.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 1, or ``rank`` not one from 1 to ``dim``.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685
    """

    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        super().__init__()
        owner = "Blueprint 'lora'"
        require_width(owner, dim)
        r = default_rank(dim) if rank is None else require_at_least(owner, "rank", rank, 1)
        if r > dim:
            raise ValueError(
                f"{owner} cannot have a higher rank than its width.\n"
                f"  rank: {r}\n"
                f"  dim:  {dim}\n"
                f"Give a rank from 1 to {dim}, or leave it out for {default_rank(dim)}."
            )
        self.down = nn.Linear(dim, r, bias=False)  # A
        self.up = nn.Linear(r, dim, bias=False)  # B
        zero_init_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + B A x``."""
        branch: Tensor = self.up(self.down(x))
        return x + branch
