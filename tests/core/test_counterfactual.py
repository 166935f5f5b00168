"""The counterfactual pass gives a gradient to the seed, the right one, and touches nothing else."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    CNN_SLOTS,
    COUNTERFACTUAL,
    ConvSeed,
    cnn_host,
    cnn_model,
    gradients,
    grow_to,
    images,
    labels,
    registry,
    same_tensors,
    scramble,
    snapshot,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kasmina_core import MorphogeneticModel, SeedStage


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(images()), labels())


def incubating(*slots: str, blueprint: str = "conv", **keywords: object) -> MorphogeneticModel:
    model = cnn_model(incubation=COUNTERFACTUAL, **keywords)
    for slot in slots:
        grow_to(model, slot, SeedStage.TRAINING, blueprint)
    return model


def test_gradient_is_that_of_the_host_with_the_seed_written_into_it() -> None:
    model = incubating("norm")
    seed = model.slots["norm"].seed
    scramble(seed)
    losses = model.incubate(lambda: loss_of(model))
    by_hand = cnn_host().eval()
    written_in = copy.deepcopy(seed)
    by_hand.norm.register_forward_hook(lambda _m, _a, features: written_in(features))
    written_in.zero_grad()
    expected = loss_of(by_hand)
    expected.backward()
    assert torch.equal(losses["norm"], expected)
    assert not losses["norm"].requires_grad
    assert same_tensors(gradients(seed), gradients(written_in))


def test_gradient_goes_to_the_seed_and_nowhere_else() -> None:
    model = incubating("norm")
    model.incubate(lambda: loss_of(model))
    assert all(g is None for g in gradients(model.host).values())
    assert all(bool(g.any()) for g in gradients(model.slots["norm"].seed).values())


def test_gradient_adds_to_what_is_there_and_keeps_the_host_gradient() -> None:
    model = incubating("norm")
    loss_of(model).backward()
    host_gradient = copy.deepcopy(gradients(model.host))
    model.incubate(lambda: loss_of(model))
    once = copy.deepcopy(gradients(model.slots["norm"].seed))
    model.incubate(lambda: loss_of(model))
    for name, gradient in gradients(model.slots["norm"].seed).items():
        torch.testing.assert_close(gradient, 2 * once[name])
    assert same_tensors(gradients(model.host), host_gradient)


def test_statistics_modes_and_random_numbers_of_the_host_stay() -> None:
    model = cnn_model(cnn_host(dropout=0.5), incubation=COUNTERFACTUAL)
    grow_to(model, "norm", SeedStage.TRAINING, "dropout")
    model.host.norm2.eval()  # a mode of its own stays its own
    before = snapshot(model), torch.get_rng_state(), [m.training for m in model.modules()]
    model.incubate(lambda: loss_of(model))
    after = snapshot(model), torch.get_rng_state(), [m.training for m in model.modules()]
    assert same_tensors(before, after)


def test_buffers_of_the_seed_are_its_own_and_move() -> None:
    model = incubating("norm", blueprint="norm")
    before, host_before = snapshot(model.slots["norm"].seed), snapshot(model.host)
    model.incubate(lambda: loss_of(model))
    after = snapshot(model.slots["norm"].seed)
    assert not torch.equal(before["norm.running_mean"], after["norm.running_mean"])
    assert same_tensors(host_before, snapshot(model.host))


def test_several_seeds_learn_one_at_a_time_each_as_if_it_were_alone() -> None:
    together = incubating(*CNN_SLOTS)
    losses = together.incubate(lambda: loss_of(together))
    assert list(losses) == list(CNN_SLOTS)
    for slot in CNN_SLOTS:
        alone = incubating(slot)
        assert same_tensors(alone.incubate(lambda m=alone: loss_of(m)), {slot: losses[slot]})
        assert same_tensors(gradients(alone.slots[slot].seed), gradients(together.slots[slot].seed))


def test_modes_are_switched_once_however_many_seeds_learn() -> None:
    model, entered = incubating("norm", "act2"), []
    train = model.host.train
    model.host.train = lambda mode=True: (entered.append(mode), train(mode))[1]
    model.train()
    entered.clear()
    assert len(model.incubate(lambda: loss_of(model))) == 2
    assert entered == [False]
    assert all(module.training for module in model.modules())


def test_each_seed_learns_in_eval_mode_and_from_the_same_random_numbers_whatever_the_closure_does() -> None:
    gained = []
    for switches in (False, True):
        model = incubating("norm", "act2", host=cnn_host(dropout=0.5))
        model.train()
        torch.manual_seed(3)

        def closure(model: MorphogeneticModel = model, switches: bool = switches) -> Tensor:
            loss = loss_of(model) + 0.0 * torch.rand(())
            if switches:
                model.train()
            return loss * torch.rand(())

        losses = model.incubate(closure)
        gained.append((losses, gradients(model.slots["norm"].seed), gradients(model.slots["act2"].seed)))
        assert torch.equal(torch.rand(()), torch.rand((), generator=torch.Generator().manual_seed(3)))
    assert same_tensors(*gained)


def test_a_fossil_beside_it_takes_part_and_gets_no_gradient() -> None:
    model = incubating("norm2")
    grow_to(model, "norm", SeedStage.FOSSILIZED)
    losses = model.incubate(lambda: loss_of(model))
    assert list(losses) == ["norm2"]
    assert all(g is None for g in gradients(model.slots["norm"].seed).values())
    assert all(bool(g.any()) for g in gradients(model.slots["norm2"].seed).values())


@pytest.mark.parametrize(
    "stage",
    [SeedStage.DORMANT, SeedStage.GERMINATED, SeedStage.SHADOWING, SeedStage.FOSSILIZED, SeedStage.EMBARGOED],
    ids=lambda s: s.name,
)
def test_nothing_runs_where_no_seed_incubates(stage: SeedStage) -> None:
    model = cnn_model(incubation=COUNTERFACTUAL)
    grow_to(model, "norm", stage)
    assert model.incubate(lambda: pytest.fail("ran")) == {}


def test_nothing_runs_with_straight_through_incubation_or_a_paused_seed() -> None:
    straight = cnn_model()
    grow_to(straight, "norm", SeedStage.TRAINING)
    assert straight.incubate(lambda: pytest.fail("ran")) == {}
    paused = incubating("norm")
    paused.slots["norm"].pause()
    assert paused.incubate(lambda: pytest.fail("ran")) == {}


def test_a_seed_at_alpha_zero_of_its_ramp_still_incubates() -> None:
    model = cnn_model(incubation=COUNTERFACTUAL)
    grow_to(model, "norm", SeedStage.BLENDING, alpha=0.0)
    assert list(model.incubate(lambda: loss_of(model))) == ["norm"]
    model.slots["norm"].set_alpha(0.5)
    assert model.incubate(lambda: pytest.fail("ran")) == {}


def test_parameter_shared_with_the_host_gets_no_gradient() -> None:
    host = cnn_host()

    class Shares(ConvSeed):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.shared = host.norm2.weight

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.shared.view(1, -1, 1, 1)

    model = cnn_model(host, seeds=registry(shares=Shares), incubation=COUNTERFACTUAL)
    grow_to(model, "norm", SeedStage.TRAINING, "shares")
    model.incubate(lambda: loss_of(model))
    assert host.norm2.weight.grad is None
    assert bool(model.slots["norm"].seed.conv.weight.grad.any())


def test_a_frozen_host_and_a_frozen_seed_are_both_fine() -> None:
    model = cnn_model(cnn_host().requires_grad_(False), incubation=COUNTERFACTUAL)
    grow_to(model, "norm", SeedStage.TRAINING)
    model.incubate(lambda: loss_of(model))
    assert all(bool(p.grad.any()) for p in model.seed_parameters())
    model.slots["norm"].seed.requires_grad_(False)
    assert model.incubate(lambda: pytest.fail("ran")) == {}


def test_gradients_carry_the_scale_of_a_grad_scaler() -> None:
    plain, scaled = incubating("norm"), incubating("norm")
    plain.incubate(lambda: loss_of(plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = scaled.incubate(lambda: loss_of(scaled), scaler)
    assert torch.equal(losses["norm"], plain.incubate(lambda: loss_of(plain))["norm"])  # reported unscaled
    plain.zero_grad()
    plain.incubate(lambda: loss_of(plain))
    for name, gradient in gradients(scaled.slots["norm"].seed).items():
        torch.testing.assert_close(gradient, 1024 * gradients(plain.slots["norm"].seed)[name])
    optimizer = torch.optim.SGD(scaled.seed_parameters(), 0.1)
    scaler.unscale_(optimizer)
    for name, gradient in gradients(scaled.slots["norm"].seed).items():
        torch.testing.assert_close(gradient, gradients(plain.slots["norm"].seed)[name])


def test_seed_that_overflows_does_not_stop_the_host_from_stepping() -> None:
    model = incubating("norm")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    host_steps = torch.optim.SGD(model.host_parameters(), 0.1)
    seed_steps = torch.optim.SGD(model.seed_parameters(), 0.1)
    scaler.scale(loss_of(model)).backward()
    model.incubate(lambda: loss_of(model) * math.inf, scaler)
    before = snapshot(model.host), snapshot(model.slots["norm"].seed)
    scaler.step(host_steps)
    scaler.step(seed_steps)
    scaler.update()
    assert not same_tensors(before[0], snapshot(model.host))
    assert same_tensors(before[1], snapshot(model.slots["norm"].seed))
    assert scaler.get_scale() == 4.0


def test_closure_that_raises_leaves_modes_and_forward_as_they_were() -> None:
    model = incubating("norm")
    modes, numbers = [m.training for m in model.modules()], torch.get_rng_state()

    def fails() -> Tensor:
        torch.rand(3)
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        model.incubate(fails)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), numbers)
    features = torch.randn(2, 4, 3, 3)
    assert model.slots["norm"](features) is features


def test_works_when_gradients_are_off_around_it_and_under_autocast() -> None:
    model = incubating("norm")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.incubate(lambda: loss_of(model).float())
    assert all(bool(p.grad.any()) for p in model.seed_parameters())


def test_seed_stays_bounded_in_long_incubation() -> None:
    model = incubating("norm")
    optimizer = torch.optim.Adam(model.seed_parameters(), 1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(float(model.incubate(lambda: loss_of(model))["norm"]))
        optimizer.step()
    assert losses[-1] < 0.85 * losses[0]
    features = torch.randn(4, 4, 5, 5)
    with torch.no_grad():
        assert float((model.slots["norm"].seed(features) - features).std()) < 10.0


def test_host_may_use_gradient_checkpointing_that_is_not_reentrant() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = cnn_host()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    plain = incubating("norm")
    model = cnn_model(Checkpointed(), ("body.norm",), incubation=COUNTERFACTUAL)
    slot = grow_to(model, "body.norm", SeedStage.TRAINING)
    slot.seed.load_state_dict(plain.slots["norm"].seed.state_dict())
    for m in (plain, model):
        m.incubate(lambda m=m: loss_of(m))
    assert same_tensors(gradients(slot.seed), gradients(plain.slots["norm"].seed))
    assert all(g is None for g in gradients(model.host).values())


def test_between_the_calls_in_which_it_learns_a_seed_stands_still_whatever_the_optimiser_finds() -> None:
    model = incubating("norm", incubate_every=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        learned = bool(model.incubate(lambda: loss_of(model)))
        before = [p.detach().clone() for p in model.seed_parameters()]
        optimizer.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, model.seed_parameters(), strict=True)]
        assert any(moved) is learned
