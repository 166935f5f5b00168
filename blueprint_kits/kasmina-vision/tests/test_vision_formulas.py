"""Each seed compared with its formula written out plainly, and with what its options change."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kasmina_vision import sizes
from torch import Tensor, nn
from vision_cases import SPECS, features

from kasmina_core.testing.seeds import grown, newborn


def _linear(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.T + layer.bias


def test_eca_gates_each_channel_by_the_means_of_its_neighbours() -> None:
    seed: Any = grown(SPECS["eca"], 8)
    x = features(8)
    (w,) = seed.mix.weight[0]
    for i in range(8):
        near = [x[:, j].mean((1, 2)) if 0 <= j < 8 else torch.zeros(4) for j in (i - 1, i, i + 1)]
        z = sum(a * b for a, b in zip(w, near, strict=True))
        gate = 2 * torch.sigmoid(2 * z)  # the paper's gate, from (0, 1) to (0, 2)
        torch.testing.assert_close(seed(x)[:, i], x[:, i] * gate[:, None, None])


def test_cbam_gates_channels_by_mean_and_peak_and_then_pixels() -> None:
    seed: Any = grown(SPECS["cbam"], 8)
    x = features(8)
    hidden = [F.silu(_linear(v, seed.squeeze)) for v in (x.mean((2, 3)), x.flatten(2).max(2).values)]
    u = x * 2 * torch.sigmoid(2 * _linear(hidden[0] + hidden[1], seed.excite))[:, :, None, None]
    padded = F.pad(torch.stack([u.mean(1), u.max(1).values], 1), (3, 3, 3, 3))
    y = seed(x)
    for row, column in ((0, 0), (2, 3), (5, 4)):
        seen = padded[:, :, row : row + 7, column : column + 7]
        z = (seen * seed.spatial.weight).sum((1, 2, 3)) + seed.spatial.bias
        at = (slice(None), slice(None), row, column)
        torch.testing.assert_close(y[at], u[at] * 2 * torch.sigmoid(2 * z)[:, None])


def test_convnext_is_a_kernel_per_channel_and_a_network_per_pixel() -> None:
    seed: Any = grown(SPECS["convnext"], 6)
    x = features(6)
    padded = F.pad(x, (3, 3, 3, 3))
    y = seed(x)
    for row, column in ((0, 0), (3, 2)):
        seen = padded[:, :, row : row + 7, column : column + 7]
        pixel = (seen * seed.depthwise.weight[:, 0]).sum((2, 3)) + seed.depthwise.bias  # (b, c)
        centred = pixel - pixel.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        hidden = F.gelu(_linear(normed * seed.norm.weight + seed.norm.bias, seed.expand))
        branch = seed.scale * _linear(hidden, seed.contract)
        torch.testing.assert_close(y[:, :, row, column], x[:, :, row, column] + branch)


def test_inverted_residual_widens_filters_and_narrows() -> None:
    seed: Any = grown(SPECS["inverted_residual"], 4, expansion=2)
    x = features(4)

    def norm(v: Tensor, layer: Any) -> Tensor:
        groups = v.unflatten(1, (2, 4))  # eight channels in two groups
        variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
        scaled = ((groups - mean) / (variance + layer.eps).sqrt()).flatten(1, 2)
        return scaled * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

    wide = torch.einsum("oi,bihw->bohw", seed.widen.weight[:, :, 0, 0], x)
    wide = F.silu(norm(wide, seed.widen_norm))
    channels = [F.conv2d(wide[:, i : i + 1], seed.depthwise.weight[i : i + 1], padding=1) for i in range(8)]
    wide = F.silu(norm(torch.cat(channels, 1), seed.depthwise_norm))
    branch = torch.einsum("oi,bihw->bohw", seed.narrow.weight[:, :, 0, 0], wide)
    torch.testing.assert_close(seed(x), x + branch + seed.narrow.bias.view(-1, 1, 1))


# Options


def _count(name: str, dim: int, **options: Any) -> int:
    return sum(parameter.numel() for parameter in newborn(SPECS[name], dim, **options).parameters())


@pytest.mark.parametrize(
    ("name", "options", "params"),
    [
        ("cbam", {"reduction": 2}, 2 * 64 * 32 + 32 + 64 + 99),
        ("cbam", {"reduction": 64}, 2 * 64 * 4 + 4 + 64 + 99),
        ("convnext", {"kernel_size": 3}, 8 * 64**2 + 18 * 64),
        ("convnext", {"expansion": 1}, 2 * 64**2 + 55 * 64),
        ("eca", {"kernel_size": 9}, 9),
        ("inverted_residual", {"expansion": 1}, 2 * 64**2 + 14 * 64),
    ],
)
def test_an_option_sets_the_size(name: str, options: dict[str, Any], params: int) -> None:
    assert _count(name, 64, **options) == params


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cbam", {"reduction": 1}),
        ("convnext", {"kernel_size": 1, "expansion": 2}),
        ("convnext", {"kernel_size": 9}),
        ("eca", {"kernel_size": 1}),
        ("eca", {"kernel_size": 31}),
        ("inverted_residual", {"expansion": 1}),
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
    ("name", "option"),
    [("cbam", "reduction"), ("convnext", "expansion"), ("inverted_residual", "expansion")],
)
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "4"])
def test_an_option_that_is_no_positive_number_is_refused_with_both_values(
    name: str, option: str, value: object
) -> None:
    message = rf"Blueprint '{name}'.*given: +{option}={re.escape(repr(value))}\n.*1 or more\nGive {option}="
    with pytest.raises(ValueError, match=f"(?s){message}"):
        SPECS[name].load_factory()(8, **{option: value})


@pytest.mark.parametrize("name", ["convnext", "eca"])
@pytest.mark.parametrize("value", [0, 4, -1, 3.0, True])
def test_a_kernel_that_is_not_odd_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"'{name}'(?s:.*)given: +kernel_size={value!r}\n.*odd"):
        SPECS[name].load_factory()(8, kernel_size=value)


def test_inverted_residual_of_a_single_channel_must_widen_it() -> None:
    seed = newborn(SPECS["inverted_residual"], 1, expansion=2)
    assert isinstance(seed, nn.Module)
    with pytest.raises(ValueError, match=r"given: +expansion=1\n.*2 or more"):
        newborn(SPECS["inverted_residual"], 1, expansion=1)


@given(st.integers(3, 4096))
def test_declared_sizes_are_the_documented_formulas(c: int) -> None:
    m = min(c, max(4, c // 16))
    assert SPECS["cbam"].declared_params(c) == 2 * c * m + m + c + 99
    assert SPECS["convnext"].declared_params(c) == 8 * c**2 + 58 * c
    assert SPECS["eca"].declared_params(c) == (1 if c < 8 else 3 if c < 128 else 5 if c < 2048 else 7)
    assert SPECS["inverted_residual"].declared_params(c) == 12 * c**2 + 79 * c


@given(st.integers(1, 4096))
def test_groups_divide_the_channels_and_are_the_most_that_leave_four_channels_each(channels: int) -> None:
    fitting = [g for g in range(1, 9) if channels % g == 0 and channels // g >= 4]
    assert sizes.group_count(channels) == max(fitting, default=1)


@given(st.integers(1, 4096))
def test_eca_kernel_is_the_papers(dim: int) -> None:
    t = int(abs(torch.tensor(dim, dtype=torch.float64).log2().item() + 1) / 2)
    assert sizes.eca_kernel_size(dim) == (t if t % 2 else t + 1)
