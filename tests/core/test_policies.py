"""The bundled policies in a simulated model: what they choose, keep and never do."""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import replace
from functools import reduce
from operator import getitem

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_environment import ALIVE, FakeGrowth, S
from state_helpers import FIRST, make_model, make_registry, open_config

from kasmina_core import (
    BanditPolicy,
    BudgetPolicy,
    CheckpointError,
    Cull,
    FixedTimesPolicy,
    Germinate,
    GerminationError,
    GrowingPolicy,
    PlanPolicy,
    Plateau,
    PlateauPolicy,
    Policy,
    Regerminate,
    SeedCost,
    SlotObservation,
    Topology,
    TournamentPolicy,
    blueprint_costs,
)

NAMES = ("bad", "good", "null")
CANDIDATES = {Topology.CNN: NAMES}
SIZES = {"bad": 5, "good": 20, "null": 10}
GAINS = {(slot, name): gain for slot in "ab" for name, gain in zip(NAMES, (-0.5, 0.4, 0.0), strict=True)}


def costs(slot, blueprint):
    return SeedCost(SIZES[blueprint], 10 * SIZES[blueprint])


MAKERS = {
    "plateau": lambda: PlateauPolicy(CANDIDATES, patience=2),
    "two at once": lambda: PlateauPolicy(CANDIDATES, patience=2, max_growing=2),
    "fixed": lambda: FixedTimesPolicy(CANDIDATES, epochs=[3, 5, 20, 40]),
    "plan": lambda: PlanPolicy({Topology.CNN: ("good", "null", "bad")}, at=[3, 20, 30, 40, 50], patience=2),
    "budget": lambda: BudgetPolicy(CANDIDATES, parameters=30, flops=400, costs=costs, patience=2),
    "bandit": lambda: BanditPolicy(CANDIDATES, patience=2, seed=3),
    "tournament": lambda: TournamentPolicy(CANDIDATES, patience=2, incubation_epochs=4),
}
every_policy = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
pytestmark = pytest.mark.filterwarnings("ignore:.*has seen:RuntimeWarning")


# -- all of them -----------------------------------------------------------------------------------------------------


@st.composite
def worlds(draw):
    slots = draw(st.integers(1, 3))
    gains = {
        (slot, name): draw(st.floats(-1, 1))
        for slot in "abc"[:slots]
        for name in NAMES
        if draw(st.booleans()) or draw(st.booleans())
    }
    gains = gains or {("a", "good"): 0.5}
    metrics = draw(st.lists(st.floats(0.1, 5) | st.just(math.nan) | st.none(), min_size=1, max_size=30))
    return FakeGrowth(
        gains,
        SIZES,
        noise=draw(st.sampled_from([0.0, 0.3])),
        metrics=metrics,
        stops=draw(st.sets(st.sampled_from(NAMES), max_size=1)),
        embargo=draw(st.integers(0, 3)),
        dwell=draw(st.integers(1, 4)),
    )


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=25, deadline=None)
@given(world=worlds(), data=st.data())
def test_only_what_is_allowed_is_said_whatever_happens(name, world, data):
    policy = MAKERS[name]()
    assert isinstance(policy, Policy)
    for _ in range(60):
        world.follow(policy)
        slot = data.draw(st.sampled_from(sorted(world.slots)))
        now = world.slots[slot]
        if now.stage in ALIVE and not now.is_stopped and data.draw(st.integers(0, 9)) == 0:
            world.change(slot, is_paused=not now.is_paused)
        reloaded = MAKERS[name]()
        reloaded.load_state_dict(json.loads(json.dumps(policy.state_dict())))
        assert reloaded.state_dict() == policy.state_dict()
        twin = MAKERS[name]()
        twin.load_state_dict(policy.state_dict())
        policy = twin  # a policy that is saved and loaded every epoch decides like one that is not
    if name == "budget":
        assert world.observe().seed_parameters <= 30


@every_policy
def test_saving_and_loading_changes_no_decision(make):
    plain, policy = FakeGrowth(GAINS, SIZES, noise=0.2), make()
    plain.follow(policy, 80)
    again, other = FakeGrowth(GAINS, SIZES, noise=0.2), make()
    for _ in range(80):
        again.follow(other)
        state = json.loads(json.dumps(other.state_dict()))
        other = make()
        other.load_state_dict(state)
    assert plain.commands == again.commands
    assert len(plain.commands) > 3


def leaves(data, path=()):
    """Where something stands in nested data: the containers' places too, but the whole's."""
    for key, item in data.items() if isinstance(data, dict) else enumerate(data):
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from leaves(item, (*path, key))


