"""Joint gains are given to the seeds they are due to, and first-order gains foretell which cannot help."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    CNN_SLOTS,
    cnn_host,
    cnn_model,
    gradients,
    grow_to,
    images,
    same_tensors,
    scramble,
    snapshot,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kasmina_core import GateThresholds, MorphogeneticModel, PairedGain, QualityGates, SeedStage
from kasmina_core.slots.forward import ForwardMode

X = images(40, seed=41)
Y = (X.mean((1, 2, 3)) > 0).long()


def losses(model: MorphogeneticModel) -> Tensor:
    parts = zip(X.split(16), Y.split(16), strict=True)
    return torch.cat([F.cross_entropy(model(x), y, reduction="none") for x, y in parts])


def grown(*stages: SeedStage, **config: object) -> MorphogeneticModel:
    model = cnn_model(**config)
    for i, (name, stage) in enumerate(zip(CNN_SLOTS, stages, strict=False)):
        scramble(grow_to(model, name, stage).seed, std=0.1, seed=i)
    return model


def value(model: MorphogeneticModel, inside: set[str], names: tuple[str, ...]) -> Tensor:
    """Minus the losses with some of the seeds, by hand."""
    modes = {name: model.slots[name]._override for name in names}
    try:
        for name in names:
            model.slots[name]._override = int(ForwardMode.MEASURE if name in inside else ForwardMode.PASS)
            model.slots[name].refresh_mode()
        with torch.no_grad():
            return -losses(model.eval()).double()
    finally:
        for name, mode in modes.items():
            model.slots[name]._override = mode
            model.slots[name].refresh_mode()
        model.train()


def test_shapley_values_are_the_mean_over_all_orders_and_sum_to_the_joint_gain() -> None:
    model = grown(SeedStage.TRAINING, SeedStage.SHADOWING, SeedStage.FOSSILIZED)
    found = model.attribute(evaluator=lambda: losses(model))
    expected = dict.fromkeys(CNN_SLOTS, torch.zeros(40, dtype=torch.float64))
    for order in itertools.permutations(CNN_SLOTS):
        for i, name in enumerate(order):
            step = value(model, {*order[: i + 1]}, CNN_SLOTS) - value(model, {*order[:i]}, CNN_SLOTS)
            expected[name] = expected[name] + step / 6
    for share in found.seeds:
        by_hand = PairedGain.of(expected[share.slot])
        assert share.shapley.gain == pytest.approx(by_hand.gain, abs=1e-7)
        assert share.shapley.standard_error == pytest.approx(by_hand.standard_error, rel=1e-4)
    assert sum(share.shapley.gain for share in found.seeds) == pytest.approx(found.joint.gain, abs=1e-9)
    assert found.joint.gain != 0.0
    assert found.passes == 8
    assert found.permutations is None


def test_alone_and_last_are_with_and_without_each() -> None:
    model = grown(SeedStage.TRAINING, SeedStage.FOSSILIZED)
    found = model.attribute(evaluator=lambda: losses(model))
    names = CNN_SLOTS[:2]
    for share in found.seeds:
        alone = value(model, {share.slot}, names) - value(model, set(), names)
        last = value(model, set(names), names) - value(model, set(names) - {share.slot}, names)
        assert share.alone.gain == pytest.approx(float(alone.mean()), abs=1e-7)
        assert share.last.gain == pytest.approx(float(last.mean()), abs=1e-7)
    assert found.passes == 4
    assert "together" in str(found)
    assert found.to_dict()["seeds"][0]["slot"] == names[0]


def test_the_share_of_the_only_seed_is_its_evidence() -> None:
    model = grown(SeedStage.TRAINING)
    found = model.attribute([CNN_SLOTS[0]], lambda: losses(model))
    evidence = model.measure(CNN_SLOTS[0], lambda: losses(model))
    (share,) = found.seeds
    for gain in (found.joint, share.alone, share.last, share.shapley):
        assert gain.gain == pytest.approx(evidence.gain, abs=1e-9)


def test_drawn_orders_sum_to_the_joint_gain_and_say_how_unsure_they_are() -> None:
    model = grown(SeedStage.TRAINING, SeedStage.SHADOWING, SeedStage.FOSSILIZED)
    exact = model.attribute(evaluator=lambda: losses(model))
    drawn = model.attribute(
        evaluator=lambda: losses(model), permutations=40, generator=torch.Generator().manual_seed(0)
    )
    assert sum(share.shapley.gain for share in drawn.seeds) == pytest.approx(exact.joint.gain, abs=1e-9)
    assert drawn.passes <= 8
    for one, other in zip(exact.seeds, drawn.seeds, strict=True):
        assert other.shapley.standard_error > one.shapley.standard_error * 0.9
        assert abs(other.shapley.gain - one.shapley.gain) < 4 * other.shapley.standard_error


def test_what_cannot_be_attributed_is_refused() -> None:
    model = grown(SeedStage.TRAINING)
    with pytest.raises(ValueError, match="slot 'norm2': it is DORMANT"):
        model.attribute(["norm2"], lambda: losses(model))
    with pytest.raises(ValueError, match="no slot has an active seed"):
        cnn_model().attribute(evaluator=lambda: losses(model))
    with pytest.raises(ValueError, match="come with a generator"):
        model.attribute(evaluator=lambda: losses(model), permutations=4)
    model.evaluate_with(None)
    with pytest.raises(ValueError, match="no held-out samples"):
        model.attribute()
    with pytest.raises(ValueError, match="no held-out samples"):
        model.screen()


def test_too_many_seeds_for_every_subset_are_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kasmina_core.evidence.attribution.EXACT_SEEDS", 2)
    model = grown(SeedStage.TRAINING, SeedStage.SHADOWING, SeedStage.FOSSILIZED)
    with pytest.raises(ValueError, match=r"8 passes.\n  seeds: 3\n  at most: 2\n.*permutations=20"):
        model.attribute(evaluator=lambda: losses(model))


# -- the first-order screen --------------------------------------------------------------------------------------------


def test_first_order_gains_are_the_slope_of_the_loss_as_each_seed_begins_to_blend() -> None:
    model = grown(SeedStage.TRAINING, SeedStage.TRAINING).double()
    calls = []

    def evaluate() -> Tensor:
        calls.append(1)
        parts = zip(X.double().split(16), Y.split(16), strict=True)
        return torch.cat([F.cross_entropy(model(x), y, reduction="none") for x, y in parts])

    found = model.screen(evaluate)
    assert len(calls) == 1  # one forward and backward for all of them
    assert list(found) == ["norm", "norm2"]
    step = 1e-5
    with torch.no_grad():
        model.eval()
        without = evaluate()
        for name, gain in found.items():
            slot = model.slots[name]
            with slot.blend_weight(step), slot.forced(ForwardMode.BLEND):
                slope = (without - evaluate()) / step
            assert gain.gain == pytest.approx(float(slope.mean()), rel=1e-3)
            assert gain.standard_error == pytest.approx(float(slope.std()) / math.sqrt(40), rel=1e-3)
            assert gain.samples == 40


class Recomputed(nn.Module):
    """A host that is computed again in the backward pass, slots included."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = cnn_host(dropout=0.5), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


