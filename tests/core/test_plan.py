"""PlanPolicy: waves at points that are set beforehand, kept or taken back as a whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import ConvSeed, cnn_host, images, labels, registry, same_tensors, snapshot
from torch import nn

from kasmina_core import (
    Advance,
    Cull,
    GateThresholds,
    Germinate,
    GrowthConfig,
    KasminaError,
    MorphogeneticModel,
    Observation,
    PlanPolicy,
    SeedStage,
    SlotObservation,
    StraightInsertion,
    Topology,
    blueprint_sizes,
    load_checkpoint,
    save_checkpoint,
    tie_optimizer,
)
from kasmina_core.policies.bundled import PolicyOptionError, build_policy

S = SeedStage
BLOCKS = {Topology.CNN: ["block"]}


class Block(ConvSeed):
    """``copies`` convolutions in a row."""

    def __init__(self, dim: int, copies: int = 1) -> None:
        super().__init__(dim)
        self.more = nn.ModuleList(ConvSeed(dim) for _ in range(copies - 1))


def seeds():
    found = registry()
    from kasmina_core import BlueprintSpec

    spec = BlueprintSpec("block", Topology.CNN, Block, lambda d: 9 * d * d + d, options={"copies": 1})
    found.register(spec, pack="tiny")
    return found


def at(epoch, *, free=1, metric=1.0, **more):
    slots = tuple(SlotObservation(f"{epoch}.{i}", Topology.CNN, 4, S.DORMANT) for i in range(free))
    return Observation(epoch, metric, False, 100, 0, slots, **more)


def due(policy, observations):
    """Epochs after which a wave came, every seed of it being kept at once."""
    found = []
    for observation in observations:
        commands = policy.decide(observation)
        assert all(isinstance(c, Germinate) for c in commands)
        assert len({c.slot for c in commands}) == len(commands)
        if commands:
            assert len(commands) == len(observation.slots)
            found.append(observation.epoch)
    return found


# -- when ----------------------------------------------------------------------------------------------------------


def test_points_are_reached_in_any_unit():
    epochs = range(1, 40)
    assert due(PlanPolicy(BLOCKS, at=[5, 20]), map(at, epochs)) == [5, 20]
    steps = [at(e, steps=7 * e) for e in epochs]
    assert due(PlanPolicy(BLOCKS, at=[50, 100], unit="steps"), steps) == [8, 15]
    flops = [at(e, flops=1e6 * e, budget=4e7) for e in epochs]
    assert due(PlanPolicy(BLOCKS, shares=[0.1, 0.5], unit="flops"), flops) == [4, 20]
    assert due(PlanPolicy(BLOCKS, shares=[0.1, 0.5], budget=20), map(at, epochs)) == [3, 10]
    now = [0.0]
    policy = PlanPolicy(BLOCKS, at=[10.5], unit="seconds", clock=lambda: now[0])
    found = []
    for epoch in epochs:
        now[0] += 2.0
        found += [epoch] if policy.decide(at(epoch)) else []
    assert found == [6]


def test_a_plan_without_an_end_waits_for_a_share_of_what_the_next_size_needs():
    def sizes(slot, blueprint, options):
        return 50 * options["copies"]

    options = {"options": {"copies": 1}, "doubles": "copies", "sizes": sizes}
    policy = PlanPolicy(BLOCKS, needs=2.0, unit="steps", **options)
    steps = [at(e, free=2, steps=e) for e in range(1, 100)]
    # 100 parameters and 2 * 50 in the free slots: 2.0 * 200 steps, a tenth of them; then 2 * 100.
    assert due(policy, steps) == [40, 60]
    squared = PlanPolicy(BLOCKS, needs=1e-3, unit="flops", max_waves=1, **options)
    assert due(squared, [at(e, free=2, flops=float(e)) for e in range(1, 100)]) == [4]


def test_all_free_slots_grow_in_one_epoch_and_options_double_from_wave_to_wave():
    policy = PlanPolicy(
        BLOCKS, at=[3, 4], options={"copies": 2, "std": 0.1}, doubles="copies", straight=False
    )
    assert policy.decide(at(3, free=3)) == [
        Germinate(f"3.{i}", "block", {"copies": 2, "std": 0.1}) for i in range(3)
    ]
    assert policy.decide(at(4, free=1))[0].options == {"copies": 4, "std": 0.1}
    assert policy.decide(at(5, free=1)) == ()


def test_the_first_wave_that_is_put_in_straight_waits_for_three_epochs_and_for_a_finite_metric():
    assert due(PlanPolicy(BLOCKS, at=[1]), map(at, range(1, 9))) == [3]
    assert due(PlanPolicy(BLOCKS, at=[1], straight=False), map(at, range(1, 9))) == [1]
    broken = PlanPolicy(BLOCKS, at=[3], patience=9)
    assert due(broken, [at(3, metric=float("nan")), at(4)]) == [4]


def test_what_g0_refuses_is_made_up_for_within_its_wave():
    policy = PlanPolicy(
        {Topology.CNN: ["odd", "block"]}, at=[3, 9], options={"copies": 1}, doubles="copies", straight=False
    )
    assert policy.decide(at(3))[0].blueprint == "odd"
    (again,) = policy.decide(replace(at(3), epoch=4))
    assert (again.blueprint, again.options) == ("block", {"copies": 1})
    assert policy.points.waves == 1


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({}, r"at=\[200, 800\].*shares=\[0\.1, 0\.4\].*needs="),
        ({"at": [3], "shares": [0.1]}, "in one way"),
        ({"at": [4, 4]}, r"rising.*\[4, 4\]"),
        ({"at": []}, "rising"),
        ({"at": [-1]}, "at least 0"),
        ({"shares": [0.1, 1.0], "budget": 9}, "below 1"),
        ({"shares": [0.1]}, "give budget=, in epochs"),
        ({"shares": [0.1], "budget": 0}, "budget must be above 0"),
        ({"at": [1], "unit": "step"}, "Did you mean 'steps'"),
        ({"needs": 1.0}, r"sizes=, such as blueprint_sizes"),
        ({"needs": 1.0, "share": 0.0, "sizes": lambda *_: 1}, "share must be above 0"),
        ({"at": [1], "doubles": "copies"}, r"options=\{'copies': 1\}"),
        ({"at": [1], "options": {"a": object()}}, "plain data"),
        ({"at": [1], "patience": 0}, "patience must be at least 1"),
        ({"at": [1], "max_waves": 0}, "max_waves must be at least 1"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_line_to_write(plan, says):
    with pytest.raises(ValueError, match=says):
        PlanPolicy(BLOCKS, **plan)


def test_a_plan_that_is_not_told_what_is_spent_says_how_to_tell_it():
    with pytest.raises(KasminaError, match=r"step_epoch\(metric, flops=spent_so_far\)"):
        PlanPolicy(BLOCKS, at=[1e9], unit="flops").decide(at(3))
    with pytest.raises(KasminaError, match=r"step_epoch\(metric, flops=spent, budget=all\)"):
        PlanPolicy(BLOCKS, shares=[0.1], unit="flops").decide(at(3, flops=1.0))


def test_the_command_builds_a_plan_from_its_options():
    from kasmina_core.policies.bundled import BUNDLED

    def build(options, **more):
        return build_policy("plan", BUNDLED["plan"], BLOCKS, options, registry=seeds(), **more)

    assert due(build({}, epochs=50), map(at, range(1, 50))) == [5, 20]
    assert due(build({"needs": 0.1, "unit": "steps"}), [at(e, steps=e) for e in range(1, 9)]) == [
        3,
        4,
        5,
        6,
        7,
        8,
    ]
    with pytest.raises(PolicyOptionError, match="a list of numbers"):
        build({"shares": "0.1"})
    with pytest.raises(PolicyOptionError, match="a mapping"):
        build({"at": [1], "options": [1]})


def test_the_next_size_is_counted_with_the_options_and_without_memory_or_random_numbers():
    slot = SlotObservation("s", Topology.CNN, 4, S.DORMANT)
    before = torch.get_rng_state()
    size = blueprint_sizes(seeds())
    one = sum(p.numel() for p in Block(4).parameters())
    torch.set_rng_state(before)
    assert (size(slot, "block", {}), size(slot, "block", {"copies": 3})) == (one, 3 * one)
    assert torch.equal(torch.get_rng_state(), before)


# -- what becomes of a wave --------------------------------------------------------------------------------------------


class Run:
    """A tiny model with a tied Adam that follows a plan."""

    def __init__(self, **plan):
        self.model = MorphogeneticModel(
            cnn_host(),
            ("norm", "norm2"),
            example=images(2),
            registry=seeds(),
            config=GrowthConfig(
                gates=GateThresholds(against_start="no harm"), straight=StraightInsertion(lag=2)
            ),
        )
        self.optimizer = tie_optimizer(self.model, torch.optim.Adam(self.model.parameters(), 1e-2))
        self.policy = PlanPolicy(BLOCKS, **{"at": [5], "patience": 2} | plan)
        self.done = []

    def learn(self):
        self.model.train()
        for _ in range(2):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images()), labels()).backward()
            self.model.step()
            self.optimizer.step()

    def epochs(self, *metrics):
        for metric in metrics:
            self.learn()
            self.model.step_epoch(metric)
            self.done += self.model.follow(self.policy)
            assert all(outcome.done for outcome in self.model.outcomes)

    def everything(self):
        states = [self.optimizer.state[p] for p in self.model.host.parameters()]
        return snapshot(self.model.host), [{k: v.clone() for k, v in one.items()} for one in states]

    def stages(self):
        return {slot.stage for slot in self.model.slots.values()}


FALLING = (3.0, 2.6, 2.3, 2.1, 2.0)


def test_a_wave_that_passes_is_kept():
    run = Run()
    run.epochs(*FALLING)
    assert run.stages() == {S.PROBATIONARY}
    run.epochs(2.5, 1.7)
    assert run.stages() == {S.FOSSILIZED}
    assert [type(c) for c in run.done] == [Germinate, Germinate, Advance, Advance]


def test_a_wave_that_g5_refuses_is_taken_back_bit_for_bit_the_last_seed_first():
    run = Run()
    run.epochs(*FALLING)
    before = run.everything()
    run.epochs(9.0, 9.0)
    assert run.stages() == {S.PROBATIONARY}
    run.epochs(9.0)
    assert run.stages() == {S.CULLED}
    assert same_tensors(run.everything(), before)
    assert [(c.slot, c.revert) for c in run.done if isinstance(c, Cull)] == [("norm2", True), ("norm", True)]
    assert run.model.lost_epochs == 3
    assert "refused in 2 epochs" in run.model.slots["norm"].state.cull_reason


def test_a_wave_that_took_the_metric_to_nan_is_taken_back_whole():
    run = Run()
    run.epochs(*FALLING)
    before = run.everything()
    with pytest.warns(RuntimeWarning, match="metric of nan"):
        run.epochs(float("nan"), float("nan"))
    assert same_tensors(run.everything(), before)


def test_a_paused_seed_keeps_its_wave_waiting():
    run = Run()
    run.epochs(*FALLING)
    run.model.slots["norm"].pause()
    run.epochs(9.0, 9.0, 9.0, 9.0)
    assert run.stages() == {S.PROBATIONARY}


def test_without_straight_each_seed_lives_the_whole_lifecycle():
    run = Run(straight=False)
    run.epochs(*FALLING)
    assert run.stages() == {S.GERMINATED}
    assert all(not slot.state.is_straight for slot in run.model.slots.values())


def test_a_resumed_plan_decides_as_the_one_that_went_on(tmp_path):
    run = Run(at=[4, 26], unit="steps")
    run.epochs(*FALLING[:4], 9.0)
    save_checkpoint(tmp_path / "saved", run.model, optimizer=run.optimizer, policy=run.policy)
    json.dumps(run.policy.state_dict())
    other = Run(at=[4, 26], unit="steps")
    load_checkpoint(tmp_path / "saved", other.model, optimizer=other.optimizer, policy=other.policy)
    assert other.model.observe() == run.model.observe()
    before = len(run.done)
    for each in (run, other):
        each.epochs(9.0, 9.0, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4)
    assert run.done[before:] == other.done
    assert [type(c) for c in other.done[:2]] == [Cull, Cull]
    assert Germinate in map(type, other.done)
    assert same_tensors(run.everything(), other.everything())
