"""Counting of operations: torch's counter with the CPU's attention added, and fvcore's count of one module."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]

_SDPA: Final = "aten::scaled_dot_product_attention"
_COSTLY: Final = ("attention", "conv", "fft", "gru", "linear", "lstm", "mm", "rnn", "transformer", "dot")


def _attention(query: Shape, key: Shape, value: Shape, by_key: int = 1, by_value: int = 1) -> int:
    """Return the multiply-adds of so many products of the scores' size with the keys' and the values' width."""
    *batch, t, d = query
    return math.prod(batch) * t * key[-2] * (by_key * d + by_value * value[-1])


def flop_counter() -> FlopCounterMode:
    """Return torch's counter, which counts a multiply-add as 2, taught the attention kernels of the CPU.

    Source: https://docs.pytorch.org/docs/stable/_modules/torch/utils/flop_counter.html (it knows those of CUDA).
    """
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
                2 * _attention(q, k, v)
            ),
            # The scores are computed again; then one product each for dV, dP, dQ and dK.
            aten._scaled_dot_product_flash_attention_for_cpu_backward: (
                lambda grad, q, k, v, *_, **__: 2 * _attention(q, k, v, 3, 2)
            ),
        },
    )


@final
@dataclass(frozen=True, slots=True)
class FlopCount:
    """Cost of one forward pass.

    Attributes:
        multiply_adds: Multiply-adds of matrix products, convolutions and attention; fvcore adds the operations of
            norms and pooling.
        counted_by: ``"fvcore"`` or ``"torch FlopCounterMode"``.
        because: What fvcore could not do; empty if it could do everything.
    """

    multiply_adds: int
    counted_by: str
    because: str = ""


def count_flops(module: nn.Module, x: Tensor) -> FlopCount:
    """Return the cost of the forward pass of ``module`` on ``x``: fvcore's count where that is complete.

    fvcore traces the module: give it one that is not used afterwards, because buffers such as BatchNorm's statistics
    and the global random numbers move. Where fvcore fails, or misses operations that torch's counter sees, torch's
    count is taken, halved, because it counts a multiply-add as 2.

    Raises:
        Exception: Whatever the forward pass raises.

    Source: https://github.com/facebookresearch/fvcore/blob/main/docs/flop_count.md
    """
    counted, because = 0, ""
    try:
        counted, missed = _fvcore_flops(module, x)
    except Exception as error:  # tracing runs foreign code under rules that it may not know
        first = str(error).strip().partition("\n")[0]
        because = f"fvcore could not: {type(error).__name__}: {first}"[:200]
    else:
        if not missed:
            return FlopCount(counted, "fvcore")
        because = f"fvcore does not know {', '.join(missed)}"
    # Without gradients torch may take a fused path for a whole layer, which neither counter can look into.
    with torch.enable_grad(), flop_counter() as counter:
        module(x)
    seen = counter.get_total_flops() // 2
    if counted >= seen and counted > 0:
        return FlopCount(counted, "fvcore", because)
    return FlopCount(seen, "torch FlopCounterMode", because)


def _fvcore_flops(module: nn.Module, x: Tensor) -> tuple[int, list[str]]:
    """Return the count, and the operations that may cost much and were not counted."""
    with warnings.catch_warnings():
        # fvcore scripts functions when it is imported, and traces; torch deprecates both.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(module, (x,))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        analysis.set_op_handle(_SDPA, _fvcore_attention)
        with torch.enable_grad():
            counted = round(float(analysis.total()))
        unknown: list[str] = sorted(analysis.unsupported_ops())
    return counted, [op for op in unknown if any(word in op for word in _COSTLY)]


def _fvcore_attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of the scores and of their product with the values."""
    query, key, value = (tuple(tensor.type().sizes()) for tensor in inputs[:3])
    return _attention(query, key, value)
