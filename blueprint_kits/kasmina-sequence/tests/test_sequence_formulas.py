"""Each seed compared with its formula written out plainly, and with what its options change."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sequence_cases import SPECS, features
from torch import Tensor

from kasmina_core.testing.seeds import grown, newborn


def _normed(x: Tensor, seed: Any) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * seed.norm.weight


def test_swiglu_is_a_gated_product() -> None:
    seed: Any = grown(SPECS["swiglu"], 8)
    x = features(8)
    n = _normed(x, seed)
    hidden = F.silu(n @ seed.gate.weight.T) * (n @ seed.value.weight.T)
    torch.testing.assert_close(seed(x), x + hidden @ seed.out.weight.T)


def test_rmsnorm_adapter_goes_through_its_rank() -> None:
    seed: Any = grown(SPECS["rmsnorm_adapter"], 12, rank=3)
    x = features(12)
    hidden = F.silu(_normed(x, seed) @ seed.down.weight.T + seed.down.bias)
    assert hidden.shape[-1] == 3
    torch.testing.assert_close(seed(x), x + hidden @ seed.up.weight.T + seed.up.bias)


def test_moe_is_a_weighted_sum_of_experts() -> None:
    seed: Any = grown(SPECS["moe"], 6, experts=3, expansion=2)
    x = features(6)
    n = _normed(x, seed)
    p = (n @ seed.router.weight.T).softmax(-1)
    y = x + seed.contract.bias
    for i, own in enumerate(torch.arange(36).split(12)):
        hidden = F.gelu(n @ seed.expand.weight[own].T + seed.expand.bias[own])
        y = y + p[..., i, None] * (hidden @ seed.contract.weight[:, own].T)
    torch.testing.assert_close(seed(x), y)


@pytest.mark.parametrize("causal", [False, True])
def test_gau_gates_what_attention_gathers(causal: bool) -> None:
    seed: Any = grown(SPECS["gau"], 6, expansion=2, key_dim=5, causal=causal)
    x = features(6, length=7)
    parts = F.silu(_normed(x, seed) @ seed.spread.weight.T + seed.spread.bias)
    u, v, z = parts[..., :12], parts[..., 12:24], parts[..., 24:]
    q, k = (z * a + c for a, c in zip(seed.scales, seed.shifts, strict=True))
    y = seed(x)
    for t in range(7):
        last = t + 1 if causal else 7
        weights = ((q[:, t, None] * k[:, :last]).sum(-1) / 5**0.5).softmax(-1)  # (b, last)
        gathered = (weights[..., None] * v[:, :last]).sum(1)
        branch = (u[:, t] * gathered) @ seed.out.weight.T + seed.out.bias
        torch.testing.assert_close(y[:, t], x[:, t] + branch)


# Options


def _count(name: str, dim: int, **options: Any) -> int:
    return sum(parameter.numel() for parameter in newborn(SPECS[name], dim, **options).parameters())


@pytest.mark.parametrize(
    ("name", "options", "params"),
    [
        ("gau", {"expansion": 1}, 64 + 65 * (2 * 64 + 64) + 4 * 64 + 65 * 64),
        ("gau", {"key_dim": 16}, 64 + 65 * (4 * 64 + 16) + 4 * 16 + 129 * 64),
        ("moe", {"experts": 2}, 4 * 64**2 + 6 * 64),
        ("moe", {"expansion": 2}, 16 * 64**2 + 14 * 64),
        ("rmsnorm_adapter", {"rank": 3}, 2 * 64 * 3 + 2 * 64 + 3),
        ("swiglu", {"expansion": 6}, 3 * 64 * 256 + 64),
    ],
)
def test_an_option_sets_the_size(name: str, options: dict[str, Any], params: int) -> None:
    assert _count(name, 64, **options) == params


@given(st.integers(2, 4096))
def test_declared_sizes_are_the_documented_formulas(d: int) -> None:
    s, r, h = min(d, 128), min(d, 8), 8 * d // 3
    assert SPECS["gau"].declared_params(d) == 6 * d**2 + 6 * d + d * s + 5 * s
    assert SPECS["moe"].declared_params(d) == 8 * d**2 + 10 * d
    assert SPECS["rmsnorm_adapter"].declared_params(d) == 2 * d * r + 2 * d + r
    assert SPECS["swiglu"].declared_params(d) == 3 * d * h + d


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gau", {"expansion": 1}),
        ("gau", {"key_dim": 1}),
        ("gau", {"causal": True}),
        ("moe", {"experts": 2}),
        ("moe", {"experts": 7, "expansion": 2}),
        ("rmsnorm_adapter", {"rank": 1}),
        ("rmsnorm_adapter", {"rank": 12}),
        ("swiglu", {"expansion": 1}),
    ],
)
def test_with_options_too_a_seed_starts_as_the_identity_and_then_does_something(
    name: str, options: dict[str, Any]
) -> None:
    x = features(12)
    assert torch.equal(newborn(SPECS[name], 12, **options)(x), x)
    y = grown(SPECS[name], 12, **options)(x)
    assert y.shape == x.shape
    assert (y - x).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "option", "minimum"),
    [
        ("gau", "expansion", 1),
        ("gau", "key_dim", 1),
        ("moe", "experts", 2),
        ("moe", "expansion", 1),
        ("rmsnorm_adapter", "rank", 1),
        ("swiglu", "expansion", 1),
    ],
)
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "4"])
def test_an_option_that_is_no_positive_number_is_refused_with_both_values(
    name: str, option: str, minimum: int, value: object
) -> None:
    message = rf"Blueprint '{name}'.*given: +{option}={re.escape(repr(value))}\n.*{minimum} or more"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        SPECS[name].load_factory()(8, **{option: value})


def test_a_single_expert_is_refused() -> None:
    with pytest.raises(ValueError, match=r"given: +experts=1\n +allowed: a whole number, 2 or more"):
        newborn(SPECS["moe"], 8, experts=1)


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank: 9\n +dim: +8\nGive a rank from 1 to 8"):
        newborn(SPECS["rmsnorm_adapter"], 8, rank=9)
