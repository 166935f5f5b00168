"""A seed that goes too far from its host while it learns apart is measured, stopped and kept out."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    COUNTERFACTUAL,
    STRAIGHT_THROUGH,
    ConvSeed,
    cnn_model,
    grow_to,
    images,
    labels,
    registry,
)

from kasmina_core import (
    GateLevel,
    GrowthConfig,
    IncubationStopped,
    PlateauPolicy,
    SeedStage,
    Topology,
    tie_optimizer,
)


class Poison(ConvSeed):
    """Is well until its bias moves, and then nowhere."""

    def forward(self, x):
        return super().forward(x) + torch.where(self.conv.bias.abs().sum() > 1e3, math.nan, 0.0)


def loss_of(model):
    return F.cross_entropy(model(images()), labels())


class Recorder:
    def __init__(self):
        self.events = []

    def emit(self, event):
        self.events.append(event)

    def stops(self):
        return [event for event in self.events if isinstance(event, IncubationStopped)]


def training(**config):
    model = cnn_model(seeds=registry(poison=Poison), **config)
    recorder = Recorder()
    model.emit_to(recorder)
    grow_to(model, "norm", SeedStage.TRAINING, "poison")
    return model, model.slots["norm"], recorder


def learn(model, steps=1):
    for _ in range(steps):
        model.train()
        loss_of(model).backward()
        model.incubate(lambda: loss_of(model))
        model.step()


def features_at(model, slot):
    seen = []
    handle = slot.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach().clone()))
    with model.bypassed(slot.name):
        model(images())
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("incubation", [STRAIGHT_THROUGH, COUNTERFACTUAL])
def test_the_deviation_is_that_of_the_seed_from_its_host_in_the_pass_it_learns_in(incubation):
    model, slot, _ = training(incubation=incubation)
    reference = copy.deepcopy(model)
    if incubation is COUNTERFACTUAL:
        model.incubate(lambda: loss_of(model))
    else:
        learn(model)
    assert slot.check_deviation() == slot.state.metrics.deviation == model.observe().slots[0].deviation
    if incubation is COUNTERFACTUAL:
        reference.eval()
    host = features_at(reference, reference.slots["norm"])
    delta = (reference.slots["norm"].seed(host) - host).detach()
    expected = delta.pow(2).mean().sqrt() / host.pow(2).mean().sqrt()
    assert slot.state.metrics.deviation == pytest.approx(float(expected), rel=1e-5)
    assert slot.check_deviation() is None  # nothing new
    assert slot.telemetry().deviation == slot.state.metrics.deviation


def test_the_largest_batch_counts_and_the_bound_of_the_forward_does_not():
    model, slot, _ = training(max_deviation=1e-3)
    with torch.no_grad():
        slot.seed.conv.weight.mul_(10.0)
    learn(model)
    with torch.no_grad():
        slot.seed.conv.weight.mul_(0.01)
    learn(model)
    assert slot.check_deviation() > 0.5


def test_isolation_checks_do_not_count_as_learning():
    _, slot, _ = training()
    assert slot.check_isolation() is not None
    assert slot.check_deviation() is None


@pytest.mark.parametrize("incubation", [STRAIGHT_THROUGH, COUNTERFACTUAL])
@pytest.mark.parametrize("size", [1e5, math.nan, math.inf])
@pytest.mark.parametrize("limit", [10.0, math.inf])
def test_a_seed_that_went_too_far_is_stopped_with_one_event(incubation, size, limit):
    if limit == math.inf and math.isfinite(size):
        limit = 1e3
    model, slot, recorder = training(incubation=incubation, max_incubation_deviation=limit)
    optimizer = tie_optimizer(model, torch.optim.Adam(model.parameters(), 1e-2))
    with torch.no_grad():
        slot.seed.conv.weight.fill_(size)
    learn(model)
    optimizer.zero_grad()
    result = slot.step_epoch()
    assert not result.passed
    assert slot.state.is_stopped
    assert slot.state.is_paused
    assert slot.stage is SeedStage.TRAINING
    (event,) = recorder.stops()
    assert (event.limit == limit and not event.deviation <= limit) or math.isinf(event.deviation)
    assert event.slot == "norm"
    assert event.to_dict()["type"] == "incubation_stopped"
    before = [p.detach().clone() for p in slot.seed_parameters()]
    learn(model, 2)
    optimizer.step()
    assert all(torch.equal(a, b) or size != size for a, b in zip(before, slot.seed_parameters(), strict=True))
    assert slot.step_epoch() is None
    assert len(recorder.stops()) == 1
    assert re.search(
        rf"was stopped: it went \S+ from the host, and max_incubation_deviation is {limit:g}; resume it, "
        r"model\.slots\['norm'\]\.resume\(\), or cull it, model\.cull\('norm'\)",
        slot.advance_stage().reason,
    )


def test_a_run_can_be_stopped_within_an_epoch():
    model, slot, recorder = training(isolation_every=3, max_incubation_deviation=1e-6)
    learn(model, 2)
    assert not slot.state.is_stopped
    learn(model)
    assert slot.state.is_stopped
    assert len(recorder.stops()) == 1


def test_g2_refuses_a_stopped_seed_and_says_so():
    model, slot, _ = training(max_incubation_deviation=1e-6)
    learn(model)
    result = slot.check_gate(GateLevel.G2)
    assert not result.passed
    assert "stopped in incubation failed" in result.reason
    assert [c.name for c in result.failed_checks] == ["stopped in incubation"] + [
        c.name for c in result.failed_checks if c.value is None
    ]


def test_a_stopped_seed_may_go_on_if_asked_and_is_stopped_again():
    model, slot, recorder = training(max_incubation_deviation=1e-6)
    learn(model)
    slot.check_deviation()
    slot.resume()
    assert slot.is_incubating
    assert not slot.state.is_stopped
    learn(model)
    assert slot.check_deviation() > 1e-6
    assert slot.state.is_stopped
    assert len(recorder.stops()) == 2


def test_a_plateau_policy_culls_what_was_stopped_and_leaves_what_is_paused():
    model, slot, _recorder = training(max_incubation_deviation=1e-6)
    policy = PlateauPolicy({Topology.CNN: ["conv"]})
    slot.pause()
    assert policy.decide(model.observe()) == []
    slot.resume()
    learn(model)
    model.step_epoch(1.0)
    model.follow(policy)
    assert slot.stage is SeedStage.CULLED
    assert slot.state.cull_reason.startswith("stopped in incubation: its deviation from the host is ")
    assert not slot.state.is_stopped


def test_a_stopped_seed_is_still_stopped_after_a_load():
    model, slot, _ = training(max_incubation_deviation=1e-6)
    learn(model)
    slot.check_deviation()
    twin = cnn_model(seeds=registry(poison=Poison), max_incubation_deviation=1e-6)
    twin.load_state_dict(model.state_dict())
    state = twin.slots["norm"].state
    assert state.is_stopped
    assert state.metrics.deviation == slot.state.metrics.deviation
    assert all(not p.requires_grad for p in twin.slots["norm"].seed_parameters())


def test_what_was_measured_within_an_epoch_travels_with_a_checkpoint_and_not_with_a_failed_load():
    model, slot, _ = training()
    learn(model)
    twin = cnn_model(seeds=registry(poison=Poison))
    twin.load_state_dict(model.state_dict())
    broken = dict(model.state_dict())
    broken.popitem()
    broken["stem.weight"] = torch.zeros(7)
    with pytest.raises(RuntimeError):
        twin.load_state_dict(broken)
    assert twin.slots["norm"].check_deviation() == slot.check_deviation()


@pytest.mark.parametrize("every", [1, 3])
def test_incubate_every_runs_one_pass_in_so_many_calls(every):
    model, _, _ = training(incubation=COUNTERFACTUAL, incubate_every=every)
    ran = [bool(model.incubate(lambda: loss_of(model))) for _ in range(7)]
    assert ran == [call % every == 0 for call in range(7)]


def test_the_turn_of_a_seed_travels_with_a_checkpoint():
    model, _, _ = training(incubation=COUNTERFACTUAL, incubate_every=3)
    for _ in range(2):
        model.incubate(lambda: loss_of(model))
    twin = cnn_model(seeds=registry(poison=Poison), incubation=COUNTERFACTUAL, incubate_every=3)
    twin.load_state_dict(model.state_dict())
    ran = [bool(twin.incubate(lambda: loss_of(twin))) for _ in range(3)]
    assert ran == [False, True, False]


@pytest.mark.parametrize("change", [{"max_incubation_deviation": 0}, {"incubate_every": 0}])
def test_numbers_out_of_range_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} must be .*not {value}"):
        GrowthConfig(**change)
