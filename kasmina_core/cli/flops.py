"""Counting what a run costs, in floating-point operations, without slowing it down."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, final

import torch
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")
Shape = tuple[int, ...]


def _attention_forward(
    query: Shape, key: Shape, value: Shape, *args: Any, out_shape: Any = None, **kw: Any
) -> int:
    b, h, t, d = query
    s, v = key[-2], value[-1]
    return 2 * b * h * t * s * (d + v)


def _attention_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *args: Any, out_shape: Any = None, **kw: Any
) -> int:
    b, h, t, d = query
    s, v = key[-2], value[-1]
    # The scores are computed again; then one product each for dV, dP, dQ and dK.
    return 2 * b * h * t * s * (d + v + v + d + d)


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, which counts a multiply-add as 2, taught the attention kernels of the CPU.

    Source: https://docs.pytorch.org/docs/stable/_modules/torch/utils/flop_counter.html (it knows those of CUDA).
    """
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


@final
class FlopLedger:
    """Adds up the operations of a run.

    The first call of each kind of work is counted by running it under the counter; later calls of the same kind cost
    the same and are only added. Matrix products, convolutions and attention count; element-wise work does not.

    Attributes:
        total: Operations so far.
    """

    def __init__(self) -> None:
        self.total = 0
        self._known: dict[Hashable, int] = {}

    def charge(self, kind: Hashable, work: Callable[[], T]) -> T:
        """Do the work and add what it costs.

        Args:
            kind: Equal for calls that do the same operations on the same shapes.
            work: What to do.
        """
        if kind in self._known:
            result = work()
        else:
            with flop_counter() as counter:
                result = work()
            self._known[kind] = counter.get_total_flops()
        self.total += self._known[kind]
        return result
