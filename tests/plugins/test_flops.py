"""Counting operations: fvcore where it knows them, torch's counter where it does not, and which of them said so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kasmina_core.checks.flops import count_flops, flop_counter


class Attention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (b, heads, t, d)
        return nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class NotTraced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("cannot be traced\nfor a long reason")
        return x @ x.mT


def test_a_multiply_add_counts_once() -> None:
    count = count_flops(nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 4, 4))
    assert (count.multiply_adds, count.counted_by) == (2 * 3 * 5 * 9 * 16, "fvcore")


def test_fvcore_counts_attention_as_torchs_counter_does() -> None:
    x = torch.randn(2, 7, 12)
    count = count_flops(Attention(3), x)
    assert (count.multiply_adds, count.counted_by) == (2 * 3 * 7 * 7 * (4 + 4), "fvcore")
    with flop_counter() as counter:
        Attention(3)(x)
    assert counter.get_total_flops() == 2 * count.multiply_adds


def test_a_fused_layer_is_counted_as_what_it_does() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    projections, attention, mlp = 4 * 8 * 8 * 5, 2 * 5 * 5 * 8, 2 * 8 * 16 * 5
    assert count_flops(layer, torch.randn(1, 5, 8)).multiply_adds >= projections + attention + mlp


@pytest.mark.parametrize(
    ("module", "expected", "because"),
    [
        (nn.GRU(8, 8, batch_first=True), 5 * 3 * (8 * 8 + 8 * 8), "fvcore does not know aten::gru"),
        (NotTraced(), 5 * 5 * 8, "fvcore could not: RuntimeError: cannot be traced"),
    ],
)
def test_where_fvcore_cannot_torchs_counter_counts_and_the_reason_is_told(
    module: nn.Module, expected: int, because: str
) -> None:
    count = count_flops(module, torch.randn(1, 5, 8))
    assert (count.multiply_adds, count.counted_by) == (expected, "torch FlopCounterMode")
    assert count.because == because


def test_a_module_without_costly_operations_costs_what_fvcore_says() -> None:
    count = count_flops(nn.ReLU(), torch.randn(1, 5, 8))
    assert (count.multiply_adds, count.counted_by) == (0, "fvcore")
