"""Placebo seeds: what chance gives is measured as gates would judge it, and thresholds follow from it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import CNN_SLOTS, cnn_model, grow_to, images, same_tensors, snapshot
from torch import Tensor

from kasmina_core import (
    Calibration,
    CalibrationError,
    Finding,
    GateThresholds,
    MorphogeneticModel,
    QualityGates,
    SeedStage,
    calibrate,
)
from kasmina_core.evidence.calibration import Placebo, Rate, shuffled

X = images(160, seed=51)
Y = (X.mean((1, 2, 3)) > 0).long()
GATES = QualityGates(thresholds=GateThresholds(min_samples=50))


def evaluate(model: MorphogeneticModel) -> Tensor:
    return F.cross_entropy(model(X[:100]), Y[:100], reduction="none")


def placebo_loss(model: MorphogeneticModel, generator: torch.Generator) -> Tensor:
    return F.cross_entropy(model(X[100:]), shuffled(Y[100:], generator))


def calibrated(model: MorphogeneticModel | None = None, **changes: object) -> Calibration:
    settings = {"blueprints": ["conv"], "seeds": 4, "looks": 3, "steps": 3, "lr": 1e-2}
    return calibrate(model or cnn_model(gates=GATES), evaluate, placebo_loss, **{**settings, **changes})


def test_placebos_are_judged_at_every_look_and_the_model_is_left_as_it_is() -> None:
    model = cnn_model(gates=GATES)
    before, numbers, seen = snapshot(model), torch.get_rng_state(), []
    found = calibrated(model, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(i, 4) for i in range(1, 5)]
    assert [p.slot for p in found.placebos] == [*CNN_SLOTS, CNN_SLOTS[0]]
    assert all([f.look for f in p.findings] == [1, 2, 3] for p in found.placebos)
    assert found.samples == 100
    assert found.resampled.trials == 400
    assert same_tensors(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert model.slots["norm"].germinations == 0
    assert model.epoch == 0


def test_one_seed_gives_one_calibration() -> None:
    assert calibrated().to_dict() == calibrated().to_dict()
    assert calibrated(seed=1).to_dict() != calibrated().to_dict()


def test_null_seeds_made_from_the_placebos_are_accepted_no_more_often_than_asked() -> None:
    found = calibrated(seeds=6)
    assert found.resampled.interval[0] <= 0.05
    harmless = calibrated(cnn_model(gates=QualityGates(thresholds=GateThresholds(error_rate=0.9))))
    assert harmless.resampled.share > found.resampled.share  # the rate is that of the thresholds


def finding(effect: float, p_value: float = 0.5) -> Finding:
    return Finding(1.0, effect, effect, effect, effect, 100, p_value, 1, 0.005, 0.005, 0.05)


def made(effects: list[float], resampled: Rate, spread: float = 0.2, **thresholds: float) -> Calibration:
    placebos = tuple(Placebo("s", "b", (finding(effect),), None, spread) for effect in effects)
    return Calibration(placebos, resampled, 100, GateThresholds(**thresholds))


def test_a_gain_that_placebos_reach_is_not_enough() -> None:
    held = Rate(10, 1000)
    assert made([0.01 * i for i in range(101)], held).propose().min_gain == pytest.approx(0.95)
    assert made([-0.3, -0.2], held).propose().min_gain == 0.0
    assert made([-0.3, -0.2], held, min_gain=0.1).propose().min_gain == 0.1
    assert made([-0.3, -0.2], held).propose().error_rate == 0.05


def test_an_error_rate_that_was_not_held_is_lowered_in_proportion() -> None:
    assert made([0.0, 0.0], Rate(100, 1000)).propose().error_rate == pytest.approx(0.025)
    assert made([0.0, 0.0], Rate(55, 1000)).propose().error_rate == 0.05  # that may be chance


def test_the_samples_for_an_effect_are_those_at_which_it_is_found() -> None:
    found = made([0.0, 0.0], Rate(0, 100), spread=0.2)
    n = found.samples_for(0.05)
    source, level, accepted = torch.Generator().manual_seed(0), 0.005 / 2, 0
    from kasmina_core import PairedGain

    for _ in range(300):
        d = 0.2 * torch.randn(n, generator=source, dtype=torch.float64) + 0.05
        accepted += PairedGain.of(d).p_value <= level
    assert 0.72 <= accepted / 300 <= 0.88
    assert found.samples_for(0.025) > 3 * n
    assert found.propose(0.05).min_samples == max(100, n)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="effect must be above 0"):
            found.samples_for(bad)


@pytest.mark.parametrize(("count", "trials"), [(0, 20), (1, 20), (10, 20), (20, 20), (50, 1000)])
def test_the_interval_of_a_rate_is_wilsons(count: int, trials: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    wilson = stats.binomtest(count, trials).proportion_ci(method="wilson")
    assert Rate(count, trials).interval == pytest.approx((wilson.low, wilson.high), abs=1e-9)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blueprints": []}, "at least one blueprint"),
        ({"seeds": 1}, "seeds must be at least 2, not 1"),
        ({"looks": 0}, "looks must be at least 1, not 0"),
        ({"lr": math.nan}, "lr must be above 0 and finite, not nan"),
        ({"slots": ["norm"]}, "Slot 'norm' is not dormant"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(change: dict[str, object], says: str) -> None:
    model = cnn_model(gates=GATES)
    grow_to(model, "norm", SeedStage.TRAINING)
    with pytest.raises(CalibrationError, match=says):
        calibrated(model, **change)


def test_losses_that_are_no_evidence_are_refused() -> None:
    model = cnn_model(gates=GATES)
    with pytest.raises(CalibrationError, match="one loss per held-out sample"):
        calibrate(model, lambda m: evaluate(m).mean(), placebo_loss, blueprints=["conv"], steps=1)
    with pytest.raises(CalibrationError, match=r"placebo_loss must return one number, not \(100,\)"):
        calibrate(model, evaluate, lambda m, g: evaluate(m), blueprints=["conv"], steps=1)
    for slot in CNN_SLOTS:
        grow_to(model, slot, SeedStage.TRAINING)
    with pytest.raises(CalibrationError, match="No slot is dormant"):
        calibrated(model)
