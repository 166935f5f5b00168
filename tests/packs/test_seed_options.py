"""The options of the bundled seeds: what they change, and what is said of values that cannot be used."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kasmina_layers.sizes import group_count, waist_width
from kasmina_transformer import sizes as transformer_sizes
from pack_cases import SPECS, every_blueprint

from kasmina_core import BlueprintError, BlueprintRegistry, BlueprintSpec
from kasmina_core.testing.seeds import features, grown, newborn


def _count(name: str, dim: int, **options: Any) -> int:
    return sum(parameter.numel() for parameter in newborn(SPECS[name], dim, **options).parameters())


@pytest.mark.parametrize(
    ("name", "options", "params"),
    [
        ("cnn:attention", {"reduction": 2}, 2 * 64 * 32 + 32 + 64),
        ("cnn:attention", {"reduction": 64}, 2 * 64 * 4 + 4 + 64),
        ("cnn:block", {"copies": 3}, 3 * (18 * 64 * 64 + 5 * 64)),
        ("cnn:bottleneck", {"reduction": 2}, 2 * 64 * 32 + 9 * 32 * 32 + 4 * 32 + 64),
        ("signal:bottleneck", {"reduction": 2}, 2 * 64 * 32 + 32 + 64),
        ("signal:conv", {"kernel": 2, "dilation": 5}, 3 * 64 * 64 + 3 * 64),
        ("signal:depthwise", {"kernel": 31}, 64 * 64 + 34 * 64),
        ("signal:dilated", {"kernel": 1}, 3 * 64 * 64 + 3 * 64),
        ("transformer:block", {"copies": 3}, 3 * (12 * 64 * 64 + 10 * 64)),
        ("transformer:block", {"expansion": 2}, 8 * 64 * 64 + 8 * 64),
        ("transformer:lora", {"rank": 3}, 2 * 64 * 3),
        ("transformer:lora", {"rank": 64}, 2 * 64 * 64),
        ("transformer:mlp", {"expansion": 1}, 2 * 64 * 64 + 4 * 64),
        ("vector:bottleneck", {"reduction": 2}, 2 * 64 * 32 + 32 + 64),
        ("vector:mlp", {"expansion": 1}, 2 * 64 * 64 + 4 * 64),
        ("volume:bottleneck", {"reduction": 2}, 2 * 64 * 32 + 27 * 32 * 32 + 4 * 32 + 64),
    ],
)
def test_an_option_sets_the_size(name: str, options: dict[str, Any], params: int) -> None:
    assert _count(name, 64, **options) == params


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cnn:attention", {"reduction": 1}),
        ("cnn:block", {"copies": 3}),
        ("cnn:bottleneck", {"reduction": 1}),
        ("signal:conv", {"kernel": 4, "dilation": 3}),
        ("signal:depthwise", {"kernel": 2, "causal": True}),
        ("signal:dilated", {"kernel": 40}),  # longer than the signal
        ("transformer:attention", {"heads": 1}),
        ("transformer:attention", {"heads": 12}),
        ("transformer:attention", {"causal": True}),
        ("transformer:block", {"copies": 3, "causal": True}),
        ("transformer:block", {"heads": 12, "expansion": 1}),
        ("transformer:lora", {"rank": 1}),
        ("transformer:mlp", {"expansion": 2}),
    ],
)
def test_with_options_too_a_seed_starts_as_the_identity_and_then_does_something(
    name: str, options: dict[str, Any]
) -> None:
    x = features(SPECS[name], 12)
    assert torch.equal(newborn(SPECS[name], 12, **options)(x), x)
    y = grown(SPECS[name], 12, **options)(x)
    assert y.shape == x.shape
    assert (y - x).abs().max() > 0.01


def test_heads_change_the_result_and_not_the_size() -> None:
    spec = SPECS["transformer:attention"]
    assert _count("transformer:attention", 12, heads=1) == _count("transformer:attention", 12, heads=3)
    x = features(spec, 12)
    assert not torch.allclose(grown(spec, 12, heads=1)(x), grown(spec, 12, heads=3)(x))


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("cnn:attention", "reduction"),
        ("cnn:block", "copies"),
        ("cnn:bottleneck", "reduction"),
        ("signal:bottleneck", "reduction"),
        ("signal:conv", "dilation"),
        ("signal:conv", "kernel"),
        ("signal:dilated", "dilation"),
        ("signal:dilated", "kernel"),
        ("transformer:attention", "heads"),
        ("transformer:block", "copies"),
        ("transformer:block", "expansion"),
        ("transformer:block", "heads"),
        ("transformer:lora", "rank"),
        ("transformer:mlp", "expansion"),
    ],
)
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "4"])
def test_an_option_that_is_no_positive_number_is_refused_with_both_values(
    name: str, option: str, value: object
) -> None:
    short = name.partition(":")[2]
    message = rf"Blueprint '{short}'.*given: +{option}={re.escape(repr(value))}\n.*1 or more\nGive {option}="
    with pytest.raises(ValueError, match=f"(?s){message}"):
        SPECS[name].load_factory()(8, **{option: value})


@every_blueprint
@pytest.mark.parametrize("dim", [0, -1, 8.0, None])
def test_a_width_that_is_no_positive_number_is_refused(spec: BlueprintSpec, dim: object) -> None:
    name = "conv_light" if spec.name == "conv_enhance" else spec.name  # the same module
    with pytest.raises(ValueError, match=rf"'{name}'(?s:.*)given: +dim={dim!r}"):
        spec.load_factory()(dim)


@pytest.mark.parametrize("name", ["attention", "block"])
def test_heads_that_do_not_divide_the_width_are_refused_with_the_numbers_that_do(name: str) -> None:
    message = rf"'{name}'(?s:.*)heads: 5\n +dim: 12\nGive heads as one of 1, 2, 3, 4, 6, 12\."
    with pytest.raises(ValueError, match=message):
        newborn(SPECS[f"transformer:{name}"], 12, heads=5)


@pytest.mark.parametrize("name", ["cnn:block", "transformer:block"])
def test_every_copy_of_a_block_learns_from_the_first_step_and_all_of_it_from_the_second(name: str) -> None:
    seed, x = newborn(SPECS[name], 8, copies=3), features(SPECS[name], 8)
    optimizer = torch.optim.SGD(seed.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        before = {key: parameter.detach().clone() for key, parameter in seed.named_parameters()}
        optimizer.zero_grad()
        (seed(x) - x.roll(1, dims=1)).square().mean().backward()
        optimizer.step()
        moved.append({key for key, p in seed.named_parameters() if not torch.equal(p, before[key])})
    last = {key for key, p in before.items() if ".second." in key or ".out." in key or ".contract." in key}
    assert moved == [last, set(before)]
    assert {key.split(".")[1] for key in last} == {"0", "1", "2"}


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank: 9\n +dim: +8\nGive a rank from 1 to 8"):
        newborn(SPECS["transformer:lora"], 8, rank=9)


def test_the_registry_hands_on_what_a_seed_says_of_an_option() -> None:
    registry = BlueprintRegistry()
    registry.register(SPECS["transformer:attention"], pack="transformer")
    with pytest.raises(
        BlueprintError, match=r"'transformer:attention' could not be built at width 12(?s:.*)heads: 5"
    ):
        registry.create("attention", 12, causal=True, options={"heads": 5})


@settings(deadline=None)
@given(st.integers(1, 4096))
def test_groups_divide_the_channels_and_are_the_most_that_leave_four_channels_each(channels: int) -> None:
    groups = group_count(channels)
    fitting = [g for g in range(1, 9) if channels % g == 0 and channels // g >= 4]
    assert groups == max(fitting, default=1)


@settings(deadline=None)
@given(st.integers(1, 4096))
def test_default_heads_divide_the_width_and_are_the_most_up_to_four(dim: int) -> None:
    assert transformer_sizes.default_heads(dim) == max(h for h in (1, 2, 3, 4) if dim % h == 0)


@settings(deadline=None)
@given(st.integers(1, 4096), st.integers(1, 64))
def test_a_waist_is_never_wider_than_the_features_nor_needlessly_narrow(dim: int, reduction: int) -> None:
    waist = waist_width(dim, reduction)
    assert min(4, dim) <= waist <= dim
    assert waist == dim // reduction or waist == min(4, dim)
