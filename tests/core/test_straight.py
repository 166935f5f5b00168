"""Straight insertion: a seed contributes at once, the record says which gates were not asked, and G5 asks the trend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import ConvSeed, cnn_host, images, labels, registry, same_tensors, snapshot
from torch import nn

from kasmina_core import (
    CheckVerdict,
    GateEvaluated,
    GateLevel,
    GatesNotAsked,
    GateThresholds,
    Germinate,
    GerminationError,
    GrowthConfig,
    MorphogeneticModel,
    SeedStage,
    StageChanged,
    StraightInsertion,
    load_checkpoint,
    save_checkpoint,
    tie_optimizer,
)
from kasmina_core.gates.trend import TrendGap

S = SeedStage
NO_HARM = GateThresholds(against_start="no harm")
FALLING = (3.0, 2.6, 2.3, 2.1, 2.0)


class ZeroSeed(ConvSeed):
    """The identity at birth."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)


class Recorder(list):
    def emit(self, event):
        self.append(event)


class Run:
    """A tiny model with a tied Adam, trained by epochs of two steps."""

    def __init__(self, gates=NO_HARM, **straight):
        self.events = Recorder()
        self.model = MorphogeneticModel(
            cnn_host(),
            ("norm", "norm2"),
            example=images(2),
            registry=registry(zero=ZeroSeed),
            config=GrowthConfig(gates=gates, straight=StraightInsertion(**straight)),
            telemetry=self.events,
        )
        self.optimizer = tie_optimizer(self.model, torch.optim.Adam(self.model.parameters(), 1e-2))

    def learn(self, steps=2):
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images()), labels()).backward()
            self.model.step()
            self.optimizer.step()

    def epochs(self, *metrics):
        results = {}
        for metric in metrics:
            self.learn()
            results = self.model.step_epoch(metric)
        return results

    def everything(self):
        states = [self.optimizer.state[p] for p in self.model.host.parameters()]
        return snapshot(self.model.host), [{k: v.clone() for k, v in one.items()} for one in states]


@pytest.fixture
def run():
    grown = Run()
    grown.epochs(*FALLING)
    return grown


def g5(run, slot="norm"):
    return run.model.slots[slot].last_gate


def verdicts(result):
    return {check.name: check.verdict for check in result.checks}


def test_a_seed_with_a_zero_last_layer_changes_no_output_and_trains_with_the_host(run):
    run.model.eval()
    before = run.model(images())
    run.model.germinate("norm", "zero", straight=True)
    slot = run.model.slots["norm"]
    assert slot.stage is S.PROBATIONARY
    assert slot.alpha == 1.0
    assert torch.equal(run.model(images()), before)
    run.learn(1)
    assert all(p.grad is not None and p.grad.any() for p in slot.seed_parameters())
    run.model.eval()
    assert not torch.equal(run.model(images()), before)


def test_the_gates_on_the_way_are_recorded_as_not_asked(run):
    run.events.clear()
    state = run.model.germinate("norm", "zero", straight=True)
    assert state.unasked == ("G1", "G2", "G3", "G4")
    assert [e.gates for e in run.events if isinstance(e, GatesNotAsked)] == [state.unasked]
    assert [e.gate for e in run.events if isinstance(e, GateEvaluated)] == ["G0"]
    assert [e.after for e in run.events if isinstance(e, StageChanged)] == [
        "GERMINATED",
        "TRAINING",
        "BLENDING",
        "SHADOWING",
        "PROBATIONARY",
    ]
    row, other = run.model.summary()
    assert (row.unasked, other.unasked) == (state.unasked, ())
    assert "PROBATIONARY, G1 G2 G3 G4 not asked" in run.model.summary_table()
    assert run.model.observe().slots[0].unasked == state.unasked
    run.epochs(1.9)
    assert run.events[-1].slots[0].unasked == state.unasked


def test_over_a_ramp_alpha_rises_from_the_first_step_and_g3_is_asked():
    run = Run(ramp_steps=4)
    run.epochs(*FALLING)
    state = run.model.germinate("norm", "zero", straight=True)
    slot = run.model.slots["norm"]
    seen = [slot.alpha]
    assert (slot.stage, state.unasked) == (S.BLENDING, ("G1", "G2", "G4"))
    for _ in range(3):
        run.learn(1)
        seen.append(slot.alpha)
    assert 0.0 < seen[0] < seen[1] < seen[2] < seen[3] == 1.0
    run.events.clear()
    run.model.step_epoch(1.9)
    assert [e.gate for e in run.events if isinstance(e, GateEvaluated)] == ["G3"]
    assert slot.stage is S.PROBATIONARY


