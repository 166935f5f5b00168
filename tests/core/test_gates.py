"""Quality gates: each check is named, measured and judged; what was never measured fails."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from state_helpers import FIRST, CountingEvaluator, bring_to, make_model, open_config, open_thresholds

from kasmina_core import (
    CheckpointError,
    CheckVerdict,
    GateCheck,
    GateCheckSpec,
    GateLevel,
    GateProfile,
    GateResult,
    GateThresholds,
    MisuseWarning,
    QualityGates,
    SeedEvidence,
    SeedMetrics,
    SeedStage,
    SeedState,
)
from kasmina_core.errors import BlueprintError
from kasmina_core.gates.checks import GateContext
from kasmina_core.gates.sequential import Look, PairedGain
from kasmina_core.verdicts import GATE_INTO, Finding

G = GateLevel
GERMINATION = (
    "blueprint known",
    "topology",
    "width",
    "positions",
    "builds",
    "shape",
    "dtype",
    "finite output",
    "input unchanged",
    "kept apart",
)


def evidence(**changes) -> SeedEvidence:
    return SeedEvidence(
        **{
            "samples": 100,
            "gain": 0.1,
            "standard_error": 0.01,
            "loss_with": 1.0,
            "loss_without": 1.1,
            "deviation": 0.5,
            **changes,
        }
    )


def context(stage=SeedStage.TRAINING, *, measured="good", gains=(0.1,), **metrics) -> GateContext:
    """A seed that passes every gate, but for what the arguments change."""
    defaults = {
        "epochs_in_current_stage": 10,
        "epochs_total": 21,
        "alpha": 1.0,
        "blending_steps_done": 5,
        "blending_steps_total": 5,
    }
    state = SeedState("s", "pack:b", "x", stage, SeedMetrics(**{**defaults, **metrics}))
    found = evidence() if measured == "good" else measured
    return GateContext(
        state,
        measure=lambda: found,
        gains=gains,
        germination=dict.fromkeys([*GERMINATION, "random numbers"], (True, "")),
    )


def verdicts(result: GateResult) -> dict[str, CheckVerdict]:
    return {check.name: check.verdict for check in result.checks}


def check(result: GateResult, name: str):
    (found,) = [c for c in result.checks if c.name == name]
    return found


def test_each_way_forward_has_its_gate():
    assert {stage.name: gate.name for stage, gate in GATE_INTO.items()} == {
        "GERMINATED": "G0",
        "TRAINING": "G1",
        "BLENDING": "G2",
        "SHADOWING": "G3",
        "PROBATIONARY": "G4",
        "FOSSILIZED": "G5",
    }


@pytest.mark.parametrize("profile", GateProfile)
@pytest.mark.parametrize("gate", GateLevel)
def test_a_good_seed_passes_every_gate(profile, gate):
    stage = SeedStage.GERMINATED if gate is G.G1 else SeedStage.TRAINING
    measured = {"initial_metric": 60.0, "metric_at_stage_start": 60.0, "current_metric": 70.0}
    result = QualityGates(profile).check(gate, context(stage, higher_is_better=True, **measured))
    assert result.gate is gate
    assert result.passed, str(result)
    assert result.epoch == 21
    passed = sum(check.verdict is CheckVerdict.PASSED for check in result.checks)
    assert result.reason.startswith(f"all {passed} checks passed")


def test_the_checks_of_the_evidence_gates_are_these():
    gates = QualityGates()
    assert {
        g.name: [c.name for c in gates.check(g, context()).checks] for g in GateLevel if g is not G.G0
    } == {
        "G1": ["just germinated", "finite parameters"],
        "G2": [
            "epochs in training",
            "finite parameters",
            "isolation violations",
            "stopped in incubation",
            "held-out samples",
            "gain",
            "gain in standard errors",
            "gain at alpha 1 in standard errors",
        ],
        "G3": ["finite parameters", "alpha", "ramp progress"],
        "G4": [
            "epochs in shadowing",
            "finite parameters",
            "held-out samples",
            "gain in standard errors",
            "output deviation",
        ],
        "G5": [
            "epochs in probation",
            "finite parameters",
            "isolation violations",
            "held-out samples",
            "gain",
            "gain in standard errors",
            "gain over the host at blending",
            "smallest gain in probation",
        ],
    }
    assert set(GERMINATION) <= {c.name for c in gates.check(G.G0, context()).checks}


@pytest.mark.parametrize(
    ("gate", "name", "change", "value", "threshold"),
    [
        (G.G2, "isolation violations", {"isolation_violations": 1}, 1.0, "<= 0"),
        (G.G2, "held-out samples", {"measured": evidence(samples=99)}, 99.0, ">= 100"),
        (G.G2, "gain", {"measured": evidence(gain=-0.1)}, -0.1, ">= 0"),
        (G.G4, "gain in standard errors", {"measured": evidence(gain=-0.021)}, -2.1, ">= -2"),
        (G.G4, "output deviation", {"measured": evidence(deviation=10.5)}, 10.5, "<= 10"),
        (G.G5, "smallest gain in probation", {"gains": (0.2, -0.3, 0.1)}, -0.3, ">= 0"),
    ],
)
def test_one_bad_value_fails_its_gate_by_name_value_and_threshold(gate, name, change, value, threshold):
    result = QualityGates().check(gate, context(**change))
    failed = check(result, name)
    assert not result.passed
    assert failed.verdict is CheckVerdict.FAILED
    assert failed.value == pytest.approx(value)
    assert failed.threshold == threshold
    assert str(failed) == f"{name} failed: {value:.4g} (needs {threshold})"
    assert str(failed) in str(result)
    assert result.verdict is CheckVerdict.FAILED
    assert str(result).startswith(f"{gate.name} failed: ")


@pytest.mark.parametrize(
    ("gate", "name", "change", "value", "threshold"),
    [
        (G.G2, "epochs in training", {"epochs_in_current_stage": 2}, 2.0, ">= 3"),
        (G.G3, "alpha", {"alpha": 0.99}, 0.99, ">= 1"),
        (G.G3, "ramp progress", {"blending_steps_done": 4}, 0.8, ">= 1"),
        (G.G4, "epochs in shadowing", {"epochs_in_current_stage": 0}, 0.0, ">= 1"),
        (G.G5, "epochs in probation", {"epochs_in_current_stage": 2}, 2.0, ">= 3"),
    ],
)
def test_a_gate_that_lacks_time_alone_waits(gate, name, change, value, threshold):
    result = QualityGates().check(gate, context(**change))
    waiting = check(result, name)
    assert not result.passed
    assert waiting.verdict is result.verdict is CheckVerdict.WAITING
    assert str(waiting) == f"{name}: {value:.4g} so far (needs {threshold})"
    assert str(result) == f"{gate.name} waiting: {waiting}"
    assert set(verdicts(result).values()) <= {CheckVerdict.WAITING, CheckVerdict.PASSED}


def test_a_check_of_a_pack_may_wait():
    warm = GateCheckSpec("warm", (G.G5,), lambda c: c.state.metrics.epochs_total, minimum=30, waits=True)
    result = QualityGates(extra_checks=[warm]).check(G.G5, context())
    assert str(result) == "G5 waiting: warm: 21 so far (needs >= 30)"
    unmeasured = replace(warm, measure=lambda c: None)
    result = QualityGates(extra_checks=[unmeasured]).check(G.G5, context())
    assert result.verdict is CheckVerdict.FAILED


@pytest.mark.parametrize("gate", [G.G1, G.G2, G.G3, G.G4, G.G5])
def test_a_seed_with_a_parameter_that_is_not_finite_passes_no_gate(gate):
    stage = SeedStage.GERMINATED if gate is G.G1 else SeedStage.TRAINING
    good = context(stage)
    bad = GateContext(good.state, good.measure, good.gains, parameters_finite=lambda: False)
    assert QualityGates().check(gate, good).passed
    assert check(QualityGates().check(gate, bad), "finite parameters").verdict is CheckVerdict.FAILED


@pytest.mark.parametrize(
    ("gate", "name", "measured"),
    [
        (G.G2, "held-out samples", None),
        (G.G2, "gain in standard errors", evidence(skewness=math.nan)),
        (G.G2, "gain in standard errors", evidence(smaller=((0.3, PairedGain(100, math.nan, 0.1)),))),
        (G.G5, "gain over the host at blending", evidence(since_blending=PairedGain(100, 0.1, math.inf))),
        (G.G2, "gain", evidence(gain=math.nan)),
        (G.G2, "gain", evidence(gain=math.inf)),
        (G.G2, "gain in standard errors", evidence(standard_error=math.nan)),
        (G.G2, "gain in standard errors", evidence(standard_error=math.inf)),
        (G.G4, "output deviation", evidence(deviation=math.nan)),
        (G.G4, "output deviation", evidence(deviation=math.inf)),
        (G.G4, "gain in standard errors", evidence(gain=-math.inf)),
        (G.G5, "gain", None),
        (G.G5, "smallest gain in probation", None),
    ],
)
def test_missing_nan_and_infinite_evidence_was_never_measured_and_fails(gate, name, measured):
    result = QualityGates().check(gate, context(measured=measured))
    assert not result
    assert check(result, name).verdict is CheckVerdict.NEVER_MEASURED
    assert "never measured" in str(check(result, name))


def test_a_nan_among_the_gains_of_probation_fails():
    for gains in [(math.nan, 0.1), (0.1, math.nan), ()]:
        assert not QualityGates().check(G.G5, context(gains=gains)), gains


def test_a_seed_that_saves_the_same_on_every_sample_passes():
    assert QualityGates().check(G.G2, context(measured=evidence(standard_error=0.0)))
    assert not QualityGates().check(G.G2, context(measured=evidence(standard_error=0.0, gain=0.0)))


@given(st.sampled_from([G.G2, G.G4, G.G5]), st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_no_gate_passes_on_a_number_that_is_not_finite(gate, gain, error):
    result = QualityGates().check(gate, context(measured=evidence(gain=gain, standard_error=abs(error))))
    if not (math.isfinite(gain) and math.isfinite(error)):
        assert not result
    assert result.passed == (not result.failed_checks)


# -- the sequential test -----------------------------------------------------------------------------------------------


def at_look(number, share=1.0, *, measured, stage=SeedStage.TRAINING) -> GateContext:
    seen = context(stage, measured=measured)
    return GateContext(seen.state, seen.measure, seen.gains, look=lambda: Look(number, share))


@pytest.mark.parametrize(
    ("number", "share", "needed"),
    [(1, 1.0, 2.6264), (8, 1.0, 2.6264), (9, 1.0, 2.6264), (10, 1.0, 3.0081), (1, 0.5, 2.8713)],
)
def test_the_gain_must_be_significant_at_what_the_look_may_spend(number, share, needed):
    for gain, passes in ((needed * 0.99, False), (needed * 1.01, True)):
        measured = evidence(gain=gain * 0.01)
        result = QualityGates().check(G.G2, at_look(number, share, measured=measured))
        found = check(result, "gain in standard errors")
        assert found.minimum == pytest.approx(needed, rel=1e-3)  # quantiles of scipy.stats.t with 99 degrees
        assert found.verdict is (CheckVerdict.PASSED if passes else CheckVerdict.FAILED)
        assert f"look {number}" in found.detail
        assert result.finding.look == number
        assert result.finding.error_rate == pytest.approx(0.05 * share)
        assert (result.finding.bound > 0) == passes


def test_a_seed_is_accepted_on_its_best_alpha_with_a_correction_for_asking_twice():
    weak = evidence(gain=0.01)
    for size, passes in ((0.0275, False), (0.0290, True)):  # 2.62 would do for one alpha, 2.87 for two
        measured = replace(weak, smaller=((0.3, PairedGain(100, size, 0.01)),))
        result = QualityGates().check(G.G2, at_look(1, measured=measured))
        assert result.passed == passes
        assert result.finding.alpha == 0.3
        assert result.finding.effect == size
        assert "alpha 0.3" in str(result)


def test_a_seed_that_does_harm_at_alpha_1_is_refused_whatever_it_does_at_less():
    measured = replace(evidence(gain=-0.03), smaller=((0.3, PairedGain(100, 0.1, 0.01)),))
    result = QualityGates().check(G.G2, at_look(1, measured=measured))
    assert [c.name for c in result.failed_checks] == ["gain at alpha 1 in standard errors"]


@pytest.mark.parametrize(("gain", "passes"), [(0.0, True), (-0.015, True), (-0.03, False)])
def test_proof_can_be_left_to_g5_and_g2_then_asks_for_no_harm(gain, passes):
    gates = QualityGates(thresholds=GateThresholds(prove_before_blending=False))
    measured = evidence(gain=gain)  # with a standard error of .01
    assert gates.check(G.G2, at_look(1, measured=measured)).passed is passes
    assert not QualityGates().check(G.G2, at_look(1, measured=measured))
    probation = {check.name for check in gates.check(G.G5, at_look(1, measured=measured)).checks}
    assert {"gain", "gain in standard errors", "gain over the host at blending"} <= probation


def test_probation_is_decided_on_the_model_as_it_is():
    measured = replace(evidence(gain=0.01), smaller=((0.3, PairedGain(100, 0.1, 0.01)),))
    result = QualityGates().check(G.G5, at_look(1, measured=measured))
    assert result.finding.alpha == 1.0
    assert check(result, "gain in standard errors").verdict is CheckVerdict.FAILED


def test_without_a_smallest_gain_the_test_alone_decides():
    gates = QualityGates(thresholds=GateThresholds(min_gain=float("-inf")))
    for measured, passes in (
        (evidence(gain=0.1), True),
        (evidence(gain=0.01), False),
        (evidence(gain=-0.1), False),
    ):
        context = replace(at_look(1, measured=measured), gains=(-0.2, 0.1, 0.1))
        result = gates.check(G.G5, context)
        assert result.passed is passes
        assert not {"gain", "smallest gain in probation"} & {c.name for c in result.checks}
        json.dumps(result.to_dict(), allow_nan=False)


def test_the_model_must_beat_its_host_as_it_was_when_blending_began():
    for gain, verdict in ((0.1, CheckVerdict.PASSED), (0.01, CheckVerdict.FAILED)):
        measured = evidence(since_blending=PairedGain(100, gain, 0.01))
        result = QualityGates().check(G.G5, at_look(1, measured=measured))
        assert check(result, "gain over the host at blending").verdict is verdict
        assert result.passed == (verdict is CheckVerdict.PASSED)


def test_a_start_that_was_never_measured_is_said_and_not_required():
    result = QualityGates().check(G.G5, at_look(1, measured=evidence()))
    found = check(result, "gain over the host at blending")
    assert found.verdict is CheckVerdict.NOT_REQUIRED
    assert "never measured" in str(found)
    assert result.passed
    relaxed = QualityGates(thresholds=GateThresholds(against_start="not asked"))
    measured = evidence(since_blending=PairedGain(100, -1.0, 0.01))
    assert relaxed.check(G.G5, at_look(1, measured=measured)).passed


def test_what_is_asked_of_the_start_is_one_of_three_things():
    with pytest.raises(
        ValueError, match="against_start must be one of 'proved', 'no harm', 'not asked', not 'harm'"
    ):
        GateThresholds(against_start="harm")


@pytest.mark.parametrize(("gain", "passes"), [(0.0, True), (-0.015, True), (-0.03, False)])
def test_the_start_can_be_asked_for_no_more_than_no_harm(gain, passes):
    lenient = QualityGates(thresholds=GateThresholds(against_start="no harm"))
    measured = evidence(since_blending=PairedGain(100, gain, 0.01))
    result = lenient.check(G.G5, at_look(1, measured=measured))
    assert result.passed is passes
    assert check(result, "gain over the host at blending").threshold == ">= -2"
    unknown = lenient.check(G.G5, at_look(1, measured=evidence()))
    assert check(unknown, "gain over the host at blending").verdict is CheckVerdict.NOT_REQUIRED
    assert unknown.passed


def test_a_gate_of_nothing_but_what_is_not_required_does_not_pass():
    assert not GateResult(G.G5, (GateCheck("x", None, CheckVerdict.NOT_REQUIRED, 1.0),))


def test_a_fixed_threshold_can_stand_in_for_the_test():
    gates = QualityGates(thresholds=GateThresholds(min_t=3.0))
    for gain, passes in ((0.029, False), (0.031, True)):
        result = gates.check(G.G2, at_look(50, measured=evidence(gain=gain)))
        assert result.passed == passes
        assert check(result, "gain in standard errors").threshold == ">= 3"


def test_the_finding_of_a_gate_survives_as_plain_data():
    result = QualityGates().check(G.G2, at_look(3, 0.5, measured=evidence()))
    assert isinstance(result.finding, Finding)
    assert GateResult.from_dict(result.to_dict()) == result
    assert result.to_dict()["finding"]["samples"] == 100
    assert "gain +0.1 (97.5 % interval +0.0" in str(result)
    assert "n = 100, alpha 1, look 3" in str(result)
    damaged = result.to_dict() | {"finding": {"look": 1}}
    with pytest.raises(CheckpointError, match="GateResult cannot be read: finding has other fields"):
        GateResult.from_dict(damaged)


def test_gates_without_evidence_have_no_finding():
    assert QualityGates().check(G.G3, context()).finding is None
    assert QualityGates().check(G.G2, context(measured=None)).finding is None
    assert QualityGates().check(G.G2, context(epochs_in_current_stage=0)).finding is None
    assert QualityGates(GateProfile.REPORT).check(G.G2, context()).finding is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"error_rate": 0.0}, "level must be above 0 and at most 1, not 0.0"),
        ({"planned_looks": 0}, "planned_looks must be at least 1, not 0"),
        ({"smaller_alphas": (1.0,)}, "between 0 and 1, not 1.0"),
        ({"smaller_alphas": (0.3, 0.3)}, "names one twice"),
        ({"error_budget": "per day"}, "per day"),
    ],
)
def test_thresholds_out_of_range_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        GateThresholds(**change)


@pytest.mark.parametrize("gate", [6, -1, "G2", None, 2.5])
def test_an_unknown_gate_fails_and_says_which_there_are(gate):
    result = QualityGates().check(gate, context())
    assert not result.passed
    assert result.gate is None
    assert f"{gate!r} is none of G0, G1, G2, G3, G4, G5" in result.reason


def test_a_gate_without_checks_does_not_pass():
    empty = GateResult(G.G2, ())
    assert not empty
    assert empty.reason == "nothing was checked"


def test_the_reason_is_the_first_failure_before_what_was_not_measured():
    result = QualityGates().check(G.G2, context(epochs_in_current_stage=1, measured=None))
    assert result.reason == "epochs in training: 1 so far (needs >= 3)"
    assert str(result) == f"G2 waiting: {result.reason}"
    poor = replace(context(epochs_in_current_stage=1), parameters_finite=lambda: False)
    result = QualityGates().check(G.G2, poor)
    assert result.reason == "finite parameters failed"
    assert str(result) == f"G2 failed: {result.reason}"
    unmeasured = QualityGates().check(G.G2, context(measured=None))
    assert unmeasured.reason.startswith("held-out samples never measured: nothing (needs >= 100)")


def test_a_result_as_plain_data_names_every_check():
    data = QualityGates().check(G.G3, context(alpha=0.5)).to_dict()
    assert (data["gate"], data["passed"], data["epoch"]) == ("G3", False, 21)
    assert data["checks"][1] == {
        "name": "alpha",
        "value": 0.5,
        "minimum": 1.0,
        "maximum": None,
        "verdict": "waiting",
        "detail": "",
    }


# -- germination -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GERMINATION)
def test_each_finding_at_germination_can_refuse_it(name):
    findings = context().germination
    refused = QualityGates().check(
        G.G0, GateContext(context().state, germination={**findings, name: (False, "because")})
    )
    assert [c.name for c in refused.failed_checks] == [name]
    assert refused.reason == f"{name} failed: because"
    unseen = {key: found for key, found in findings.items() if key != name}
    result = QualityGates().check(G.G0, GateContext(context().state, germination=unseen))
    assert verdicts(result)[name] is CheckVerdict.NEVER_MEASURED
    assert not result


# -- checks from packs -----------------------------------------------------------------------------------------------


def extra(measure, **more) -> GateCheckSpec:
    return GateCheckSpec(**{"name": "extra", "gates": (G.G2,), "measure": measure, "minimum": 1.0, **more})


def raises(_):
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("measure", "verdict", "says"),
    [
        (raises, CheckVerdict.FAILED, "the check raised RuntimeError: out of order"),
        (lambda _: "much", CheckVerdict.FAILED, "could not convert string to float: 'much'"),
        (lambda _: [1.0], CheckVerdict.FAILED, "TypeError"),
        (lambda _: torch.ones(2), CheckVerdict.FAILED, "the check raised"),
        (lambda _: None, CheckVerdict.NEVER_MEASURED, "no measurement"),
        (lambda _: math.nan, CheckVerdict.NEVER_MEASURED, "not a finite number"),
        (lambda _: math.inf, CheckVerdict.NEVER_MEASURED, "not a finite number"),
        (lambda _: 0.5, CheckVerdict.FAILED, "0.5 (needs >= 1)"),
        (lambda _: False, CheckVerdict.FAILED, "extra failed"),
        (lambda _: True, CheckVerdict.PASSED, "extra passed"),
        (lambda _: torch.tensor(1.0), CheckVerdict.PASSED, "1 (needs >= 1)"),
    ],
)
def test_an_extra_check_can_veto(measure, verdict, says):
    result = QualityGates(extra_checks=[extra(measure)]).check(G.G2, context())
    assert check(result, "extra").verdict is verdict
    assert says in str(check(result, "extra"))
    assert result.passed == (verdict is CheckVerdict.PASSED)


def test_an_extra_check_cannot_force_a_gate():
    gates = QualityGates(extra_checks=[extra(lambda _: 1e9)])
    result = gates.check(G.G2, context(measured=evidence(gain=-1.0)))
    assert verdicts(result)["extra"] is CheckVerdict.PASSED
    assert not result


def test_an_extra_check_concerns_its_own_gates_only():
    gates = QualityGates(extra_checks=[extra(raises)])
    assert gates.check(G.G3, context()).passed
    assert not gates.check(G.G2, context()).passed


def test_two_checks_of_one_name_both_count():
    gates = QualityGates(extra_checks=[extra(lambda _: 1.0), extra(lambda _: 0.0)])
    assert [c.verdict.value for c in gates.check(G.G2, context()).checks if c.name == "extra"] == [
        "passed",
        "failed",
    ]


def test_a_check_with_both_bounds_shows_both():
    spec = extra(lambda _: 3.0, minimum=1.0, maximum=2.0)
    assert spec.run(context()).threshold == ">= 1, <= 2"
    assert spec.run(context()).verdict is CheckVerdict.FAILED


def test_a_check_needs_a_bound_and_a_gate():
    with pytest.raises(BlueprintError, match="'extra' needs a minimum or a maximum"):
        extra(lambda _: 1.0, minimum=None)
    with pytest.raises(BlueprintError, match="'extra' names no gate"):
        extra(lambda _: 1.0, gates=())


def test_costly_checks_run_only_when_the_cheap_ones_passed():
    asked = []

    def measure():
        asked.append(1)
        return evidence()

    early = context(epochs_in_current_stage=0).state
    result = QualityGates().check(G.G2, GateContext(early, measure))
    assert asked == []
    assert check(result, "gain").verdict is CheckVerdict.WAITING
    assert check(result, "gain").detail == "asked when the earlier checks have passed"
    result = QualityGates().check(G.G2, GateContext(early, measure, parameters_finite=lambda: False))
    assert asked == []
    assert check(result, "gain").verdict is CheckVerdict.NEVER_MEASURED
    assert check(result, "gain").detail == "an earlier check failed"


# -- the report's profile --------------------------------------------------------------------------------------------


def test_the_report_profile_has_the_thresholds_of_the_reviewed_system():
    thresholds = QualityGates(GateProfile.REPORT).thresholds
    assert thresholds == GateThresholds.report()
    assert thresholds.max_isolation_violations == 10
    assert thresholds.min_training_improvement == 0.5
    assert thresholds.min_blending_alpha == 0.95
    assert QualityGates().thresholds == GateThresholds()
    assert QualityGates("report").profile is GateProfile.REPORT  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gate", "name", "change"),
    [
        (G.G2, "improvement since stage start", {"metric_at_stage_start": 60.0, "current_metric": 60.4}),
        (G.G2, "isolation violations", {"isolation_violations": 11}),
        (G.G3, "alpha", {"alpha": 0.94}),
        (G.G3, "epochs in blending", {"epochs_in_current_stage": 2}),
        (G.G5, "total improvement", {"initial_metric": 60.0, "current_metric": 59.0}),
    ],
)
def test_the_report_profile_judges_the_whole_model(gate, name, change):
    good = {"initial_metric": 50.0, "metric_at_stage_start": 60.0, "current_metric": 60.5, "measured": None}
    gates = QualityGates(GateProfile.REPORT)
    assert gates.check(gate, context(higher_is_better=True, **good))
    result = gates.check(gate, context(higher_is_better=True, **{**good, **change}))
    assert [c.name for c in result.failed_checks] == [name]


@pytest.mark.parametrize("metric", [None, math.nan, math.inf])
@pytest.mark.parametrize("gate", [G.G2, G.G4, G.G5])
def test_the_report_profile_fails_without_a_usable_metric(gate, metric):
    measured = {"initial_metric": metric, "metric_at_stage_start": metric, "current_metric": metric}
    result = QualityGates(GateProfile.REPORT).check(gate, context(**measured))
    assert not result
    assert CheckVerdict.NEVER_MEASURED in verdicts(result).values()


# -- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", GateProfile)
def test_gates_survive_pickling_with_their_checks(profile):
    gates = QualityGates(profile, open_thresholds(min_gain=0.25), [extra(raises)])
    again = pickle.loads(pickle.dumps(gates))
    assert (again.profile, again.thresholds, again.extra_checks) == (
        profile,
        gates.thresholds,
        gates.extra_checks,
    )
    assert [c.name for c in again.checks] == [c.name for c in gates.checks]
    assert again.check(G.G2, context()).reason == gates.check(G.G2, context()).reason


# -- in a slot -------------------------------------------------------------------------------------------------------


def test_a_gate_is_evaluated_once_an_epoch():
    model, recorder = make_model()
    evaluator = CountingEvaluator(model)
    model.evaluate_with(evaluator)
    bring_to(model, SeedStage.PROBATIONARY)
    evaluator.calls = 0
    result = model.step_epoch(1.0)[FIRST]
    assert evaluator.calls == 2  # with the seed and without it
    assert model.slots[FIRST].check_gate(G.G5) is result
    assert model.advance_stage(FIRST) is result
    assert model.measure(FIRST) is model.slots[FIRST].last_evidence
    assert evaluator.calls == 2
    assert [e.gate for e in recorder.events if e.type.value == "gate_evaluated"][-1:] == ["G5"]
    model.step_epoch(1.0)
    assert evaluator.calls == 4


def test_an_evaluator_that_is_gone_leaves_nothing_to_pass_on():
    model, _ = make_model()
    bring_to(model, SeedStage.PROBATIONARY)
    for _ in range(3):
        assert model.slots[FIRST].stage is SeedStage.PROBATIONARY
        passed = model.step_epoch(1.0)[FIRST].passed
    assert passed
    model.evaluate_with(None)
    result = model.step_epoch(1.0)[FIRST]
    assert model.measure(FIRST) is None
    assert model.measure(FIRST) is None
    assert not result
    assert check(result, "gain").verdict is CheckVerdict.NEVER_MEASURED
    assert not model.advance_stage(FIRST)
    assert model.slots[FIRST].stage is SeedStage.PROBATIONARY


def test_asking_too_early_does_not_hide_the_evidence_of_the_epoch():
    model, _ = make_model()
    bring_to(model, SeedStage.GERMINATED)
    assert model.measure(FIRST) is None
    assert model.advance_stage(FIRST)
    assert model.measure(FIRST) is not None


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.SHADOWING, SeedStage.PROBATIONARY])
def test_an_evaluator_that_raises_fails_the_gate_and_not_the_training(stage):
    model, _ = make_model()
    bring_to(model, stage)

    def broken():
        raise RuntimeError("no data")

    model.evaluate_with(broken)
    with pytest.warns(MisuseWarning, match="no data") as said:
        results = [model.step_epoch(1.0)[FIRST] for _ in range(3)]
    assert len(said) == 1
    assert not any(results)
    assert "RuntimeError: no data" in results[-1].reason
    assert model.slots[FIRST].stage is stage


def test_a_mean_loss_is_no_evidence():
    model, _ = make_model()
    bring_to(model, SeedStage.TRAINING)
    model.evaluate_with(lambda: torch.tensor(1.0))
    model.step_epoch(1.0)
    with pytest.warns(MisuseWarning, match="reduction="):
        result = model.step_epoch(1.0)[FIRST]
    assert not result
    assert "one loss per held-out sample: reduction=" in result.reason


def test_the_last_epochs_of_probation_count_for_its_smallest_gain():
    model, _ = make_model(open_config(gates=QualityGates(thresholds=open_thresholds(min_probation_epochs=3))))
    bring_to(model, SeedStage.PROBATIONARY)
    gains = []
    for _ in range(4):
        result = model.step_epoch(1.0)[FIRST]
        gains.append(model.slots[FIRST].last_evidence.gain)
        with torch.no_grad():
            for parameter in model.slots[FIRST].seed_parameters():
                parameter.mul_(1.1)
    assert result.passed
    assert check(result, "smallest gain in probation").value == min(gains[-3:])  # as many as the dwell
    assert len(set(gains)) == 4


def test_one_bad_epoch_of_probation_is_forgotten_in_time():
    assert not QualityGates().check(G.G5, context(gains=(0.1, 0.1, -0.3, 0.1, 0.1)))
    assert QualityGates().check(G.G5, context(gains=(-0.3, 0.1, 0.1, 0.1)))


def test_measuring_changes_nothing_but_what_is_known():
    model, _ = make_model()
    bring_to(model, SeedStage.TRAINING, blueprint="normed")
    weights = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("_extra_state")}
    random_numbers = torch.get_rng_state()
    assert model.training
    assert model.measure(FIRST) is not None
    assert all(module.training for module in model.modules())
    assert torch.equal(random_numbers, torch.get_rng_state())
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in weights.items())


# -- evidence --------------------------------------------------------------------------------------------------------


def test_evidence_is_the_paired_t_test():
    with_seed, without = torch.tensor([1.0, 2.0, 2.5, 0.5]), torch.tensor([1.5, 2.0, 3.5, 1.5])
    found = SeedEvidence.from_losses(with_seed, without, 0.25)
    saved = [0.5, 0.0, 1.0, 1.0]
    mean = sum(saved) / 4
    error = math.sqrt(sum((s - mean) ** 2 for s in saved) / 3) / 2
    assert found.samples == 4
    assert found.gain == pytest.approx(mean)
    assert found.standard_error == pytest.approx(error)
    assert found.t == pytest.approx(mean / error)
    student = 3.1824  # the .975 quantile with 3 degrees of freedom
    assert found.interval[0] <= mean - student * error * 0.99
    assert found.interval[1] >= mean + student * error * 0.99
    assert (found.loss_with, found.loss_without, found.deviation) == (1.5, 2.125, 0.25)


@pytest.mark.parametrize(
    ("a", "b", "shown"),
    [
        (torch.ones(3), torch.ones(4), r"\(3,\)\n.*\(4,\)"),
        (torch.ones(()), torch.ones(()), r"\(\)\n.*\(\)"),
        (torch.ones(1), torch.ones(1), r"\(1,\)\n.*\(1,\)"),
        (torch.ones(2, 2), torch.ones(2, 2), r"\(2, 2\)\n.*\(2, 2\)"),
    ],
)
def test_losses_that_are_not_paired_are_refused(a, b, shown):
    with pytest.raises(ValueError, match=shown):
        SeedEvidence.from_losses(a, b)


GAINS = st.builds(PairedGain, st.integers(0, 10**6), st.floats(), st.floats(), st.floats())


@given(
    st.builds(
        SeedEvidence,
        samples=st.integers(0, 10**6),
        gain=st.floats(),
        standard_error=st.floats(),
        loss_with=st.floats(),
        loss_without=st.floats(),
        deviation=st.floats(),
        skewness=st.floats(),
        smaller=st.lists(st.tuples(st.floats(0.01, 0.99), GAINS), max_size=2).map(tuple),
        since_blending=st.none() | GAINS,
    )
)
def test_evidence_survives_as_plain_data(found):
    again = SeedEvidence.from_dict(found.to_dict())
    assert repr(again) == repr(found)
    assert math.isnan(found.t) or found.t == again.t


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"samples": 3}, "(?s)SeedEvidence cannot be read.*missing: deviation, gain"),
        ([], "cannot be read"),
        (
            evidence().to_dict() | {"gain": "much"},
            "SeedEvidence cannot be read: gain must be a number, not 'much'",
        ),
        (
            evidence().to_dict() | {"samples": 1.5},
            "SeedEvidence cannot be read: samples must be a whole number of at least 0, not 1.5",
        ),
        (evidence().to_dict() | {"colour": 1}, "colour"),
        (
            evidence().to_dict() | {"smaller": [[2.0, PairedGain(3, 0.0, 0.0).to_dict()]]},
            "must be a number above 0 and below 1, not 2.0",
        ),
        (evidence().to_dict() | {"smaller": [[0.3, {"gain": 1}]]}, r"smaller\[0\]\[1\] has other fields"),
        (evidence().to_dict() | {"since_blending": 1}, "since_blending must be a mapping, not 1"),
    ],
)
def test_damaged_evidence_is_refused(data, says):
    with pytest.raises(CheckpointError, match=says):
        SeedEvidence.from_dict(data)


def test_a_gain_on_few_samples_was_never_measured() -> None:
    with_seed, without = torch.zeros(300), torch.zeros(300)
    without[:18] = 1.0
    result = QualityGates().check(
        GateLevel.G2, context(measured=SeedEvidence.from_losses(with_seed, without, 0.5))
    )
    check = next(c for c in result.checks if c.name == "gain in standard errors")
    assert not result.passed
    assert check.verdict is CheckVerdict.NEVER_MEASURED
    assert "only 18 samples differ, of 300, and 100 must" in str(result)


def test_right_and_wrong_answers_are_judged_however_few_differ() -> None:
    right, wrong = torch.ones(300, dtype=torch.bool), torch.ones(300, dtype=torch.bool)
    wrong[:30] = False
    measured = SeedEvidence.from_losses(right, wrong, 0.5, higher_is_better=True)
    assert QualityGates().check(GateLevel.G2, context(measured=measured)).passed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gates": GateLevel.G1}, "gates must be a tuple of GateLevel.G0, .*, not <GateLevel.G1"),
        ({"gates": ("G1",)}, "gates must be a tuple .*not .'G1'"),
        ({"gates": ()}, "names no gate"),
        ({"minimum": "1"}, "minimum must be a number, not '1'"),
        ({"measure": 1.0}, "measure must be a function"),
        ({"name": 5}, "named by text, not 5"),
    ],
)
def test_a_declaration_of_a_check_that_cannot_be_asked_is_refused_where_it_is_made(changes, says) -> None:
    given = {"name": "never", "gates": (GateLevel.G1,), "measure": lambda context: 0.0, "minimum": 1.0}
    with pytest.raises(BlueprintError, match=says):
        GateCheckSpec(**{**given, **changes})


def test_the_gates_of_a_check_may_be_given_by_their_numbers() -> None:
    assert GateCheckSpec("n", [1], lambda context: 0.0, minimum=1.0).gates == (GateLevel.G1,)


@pytest.mark.parametrize(
    ("check", "score"),
    [
        (GateCheck("a", 3.0, CheckVerdict.PASSED, minimum=1.0), 1.0),
        (GateCheck("a", 1.0, CheckVerdict.FAILED, minimum=4.0), 0.25),
        (GateCheck("a", -1.0, CheckVerdict.FAILED, minimum=4.0), 0.0),
        (GateCheck("a", -3.0, CheckVerdict.FAILED, minimum=-2.0), 0.0),
        (GateCheck("a", 10.0, CheckVerdict.FAILED, maximum=5.0), 0.5),
        (GateCheck("a", 2.0, CheckVerdict.FAILED, maximum=0.0), 0.0),
        (GateCheck("a", None, CheckVerdict.FAILED, minimum=1.0), 0.0),
        (GateCheck("a", math.nan, CheckVerdict.NEVER_MEASURED, minimum=1.0), 0.0),
    ],
)
def test_a_check_scores_how_near_it_is_to_its_bound(check, score):
    assert check.score == score


def test_a_gate_scores_the_mean_of_its_checks_and_1_only_if_it_passed():
    passed = GateCheck("a", 1.0, CheckVerdict.PASSED, minimum=1.0)
    half = GateCheck("b", 2.0, CheckVerdict.FAILED, minimum=4.0)
    waived = GateCheck("c", None, CheckVerdict.NOT_REQUIRED, minimum=1.0)
    assert GateResult(GateLevel.G2, (passed, half, waived)).score == 0.75
    assert GateResult(GateLevel.G2, (passed, waived)).score == 1.0
    assert GateResult(GateLevel.G2, (waived,)).score == GateResult(GateLevel.G2, ()).score == 0.0
    assert GateResult(GateLevel.G2, (half,)).to_dict()["score"] == 0.5


def test_the_score_of_g3_is_the_share_of_the_ramp():
    metrics = SeedMetrics(alpha=0.25, blending_steps_done=1, blending_steps_total=4)
    state = SeedState("s", "b", "slot", SeedStage.BLENDING, metrics)
    result = QualityGates().check(GateLevel.G3, GateContext(state))
    assert result.score == pytest.approx((1.0 + 0.25 + 0.25) / 3)  # the seed's parameters are finite
