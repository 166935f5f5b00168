"""The ramp, the blend, and a host that goes on learning when the blend is complete."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric_helpers import (
    ACTIVE_STAGES,
    CNN_SLOTS,
    causal_model,
    cnn_model,
    grow_to,
    images,
    labels,
    scramble,
    tokens,
)
from torch import Tensor, nn

from kasmina_core import (
    AlphaSchedule,
    CheckpointError,
    ForwardMode,
    GrowthConfig,
    MorphogeneticModel,
    RampUnit,
    SeedShapeError,
    SeedStage,
    Topology,
    TransitionError,
    blend_with_isolation,
)
from kasmina_core.blending import LARGEST_STEEPNESS

# -- the schedule --------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw: st.DrawFn) -> AlphaSchedule:
    total = draw(st.integers(1, 400))
    start, end = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    steepness = draw(st.none() | st.floats(0.1, LARGEST_STEEPNESS * 0.999))
    return AlphaSchedule(total, start, end, None if steepness is None else total / steepness)


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_ramp_has_exact_ends_is_monotone_and_takes_no_large_step(ramp: AlphaSchedule) -> None:
    alphas = [ramp(step) for step in range(-2, ramp.total_steps + 3)]
    assert alphas[:3] == [ramp.start] * 3
    assert alphas[-3:] == [ramp.end] * 3
    steps = [b - a for a, b in itertools.pairwise(alphas)]
    assert min(steps) >= 0.0
    # The slope in the middle of a normalised sigmoid of temperature T over n steps is 1 / (4 T tanh(n / 4T)).
    n, width = ramp.total_steps, ramp.temperature
    slope = (ramp.end - ramp.start) / (4 * width * math.tanh(n / (4 * width)))
    assert max(steps) <= slope + 1e-12
    assert max(steps) <= 6.1 / n


@pytest.mark.parametrize(("start", "end"), [(0.2, 0.9), (0.3, 0.9), (0.0, 1.0)])
def test_ramp_ends_at_exactly_the_end_whatever_rounding_does(start: float, end: float) -> None:
    ramp = AlphaSchedule(7, start, end)
    assert (ramp(0), ramp(7), ramp(8)) == (start, end, end)


@given(st.integers(1, 5000))
def test_default_ramp_takes_no_step_above_three_over_its_length(total: int) -> None:
    ramp, middle = AlphaSchedule(total), total // 2
    near = range(max(0, middle - 2), min(total, middle + 3))
    assert max(ramp(step + 1) - ramp(step) for step in near) <= 3.1 / total


@given(st.integers(2, 300))
def test_ramp_is_symmetric(total: int) -> None:
    ramp = AlphaSchedule(total)
    for step in range(total + 1):
        assert ramp(step) + ramp(total - step) == pytest.approx(1.0, abs=1e-12)


@settings(deadline=None)
@given(schedules(), st.floats(0, 1))
def test_first_step_reaching_an_alpha_is_the_first(ramp: AlphaSchedule, alpha: float) -> None:
    step = ramp.first_step_reaching(alpha)
    assert 0 <= step <= ramp.total_steps
    assert ramp(step) >= alpha or step == ramp.total_steps
    assert step == 0 or ramp(step - 1) < alpha


@given(schedules())
def test_ramp_survives_plain_data(ramp: AlphaSchedule) -> None:
    again = AlphaSchedule.from_dict(ramp.to_dict())
    assert again == ramp
    assert hash(again) == hash(ramp)
    assert [again(step) for step in range(5)] == [ramp(step) for step in range(5)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"total_steps": 0}, "at least 1, not 0"),
        ({"total_steps": 2.5}, "at least 1, not 2.5"),
        ({"total_steps": True}, "at least 1, not True"),
        ({"total_steps": 5, "start": 0.6, "end": 0.4}, "start=0.6, end=0.4"),
        ({"total_steps": 5, "end": 1.5}, "start=0.0, end=1.5"),
        ({"total_steps": 5, "start": math.nan}, "start=nan"),
        (
            {"total_steps": 48, "temperature": 1.0},
            r"temperature=1.0 makes the ramp of 48 steps a jump.\n  smallest: 2 ",
        ),
        ({"total_steps": 5, "temperature": math.nan}, "temperature=nan"),
        ({"total_steps": 5, "temperature": math.inf}, "temperature=inf"),
        ({"total_steps": 5, "temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_impossible_ramp_is_refused_with_its_values(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AlphaSchedule(**arguments)
    with pytest.raises(CheckpointError, match=words):
        AlphaSchedule.from_dict(arguments)


# -- the ramp in a slot --------------------------------------------------------------------------------------------


def test_ramp_per_epoch_moves_the_blend_through_a_real_slot() -> None:
    model = cnn_model(ramp_steps=4)
    slot = grow_to(model, "norm", SeedStage.BLENDING, alpha=0.0)
    features, ramp = torch.randn(2, 4, 3, 3), AlphaSchedule(4)
    for step in range(4):
        assert slot.stage is SeedStage.BLENDING
        assert slot.alpha == ramp(step)
        slot(features).sum().backward()
        model.step()  # optimiser steps do not move it
        expected = torch.lerp(features, slot.seed(features), ramp(step))
        torch.testing.assert_close(slot(features), expected)
        model.step_epoch()
    assert slot.alpha == 1.0
    assert slot.stage is SeedStage.SHADOWING
    assert torch.equal(slot(features), slot.seed(features))


def test_ramp_per_optimiser_step_moves_alpha_and_epochs_do_not() -> None:
    model = cnn_model(ramp_steps=6, ramp_unit=RampUnit.STEP)
    slot = grow_to(model, "norm", SeedStage.BLENDING, alpha=0.0)
    ramp = AlphaSchedule(6)
    for step in range(6):
        assert slot.alpha == ramp(step)
        assert slot.state.metrics.ramp_progress == step / 6
        model.step_epoch()
        assert slot.alpha == ramp(step)
        assert slot.stage is SeedStage.BLENDING
        slot(torch.randn(2, 4, 3, 3)).sum().backward()
        model.step()
    assert slot.alpha == 1.0
    model.step()
    assert slot.alpha == 1.0
    model.step_epoch()
    assert slot.stage is SeedStage.SHADOWING


def test_ramp_goes_on_from_an_alpha_set_by_hand_and_never_falls() -> None:
    model = cnn_model(ramp_steps=10)
    slot = grow_to(model, "norm", SeedStage.BLENDING, alpha=0.4)
    alphas = [slot.alpha]
    while slot.stage is SeedStage.BLENDING:
        model.step_epoch()
        alphas.append(slot.alpha)
    assert alphas[0] == 0.4
    assert alphas == sorted(alphas)
    assert alphas[-1] == 1.0


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, "half", None])
def test_alpha_set_by_hand_must_lie_between_zero_and_one(alpha: Any) -> None:
    slot = grow_to(cnn_model(), "norm", SeedStage.BLENDING, alpha=0.25)
    with pytest.raises(ValueError, match=rf"\[0, 1\], not {alpha!r}"):
        slot.set_alpha(alpha)
    assert slot.alpha == 0.25


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.SHADOWING, SeedStage.FOSSILIZED], ids=str)
def test_alpha_cannot_be_set_outside_blending(stage: SeedStage) -> None:
    slot = grow_to(cnn_model(), "norm", stage)
    with pytest.raises(TransitionError, match=f"cannot be set in {stage.name}"):
        slot.set_alpha(0.5)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_alpha_zero_keeps_out_a_seed_that_is_not_finite(poison: float) -> None:
    slot = grow_to(cnn_model(), "norm", SeedStage.BLENDING, alpha=0.0)
    for p in slot.seed_parameters():
        p.data.fill_(poison)
    features = torch.randn(2, 4, 3, 3)
    for training in (True, False):
        assert torch.equal(slot.train(training)(features), features)


# -- the blend -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_blend_is_the_weighted_mean(alpha: float, as_tensor: bool) -> None:
    host, seed = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    blended = blend_with_isolation(host, seed, torch.tensor(alpha) if as_tensor else alpha)
    torch.testing.assert_close(blended, (1 - alpha) * host + alpha * seed)
    if alpha in (0.0, 1.0):
        assert torch.equal(blended, seed if alpha else host)


@pytest.mark.parametrize(("alpha", "clamped"), [(-3.0, 0.0), (7.0, 1.0)])
def test_blend_clamps_alpha(alpha: float, clamped: float) -> None:
    host, seed = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = blend_with_isolation(host, seed, clamped)
    assert torch.equal(blend_with_isolation(host, seed, alpha), expected)
    assert torch.equal(blend_with_isolation(host, seed, torch.tensor(alpha)), expected)


def test_blend_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(SeedShapeError, match=r"host: \(2, 3, 4\)\n  seed: \(1, 3, 4\)"):
        blend_with_isolation(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4), 0.5)


def test_blend_shares_the_gradient_by_alpha() -> None:
    host, seed = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    blend_with_isolation(host, seed, 0.25).sum().backward()
    torch.testing.assert_close(host.grad, torch.full_like(host, 0.75))
    torch.testing.assert_close(seed.grad, torch.full_like(seed, 0.25))


def test_detached_host_path_gets_no_gradient() -> None:
    host, seed = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    blended = blend_with_isolation(host, seed, 0.25, detach_host=True)
    torch.testing.assert_close(blended, blend_with_isolation(host, seed, 0.25))
    blended.sum().backward()
    assert host.grad is None
    torch.testing.assert_close(seed.grad, torch.full_like(seed, 0.25))


@pytest.mark.parametrize("detached", [True, False])
def test_gradient_policy_decides_whether_the_host_learns_through_a_blending_seed(detached: bool) -> None:
    policies = {Topology.CNN: type(GrowthConfig().gradient_policies[Topology.CNN])(detached)}
    slot = grow_to(cnn_model(gradient_policies=policies), "norm", SeedStage.BLENDING, alpha=0.25)
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    slot(features).sum().backward()
    own = torch.full_like(features, 0.75)
    (through_seed,) = torch.autograd.grad(0.25 * slot.seed(features).sum(), features)
    torch.testing.assert_close(features.grad, own if detached else own + through_seed)


def test_default_policies_detach_for_cnn_and_attach_for_transformers() -> None:
    policies = GrowthConfig().gradient_policies
    assert policies[Topology.CNN].detach_input_in_blending
    assert not policies[Topology.TRANSFORMER].detach_input_in_blending


def test_a_policy_that_is_left_out_is_that_of_the_topology() -> None:
    slot = grow_to(cnn_model(gradient_policies={}), "norm", SeedStage.BLENDING, alpha=0.25)
    assert slot.mode == ForwardMode.BLEND_DETACHED


# -- the host goes on learning -------------------------------------------------------------------------------------

CONTRIBUTING = [SeedStage.BLENDING, *ACTIVE_STAGES[2:]]


def without_gradient(model: nn.Module, loss: Tensor) -> list[str]:
    """Names of trainable parameters that the loss does not reach, or reaches with an all-zero gradient."""
    model.zero_grad()
    loss.backward()
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not bool(p.grad.any()))
    ]


def cnn_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(images(16)), labels(16))


def causal_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(tokens(16))[:, :-1].mT, tokens(16)[:, 1:])


@pytest.mark.parametrize("stage", CONTRIBUTING, ids=lambda s: s.name)
def test_every_parameter_of_a_cnn_learns_when_the_seed_contributes(stage: SeedStage) -> None:
    model = cnn_model()
    scramble(grow_to(model, "norm", stage, alpha=0.5).seed)
    assert without_gradient(model, cnn_loss(model)) == []


@pytest.mark.parametrize("stage", CONTRIBUTING, ids=lambda s: s.name)
def test_every_parameter_of_a_transformer_learns_when_the_seed_contributes(stage: SeedStage) -> None:
    model = causal_model()
    scramble(grow_to(model, "blocks.0", stage, "mlp", alpha=0.5).seed)
    assert without_gradient(model, causal_loss(model)) == []


def test_every_parameter_learns_behind_and_before_three_fossils_in_a_row() -> None:
    model = cnn_model()
    for slot in CNN_SLOTS:
        scramble(grow_to(model, slot, SeedStage.FOSSILIZED).seed, std=0.1)
    assert without_gradient(model, cnn_loss(model)) == []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_blend_with_a_detached_host_would_starve_everything_upstream() -> None:
    model: MorphogeneticModel = cnn_model()
    slot = grow_to(model, "norm", SeedStage.SHADOWING)
    slot.forward = lambda x: blend_with_isolation(x, slot.seed(x.detach()), 1.0, detach_host=True)
    starved = without_gradient(model, cnn_loss(model))
    assert starved == ["host.stem.weight", "host.norm.weight", "host.norm.bias"]
