"""The seeds. Each returns exactly its input at birth, and every one of its last weights has a gradient then."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_core import WHOLE_SEQUENCES, SeedContext


class ContextSeed(nn.Module):
    """``x + out(mean(x))``, the mean over the positions that each may look at; ``out`` is zero at birth.

    Args:
        dim: Number of features ``d``.
        causal: Whether position ``t`` may use positions up to ``t`` only. Kasmina passes what the host declares.

    Shape:
        ``(b, t, d)`` to the same.
    """

    def __init__(self, dim: int, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, context: SeedContext = WHOLE_SEQUENCES) -> Tensor:
        """Return the features with their context.

        Args:
            x: The features.
            context: Which positions are padding, of another document, or cached.
        """
        whole = context.with_past("features", x)  # (b, past + t, d)
        seen = context.visible(x, causal=self.causal)  # (b or 1, 1, t, past + t)
        if seen is not None:
            weights = seen[:, 0].to(x.dtype)
            mean = weights @ whole / weights.sum(-1, keepdim=True)  # (b, t, d)
        elif self.causal:
            counts = torch.arange(1, x.shape[1] + 1, device=x.device).to(x.dtype)
            mean = x.cumsum(1) / counts.view(1, -1, 1)  # (b, t, d)
        else:
            mean = x.mean(1, keepdim=True)  # (b, 1, d)
        return x + self.out(mean)


class WaistSeed(nn.Module):
    """``x + expand(gelu(narrow(x)))`` through ``width`` features.

    Only ``expand``, the last layer, is zero at birth: were ``narrow`` zero too, neither would ever get a gradient.

    Args:
        dim: Number of features ``d``.
        width: Features of the waist, at least 1.

    Shape:
        ``(b, t, d)`` to the same.

    Raises:
        ValueError: If ``width`` is below 1.
    """

    def __init__(self, dim: int, width: int = 4) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"The waist must have at least 1 feature, not {width}.")
        self.narrow = nn.Linear(dim, width)
        self.expand = nn.Linear(width, dim)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features with what the network adds."""
        return x + self.expand(F.gelu(self.narrow(x)))
