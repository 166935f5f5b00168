"""Host and seeds are clipped apart, and a seed's NaN, infinity or overflow never costs the host anything."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    COUNTERFACTUAL,
    STRAIGHT_THROUGH,
    causal_host,
    causal_model,
    cnn_host,
    cnn_model,
    gradients,
    grow_to,
    images,
    labels,
    same_tensors,
    tokens,
)
from torch.nn.utils import clip_grad_norm_

from kasmina_core import RampUnit, SeedStage, clip_gradients, drop_nonfinite_seed_gradients, tie_optimizer

every_incubation = pytest.mark.parametrize("incubation", [STRAIGHT_THROUGH, COUNTERFACTUAL], ids=str)


def loss_of(module, scale=1.0):
    return F.cross_entropy(module(images()), labels()) * scale


def backward(model, scale=1.0):
    loss_of(model, scale).backward()
    model.incubate(lambda: loss_of(model, scale))


def trained(stage=SeedStage.TRAINING, slots=("norm", "norm2"), **config):
    model = cnn_model(**config)
    for slot in slots:
        grow_to(model, slot, stage)
    return model


def spoil(model, slot, value=math.nan):
    model.seed_parameters(slot)[0].grad.view(-1)[3] = value


@every_incubation
@pytest.mark.parametrize("norm_type", [2.0, math.inf, 1.0])
@pytest.mark.parametrize("spoiled", [None, math.nan, math.inf, 1e30])
def test_the_hosts_gradient_is_what_torch_makes_of_the_bare_hosts(spoiled, norm_type, incubation):
    bare, model = cnn_host(), trained(incubation=incubation)
    loss_of(bare).backward()
    backward(model)
    if spoiled is not None:
        spoil(model, "norm", spoiled)
    expected = clip_grad_norm_(bare.parameters(), 0.01, norm_type)
    found = clip_gradients(model, 0.01, norm_type=norm_type)
    assert torch.equal(found.host_norm, expected)
    assert same_tensors(gradients(model.host), gradients(bare))
    assert any(bool(p.grad.any()) for p in bare.parameters())


def test_each_seed_is_clipped_by_its_own_norm_to_its_own_limit():
    model = trained()
    backward(model, 100.0)
    before = {slot: [p.grad.clone() for p in model.seed_parameters(slot)] for slot in ("norm", "norm2")}
    found = clip_gradients(model, math.inf, 0.125)
    assert list(found.seed_norms) == ["norm", "norm2"]
    assert found.dropped == ()
    for slot, old in before.items():
        norm = torch.nn.utils.get_total_norm(old)
        assert torch.equal(found.seed_norms[slot], norm)
        for p, gradient in zip(model.seed_parameters(slot), old, strict=True):
            torch.testing.assert_close(p.grad, gradient * 0.125 / norm)


def test_seeds_have_the_hosts_limit_if_they_get_none():
    model = trained(slots=("norm",))
    backward(model, 100.0)
    clip_gradients(model, 0.25)
    for parameters in (model.host_parameters(), model.seed_parameters()):
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        assert norm == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_seed_whose_gradient_is_not_finite_sits_the_step_out_and_that_is_said(value):
    model = trained()
    optimizer = tie_optimizer(model, torch.optim.AdamW(model.host_parameters(), 0.01))
    backward(model)
    spoil(model, "norm", value)
    found = clip_gradients(model, 1.0)
    assert found.dropped == ("norm",)
    assert not found.seed_norms["norm"].isfinite()
    before = [[p.clone() for p in model.seed_parameters(slot)] for slot in ("norm", "norm2")]
    model.step()
    optimizer.step()
    assert all(map(torch.equal, before[0], model.seed_parameters("norm")))
    assert not any(map(torch.equal, before[1], model.seed_parameters("norm2")))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not any(p in optimizer.state for p in model.seed_parameters("norm"))


def test_a_model_without_gradients_or_seeds_is_clipped_like_its_host():
    model = cnn_model()
    assert clip_gradients(model, 1.0).host_norm == 0.0
    backward(model)
    assert clip_gradients(model, 1.0).seed_norms == {}
    assert drop_nonfinite_seed_gradients(model) == ()


def test_a_host_that_is_not_finite_is_treated_as_torch_treats_it():
    model, bare = trained(), cnn_host()
    for module in (model.host, bare):
        loss_of(module).backward()
        module.head.weight.grad[0, 0] = math.inf
    seeds = [p.grad for p in model.seed_parameters()]
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_gradients(model, 1.0, error_if_nonfinite=True)
    assert same_tensors([p.grad for p in model.seed_parameters()], seeds)
    clip_gradients(model, 1.0)
    clip_grad_norm_(bare.parameters(), 1.0)
    assert same_tensors(gradients(model.host), gradients(bare))


# GradScaler


def scaled_run(model, steps, *, drop, spoil_at=-1, slots=(), optimizers=None):
    """Train with a scaler; what its scale was at each step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    if optimizers is None:
        optimizers = [tie_optimizer(model, torch.optim.SGD(model.host_parameters(), 0.1, momentum=0.9))]
    scales = []
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        scaler.scale(loss).backward()
        model.incubate(lambda: loss_of(model), scaler)
        if step == spoil_at:
            for slot in slots:
                spoil(model, slot, math.inf)
        dropped = drop_nonfinite_seed_gradients(model) if drop else ()
        assert dropped == (tuple(slots) if drop and step == spoil_at else ())
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        clip_gradients(model, 1.0)
        model.step()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@every_incubation