@every_policy
def test_a_damaged_memory_is_refused_wherever_it_is_damaged_and_the_policy_stays(make):
    policy = make()
    FakeGrowth(GAINS, SIZES).follow(policy, 40)
    whole, fresh = json.loads(json.dumps(policy.state_dict())), make()
    before = fresh.state_dict()
    for path in leaves(whole):
        for wrong in ({"a": [object()]}, [[[]]], True, -(10**400)):
            state = copy.deepcopy(whole)
            *way, last = path
            reduce(getitem, way, state)[last] = wrong
            with pytest.raises(CheckpointError, match="The saved state of the policy"):
                fresh.load_state_dict(state)
            assert fresh.state_dict() == before
    for name in whole:
        with pytest.raises(CheckpointError, match=f"lacks '{name}'"):
            fresh.load_state_dict({key: item for key, item in whole.items() if key != name})


@every_policy
def test_what_helps_is_kept_and_nothing_else(make):
    world = FakeGrowth(GAINS, SIZES).follow(make(), 250)
    assert world.kept()
    assert set(world.kept().values()) == {"good"}


@every_policy
def test_a_pair_that_g0_refuses_is_asked_once(make):
    gains = {("a", "good"): 0.3, ("a", "null"): -0.1}  # "bad" is refused
    world = FakeGrowth(gains, SIZES).follow(make(), 200)
    assert world.grown().count("bad") <= 1
    assert world.kept() == {"a": "good"}


@every_policy
def test_where_everything_is_refused_it_falls_silent(make):
    world = FakeGrowth({("a", "nobody"): 1.0}, SIZES).follow(make(), 100)
    assert sorted(world.grown()) == sorted(NAMES)


@every_policy
def test_a_stopped_seed_is_culled_at_once_with_the_reason(make):
    world = FakeGrowth({("a", name): 0.5 for name in NAMES}, SIZES, stops=NAMES).follow(make(), 30)
    culls = [c for c in world.commands if isinstance(c, Cull)]
    assert culls
    expected = "never measured" if isinstance(make(), TournamentPolicy) else "is 1000 times its RMS"
    assert all(expected in cull.reason for cull in culls)


@every_policy
def test_a_metric_that_stays_nan_is_said_once_and_nothing_grows(make):
    world, policy = FakeGrowth(GAINS, SIZES, metrics=[math.nan]), make()
    with pytest.warns(RuntimeWarning, match="a metric of nan, for ") as said:
        world.follow(policy, 50)
    assert len(said) == 1
    assert world.commands == []


def test_a_missing_metric_is_said_too():
    with pytest.warns(RuntimeWarning, match=r"no metric: give step_epoch\(metric\) one, for 3 epochs"):
        FakeGrowth(GAINS, SIZES, metrics=[None]).follow(PlateauPolicy(CANDIDATES), 9)


@every_policy
def test_a_seed_that_took_the_metric_to_nan_is_culled_and_reverted(make):
    world, policy = FakeGrowth(GAINS, SIZES), make()
    while not any(s.stage is S.SHADOWING for s in world.slots.values()) and world.epoch < 200:
        world.follow(policy)
    world.metrics = [math.nan]
    with pytest.warns(RuntimeWarning, match="a metric of nan"):
        world.follow(policy, 3)
    cull = world.commands[-1]
    assert cull.revert
    assert cull.reason.startswith("the model's metric has not been finite for ")


@every_policy
def test_what_is_paused_is_left_alone(make):
    world, policy = FakeGrowth(GAINS, SIZES), make()
    while not any(s.stage in ALIVE for s in world.slots.values()) and world.epoch < 50:
        world.follow(policy)
    for name, slot in world.slots.items():
        if slot.stage in ALIVE:
            world.change(name, is_paused=True)
            paused = name
    said = len(world.commands)
    world.follow(policy, 40)
    assert all(command.slot != paused for command in world.commands[said:])


# -- fixed times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "expected"), [((1, None), 1), ((2, None), 2), ((9, None), 3), ((2, 1), 1)]
)
def test_as_many_seeds_grow_together_as_are_allowed_each_in_a_slot_of_its_own(limits, expected):
    growing, kept = limits
    world = FakeGrowth({(slot, "good"): 0.4 for slot in "abc"}, SIZES)
    policy = PlateauPolicy({Topology.CNN: ["good"]}, patience=2, max_growing=growing, max_seeds=kept)
    counts = []
    for _ in range(40):
        world.follow(policy)
        counts.append(sum(slot.stage in ALIVE for slot in world.slots.values()))
    assert max(counts) == expected
    assert next(count for count in counts if count) == expected  # germinated together, not one by one
    assert sum(slot.stage is S.FOSSILIZED for slot in world.slots.values()) == (kept or 3)