def recomputed(reentrant: bool) -> tuple[MorphogeneticModel, MorphogeneticModel]:
    plain = grown(SeedStage.TRAINING, SeedStage.TRAINING, host=cnn_host(dropout=0.5))
    model = cnn_model(Recomputed(reentrant), ("body.norm", "body.norm2"))
    for mine, other in zip(model.slots, CNN_SLOTS, strict=False):
        seed = grow_to(model, mine, SeedStage.TRAINING).seed
        seed.load_state_dict(plain.slots[other].seed.state_dict())
    return model, plain


def test_first_order_gains_are_those_without_gradient_checkpointing() -> None:
    model, plain = recomputed(reentrant=False)
    before = snapshot(model)
    found = model.screen(lambda: losses(model))
    expected = plain.screen(lambda: losses(plain))
    assert list(found.values()) == list(expected.values())
    assert all(gain.gain != 0.0 for gain in found.values())
    assert same_tensors(snapshot(model), before)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_gradient_checkpointing_is_refused_by_the_screen() -> None:
    model, _ = recomputed(reentrant=True)
    with pytest.raises(ValueError, match="must not use gradient checkpointing with use_reentrant=True"):
        model.screen(lambda: losses(model))


def test_screening_leaves_no_trace() -> None:
    model = grown(SeedStage.TRAINING, SeedStage.FOSSILIZED)
    model.host.stem.weight.requires_grad_(False)
    before, numbers = snapshot(model), torch.get_rng_state()
    asks = {name: p.requires_grad for name, p in model.named_parameters()}
    assert list(model.screen(lambda: losses(model))) == ["norm"]
    assert same_tensors(snapshot(model), before)
    assert torch.equal(numbers, torch.get_rng_state())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asks
    assert not any(g is not None for g in gradients(model).values())
    assert all(m.training for m in model.modules())
    assert cnn_model().screen(lambda: losses(model)) == {}


