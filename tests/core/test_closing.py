"""Closing verdict: why growth ended as it did, by figures."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from state_helpers import FIRST, SECOND, bring_to, make_model, open_config, open_thresholds, train_once

from kasmina_core import (
    CheckVerdict,
    FixedTimesPolicy,
    ForwardMode,
    GateThresholds,
    GrowthCause,
    GrowthConfig,
    GrowthVerdict,
    MisuseWarning,
    MorphogeneticModel,
    NoGrowthPolicy,
    PlateauPolicy,
    SeedStage,
    StraightInsertion,
    Topology,
    UntrackedSeedWarning,
    load_checkpoint,
    save_checkpoint,
    tie_optimizer,
)

S = SeedStage


def sentences(verdict: GrowthVerdict) -> list[str]:
    assert 1 <= len(verdict.sentences) <= 3
    assert all(re.fullmatch(r"[A-Z].*\.", sentence) for sentence in verdict.sentences)
    assert str(verdict) == " ".join(verdict.sentences)
    return list(verdict.sentences)


def tied(model: MorphogeneticModel) -> torch.optim.Optimizer:
    return tie_optimizer(model, torch.optim.SGD(model.parameters(), 0.1))


def plateau(**options) -> PlateauPolicy:
    return PlateauPolicy({Topology.CNN: ["scale"]}, patience=3, **options)


def grown_and_culled(model: MorphogeneticModel, optimizer=None, epochs: int = 3, fall: float = 1.0) -> None:
    metric = 1.0
    model.germinate(FIRST, "scale")
    for _ in range(epochs):
        if optimizer is not None:
            train_once(model, optimizer)
        model.step_epoch(metric)
        metric *= fall
    model.cull(FIRST, "took too long")


def test_a_model_that_nobody_asks_for_seeds_says_so():
    model, _ = make_model()
    model.step_epoch(1.0)
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.NO_POLICY
    assert sentences(verdict)[0] == "No seed germinated in 1 epoch."
    model.follow(NoGrowthPolicy())
    assert model.verdict().cause is GrowthCause.NOT_ASKED_FOR
    assert "NoGrowthPolicy, grows nothing" in str(model.verdict())


def followed(metrics, policy=None, **config) -> GrowthVerdict:
    model, _ = make_model(GrowthConfig(**config))
    policy = policy or plateau()
    for metric in metrics:
        model.step_epoch(metric)
        model.follow(policy)
    return model.verdict()


def test_a_model_whose_epochs_were_not_stepped_says_so():
    model, _ = make_model()
    model.follow(plateau())
    assert model.verdict().cause is GrowthCause.NOT_STEPPED
    model.germinate(FIRST, "scale")
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.NOT_STEPPED
    assert "Nobody called model.step_epoch" in sentences(verdict)[1]


@pytest.mark.filterwarnings("ignore:PlateauPolicy has seen a metric:RuntimeWarning")
@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ((math.nan,) * 5, "no number (NaN) since epoch 1 of 5; it never was finite."),
        ((2.0, 1.5, math.inf, math.nan), "no number (NaN) since epoch 3 of 4; it was 1.5 at best before."),
        ((2.0, math.nan, 1.0, math.inf), "infinite since epoch 4 of 4; it was 1 at best before."),
    ],
)
def test_a_metric_that_is_not_finite_is_told_with_its_epoch(metrics, told):
    verdict = followed(metrics)
    assert verdict.cause is GrowthCause.METRIC_NOT_FINITE
    assert told in sentences(verdict)[1]
    assert "lower the learning rate" in sentences(verdict)[2]
    assert "plateau" not in str(verdict)


def test_seeds_of_a_run_that_diverged_are_not_said_to_gain_nothing():
    model, _ = make_model()
    grown_and_culled(model, tied(model))
    model.step_epoch(math.nan)
    assert model.verdict().cause is GrowthCause.METRIC_NOT_FINITE
    model, _ = make_model()
    bring_to(model, S.FOSSILIZED)
    model.step_epoch(math.nan)
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.KEPT
    assert "no number (NaN) since epoch" in sentences(verdict)[1]


@pytest.mark.filterwarnings("ignore:PlateauPolicy has seen no metric:RuntimeWarning")
def test_a_policy_that_waits_for_a_metric_that_nobody_gives_says_so():
    verdict = followed((None,) * 4)
    assert verdict.cause is GrowthCause.NO_METRIC
    assert "step_epoch was given no metric, and PlateauPolicy waits" in str(verdict)


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_a_metric_of_the_wrong_direction_is_told_with_both_figures(higher_is_better):
    rising = (0.3, 0.5, 0.7, 0.8)
    metrics = rising[::-1] if higher_is_better else rising
    verdict = followed(metrics, plateau(min_delta=0.0), higher_is_better=higher_is_better)
    assert verdict.cause is GrowthCause.METRIC_GOT_WORSE
    assert f"from {metrics[0]} it went to {metrics[-1]}" in str(verdict)
    assert f"higher_is_better={not higher_is_better}" in sentences(verdict)[2]
    right = followed(metrics, plateau(), higher_is_better=not higher_is_better)
    assert right.cause is GrowthCause.NO_PLATEAU


def test_fewer_samples_than_gates_ask_for_are_told_before_more_epochs_are():
    model, _ = make_model(GrowthConfig(gates=GateThresholds(min_training_epochs=1)))  # of 8 samples
    optimizer = tied(model)
    model.germinate(FIRST, "scale")
    for _ in range(3):
        train_once(model, optimizer)
        model.step_epoch(1.0)
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.TOO_FEW_SAMPLES
    assert "(needs >= 100)" in sentences(verdict)[1]


def test_a_host_that_does_not_learn_is_told_apart_from_one_that_gains_nothing_by_seeds():
    thresholds = GateThresholds(min_training_epochs=1, smaller_alphas=(), max_harm_t=1e9)
    model, _ = make_model(GrowthConfig(gates=thresholds))
    model.evaluate_with(noisy(model, -0.05))
    grown_and_culled(model, tied(model))
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.METRIC_STOOD_STILL
    assert "was 1 in all 3 epochs" in str(verdict)


def test_seeds_that_no_optimiser_held_are_told_apart_from_seeds_that_gain_nothing():
    model, _ = make_model()
    optimizer = torch.optim.SGD(model.host_parameters(), 0.1)
    with pytest.warns(UntrackedSeedWarning):
        grown_and_culled(model, optimizer)
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.NO_OPTIMIZER
    assert f"No optimiser held all parameters of {FIRST}-1 in any epoch" in str(verdict)
    assert "tie_optimizer" in sentences(verdict)[2]
    tied_later, _ = make_model()
    optimizer = torch.optim.SGD(tied_later.host_parameters(), 0.1)
    tied_later.germinate(FIRST, "scale")
    train_once(tied_later, optimizer)
    with pytest.warns(UntrackedSeedWarning):
        tied_later.step_epoch(1.0)
    train_once(tied_later, optimizer)
    tied_later.step_epoch(1.0)
    tie_optimizer(tied_later, optimizer)
    train_once(tied_later, optimizer)
    tied_later.step_epoch(1.0)
    tied_later.cull(FIRST)
    assert tied_later.verdict().cause is not GrowthCause.NO_OPTIMIZER


def test_a_metric_without_a_plateau_is_told_with_its_longest_wait():
    model, _ = make_model()
    policy = plateau()
    for metric in (1.0, 0.9, 0.9, 0.9, 0.5, 0.3):
        model.step_epoch(metric)
        model.follow(policy)
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.NO_PLATEAU
    assert "takes 3 epochs in a row without an improvement by 1 %" in str(verdict)
    assert "the longest time without one was 2 epochs" in str(verdict)


def test_times_that_did_not_come_are_told():
    model, _ = make_model()
    model.step_epoch(1.0)
    model.follow(FixedTimesPolicy({Topology.CNN: ["scale"]}, epochs=[9]))
    assert "The first time for one is epoch 9, and the run had 1." in sentences(model.verdict())


def test_germinations_that_were_all_refused_are_counted_with_the_reason():
    model, _ = make_model()
    policy = PlateauPolicy({Topology.CNN: ["picky"]}, patience=1)
    for _ in range(4):
        model.step_epoch(1.0)
        model.follow(policy)
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.NOT_GERMINATED
    assert "4 is not a multiple of 8" in str(verdict)


def test_a_seed_without_gradient_is_told_apart_from_one_that_nobody_watched():
    model, _ = make_model()
    grown_and_culled(model)
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.NO_GRADIENT
    assert "never measured" in str(verdict)
    assert "model.step()" in str(verdict)
    assert sentences(verdict)[0] == "Of 1 seed none stayed: within 3 epochs 1 was culled."

    model, _ = make_model()
    optimizer = tied(model)
    for parameter in model.host[7].parameters():  # the head: nothing of the loss comes back
        torch.nn.init.zeros_(parameter.requires_grad_(False))
    grown_and_culled(model, optimizer)
    assert "it was 0." in str(model.verdict())


def test_a_model_without_held_out_samples_says_what_lacks():
    model, _ = make_model(evaluate=False)
    with pytest.warns(MisuseWarning, match="no evaluator"):
        grown_and_culled(model, tied(model))
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.NEVER_MEASURED
    assert "model.evaluate_with" in str(verdict)


def test_a_seed_that_changes_too_few_samples_is_told_apart_from_a_model_without_any():
    thresholds = GateThresholds(min_training_epochs=1, smaller_alphas=())
    model, _ = make_model(GrowthConfig(gates=thresholds))
    changed = (torch.arange(200) < 6).float()
    model.evaluate_with(lambda: 1.0 - changed * float(model.slots[FIRST].mode != ForwardMode.PASS))
    grown_and_culled(model, tied(model))
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.NEVER_MEASURED
    assert "only 6 samples differ" in str(verdict)
    assert sentences(verdict)[2] == "Give them more held-out samples, or a loss that differs on most of them."
    assert model.verdict(training_metric=0.1).cause is GrowthCause.FITS_TRAINING_DATA


def test_a_host_that_fits_its_training_data_has_capacity_to_spare():
    model, _ = make_model(GrowthConfig(gates=GateThresholds(min_samples=2, min_training_epochs=1)))
    optimizer = tied(model)
    grown_and_culled(model, optimizer)
    verdict = model.verdict(training_metric=0.5)
    assert verdict.cause is GrowthCause.FITS_TRAINING_DATA
    assert "0.5 on training data and 1 on held-out data" in str(verdict)
    assert model.verdict(training_metric=0.6).cause is not GrowthCause.FITS_TRAINING_DATA
    assert model.verdict().cause is not GrowthCause.FITS_TRAINING_DATA


def noisy(model: MorphogeneticModel, gain: float):
    """Hold an evaluator that finds a gain with a spread of 1."""
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean()) / noise.std()

    def losses():
        slot = model.slots[FIRST]
        return 5.0 - (gain + noise) * float(slot.mode != ForwardMode.PASS)

    return losses


@pytest.mark.parametrize(
    ("gain", "cause"), [(0.05, GrowthCause.TOO_FEW_SAMPLES), (-0.05, GrowthCause.REFUSED_BY_CHECK)]
)
def test_a_gain_that_needs_more_samples_says_how_many(gain, cause):
    thresholds = GateThresholds(min_training_epochs=1, smaller_alphas=(), max_harm_t=1e9)
    model, _ = make_model(GrowthConfig(gates=thresholds))
    model.evaluate_with(noisy(model, gain))
    grown_and_culled(model, tied(model), fall=0.9)
    verdict = model.verdict()
    assert verdict.cause is cause
    if gain > 0:
        # ((z(1 - .005) + z(.8)) / .05)² with normal quantiles
        assert verdict.samples_needed == pytest.approx((2.576 + 0.842) ** 2 / 0.05**2, rel=0.01)
        assert f"{verdict.samples_needed:,} would show it" in str(verdict)
        assert "+0.05 per sample of" in str(verdict)
        assert "400 held-out samples" in str(verdict)
    else:
        assert "Gate G2 stopped 1 of 1 by its check 'gain'" in str(verdict)


def test_a_run_that_ended_first_says_where_its_seeds_were():
    model, _ = make_model()
    optimizer = tied(model)
    model.germinate(FIRST, "scale")
    for _ in range(2):
        train_once(model, optimizer)
        model.step_epoch(1.0)
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.UNFINISHED
    assert "in TRAINING (epochs in training: 1 so far (needs >= 2))" in str(verdict)


def test_seeds_that_are_culled_before_a_gate_judged_them_are_not_called_refused():
    model, _ = make_model()
    for slot in (FIRST, SECOND):
        model.germinate(slot, "scale")
    model.step_epoch(1.0)
    model.cull(FIRST)
    verdict = model.verdict(training_metric=0.1)
    assert verdict.cause is GrowthCause.NOT_REFUSED
    assert sentences(verdict)[1].startswith(
        "No gate had refused it when it was culled, by hand or by the policy"
    )
    assert sentences(verdict)[0].endswith("1 was culled, and 1 not finished.")
    model.cull(SECOND)
    assert (
        f"No gate had refused any of them when they were culled, by hand or by the policy: {FIRST}-1, "
        in str(model.verdict())
    )


def straight_model() -> MorphogeneticModel:
    thresholds = open_thresholds(against_start="not asked")
    return make_model(open_config(gates=thresholds, straight=StraightInsertion(lag=3)))[0]


def test_a_seed_that_was_put_in_straight_is_where_it_is():
    model = straight_model()
    model.germinate(FIRST, "scale", straight=True)
    train_once(model, tied(model))
    model.step_epoch(1.0)
    assert "judged: 2-1 in PROBATIONARY and in the output (lag since insertion: 1 so far" in str(
        model.verdict()
    )


def test_a_straight_seed_that_is_culled_before_its_lag_was_not_judged():
    model = straight_model()
    optimizer = tied(model)
    model.germinate(FIRST, "scale", straight=True)
    train_once(model, optimizer)
    model.step_epoch(1.0)
    model.cull(FIRST)
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.NOT_REFUSED
    assert "2-1 (lag since insertion: 1 so far (needs >= 3))." in str(verdict)
    assert "gain nothing" not in str(verdict)


def test_a_straight_seed_learns_from_its_first_epoch_on():
    model = straight_model()
    model.germinate(FIRST, "scale", straight=True)
    model.step_epoch(1.0)
    (life,) = model.growth.journal.seeds.values()
    assert life.learned_epochs == 1
    assert model.verdict().cause is GrowthCause.NO_GRADIENT  # nothing called model.step()


def test_unfinished_seeds_are_named_beside_those_that_stayed():
    model, _ = make_model(open_config(gates=open_thresholds()))
    bring_to(model, S.FOSSILIZED, SECOND)
    bring_to(model, S.TRAINING)
    model.step_epoch(1.0)
    assert "; not finished: 2-1 in TRAINING (epochs in training: 1 so far (needs >= 2))." in str(
        model.verdict()
    )


def test_what_a_gate_waited_for_is_forgotten_once_it_lets_the_seed_pass():
    model, _ = make_model(open_config(gates=open_thresholds()))
    optimizer = tied(model)
    model.germinate(FIRST, "scale")
    while model.slots[FIRST].stage is not S.BLENDING:
        train_once(model, optimizer)
        model.step_epoch(1.0)
    assert "judged: 2-1 in BLENDING and in the output." in str(model.verdict())
    assert "or cull what is not proved" in str(model.verdict())


def test_a_seed_that_was_kept_in_the_last_epochs_is_unproved_until_more_have_passed():
    model, _ = make_model()
    bring_to(model, S.FOSSILIZED)
    (seed,) = model.growth.journal.seeds
    verdict = model.verdict()
    assert verdict.cause is GrowthCause.KEPT
    assert (verdict.kept, verdict.unproved) == ((seed,), (seed,))
    assert f"Unproved: {seed} " in sentences(verdict)[2]
    assert sentences(verdict)[0] == "Of 1 seed 1 stayed; it adds 8 parameters."
    for _ in range(5):
        model.step_epoch(1.0)
    assert model.verdict().unproved == ()


def test_the_verdict_says_where_seeds_were_kept_and_where_they_were_taken_back():
    model, _ = make_model(open_config(gates=open_thresholds()))
    bring_to(model, S.FOSSILIZED, SECOND)
    born = next(iter(model.growth.journal.seeds.values())).born
    epoch = model.epoch
    grown_and_culled(model)
    first = sentences(model.verdict())[0]
    assert first.startswith("Of 2 seeds 1 stayed; it adds 8 parameters: ")
    assert f": {SECOND} (after epoch {born}); taken back: {FIRST} (after epoch {epoch})" in first


@pytest.mark.parametrize("kept", [False, True])
def test_epochs_of_the_host_that_culls_gave_up_are_told(kept):
    model, _ = make_model(open_config(gates=open_thresholds(), keep_snapshot=True))
    if kept:
        bring_to(model, S.FOSSILIZED, SECOND)
    bring_to(model, S.SHADOWING)
    lost = model.lost_epochs
    model.cull(FIRST, "asked to", revert=True)
    assert model.lost_epochs > lost
    told = f"; undoing culls gave up {model.lost_epochs} epoch"
    assert told in sentences(model.verdict())[0]


def test_a_checkpoint_and_a_copy_remember_what_became_of_the_seeds(tmp_path):
    model, _ = make_model(open_config(gates=open_thresholds()))
    bring_to(model, S.FOSSILIZED, SECOND)
    grown_and_culled(model)
    save_checkpoint(tmp_path / "point", model)
    loaded, _ = make_model(open_config(gates=open_thresholds()))
    load_checkpoint(tmp_path / "point", loaded)
    assert loaded.growth.journal == copy.deepcopy(model).growth.journal == model.growth.journal
    assert loaded.verdict() == model.verdict()


def test_an_epoch_that_is_undone_leaves_nothing_in_the_journal():
    model, recorder = make_model()
    bring_to(model, S.TRAINING)
    before = copy.deepcopy(model.growth.journal)

    def fails():
        raise KeyboardInterrupt

    while (
        model.slots[FIRST].last_gate is None or model.slots[FIRST].last_gate.verdict is CheckVerdict.WAITING
    ):
        before, sent = copy.deepcopy(model.growth.journal), len(recorder.events)
        if model.slots[FIRST].state.metrics.epochs_in_current_stage == 1:
            model.evaluate_with(fails)
            break
        model.step_epoch(1.0)
    with pytest.raises(KeyboardInterrupt):
        model.step_epoch(1.0)
    assert model.growth.journal == before
    assert len(recorder.events) == sent
