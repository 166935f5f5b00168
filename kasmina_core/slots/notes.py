"""The sizes of a seed's gradients over an epoch, gathered without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, final

import torch
from torch import Tensor

from kasmina_core.sharding import whole_tensor


@final
class GradientNorms:
    """Number, sum and maximum of L2 norms.

    Args:
        count: How many there were.
        total: Their sum.
        largest: Their maximum.
    """

    # No module's attributes, which cost more to set than a small seed's norm to compute.
    __slots__ = ("_count", "_largest", "_total")

    def __init__(self, count: int = 0, total: float = 0.0, largest: float = 0.0) -> None:
        self._count = count
        self._total, self._largest = torch.tensor([total, largest], device="cpu").unbind()

    def note(self, gradients: Sequence[Tensor]) -> None:
        """Take the gradients of one step, at least one; sharded ones are asked for whole."""
        norm = whole_tensor(_total_norm(gradients).detach()).float()
        if self._count == 0:
            # It begins the sums: a zero from the host would have to be waited for.
            self._total = self._largest = norm
        else:
            self._total = self._total.to(norm.device) + norm
            self._largest = torch.maximum(self._largest.to(norm.device), norm)
        self._count += 1

    @property
    def count(self) -> int:
        """How many there were."""
        return self._count

    @property
    def mean(self) -> float:
        """Their mean; there must be one."""
        return float(self._total) / self._count

    @property
    def largest(self) -> float:
        """The largest."""
        return float(self._largest)

    def record(self) -> tuple[int, float, float]:
        """Return the arguments that make such an object again."""
        return self._count, float(self._total), float(self._largest)


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    first = gradients[0]
    if all(type(g) is Tensor and g.dtype == first.dtype and g.device == first.device for g in gradients):
        # What get_total_norm does, without its sorting by device and dtype.
        norms: list[Tensor] = list(torch._foreach_norm(list(gradients)))
        return cast("Tensor", torch.linalg.vector_norm(torch.stack(norms)))
    return torch.nn.utils.get_total_norm(gradients)