def test_a_time_is_for_as_many_seeds_as_may_grow_together():
    world = FakeGrowth({(slot, "good"): 0.4 for slot in "abc"}, SIZES)
    policy = FixedTimesPolicy({Topology.CNN: ["good"]}, epochs=[3], max_growing=2)
    for _ in range(40):
        world.follow(policy)
    assert sum(slot.stage is S.FOSSILIZED for slot in world.slots.values()) == 2


def test_less_than_one_seed_at_a_time_is_refused():
    with pytest.raises(ValueError, match="max_growing must be at least 1, not 0"):
        PlateauPolicy(CANDIDATES, max_growing=0)


def test_fixed_times_are_kept_or_made_up_for():
    world, policy = (
        FakeGrowth(GAINS, SIZES, metrics=[0.9**k for k in range(99)]),
        FixedTimesPolicy({Topology.CNN: ["good"]}, epochs=[20, 5]),
    )
    times = []
    for _ in range(60):
        before = len(world.grown())
        world.follow(policy)
        times += [world.epoch] * (len(world.grown()) - before)
    assert times == [5, 20]
    early = FakeGrowth(GAINS, SIZES)
    policy = FixedTimesPolicy({Topology.CNN: ["good"]}, epochs=[1, 1])
    early.follow(policy, 60)
    assert early.kept() == {"a": "good", "b": "good"}


@pytest.mark.parametrize("epochs", [[], [-1]])
def test_times_that_are_none_are_refused(epochs):
    with pytest.raises(ValueError, match="epochs must be a list of numbers"):
        FixedTimesPolicy(CANDIDATES, epochs=epochs)


# -- budgets ---------------------------------------------------------------------------------------------------------


def test_the_best_gain_for_the_cost_is_grown_once_every_blueprint_was_tried():
    gains = {(s, n): {"bad": 0.1, "good": 0.2, "null": 0.4}[n] for s in "abc" for n in NAMES}
    policy = BudgetPolicy(CANDIDATES, parameters=1000, costs=costs, patience=1)
    world = FakeGrowth(gains, SIZES).follow(policy, 200)
    assert world.grown()[:3] == ["bad", "null", "good"]  # the cheapest first
    more = {(s, n): g for (s, n), g in gains.items()} | {("d", n): gains["a", n] for n in NAMES}
    world = FakeGrowth(more, SIZES).follow(
        BudgetPolicy(CANDIDATES, parameters=1000, costs=costs, patience=1), 250
    )
    assert world.grown()[3] == "null"  # .04 a parameter against .02 and .01


@pytest.mark.parametrize("budget", [{"parameters": 25}, {"flops": 250}])
def test_a_budget_is_not_exceeded_by_what_fits_alone(budget):
    gains = {(s, n): 0.3 for s in "abcd" for n in NAMES}
    world = FakeGrowth(gains, SIZES)
    policy = BudgetPolicy(CANDIDATES, **budget, costs=costs, patience=1)
    for _ in range(200):
        world.follow(policy)
        assert world.observe().seed_parameters <= 25
        assert all(left >= 0 for left in policy.left(world.observe()).values())
    assert sum(SIZES[name] for name in world.kept().values()) >= 20


def test_a_seed_larger_than_declared_is_culled_before_it_contributes():
    policy = BudgetPolicy(CANDIDATES, parameters=25, costs=costs, patience=1)
    world = FakeGrowth({("a", "good"): 0.5}, {"good": 99})
    for _ in range(30):
        world.follow(policy)
        assert world.slots["a"].alpha == 0.0
    (cull,) = [c for c in world.commands if isinstance(c, Cull)][:1]
    assert cull.reason == "it takes 99 of 25 parameters that are left"


def test_a_seed_that_stands_in_the_way_of_a_better_one_is_culled_without_a_trace():
    gains = {("a", "bad"): 0.01, ("a", "good"): 0.5, ("b", "bad"): 0.01, ("b", "good"): 0.5}
    candidates = {Topology.CNN: ["bad", "good"]}
    policy = BudgetPolicy(candidates, parameters=24, costs=costs, patience=1)
    world = FakeGrowth(gains, SIZES)
    # Both are known; what is left is enough for one of them.
    policy._gains = {"bad": [0.01], "good": [0.5]}
    world.slots["a"] = replace(
        world.slots["a"], stage=S.BLENDING, blueprint="bad", seed_id="x", parameters=5, gain=0.01
    )
    (cull,) = policy.decide(world.observe())
    assert cull.slot == "a"
    assert cull.reason.startswith("good gains 0.6 for the whole budget's cost, this one 0.048")
    world.slots["a"] = replace(world.slots["a"], alpha=0.1)
    assert policy.decide(world.observe()) == []  # it left a trace already


