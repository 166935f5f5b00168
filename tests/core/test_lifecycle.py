"""Stages, transitions, metrics and the state of a seed as data."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kasmina_core import (
    VALID_TRANSITIONS,
    CheckpointError,
    SeedMetrics,
    SeedStage,
    SeedState,
    TransitionError,
    is_active_stage,
    is_failure_stage,
    is_terminal_stage,
    is_valid_transition,
)
from kasmina_core.lifecycle import HISTORY_LENGTH

S = SeedStage

VALUES = {
    "UNKNOWN": 0,
    "DORMANT": 1,
    "GERMINATED": 2,
    "TRAINING": 3,
    "BLENDING": 4,
    "SHADOWING": 5,
    "PROBATIONARY": 6,
    "FOSSILIZED": 7,
    "CULLED": 8,
    "EMBARGOED": 9,
    "RESETTING": 10,
}

MOVES = {
    (S.DORMANT, S.GERMINATED),
    (S.GERMINATED, S.TRAINING),
    (S.TRAINING, S.BLENDING),
    (S.BLENDING, S.SHADOWING),
    (S.SHADOWING, S.PROBATIONARY),
    (S.PROBATIONARY, S.FOSSILIZED),
    (S.GERMINATED, S.CULLED),
    (S.TRAINING, S.CULLED),
    (S.BLENDING, S.CULLED),
    (S.SHADOWING, S.CULLED),
    (S.PROBATIONARY, S.CULLED),
    (S.CULLED, S.EMBARGOED),
    (S.EMBARGOED, S.RESETTING),
    (S.RESETTING, S.DORMANT),
}


def test_stage_values_are_those_written_to_files():
    assert {stage.name: int(stage) for stage in SeedStage} == VALUES


def test_the_valid_transitions_are_exactly_these():
    assert {(a, b) for a, targets in VALID_TRANSITIONS.items() for b in targets} == MOVES
    assert set(VALID_TRANSITIONS) == set(SeedStage)


def test_the_transitions_cannot_be_changed():
    with pytest.raises(TypeError):
        VALID_TRANSITIONS[S.DORMANT] = (S.FOSSILIZED,)  # type: ignore[index]


@pytest.mark.parametrize("current", SeedStage)
@pytest.mark.parametrize("target", SeedStage)
def test_a_state_moves_where_the_transitions_lead_and_nowhere_else(current, target):
    state = SeedState("s", "pack:b", "slot", stage=current)
    before = state.to_dict()
    assert is_valid_transition(current, target) == state.can_move_to(target) == ((current, target) in MOVES)
    if (current, target) in MOVES:
        state.move_to(target)
        assert state.stage is target
        assert list(state.stage_history) == [(target, 0)]
    else:
        with pytest.raises(TransitionError, match=f"from {current.name} to {target.name}"):
            state.move_to(target)
        assert state.to_dict() == before


def test_a_refused_move_lists_where_the_seed_may_go():
    with pytest.raises(
        TransitionError, match=r"Seed 'a' in slot 'x'.*\n.*allowed from TRAINING: BLENDING, CULLED"
    ):
        SeedState("a", "p:b", "x", stage=S.TRAINING).move_to(S.DORMANT)
    with pytest.raises(TransitionError, match="allowed from FOSSILIZED: none"):
        SeedState("a", "p:b", "x", stage=S.FOSSILIZED).move_to(S.CULLED)


@pytest.mark.parametrize("target", ["BLENDING", None, 99, 3.5])
def test_what_is_no_stage_is_refused(target):
    state = SeedState("a", "p:b", "x", stage=S.TRAINING)
    with pytest.raises(TransitionError, match="allowed from TRAINING"):
        state.move_to(target)
    assert state.stage is S.TRAINING


def test_a_number_that_is_a_stage_becomes_that_stage():
    state = SeedState("a", "p:b", "x", stage=S.TRAINING)
    state.move_to(4)  # type: ignore[arg-type]
    assert state.stage is S.BLENDING
    assert state.stage_history[-1][0] is S.BLENDING


def test_predicates_partition_the_stages():
    assert [s for s in SeedStage if is_active_stage(s)] == [
        S.TRAINING,
        S.BLENDING,
        S.SHADOWING,
        S.PROBATIONARY,
        S.FOSSILIZED,
    ]
    assert [s for s in SeedStage if is_failure_stage(s)] == [S.CULLED, S.EMBARGOED, S.RESETTING]
    assert [s for s in SeedStage if is_terminal_stage(s)] == [S.FOSSILIZED]
    assert is_terminal_stage(7)  # type: ignore[arg-type]


def test_a_move_restarts_the_counters_of_the_stage_and_keeps_those_of_the_seed():
    state = SeedState("a", "p:b", "x", stage=S.GERMINATED)
    state.metrics.record(2.0)
    state.metrics.epochs_total = state.metrics.epochs_in_current_stage = 5
    state.metrics.record(1.5)
    state.move_to(S.TRAINING)
    assert state.metrics.epochs_in_current_stage == 0
    assert state.metrics.epochs_total == 5
    assert state.metrics.metric_at_stage_start == 1.5
    assert state.metrics.improvement_since_stage_start == 0.0
    assert state.metrics.total_improvement == 0.5


def test_the_previous_stage_is_unknown_at_first():
    state = SeedState("a", "p:b", "x")
    assert state.previous_stage is S.UNKNOWN
    state.move_to(S.GERMINATED)
    state.move_to(S.TRAINING)
    assert state.previous_stage is S.GERMINATED


def test_the_history_of_stages_is_bounded():
    state = SeedState("a", "p:b", "x")
    cycle = [S.GERMINATED, S.CULLED, S.EMBARGOED, S.RESETTING, S.DORMANT]
    for turn in range(60):
        for stage in cycle:
            state.metrics.epochs_total = turn
            state.move_to(stage)
    assert len(state.stage_history) == HISTORY_LENGTH == 100
    assert state.stage_history[-1] == (S.DORMANT, 59)
    again = SeedState.from_dict(state.to_dict())
    again.move_to(S.GERMINATED)
    assert len(again.stage_history) == HISTORY_LENGTH


# -- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("higher_is_better", "sign"), [(True, 1.0), (False, -1.0)])
def test_improvements_are_positive_when_the_model_got_better(higher_is_better, sign):
    metrics = SeedMetrics(higher_is_better=higher_is_better)
    for value in (10.0, 14.0, 12.0):
        metrics.record(value)
    assert metrics.total_improvement == sign * 2.0
    assert metrics.improvement_since_stage_start == sign * 2.0
    assert metrics.best_metric == (14.0 if higher_is_better else 10.0)
    assert (metrics.initial_metric, metrics.current_metric) == (10.0, 12.0)


def test_what_was_never_measured_is_none():
    metrics = SeedMetrics()
    assert metrics.total_improvement is None
    assert metrics.improvement_since_stage_start is None
    assert metrics.current_metric is metrics.best_metric is metrics.gradient_norm is None
    assert metrics.ramp_progress == 0.0


def test_a_nan_metric_is_kept_but_never_the_best():
    metrics = SeedMetrics()
    metrics.record(math.nan)
    assert metrics.current_metric is not None
    assert math.isnan(metrics.current_metric)
    metrics.record(3.0)
    assert metrics.best_metric == 3.0
    metrics.record(math.nan)
    assert metrics.best_metric == 3.0
    assert metrics.total_improvement is not None
    assert math.isnan(metrics.total_improvement)


@pytest.mark.parametrize("kind", [SeedMetrics, lambda: SeedState("a", "p:b", "x")])
def test_metrics_and_state_hold_no_other_attributes(kind):
    thing = kind()
    assert not hasattr(thing, "__dict__")
    with pytest.raises(AttributeError):
        thing.alpa = 0.5


# -- plain data ------------------------------------------------------------------------------------------------------

counts = st.integers(0, 10**6)
numbers = st.floats(allow_nan=False) | st.sampled_from([math.inf, -math.inf])
maybe = st.none() | numbers
texts = st.text(max_size=8)


@st.composite
def states(draw):
    metrics = SeedMetrics(
        higher_is_better=draw(st.booleans()),
        epochs_total=draw(counts),
        epochs_in_current_stage=draw(counts),
        initial_metric=draw(maybe),
        current_metric=draw(maybe),
        best_metric=draw(maybe),
        metric_at_stage_start=draw(maybe),
        isolation_violations=draw(counts),
        gradient_norm=draw(maybe),
        gradient_norm_max=draw(maybe),
        alpha=draw(st.floats(0, 1)),
        blending_steps_done=draw(counts),
        blending_steps_total=draw(counts),
    )
    state = SeedState(draw(texts), draw(texts), draw(texts), draw(st.sampled_from(SeedStage)), metrics)
    state.stage_history.extend(draw(st.lists(st.tuples(st.sampled_from(SeedStage), counts), max_size=5)))
    state.is_paused = draw(st.booleans())
    state.cull_reason = draw(texts)
    return state


@given(states())
def test_a_state_survives_json(state):
    again = SeedState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert again == state
    assert type(again.stage) is SeedStage
    assert again.stage_history.maxlen == HISTORY_LENGTH
    assert all(type(stage) is SeedStage for stage, _ in again.stage_history)


def test_a_nan_survives_json():
    metrics = SeedMetrics(current_metric=math.nan)
    value = SeedMetrics.from_dict(json.loads(json.dumps(metrics.to_dict()))).current_metric
    assert value is not None
    assert math.isnan(value)


def test_plain_data_shares_nothing_with_the_state():
    state = SeedState("a", "p:b", "x")
    data = state.to_dict()
    state.move_to(S.GERMINATED)
    state.metrics.record(1.0)
    assert data["stage"] == 1
    assert data["stage_history"] == []
    assert data["metrics"]["current_metric"] is None


wrong = st.sampled_from(
    [None, "x", [], {}, [1], 1.5, -1, math.nan, True, 99, [[3]], [[99, 0]], [[3, math.inf]], b"x"]
)
STATE_KEYS = sorted(SeedState("a", "p:b", "x").to_dict())


def is_sane(state):
    assert type(state) is SeedState
    assert type(state.stage) is SeedStage
    assert type(state.is_paused) is bool
    assert all(
        isinstance(text, str) for text in (state.seed_id, state.blueprint_id, state.slot, state.cull_reason)
    )
    assert all(type(s) is SeedStage and type(e) is int for s, e in state.stage_history)
    SeedMetrics.from_dict(state.metrics.to_dict())


@given(key=st.sampled_from(STATE_KEYS), value=wrong, inside=st.booleans())
def test_a_damaged_state_is_refused_or_still_sane(key, value, inside):
    data = SeedState("a", "p:b", "x").to_dict()
    if inside:
        fields = sorted(data["metrics"])
        data["metrics"][fields[STATE_KEYS.index(key) % len(fields)]] = value
    else:
        data[key] = value
    try:
        state = SeedState.from_dict(data)
    except CheckpointError:
        return
    is_sane(state)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("stage", 99, r"stage must be a SeedStage \(0, .*10\), not 99"),
        ("stage", "TRAINING", r"stage must be a SeedStage \(0, .*10\), not 'TRAINING'"),
        ("stage", 3.0, r"stage must be a SeedStage \(0, .*10\), not 3.0"),
        ("is_paused", "no", "is_paused must be true or false, not 'no'"),
        ("seed_id", 5, "seed_id must be text, not 5"),
        (
            "stage_history",
            [[3, math.inf]],
            r"stage_history\[0\]\[1\] must be a whole number of at least 0, not inf",
        ),
        ("metrics", None, "metrics must be a mapping, not None"),
    ],
)
def test_a_damaged_state_says_what_is_wrong(key, value, says):
    data = SeedState("a", "p:b", "x").to_dict()
    data[key] = value
    with pytest.raises(CheckpointError, match=says):
        SeedState.from_dict(data)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("epochs_total", -1, "epochs_total must be a whole number of at least 0, not -1"),
        ("epochs_total", 1.5, "epochs_total must be a whole number of at least 0, not 1.5"),
        ("epochs_total", True, "epochs_total must be a whole number of at least 0, not True"),
        ("higher_is_better", 1, "higher_is_better must be true or false, not 1"),
        ("current_metric", "low", "current_metric must be a number, not 'low'"),
        ("alpha", None, "alpha must be a number of at least 0 and at most 1, not None"),
    ],
)
def test_damaged_metrics_say_what_is_wrong(field, value, says):
    with pytest.raises(CheckpointError, match=says):
        SeedMetrics.from_dict(SeedMetrics().to_dict() | {field: value})


def test_missing_and_foreign_fields_are_named():
    data = SeedState("a", "p:b", "x").to_dict()
    del data["slot"]
    data["colour"] = "red"
    with pytest.raises(CheckpointError, match="missing: slot\n  unknown: colour"):
        SeedState.from_dict(data)
    with pytest.raises(CheckpointError, match=r"SeedState cannot be read: it must be a mapping, not \[\]"):
        SeedState.from_dict([])  # type: ignore[arg-type]