def test_g5_waits_for_the_lag_and_then_asks_the_trend_and_not_the_host_without_the_seed(run):
    def evaluator():
        raise AssertionError("nothing is measured without the seed")

    run.model.evaluate_with(evaluator)
    run.model.germinate("norm", "zero", straight=True)
    run.epochs(2.5, 2.5)
    assert g5(run).verdict is CheckVerdict.WAITING
    run.epochs(1.5)
    assert g5(run).passed
    found = verdicts(g5(run))
    assert found["gain over the host's trend"] is CheckVerdict.PASSED
    assert found["gain in standard errors"] is CheckVerdict.NOT_ASKED
    assert found["epochs in probation"] is CheckVerdict.NOT_ASKED
    assert found["finite parameters"] is CheckVerdict.PASSED
    assert "not asked" in g5(run).reason
    assert run.model.advance_stage("norm").passed
    assert run.model.slots["norm"].stage is S.FOSSILIZED
    assert run.model.slots["norm"].state.is_straight


def test_a_model_behind_the_trend_fails(run):
    run.model.germinate("norm", "zero", straight=True)
    run.epochs(2.5, 2.5, 2.5)
    assert g5(run).verdict is CheckVerdict.FAILED
    assert "gain over the host's trend failed" in g5(run).reason


def test_proof_asks_more_than_no_harm():
    gates = GateThresholds(against_start="proved")
    proof, harm = Run(gates), Run()
    for each in (proof, harm):
        each.epochs(*FALLING)
        each.model.germinate("norm", "zero", straight=True)
        each.epochs(2.0, 1.9, 1.75)  # about as the trend has it
    assert not g5(proof).passed
    assert g5(harm).passed
    proof.epochs(0.5)
    assert g5(proof).passed


def test_without_a_trend_to_ask_a_seed_is_refused_and_nothing_has_changed():
    run = Run()
    run.epochs(3.0, 2.0)
    run.events.clear()
    before = snapshot(run.model)
    with pytest.raises(GerminationError, match=r"epochs with a metric: 2\n  needed: +3"):
        run.model.germinate("norm", "zero", straight=True)
    assert same_tensors(snapshot(run.model), before)
    assert (run.model.slots["norm"].state, run.model.slots["norm"].germinations, run.events) == (None, 0, [])
    assert len(run.optimizer.param_groups) == 1
    free = Run(GateThresholds(against_start="not asked"))
    free.model.germinate("norm", "zero", straight=True)
    free.epochs(3.0, 3.0, 3.0)
    assert g5(free).passed


def test_the_lag_may_count_steps():
    run = Run(lag=7, lag_unit="step")
    run.epochs(*FALLING)
    run.model.germinate("norm", "zero", straight=True)
    run.epochs(1.5, 1.5, 1.5)
    assert g5(run).verdict is CheckVerdict.WAITING
    run.epochs(1.5)
    assert g5(run).passed


def test_a_wave_is_undone_bit_for_bit_and_its_epochs_are_lost_once(run):
    before = run.everything()
    run.model.germinate("norm", "conv", straight=True)
    run.model.germinate("norm2", "conv", straight=True)
    run.epochs(2.5, 2.5)
    assert not same_tensors(run.everything(), before)
    assert not run.model.can_revert("norm")  # the other one began to contribute later
    run.model.cull("norm2", "behind", revert=True)
    run.model.cull("norm", "behind", revert=True)
    assert same_tensors(run.everything(), before)
    assert run.model.lost_epochs == 2
    twin = Run()
    twin.epochs(*FALLING)
    twin.learn()
    run.learn()
    assert same_tensors(run.everything(), twin.everything())


def test_a_wave_costs_one_copy_of_the_host(run):
    run.model.germinate("norm", "conv", straight=True)
    run.model.germinate("norm2", "conv", straight=True)
    first, second = (run.model.growth.snapshots[name] for name in ("norm", "norm2"))
    assert all(copy is second.copies[name] for name, copy in first.copies.items())
    moments = [[state["exp_avg"] for state in each.kept[0].states.values()] for each in (first, second)]
    assert moments[0]
    assert all(any(a is b for b in moments[1]) for a in moments[0])


