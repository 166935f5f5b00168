"""Policies decide on plain observations; a model carries their commands out."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from state_helpers import (
    FIRST,
    SECOND,
    bring_to,
    make_model,
    open_config,
    open_thresholds,
    picture,
    same_picture,
)

from kasmina_core import (
    Advance,
    CommandOutcome,
    CommandRefused,
    Continue,
    Cull,
    GateResult,
    Germinate,
    GerminationError,
    HostError,
    MisuseWarning,
    NoGrowthPolicy,
    Observation,
    Pause,
    PlateauPolicy,
    Policy,
    QualityGates,
    Regerminate,
    Resume,
    SeedStage,
    SeedState,
    SetAlpha,
    SlotObservation,
    Topology,
    TransitionError,
)

pytestmark = pytest.mark.filterwarnings("ignore:PlateauPolicy has seen:RuntimeWarning")

S = SeedStage
CANDIDATES = {Topology.CNN: ["one", "two"]}


def seen(metric, *slots, higher=False, epoch=0):
    """An observation of slots "a", "b", …, each given as a stage or as changes to an empty slot."""
    observed = []
    for name, what in zip("abc", slots or (S.DORMANT,), strict=False):
        changes = {"stage": what} if isinstance(what, SeedStage) else what
        observed.append(SlotObservation(name, Topology.CNN, 4, **{"stage": S.DORMANT, **changes}))
    return Observation(epoch, metric, higher, 10, 0, tuple(observed))


def decide(policy, metrics, *slots, **more):
    return [list(policy.decide(seen(metric, *slots, **more))) for metric in metrics]


def germinated_and_culled(policy, slots):
    """What a policy of patience 1 germinates next in so many dormant slots; the seed lives for an epoch."""
    (command,) = decide(policy, [1.0], *[S.DORMANT] * slots)[0]
    growing = [S.TRAINING if name == command.slot else S.DORMANT for name in "abc"[:slots]]
    assert decide(policy, [1.0], *growing) == [[]]
    return command


# -- when to germinate -----------------------------------------------------------------------------------------------


def test_it_germinates_on_a_plateau_and_not_before():
    said = decide(PlateauPolicy(CANDIDATES, patience=3), [1.0, 0.8, 0.6, 0.6, 0.6, 0.6])
    assert said == [[], [], [], [], [], [Germinate("a", "one")]]


def test_a_host_that_goes_on_improving_gets_no_seed():
    assert decide(PlateauPolicy(CANDIDATES, patience=2), [0.9**k for k in range(30)]) == [[]] * 30


@pytest.mark.parametrize(("higher", "metrics"), [(False, [1.0, 2.0, 3.0]), (True, [3.0, 2.0, 1.0])])
def test_getting_worse_is_a_plateau_whichever_way_the_metric_points(higher, metrics):
    said = decide(PlateauPolicy(CANDIDATES, patience=2), metrics, higher=higher)
    assert said == [[], [], [Germinate("a", "one")]]
    better = decide(PlateauPolicy(CANDIDATES, patience=2), metrics, higher=not higher)
    assert better == [[], [], []]


def test_an_improvement_must_exceed_the_share_of_the_best():
    small = [1.0, 0.995, 0.992]
    assert decide(PlateauPolicy(CANDIDATES, patience=2, min_delta=0.01), small)[-1] == [Germinate("a", "one")]
    assert decide(PlateauPolicy(CANDIDATES, patience=2, min_delta=0.001), small)[-1] == []


@pytest.mark.parametrize("metric", [None, math.nan, math.inf, -math.inf])
def test_a_metric_that_says_nothing_is_no_plateau(metric):
    policy = PlateauPolicy(CANDIDATES, patience=2)
    assert decide(policy, [metric] * 10) == [[]] * 10
    assert decide(policy, [1.0, 0.5, 0.25, 0.1]) == [[]] * 4
    assert decide(policy, [0.1, 0.1]) == [[], [Germinate("a", "one")]]


@pytest.mark.parametrize("stage", [S.GERMINATED, S.TRAINING, S.BLENDING, S.SHADOWING, S.PROBATIONARY])
def test_one_seed_lives_at_a_time(stage):
    said = decide(PlateauPolicy(CANDIDATES, patience=1), [1.0] * 6, stage, S.DORMANT)
    assert said == [[]] * 6


def test_after_a_seed_the_metric_is_judged_anew():
    policy = PlateauPolicy(CANDIDATES, patience=3)
    decide(policy, [1.0] * 5, S.TRAINING)
    assert decide(policy, [1.0] * 3, S.CULLED, S.DORMANT) == [[], [], [Germinate("b", "one")]]


def test_a_slot_that_cools_down_is_not_free():
    for stage in (S.CULLED, S.EMBARGOED, S.RESETTING, S.FOSSILIZED):
        assert decide(PlateauPolicy(CANDIDATES, patience=1), [1.0] * 4, stage) == [[]] * 4


def test_it_keeps_no_more_seeds_than_asked():
    for kept, expected in ((1, []), (2, [Germinate("b", "one")])):
        policy = PlateauPolicy(CANDIDATES, patience=1, max_seeds=kept)
        assert decide(policy, [1.0, 1.0], S.FOSSILIZED, S.DORMANT)[-1] == expected


def test_a_blueprint_that_was_culled_waits_for_the_others():
    policy = PlateauPolicy(CANDIDATES, patience=1)
    decide(policy, [1.0])
    tried = [germinated_and_culled(policy, 2) for _ in range(6)]
    assert tried == [
        Germinate("a", "one"),
        Germinate("b", "one"),
        Germinate("a", "two"),
        Germinate("b", "two"),
        Germinate("a", "one"),
        Germinate("b", "one"),
    ]


@given(
    slots=st.integers(1, 3),
    kinds=st.integers(1, 4),
    rounds=st.integers(1, 20),
)
def test_no_pair_is_tried_again_before_every_other_was(slots, kinds, rounds):
    names = [f"k{i}" for i in range(kinds)]
    policy = PlateauPolicy({Topology.CNN: names}, patience=1)
    decide(policy, [1.0])
    counts = {(slot, kind): 0 for slot in "abc"[:slots] for kind in names}
    for _ in range(rounds):
        command = germinated_and_culled(policy, slots)
        counts[command.slot, command.blueprint] += 1
        assert max(counts.values()) - min(counts.values()) <= 1


def test_candidates_may_be_chosen_by_a_function_of_the_slot():
    policy = PlateauPolicy(lambda slot: ["wide"] if slot.slot == "b" else [], patience=1)
    assert decide(policy, [1.0, 1.0], S.DORMANT, S.DORMANT)[-1] == [Germinate("b", "wide")]


def test_without_a_candidate_nothing_happens_and_it_is_said_once():
    policy = PlateauPolicy({Topology.TRANSFORMER: ["x"]}, patience=1)
    with pytest.warns(MisuseWarning, match="will never germinate") as said:
        assert decide(policy, [1.0] * 3) == [[]] * 3
    assert len(said) == 1


# -- what becomes of it ----------------------------------------------------------------------------------------------


def judged(**changes):
    policy = PlateauPolicy(CANDIDATES, max_training_epochs=5, max_probation_epochs=4)
    return list(policy.decide(seen(1.0, changes)))


def test_it_fossilises_what_passes_g5():
    assert judged(stage=S.PROBATIONARY, gate_passed=True, epochs_in_stage=9) == [Advance("a")]
    assert judged(stage=S.PROBATIONARY, gate_passed=None) == []
    assert judged(stage=S.PROBATIONARY, gate_passed=False, epochs_in_stage=3) == []


@pytest.mark.parametrize(
    ("stage", "limit", "more"),
    [
        (S.GERMINATED, 5, {}),
        (S.TRAINING, 5, {}),
        (S.BLENDING, 4, {"ramp_progress": 1.0}),
        (S.SHADOWING, 4, {}),
        (S.PROBATIONARY, 4, {}),
    ],
)
def test_it_culls_at_the_limit_with_the_reason_of_the_gate(stage, limit, more):
    at = {"stage": stage, "gate_reason": "gain failed: -1 (needs >= 0)", "gate_passed": False, **more}
    assert judged(**at, epochs_in_stage=limit - 1) == []
    reason = f"{limit} epochs in {stage.name}: gain failed: -1 (needs >= 0)"
    assert judged(**at, epochs_in_stage=limit) == [Cull("a", reason)]


def test_a_ramp_may_take_its_time():
    assert judged(stage=S.BLENDING, ramp_progress=0.9, epochs_in_stage=500) == []


@pytest.mark.parametrize("stage", [S.TRAINING, S.SHADOWING, S.PROBATIONARY])
def test_a_paused_seed_is_left_alone(stage):
    assert judged(stage=stage, is_paused=True, epochs_in_stage=99, gate_passed=True) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"patience": 0}, "patience must be at least 1, not 0"),
        ({"max_training_epochs": 0}, "max_training_epochs must be at least 1"),
        ({"max_probation_epochs": -1}, "max_probation_epochs must be at least 1, not -1"),
        ({"min_delta": -0.1}, "min_delta must be at least 0 and finite, not -0.1"),
        ({"min_delta": math.nan}, "min_delta must be at least 0 and finite, not nan"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        PlateauPolicy(CANDIDATES, **arguments)


metrics = st.lists(st.floats(0.1, 10.0) | st.none() | st.just(math.nan), max_size=12)


@given(before=metrics, after=metrics)
def test_a_policy_that_is_loaded_decides_like_the_one_that_was_saved(before, after):
    policy = PlateauPolicy(CANDIDATES, patience=2)
    decide(policy, before, S.DORMANT, S.DORMANT)
    twin = PlateauPolicy(CANDIDATES, patience=2)
    twin.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert twin.state_dict() == policy.state_dict()
    assert decide(twin, after, S.DORMANT, S.DORMANT) == decide(policy, after, S.DORMANT, S.DORMANT)


def test_no_growth_never_grows():
    assert decide(NoGrowthPolicy(), [1.0] * 5) == [[]] * 5
    assert isinstance(NoGrowthPolicy(), Policy)
    assert isinstance(PlateauPolicy(CANDIDATES), Policy)
    assert not isinstance(object(), Policy)


# -- with a model ----------------------------------------------------------------------------------------------------


class Script:
    """Says what it was told to, one list an epoch."""

    def __init__(self, *epochs):
        self.epochs = list(epochs)
        self.saw = []

    def decide(self, observation):
        self.saw.append(observation)
        return self.epochs.pop(0) if self.epochs else [Continue()]


def test_a_model_carries_out_every_command():
    model, _ = make_model()
    slot = model.slots[FIRST]
    assert isinstance(model.execute(Germinate(FIRST, "scale", {"gain": 0.5})), SeedState)
    assert slot.options == {"gain": 0.5}
    assert isinstance(model.execute(Advance(FIRST)), GateResult)
    assert slot.stage is S.TRAINING
    assert model.execute(Continue()) is None
    assert model.execute(Pause(FIRST)) is None
    assert slot.state.is_paused
    assert model.execute(Resume(FIRST)) is None
    assert not slot.state.is_paused
    model.step_epoch(1.0)
    model.step_epoch(1.0)
    assert model.execute(SetAlpha(FIRST, 0.25)) is None
    assert slot.alpha == 0.25
    assert model.execute(Cull(FIRST, "enough")) is None
    assert slot.state.cull_reason == "enough"


@pytest.mark.parametrize("command", [None, "cull", Cull, ("2", "why"), 3])
def test_what_is_no_command_is_refused(command):
    model, _ = make_model()
    before = picture(model)
    with pytest.raises(TypeError, match="is not a command"):
        model.execute(command)
    assert same_picture(before, picture(model))


def test_commands_that_are_not_allowed_raise_as_the_slot_does():
    model, _ = make_model()
    before = picture(model)
    for command in (Advance(FIRST), Cull(FIRST, ""), SetAlpha(FIRST, 0.5), Pause(FIRST), Resume(FIRST)):
        with pytest.raises(TransitionError, match="Slot '2' is dormant"):
            model.execute(command)
    with pytest.raises(GerminationError, match="not a multiple of 8"):
        model.execute(Germinate(FIRST, "picky"))
    assert same_picture(before, picture(model))


def test_follow_carries_out_what_a_policy_says_in_order():
    model, _ = make_model()
    commands = [Germinate(SECOND, "scale"), Germinate(FIRST, "normed"), Advance(FIRST)]
    assert model.follow(Script(commands)) == commands
    assert [s.stage for s in model.slots.values()] == [S.TRAINING, S.GERMINATED]
    assert [outcome.command for outcome in model.outcomes if outcome.done] == commands
    assert model.follow(NoGrowthPolicy()) == []
    assert model.outcomes == ()


REFUSED = {
    "not allowed": (Cull(FIRST, "no use"), "Slot '2' is dormant"),
    "an occupied slot": (Germinate(SECOND, "normed"), "is not dormant but TRAINING"),
    "an unknown slot": (Pause("nowhere"), "nowhere"),
    "an unknown blueprint": (Germinate(FIRST, "nobody's"), "No blueprint 'nobody's'"),
    "no seed put aside": (Regerminate(FIRST), "No seed was put aside"),
    "out of range": (SetAlpha(SECOND, 1.5), "Alpha of slot"),
}


@pytest.mark.parametrize(("command", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_command_that_is_refused_stops_nothing_that_is_legal_and_is_reported(command, reason):
    model, recorder = make_model()
    bring_to(model, S.TRAINING, SECOND)
    recorder.events.clear()
    legal = Germinate(FIRST, "scale")
    with pytest.warns(MisuseWarning, match=f"{type(command).__name__} was refused") as said:
        assert model.follow(Script([command, legal])) == [legal]
    assert reason in str(said[0].message)
    assert said[0].filename == __file__
    refused, done = model.outcomes
    assert (refused.command, refused.done, done) == (command, False, CommandOutcome(legal))
    assert reason in refused.refusal
    (event,) = (e for e in recorder.events if isinstance(e, CommandRefused))
    assert (event.slot, event.command, event.reason) == (
        command.slot,
        type(command).__name__,
        refused.refusal,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same once more is said in events alone
        model.follow(Script([command]))


def test_an_alpha_out_of_range_is_a_refused_command():
    model, _ = make_model()
    bring_to(model, S.BLENDING)
    with pytest.warns(MisuseWarning, match=r"alpha must be in \[0, 1\], not 1.5"):
        assert model.follow(Script([SetAlpha(FIRST, 1.5), Pause(FIRST)])) == [Pause(FIRST)]


def test_an_advance_that_its_gate_refuses_was_not_carried_out():
    model, recorder = make_model()
    bring_to(model, S.TRAINING)
    assert model.follow(Script([Advance(FIRST), Germinate(SECOND, "scale")])) == [Germinate(SECOND, "scale")]
    assert model.slots[FIRST].stage is S.TRAINING
    assert model.outcomes[0].refusal == str(model.slots[FIRST].last_gate)
    assert [e.reason for e in recorder.events if isinstance(e, CommandRefused)] == [model.outcomes[0].refusal]


@pytest.mark.parametrize("command", [None, "cull", Cull, ("2", "why"), 3])
def test_a_list_with_something_else_than_commands_is_refused_before_any_is_carried_out(command):
    model, recorder = make_model()
    before = picture(model)
    with pytest.raises(TypeError, match=r"Script.decide .* is not a command"):
        model.follow(Script([Germinate(FIRST, "scale"), command]))
    assert same_picture(before, picture(model))
    assert recorder.events == []


def test_a_lost_module_is_no_refusal_but_an_error():
    model, _ = make_model()
    bring_to(model, S.TRAINING)
    del model.host[2:]
    with pytest.raises(HostError, match="is gone") as raised:
        model.follow(Script([Continue(), Advance(FIRST), Pause(FIRST)]))
    (note,) = raised.value.__notes__
    assert "1 commands before it were tried (see outcomes), 1 after it were not" in note
    assert [outcome.command for outcome in model.outcomes] == [Continue()]


def test_an_observation_tells_what_the_model_knows():
    model, _ = make_model(open_config(higher_is_better=True))
    bring_to(model, S.PROBATIONARY)
    model.step_epoch(0.5)
    model.step_epoch(0.75)
    observation = model.observe()
    slot, state = model.slots[FIRST], model.slots[FIRST].state
    assert (observation.epoch, observation.metric, observation.higher_is_better) == (model.epoch, 0.75, True)
    assert observation.host_parameters == sum(p.numel() for p in model.host.parameters())
    assert observation.seed_parameters == 8
    first, second = observation.slots
    assert second == SlotObservation(
        SECOND, Topology.CNN, 4, S.DORMANT, shape=(2, 4, 5, 5), can_advance=False
    )
    assert first == SlotObservation(
        slot=FIRST,
        topology=Topology.CNN,
        dim=4,
        stage=S.PROBATIONARY,
        blueprint="mine:scale",
        seed_id="2-1",
        alpha=1.0,
        epochs_in_stage=2,
        epochs_total=state.metrics.epochs_total,
        ramp_progress=1.0,
        improvement_since_stage_start=-0.25,
        gain=slot.last_evidence.gain,
        gain_t=slot.last_evidence.t,
        gate_passed=True,
        gate_reason="all 8 checks passed",
        parameters=8,
        shape=(2, 4, 5, 5),
        gate_score=1.0,
        gate_verdict="passed",
        can_advance=True,
    )
    assert (observation.flops, observation.budget, observation.flops_left) == (None, None, None)


def test_an_observation_holds_what_is_spent_and_what_is_left_as_given_with_the_epoch():
    model, recorder = make_model()
    model.step_epoch(1.0, flops=30.0, budget=100.0)
    seen = model.observe()
    assert (seen.flops, seen.budget, seen.flops_left) == (30.0, 100.0, 70.0)
    assert recorder.events[-1].flops == 30.0
    model.step_epoch(1.0, flops=130.0)
    assert (model.observe().flops, model.observe().budget, model.observe().flops_left) == (130.0, None, None)
    model.step_epoch(1.0, flops=130.0, budget=100.0)
    assert model.observe().flops_left == 0.0


def test_an_observation_does_not_change_with_the_model():
    model, _ = make_model()
    bring_to(model, S.TRAINING)
    observation = model.observe()
    copy = replace(observation)
    model.step_epoch(1.0)
    model.cull(FIRST)
    assert observation == copy
    assert observation.slots[0].stage is S.TRAINING


def test_a_plateau_policy_grows_a_fossil_and_then_fills_the_next_slot():
    model, _ = make_model()
    policy = PlateauPolicy({Topology.CNN: ["scale"]}, patience=2, max_probation_epochs=20)
    for _ in range(40):
        model.step_epoch(1.0)
        model.follow(policy)
    assert [slot.stage for slot in model.slots.values()] == [S.FOSSILIZED, S.FOSSILIZED]


def test_a_plateau_policy_culls_what_g2_refuses_and_says_why():
    model, recorder = make_model(open_config(gates=QualityGates(thresholds=open_thresholds(min_gain=1e9))))
    policy = PlateauPolicy({Topology.CNN: ["scale", "normed"]}, patience=2, max_training_epochs=3)
    for _ in range(40):
        model.step_epoch(1.0)
        model.follow(policy)
    culled = [e for e in recorder.events if e.type.value == "seed_culled"]
    assert [(e.slot, e.blueprint_id) for e in culled[:4]] == [
        (FIRST, "mine:scale"),
        (SECOND, "mine:scale"),
        (FIRST, "mine:normed"),
        (SECOND, "mine:normed"),
    ]
    assert all(e.reason.startswith("3 epochs in TRAINING: gain failed: ") for e in culled)
    assert all("(needs >= 1e+09)" in e.reason for e in culled)