def test_seconds_are_spent_by_growing_alone_and_not_exceeded():
    now = [0.0]
    policy = BudgetPolicy(CANDIDATES, seconds=30.0, clock=lambda: now[0], patience=2)
    world = FakeGrowth({(s, n): -0.1 for s in "ab" for n in NAMES}, SIZES)
    spent = 0.0
    for _ in range(300):
        growing = any(s.stage in ALIVE for s in world.slots.values())
        now[0] += 1.0
        spent += growing
        world.follow(policy)
    assert 10.0 < spent <= 30.0
    assert not any(s.stage in ALIVE for s in world.slots.values())


def test_a_slow_epoch_ends_a_life():
    now = [0.0]
    policy = BudgetPolicy(CANDIDATES, seconds=10.0, clock=lambda: now[0], patience=1)
    world = FakeGrowth(GAINS, SIZES)
    for _ in range(10):
        now[0] += 4.0
        world.follow(policy)
    assert world.commands[-1].reason == "8 of 10 seconds are spent"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "needs a budget"),
        ({"parameters": 0, "costs": costs}, "parameters must be above 0, not 0"),
        ({"seconds": -1.0}, "seconds must be above 0, not -1.0"),
        ({"flops": 10}, "needs costs="),
    ],
)
def test_budgets_that_are_none_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        BudgetPolicy(CANDIDATES, **arguments)


def test_costs_of_a_registry_are_declared_parameters_and_counted_operations():
    seen = SlotObservation("a", Topology.CNN, 4, S.DORMANT, shape=(2, 4, 5, 5))
    before = torch.get_rng_state()
    assert blueprint_costs(make_registry())(seen, "scale") == SeedCost(8, 0)
    counted = blueprint_costs(make_registry(), count_operations=True)(seen, "narrow")
    assert counted == SeedCost(5, 4 * 25)
    assert torch.equal(before, torch.get_rng_state())