def test_with_a_scaler_a_seeds_overflow_changes_neither_the_host_nor_the_scale(incubation):
    model, bare = trained(slots=("norm",), incubation=incubation), cnn_model(incubation=incubation)
    scales = scaled_run(model, 6, drop=True, spoil_at=2, slots=("norm",))
    assert scales == scaled_run(bare, 6, drop=True)
    assert len(set(scales)) > 1
    assert same_tensors(dict(model.host.state_dict()), dict(bare.host.state_dict()))


def test_without_dropping_first_the_host_loses_its_step_and_the_scale_falls():
    model, bare = trained(slots=("norm",)), cnn_model()
    assert scaled_run(model, 3, drop=False, spoil_at=2, slots=("norm",))[-1] == 2.0**9
    assert scaled_run(bare, 3, drop=False)[-1] == 2.0**11
    assert not same_tensors(dict(model.host.state_dict()), dict(bare.host.state_dict()))


def test_with_an_optimiser_for_each_side_the_host_steps_though_the_scale_falls():
    model, bare = trained(slots=("norm",)), cnn_model()
    sides = [torch.optim.SGD(p, 0.1) for p in (model.host_parameters(), model.seed_parameters())]
    scales = scaled_run(model, 3, drop=False, spoil_at=2, slots=("norm",), optimizers=sides)
    assert scales[-1] == 2.0**9
    scaled_run(bare, 3, drop=False, optimizers=[torch.optim.SGD(bare.host_parameters(), 0.1)])
    assert same_tensors(dict(model.host.state_dict()), dict(bare.host.state_dict()))


def test_a_scaled_gradient_whose_squares_overflow_is_not_dropped():
    model = trained(slots=("norm",))
    backward(model)
    for p in model.seed_parameters():
        p.grad.fill_(1e30)
    assert drop_nonfinite_seed_gradients(model) == ()
    assert all(p.grad is not None for p in model.seed_parameters())


@every_incubation
def test_the_scalers_scale_is_in_the_seeds_gradient_as_in_the_hosts(incubation):
    plain, model = (
        trained(slots=("norm",), incubation=incubation),
        trained(slots=("norm",), incubation=incubation),
    )
    backward(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(loss_of(model)).backward()
    model.incubate(lambda: loss_of(model), scaler)
    optimizer = tie_optimizer(model, torch.optim.SGD(model.host_parameters(), 0.1))
    scaler.unscale_(optimizer)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient)


# Accumulation


@every_incubation
def test_accumulated_micro_batches_give_the_gradients_of_the_whole_batch(incubation):
    def grown():
        model = causal_model(causal_host(), incubation=incubation)
        grow_to(model, "blocks.0", SeedStage.TRAINING, "mlp")
        return model

    def loss(model, x):
        return F.cross_entropy(model(x)[:, :-1].mT, x[:, 1:])

    whole, parts, batch = grown(), grown(), tokens(6)
    loss(whole, batch).backward()
    whole.incubate(lambda: loss(whole, batch))
    for micro in batch.split(2):
        (loss(parts, micro) / 3).backward()
        parts.incubate(lambda micro=micro: loss(parts, micro) / 3)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], gradient, rtol=1e-4, atol=1e-7)
    assert all(bool(p.grad.any()) for p in parts.seed_parameters())


def test_a_ramp_by_steps_counts_optimiser_steps_and_not_micro_batches():
    model = cnn_model(ramp_unit=RampUnit.STEP, ramp_steps=4)
    slot = grow_to(model, "norm", SeedStage.BLENDING, alpha=0.0)
    optimizer = tie_optimizer(model, torch.optim.SGD(model.host_parameters(), 0.1))
    for _ in range(4):
        for _ in range(3):
            (loss_of(model) / 3).backward()
        clip_gradients(model, 1.0)
        model.step()
        optimizer.step()
        optimizer.zero_grad()
    assert slot.alpha == 1.0