def test_epochs_that_a_revert_gave_up_are_no_part_of_the_next_trend(run):
    run.model.germinate("norm", "conv", straight=True)
    run.epochs(9.0, 9.0)
    run.model.cull("norm", revert=True)
    assert [metric for _, metric in run.model.growth.metrics] == list(FALLING)
    run.epochs(1.9)
    assert run.model.growth.metrics[-1] == (6, 1.9)


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_been_saved(run, tmp_path):
    run.model.germinate("norm", "conv", straight=True)
    run.epochs(1.9)
    save_checkpoint(tmp_path / "saved", run.model, optimizer=[run.optimizer])
    other = Run()
    load_checkpoint(tmp_path / "saved", other.model, optimizer=[other.optimizer])
    assert other.model.slots["norm"].state.unasked == ("G1", "G2", "G3", "G4")
    for each in (run, other):
        each.epochs(1.7, 1.6)
    assert g5(run) == g5(other)
    assert g5(run).passed
    other.model.cull("norm", revert=True)
    run.model.cull("norm", revert=True)
    assert same_tensors(run.everything(), other.everything())
    assert run.model.growth.metrics == other.model.growth.metrics


def test_a_listener_that_refuses_the_seed_leaves_no_snapshot(run):
    class Refusing:
        def seed_added(self, slot, parameters):
            raise GerminationError("no room")

        def seed_removed(self, slot, parameters):
            raise AssertionError("it was never added")

    run.model.listen(Refusing())
    with pytest.raises(GerminationError, match="no room"):
        run.model.germinate("norm", "zero", straight=True)
    assert run.model.slots["norm"].state is None
    assert not run.model.growth.snapshots


def test_a_policy_asks_for_it_by_command(run):
    class Once:
        def decide(self, observation):
            return [Germinate("norm", "zero", straight=True)]

    run.model.follow(Once())
    assert run.model.slots["norm"].stage is S.PROBATIONARY
    assert run.events[-1].arguments["straight"] is True


def test_the_default_asks_every_gate(run):
    run.model.germinate("norm", "zero")
    assert run.model.slots["norm"].stage is S.GERMINATED
    assert run.model.slots["norm"].state.unasked == ()


@pytest.mark.parametrize(
    "wrong", [{"ramp_steps": 0}, {"lag": -1}, {"trend_epochs": 2}, {"lag_unit": "minute"}]
)
def test_a_setting_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        StraightInsertion(**wrong)


def test_settings_are_read_back_and_may_be_missing_in_older_files():
    config = GrowthConfig(straight=StraightInsertion(ramp_steps=5, lag=40, lag_unit="step"))
    assert GrowthConfig.from_dict(config.to_dict()).straight == config.straight
    older = {name: value for name, value in config.to_dict().items() if name != "straight"}
    assert GrowthConfig.from_dict(older).straight == StraightInsertion()


def test_the_trend_is_a_line_over_one_by_the_square_root_of_epochs():
    line = [(e, 2.0 + 0.5 / e**0.5) for e in (1, 2, 3, 5, 8)]
    assert abs(TrendGap.of(line, 16, 2.125, higher_is_better=False).gain) < 1e-6
    bent = [(e, y + (-1) ** i * 0.1) for i, (e, y) in enumerate(line)]
    x = -torch.tensor([float(e) for e, _ in bent], dtype=torch.float64).rsqrt()
    a = torch.stack([torch.ones_like(x), x], 1)
    y = torch.tensor([v for _, v in bent], dtype=torch.float64)
    fit = torch.linalg.lstsq(a, y).solution
    at = torch.tensor([1.0, -0.25], dtype=torch.float64)
    s = ((y - a @ fit).square().sum() / 3).sqrt()
    error = s * (1 + at @ torch.linalg.inv(a.T @ a) @ at).sqrt()
    gap = TrendGap.of(bent, 16, 0.5, higher_is_better=False)
    assert gap.gain == pytest.approx(float(at @ fit - 0.5))
    assert (gap.standard_error, gap.freedom) == (pytest.approx(float(error)), 3)
    mirrored = TrendGap.of([(e, -v) for e, v in bent], 16, -0.5, higher_is_better=True)
    assert mirrored.gain == pytest.approx(gap.gain)


def test_a_host_that_was_getting_worse_is_taken_to_have_stayed():
    gap = TrendGap.of([(1, 1.0), (2, 2.0), (3, 3.0)], 100, 2.0, higher_is_better=False)
    assert gap.gain == 0.0


@pytest.mark.parametrize("metrics", [[1.0, 2.0], [1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0]])
def test_a_trend_that_cannot_be_had_is_never_measured(metrics):
    assert TrendGap.of(list(enumerate(metrics, 1)), 5, 1.0, higher_is_better=False) is None
    run = Run()
    run.epochs(3.0, 2.0, *metrics)
    run.model.germinate("norm", "zero", straight=True)
    run.epochs(float("nan"), float("nan"), float("nan"))
    assert verdicts(g5(run))["gain over the host's trend"] is CheckVerdict.NEVER_MEASURED
    assert not g5(run).passed
    assert g5(run).gate is GateLevel.G5