# -- the bandit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_bandit_finds_the_best_arm(seed):
    names = [f"k{i}" for i in range(6)]
    gains = {("a", name): -0.7 + 0.1 * i for i, name in enumerate(names)}  # none is kept: the slot stays free
    policy = BanditPolicy({Topology.CNN: names}, patience=1, seed=seed, max_training_epochs=4)
    grown = FakeGrowth(gains, noise=0.02, dwell=1, embargo=0, seed=seed).follow(policy, 900).grown()
    assert len(grown) > 60
    late = grown[len(grown) // 2 :]
    assert sum(name in ("k4", "k5") for name in late) > 0.7 * len(late)
    assert set(grown) == set(names)


def test_a_blueprint_that_failed_elsewhere_waits():
    names = [f"k{i}" for i in range(4)]
    slots = "abcdefgh"
    gains = {(s, n): 0.5 if n == "k2" else -0.5 for s in slots for n in names}
    wanted = []
    for seed in range(10):
        policy = BanditPolicy({Topology.CNN: names}, patience=1, seed=seed)
        wanted.append(len(FakeGrowth(gains, dwell=1, embargo=0).follow(policy, 400).kept()))
    assert sum(wanted) >= 60


def test_draws_depend_on_the_seed_alone():
    def run(seed):
        policy = BanditPolicy(CANDIDATES, patience=1, seed=seed)
        return FakeGrowth(GAINS, SIZES).follow(policy, 60).commands

    assert run(1) == run(1)
    assert any(run(1) != run(seed) for seed in range(2, 6))


# -- the tournament --------------------------------------------------------------------------------------------------


def test_every_contender_is_compared_before_the_best_is_grown_with_what_it_learned():
    gains = {("a", "bad"): 0.1, ("a", "good"): 0.4, ("a", "null"): 0.2}
    policy = TournamentPolicy(CANDIDATES, patience=2, incubation_epochs=4)
    world = FakeGrowth(gains, SIZES)
    for _ in range(60):
        world.follow(policy)
    assert world.grown() == ["bad", "good", "null"]
    culls = [c for c in world.commands if isinstance(c, Cull)]
    assert [c.reason for c in culls] == [f"compared: it gains {g}" for g in (0.1, 0.4, 0.2)]
    assert [c.keep for c in culls] == [True, True, False]
    assert Regerminate("a") in world.commands
    assert world.kept() == {"a": "good"}
    assert [gain for *_, gain in policy.results] == [0.1, 0.4, 0.2]


def test_no_contender_ever_contributes():
    policy = TournamentPolicy(CANDIDATES, patience=2, incubation_epochs=4)
    world = FakeGrowth({("a", n): 0.3 for n in NAMES} | {("b", n): 0.3 for n in NAMES}, SIZES)
    while Regerminate("a") not in world.commands and world.epoch < 60:
        world.follow(policy)
        assert all(slot.alpha == 0.0 for slot in world.slots.values())
    assert {c.slot for c in world.commands[:3] if isinstance(c, Germinate)} == {"a", "b"}  # side by side


def test_a_winner_whose_weights_were_lost_is_grown_anew():
    policy = TournamentPolicy(CANDIDATES, patience=2, incubation_epochs=4)
    world = FakeGrowth({("a", "bad"): 0.1, ("a", "good"): 0.4, ("a", "null"): 0.2}, SIZES)
    for _ in range(60):
        world.follow(policy)
        world.change("a", kept_seed="")
    assert world.grown() == ["bad", "good", "null", "good"]


def test_where_nobody_gains_nobody_wins():
    policy = TournamentPolicy(CANDIDATES, patience=2, incubation_epochs=3, contenders=2)
    world = FakeGrowth({("a", n): -0.1 for n in NAMES}, SIZES).follow(policy, 40)
    assert world.kept() == {}
    assert world.grown()[:3] == ["bad", "good", "bad"]  # two contenders, then another plateau
    assert not any(isinstance(c, Regerminate) for c in world.commands)


# -- with a model ----------------------------------------------------------------------------------------------------


def test_a_seed_that_was_put_aside_comes_back_with_its_weights():
    model, _ = make_model(open_config(embargo_epochs=0))
    model.germinate(FIRST, "scale", gain=0.5)
    model.advance_stage(FIRST)
    learned = {name: p.detach().clone() for name, p in model.slots[FIRST].seed.named_parameters()}
    model.execute(Cull(FIRST, "compared", keep=True))
    assert model.observe().slots[0].kept_seed == "2-1"
    with pytest.raises(GerminationError, match="not dormant"):
        model.regerminate(FIRST)
    for _ in range(3):
        model.step_epoch(1.0)
    state = model.execute(Regerminate(FIRST))
    assert (state.seed_id, state.blueprint_id, model.slots[FIRST].options) == (
        "2-2",
        "mine:scale",
        {"gain": 0.5},
    )
    seed = dict(model.slots[FIRST].seed.named_parameters())
    assert all(torch.equal(seed[name], value) for name, value in learned.items())
    assert model.observe().slots[0].kept_seed == ""
    model.cull(FIRST)
    with pytest.raises(GerminationError, match="No seed was put aside in slot '2'"):
        model.regerminate(FIRST)


def test_following_a_policy_passes_over_what_g0_refuses_and_tells():
    model, recorder = make_model()
    policy = PlateauPolicy({Topology.CNN: ["picky", "scale"]}, patience=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = []
        for _ in range(4):
            model.step_epoch(1.0)
            said += model.follow(policy)
    assert [c.blueprint for c in said if isinstance(c, Germinate)] == ["scale"]
    refused = [
        e for e in recorder.events if e.type.value == "gate_evaluated" and e.gate == "G0" and not e.passed
    ]
    assert [e.reason for e in refused] == [
        "picky: width failed: 4 is not a multiple of 8"
    ] * 2  # in either slot
    assert sum(e.type.value == "command_refused" for e in recorder.events) == 2


def test_a_tournament_in_a_model_grows_the_winner():
    model, _ = make_model(open_config(embargo_epochs=0))
    policy = TournamentPolicy(
        {Topology.CNN: ["scale", "normed"]}, patience=1, incubation_epochs=3, max_probation_epochs=20
    )
    model.evaluate_with(lambda: torch.tensor([1.0, 2.0]) * (2.0 - 0.1 * (model.slots[FIRST].mode != 0)))
    for _ in range(60):
        model.step_epoch(1.0)
        model.follow(policy)
        if any(slot.stage is S.FOSSILIZED for slot in model.slots.values()):
            break
    assert model.slots[FIRST].stage is S.FOSSILIZED


def test_a_policy_of_ones_own_is_a_choice():
    class LastFirst(GrowingPolicy):
        def choose(self, observation, pairs):
            return pairs[-1]

    world = FakeGrowth(GAINS, SIZES).follow(LastFirst(CANDIDATES, Plateau(patience=2)), 4)
    assert world.commands == [Germinate("b", "null")]
