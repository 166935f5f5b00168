"""Sizes of gradients over an epoch are those that torch computes, step by step."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from kasmina_core.slots.notes import GradientNorms


def steps(count: int = 4, *dtypes: torch.dtype) -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    kinds = dtypes or (torch.float32,)
    return [
        [torch.randn(3, 5 + i, generator=draw).to(kinds[i % len(kinds)]) for i in range(3)]
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,), (torch.float64,), (torch.bfloat16,), (torch.float32, torch.float64)],
    ids=lambda dtypes: ", ".join(map(str, dtypes)),
)
def test_mean_and_largest_are_those_of_the_norms_bit_for_bit(dtypes: tuple[torch.dtype, ...]) -> None:
    norms, expected = GradientNorms(), []
    for gradients in steps(4, *dtypes):
        norms.note(gradients)
        expected.append(get_total_norm(gradients).float())
    assert norms.count == 4
    assert norms.largest == float(torch.stack(expected).max())
    total = expected[0]
    for norm in expected[1:]:
        total = total + norm
    assert norms.mean == float(total) / 4


def test_a_norm_that_is_not_finite_stays() -> None:
    for poison in (math.nan, math.inf):
        norms = GradientNorms()
        norms.note([torch.tensor([poison])])
        norms.note([torch.ones(2)])
        assert not math.isfinite(norms.mean)
        assert not math.isfinite(norms.largest)


def test_a_record_makes_the_same_again_and_goes_on() -> None:
    whole, first = GradientNorms(), GradientNorms()
    for gradients in steps(2):
        whole.note(gradients)
        first.note(gradients)
    resumed = GradientNorms(*first.record())
    for gradients in steps(4)[2:]:
        whole.note(gradients)
        resumed.note(gradients)
    assert resumed.record() == whole.record()
    assert GradientNorms().record() == (0, 0.0, 0.0)


def test_a_copy_goes_its_own_way() -> None:
    norms = GradientNorms()
    norms.note([torch.ones(4)])
    other = copy.deepcopy(norms)
    other.note([torch.full((4,), 3.0)])
    assert norms.record() == (1, 2.0, 2.0)
    assert other.record() == (2, 8.0, 6.0)