@pytest.mark.parametrize(
    ("evaluate", "says"),
    [
        (lambda m: losses(m).detach(), "requires_grad=False"),
        (lambda m: losses(m).mean(), r"shape \(\)"),
        (lambda m: losses(m)[:7], "samples: 40\n  losses:  7"),
    ],
)
def test_losses_without_a_graph_or_a_sample_each_are_refused(evaluate, says) -> None:
    model = grown(SeedStage.TRAINING)
    with pytest.raises(ValueError, match=says):
        model.screen(lambda: evaluate(model))


def test_a_changing_number_of_samples_is_refused_as_a_measurement_does() -> None:
    model = grown(SeedStage.TRAINING, SeedStage.SHADOWING)
    sizes = itertools.cycle([40, 39, 40, 38])

    def changing() -> Tensor:
        return losses(model)[: next(sizes)]

    for ask in (lambda: model.attribute(evaluator=changing), lambda: model.measure(CNN_SLOTS[0], changing)):
        with pytest.raises(ValueError, match="Evidence needs two vectors of per-sample losses of the same"):
            ask()


class Counting:
    """Counts passes with and without gradients, and turns the losses round to make every seed harmful."""

    def __init__(self, model: MorphogeneticModel, detach: bool = False) -> None:
        self.model, self.detach = model, detach
        self.screens = self.passes = 0

    def __call__(self) -> Tensor:
        if torch.is_grad_enabled():
            self.screens += 1
        else:
            self.passes += 1
        found = losses(self.model)
        return found.detach() if self.detach else found


def trained(helps: bool) -> MorphogeneticModel:
    """Two seeds in TRAINING that were taken along, or against, the gradient of the held-out losses."""
    gates = QualityGates(thresholds=GateThresholds(min_training_epochs=0, min_samples=10, screen=True))
    model = cnn_model(gates=gates)
    for name in CNN_SLOTS[:2]:
        model.germinate(name, "conv")
        assert model.advance_stage(name)
        slot = model.slots[name]
        for _ in range(40):
            with slot.forced(ForwardMode.REPLACE):
                gradient = torch.autograd.grad(losses(model.eval()).mean(), slot.seed_parameters())
            with torch.no_grad():
                for parameter, g in zip(slot.seed_parameters(), gradient, strict=True):
                    parameter.sub_((0.5 if helps else -0.2) * g)
    return model.train()


def test_a_hopeless_seed_is_refused_by_the_screen_without_a_full_measurement() -> None:
    model = trained(helps=False)
    counting = Counting(model)
    model.evaluate_with(counting)
    model.growth.epoch += 1
    for name in CNN_SLOTS[:2]:
        result = model.slots[name].check_gate(2)
        assert result.reason.startswith("first-order gain in standard errors failed")
        assert result.finding is None
    assert (counting.screens, counting.passes) == (1, 0)  # one for both of them


def test_a_seed_with_a_chance_is_measured_in_full_after_the_screen() -> None:
    model = trained(helps=True)
    counting = Counting(model)
    model.evaluate_with(counting)
    result = model.slots["norm"].check_gate(2)
    assert result, str(result)
    assert counting.screens == 1
    assert counting.passes == 4


def test_an_evaluator_that_cannot_be_screened_is_measured_in_full() -> None:
    model = trained(helps=True)
    counting = Counting(model, detach=True)
    model.evaluate_with(counting)
    result = model.slots["norm"].check_gate(2)
    assert result, str(result)
    (screened,) = [c for c in result.checks if c.name == "first-order gain in standard errors"]
    assert "not required" in str(screened)
    assert "never measured" in str(screened)
