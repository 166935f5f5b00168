"""In a causal host a seed does not see what comes after a position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_cases import SPECS, features
from torch import nn

from kasmina_core import BlueprintRegistry
from kasmina_core.testing.seeds import DTYPES, grown


def _grown_from_registry(name: str, dim: int, causal: bool) -> nn.Module:
    """A seed made the way a slot makes it, every parameter moved."""
    registry = BlueprintRegistry()
    registry.register(SPECS[name], pack="sequence")
    seed = registry.create(name, dim, causal=causal)
    seed.load_state_dict(grown(SPECS[name], dim).state_dict())
    return seed


@pytest.mark.parametrize("name", list(SPECS))
@settings(max_examples=15)
@given(dim=st.integers(2, 40), cut=st.integers(1, 11), dtype=st.sampled_from(DTYPES))
def test_earlier_outputs_are_bit_equal_when_later_inputs_change(
    name: str, dim: int, cut: int, dtype: torch.dtype
) -> None:
    seed = _grown_from_registry(name, dim, causal=True).to(dtype)
    x = features(dim).to(dtype)
    changed = x.clone()
    changed[:, cut:] = features(dim, seed=7).to(dtype)[:, cut:]
    before, after = seed(x), seed(changed)
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut:], after[:, cut:])


def test_earlier_outputs_do_not_depend_on_how_long_the_sequence_is() -> None:
    seed = _grown_from_registry("gau", 8, causal=True)
    x = features(8)
    torch.testing.assert_close(seed(x)[:, :5], seed(x[:, :5]))


def test_no_gradient_reaches_a_later_position_in_a_causal_host() -> None:
    seed = _grown_from_registry("gau", 8, causal=True)
    x = features(8).requires_grad_()
    seed(x)[:, 3].square().sum().backward()
    assert x.grad is not None
    reached = x.grad.abs().amax(dim=(0, 2)) > 0
    assert reached.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_gau_outside_a_causal_host_sees_every_position() -> None:
    seed = _grown_from_registry("gau", 8, causal=False)
    x = features(8)
    changed = x.clone()
    changed[:, -1] = -x[:, -1]
    assert (seed(x)[:, :-1] != seed(changed)[:, :-1]).any(dim=2).all()


def test_only_gau_asks_whether_the_host_is_causal() -> None:
    assert [name for name, spec in SPECS.items() if spec.takes_causal] == ["gau"]
