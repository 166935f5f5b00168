"""In a causal host a seed does not see what comes after a position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_cases import SPECS

from kasmina_core import BlueprintRegistry, SeedContext
from kasmina_core.testing.seeds import DTYPES, features, grown

CAN_BE_CAUSAL = [name for name, spec in SPECS.items() if spec.topology.can_be_causal]
LOOKS_ELSEWHERE = [
    "signal:conv",
    "signal:depthwise",
    "signal:dilated",
    "transformer:attention",
    "transformer:block",
]


def _grown_from_registry(name: str, dim: int, causal: bool) -> torch.nn.Module:
    """A seed made the way a slot makes it, every parameter moved."""
    registry = BlueprintRegistry()
    registry.register(SPECS[name], pack=name.partition(":")[0])
    with torch.random.fork_rng(devices=[]):
        seed = registry.create(name, dim, causal=causal)
    seed.load_state_dict(grown(SPECS[name], dim).state_dict())
    return seed


def _time_first(name: str, x: torch.Tensor) -> torch.Tensor:
    """The features with the axis of time in front."""
    axis = SPECS[name].topology.causal_axis
    assert axis is not None
    return x.movedim(axis, 0)


@pytest.mark.parametrize("name", CAN_BE_CAUSAL)
@settings(deadline=None, max_examples=15)
@given(
    dim=st.integers(2, 40),
    cut=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
)
def test_earlier_outputs_are_bit_equal_when_later_inputs_change(
    name: str, dim: int, cut: int, dtype: torch.dtype
) -> None:
    seed = _grown_from_registry(name, dim, causal=True).to(dtype)
    x = features(SPECS[name], dim, size=(4, 3)).to(dtype)
    changed = x.clone()
    other = features(SPECS[name], dim, size=(4, 3), seed=7).to(dtype)
    _time_first(name, changed)[cut:] = _time_first(name, other)[cut:]
    before, after = (_time_first(name, seed(each)) for each in (x, changed))
    assert torch.equal(before[:cut], after[:cut])
    assert not torch.equal(before[cut:], after[cut:])


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("signal:conv", [1, 2, 3]),
        ("signal:depthwise", [0, 1, 2, 3]),
        ("signal:dilated", [3]),  # steps 3, -1 and -5
        ("transformer:attention", [0, 1, 2, 3]),
        ("transformer:block", [0, 1, 2, 3]),
    ],
)
def test_no_gradient_reaches_a_later_position_in_a_causal_host(name: str, reached: list[int]) -> None:
    seed = _grown_from_registry(name, 8, causal=True)
    x = features(SPECS[name], 8).requires_grad_()
    _time_first(name, seed(x))[3].square().sum().backward()
    assert x.grad is not None
    sizes = _time_first(name, x.grad).abs().amax(dim=(1, 2))
    assert (sizes > 0).nonzero().flatten().tolist() == reached


@pytest.mark.parametrize("name", LOOKS_ELSEWHERE)
def test_outside_a_causal_host_a_seed_looks_ahead(name: str) -> None:
    seed = _grown_from_registry(name, 8, causal=False)
    x = features(SPECS[name], 8).requires_grad_()
    _time_first(name, seed(x))[9].square().sum().backward()
    assert x.grad is not None
    reached = (_time_first(name, x.grad).abs().amax(dim=(1, 2)) > 0).nonzero().flatten() - 9
    assert len(reached) == 30 if name.startswith("transformer:") else 0 < max(reached) == -min(reached)


@pytest.mark.parametrize(("causal", "reached"), [(True, [0, 3, 6, 9]), (False, [4, 7, 10, 13])])
def test_an_even_kernel_keeps_the_length_and_looks_farther_back_than_ahead(
    causal: bool, reached: list[int]
) -> None:
    seed = grown(SPECS["signal:depthwise"], 8, kernel=4, dilation=3, causal=causal)
    x = features(SPECS["signal:depthwise"], 8).requires_grad_()
    y = seed(x)
    assert y.shape == x.shape
    (y - x)[:, :, 9].square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().amax(dim=(0, 1)) > 0).nonzero().flatten().tolist() == reached


def test_only_seeds_that_look_at_other_positions_ask_whether_the_host_is_causal() -> None:
    assert [name for name, spec in SPECS.items() if spec.takes_causal] == LOOKS_ELSEWHERE


def test_a_block_of_several_layers_heeds_padding_documents_and_a_cache_in_each_of_them() -> None:
    seed = grown(SPECS["transformer:block"], 8, copies=3, causal=True)
    x = features(SPECS["transformer:block"], 8, batch=2, size=(4, 3))
    whole, store = seed(x), dict[str, Any]()
    pieces = [seed(x[:, start : start + 4], SeedContext(past=start, store=store)) for start in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    real = torch.arange(12) >= torch.tensor([[0], [5]])
    torch.testing.assert_close(seed(x, SeedContext(real=real))[1:, 5:], seed(x[1:, 5:]))
    documents = (torch.arange(12) >= 7).int().expand(2, -1)
    torch.testing.assert_close(seed(x, SeedContext(documents=documents))[:, 7:], seed(x[:, 7:]))
