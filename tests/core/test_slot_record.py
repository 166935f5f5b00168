"""What a slot writes down and reads back: complete, plain, and refused as a whole where it does not fit."""

from __future__ import annotations

import copy
import io
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state_helpers import (
    EVERY_STAGE,
    FIRST,
    SECOND,
    bring_to,
    make_model,
    make_registry,
    open_config,
    picture,
    same_picture,
    train_once,
)

from kasmina_core import (
    CheckpointError,
    CheckVerdict,
    GateCheck,
    Incubation,
    KasminaError,
    RampUnit,
    SeedStage,
    UnknownNameError,
    tie_optimizer,
)
from kasmina_core.growth.plain_data import FORMAT_VERSION
from kasmina_core.growth.record import SlotRecord

S = SeedStage


def grown(stage, **config):
    model, _ = make_model(open_config(**config))
    optimizer = tie_optimizer(model, torch.optim.Adam(model.host_parameters(), 1e-2))
    bring_to(model, stage)
    return model, optimizer


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_a_record_is_plain_data_in_every_stage(stage):
    model, optimizer = grown(stage)
    train_once(model, optimizer)
    slot = model.slots[FIRST]
    record = slot.get_extra_state()
    assert record["version"] == FORMAT_VERSION
    assert same_picture(json.loads(json.dumps(record)), record)
    assert same_picture(through_a_file(record), record)
    assert same_picture(SlotRecord.for_slot(record, FIRST).to_dict(), record)


MOMENTS = [(stage, False) for stage in EVERY_STAGE] + [
    (stage, True) for stage in (S.GERMINATED, S.TRAINING, S.BLENDING, S.PROBATIONARY)
]


@pytest.mark.parametrize("incubation", Incubation)
@pytest.mark.parametrize("unit", RampUnit)
@pytest.mark.parametrize(("stage", "paused"), MOMENTS)
def test_a_run_that_is_saved_and_loaded_goes_on_like_one_that_was_not(stage, paused, unit, incubation):
    config = {"ramp_unit": unit, "incubation": incubation, "isolation_every": 2}
    model, _ = make_model(open_config(**config))
    optimizer = tie_optimizer(model, torch.optim.Adam(model.host_parameters(), 1e-2))
    model.germinate(SECOND, "normed")
    train_once(model, optimizer)
    model.germinate(FIRST, "scale")
    for _ in range(40):
        slot = model.slots[FIRST]
        if stage in (S.CULLED, S.EMBARGOED, S.RESETTING) and slot.stage is S.TRAINING:
            model.cull(FIRST, "no use")
        if stage is S.FOSSILIZED and slot.stage is S.PROBATIONARY and slot.last_gate:
            model.advance_stage(FIRST)
        if stage is S.DORMANT and slot.stage is S.GERMINATED:
            model.cull(FIRST, "no use")
        if slot.stage is stage:
            break
        train_once(model, optimizer)
        model.step_epoch(1.0)
    assert model.slots[FIRST].stage is stage
    if paused:
        model.slots[FIRST].pause()
    train_once(model, optimizer)  # in the middle of an epoch

    fresh, _ = make_model(open_config(**config))
    fresh.load_state_dict(through_a_file(model.state_dict()))
    again = tie_optimizer(fresh, torch.optim.Adam(fresh.host_parameters(), 1e-2))
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same_picture(picture(model)["records"], picture(fresh)["records"])
    for epoch in range(5):
        for one in (model, fresh):
            slot = one.slots[FIRST]
            if paused and epoch == 2:
                slot.resume()
            if (
                slot.state is not None
                and slot.stage in (S.TRAINING, S.PROBATIONARY)
                and not slot.state.is_paused
            ):
                slot.advance_stage()
            if slot.stage is S.DORMANT:
                slot.germinate("scale")
        losses = [train_once(model, optimizer), train_once(fresh, again)]
        assert torch.equal(*losses)
        results = [{k: r.to_dict() for k, r in one.step_epoch(losses[0]).items()} for one in (model, fresh)]
        assert same_picture(*results)
    before, after = picture(model), picture(fresh)
    for key in ("weights", "records", "stages", "modes", "trainable"):
        assert same_picture(before[key], after[key]), key


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_loading_what_was_saved_changes_nothing(stage):
    model, _ = grown(stage)
    slot = model.slots[FIRST]
    before = picture(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    after = picture(model)
    for key in ("weights", "records", "stages", "modes", "trainable", "random numbers", "training"):
        assert same_picture(before[key], after[key]), key
    assert model.slots[FIRST] is slot


@pytest.mark.parametrize("stage", [S.TRAINING, S.SHADOWING, S.PROBATIONARY])
def test_what_the_gates_said_in_this_epoch_is_still_known_after_a_load(stage):
    model, _ = grown(stage)
    model.step_epoch(1.0)
    said = model.slots[FIRST].last_gate
    fresh, recorder = make_model()
    fresh.load_state_dict(model.state_dict())
    slot = fresh.slots[FIRST]
    assert slot.last_gate == said
    assert fresh.observe().slots[0].gate_reason == model.observe().slots[0].gate_reason
    if said is not None:
        assert slot.check_gate(said.gate) is slot.last_gate
        assert recorder.events == []


# -- what does not fit -----------------------------------------------------------------------------------------------


def change(path, value):
    def damage(record):
        *way, last = path
        for step in way:
            record = record[step]
        record[last] = value

    return damage


CHECK = GateCheck("x", 1.0, CheckVerdict.PASSED).to_dict()

DAMAGE = [
    (change(["version"], 99), f"another version.\n  saved:    99\n  readable: {FORMAT_VERSION}"),
    (lambda r: r.pop("gains"), "(?s)slot '2' cannot be read: it has other fields.*missing: gains"),
    (change(["state", "slot"], "7"), "belongs to another slot.\n  saved: '7'\n  this:  '2'"),
    (change(["state", "stage"], 1), "a seed that is DORMANT; no seed can be"),
    (change(["state", "stage"], 0), "a seed that is UNKNOWN; no seed can be"),
    (change(["state", "stage"], 42), r"stage must be a SeedStage \(0, .*10\), not 42"),
    (
        change(["state", "metrics", "alpha"], 1.5),
        "alpha must be a number of at least 0 and at most 1, not 1.5",
    ),
    (
        change(["state", "metrics", "alpha"], math.nan),
        "alpha must be a number of at least 0 and at most 1, not nan",
    ),
    (change(["schedule"], None), "is BLENDING but has no alpha schedule"),
    (change(["schedule", "total_steps"], 0), "total_steps must be a whole number of at least 1, not 0"),
    (
        change(["schedule"], {"steps": 3}),
        "(?s)schedule has other fields.*missing: total_steps\n  unknown: steps",
    ),
    (change(["germinations"], math.inf), "germinations must be a whole number of at least 0, not inf"),
    (change(["germinations"], -1), "germinations must be a whole number of at least 0, not -1"),
    (change(["options"], {"gian": 1.0}), "cannot be rebuilt in slot '2'.*no option 'gian'"),
    (change(["options"], 5), "options must be a mapping by text, not 5"),
    (change(["evidence"], {"samples": 1}), "evidence has other fields"),
    (change(["gains"], ["much"]), r"gains\[0\] must be a number, not 'much'"),
    (change(["gradient_norms"], [1]), r"gradient_norms must be a list of 3, not \[1\]"),
    (
        change(["germinations"], 1 << 63),
        "germinations must be a whole number of at least 0, not 9223372036854775808",
    ),
    (change(["gates"], None), "gates must be a list, not None"),
    (change(["gates"], [{"gate": "G9"}]), r"(?s)gates\[0\] has other fields.*missing: checks"),
    (
        change(
            ["gates"],
            [{"gate": "G3", "epoch": 1, "finding": None, "checks": [CHECK | {"verdict": "fine"}]}],
        ),
        r"verdict must be a CheckVerdict \(passed, .*\), not 'fine'",
    ),
    (change(["frozen_by_pause"], ["weights"]), "paused with parameters it does not have: weights"),
    (change(["state", "blueprint_id"], "mine:per-token"), "blueprint: transformer, slot: cnn"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE)
def test_a_damaged_record_is_refused_and_the_slot_is_as_before(damage, says):
    model, optimizer = grown(S.BLENDING)
    model.step_epoch(1.0)
    slot = model.slots[FIRST]
    record = copy.deepcopy(slot.get_extra_state())
    damage(record)
    before, gains = picture(model, optimizer), slot.notes.stage.gains
    with pytest.raises(CheckpointError, match=says.replace("\n", "\n.*")):
        slot.set_extra_state(record)
    assert same_picture(before, picture(model, optimizer))
    assert slot.notes.stage.gains is gains


def test_a_record_is_a_mapping():
    model, _ = grown(S.TRAINING)
    before = picture(model)
    for other in (None, [], "record", 3):
        with pytest.raises(CheckpointError, match=f"saved: *'{type(other).__name__}'"):
            model.slots[FIRST].set_extra_state(other)
    assert same_picture(before, picture(model))


def test_a_blueprint_that_nobody_offers_is_refused_by_name():
    model, optimizer = grown(S.TRAINING)
    before = picture(model, optimizer)
    record = copy.deepcopy(model.slots[FIRST].get_extra_state())
    record["state"]["blueprint_id"] = "os:system"
    with pytest.raises(UnknownNameError, match="No blueprint 'os:system' is registered"):
        model.slots[FIRST].set_extra_state(record)
    assert same_picture(before, picture(model, optimizer))


class Refuses:
    def seed_added(self, slot, parameters):
        raise PermissionError("full")

    def seed_removed(self, slot, parameters):
        raise AssertionError("nothing was removed")


def test_a_slot_whose_new_seed_is_refused_keeps_its_old_one():
    model, _ = make_model()
    bring_to(model, S.TRAINING)
    model.listen(Refuses())
    before = picture(model)
    with pytest.raises(PermissionError, match="full"):
        model.slots[FIRST].set_extra_state(copy.deepcopy(model.slots[FIRST].get_extra_state()))
    assert same_picture(before, picture(model))


BAD = st.sampled_from(
    [None, 0, -1, 3, 99, 1.5, math.nan, math.inf, "", "x", True, [], {}, [[3, 1]], {"a": 1}, b"x", [None]]
)


def paths_in(data, way=()):
    for key, value in data.items():
        yield (*way, key)
        if isinstance(value, dict):
            yield from paths_in(value, (*way, key))


@pytest.fixture(scope="module")
def in_shadowing():
    model, optimizer = grown(S.SHADOWING)
    return model, optimizer, model.slots[FIRST].get_extra_state()


# A harmless change, such as one of the stage, may leave a seed that does not learn, of which a model warns.
@pytest.mark.filterwarnings("ignore:A seed had no gradient:kasmina_core.MisuseWarning")
@given(data=st.data(), value=BAD)
@settings(max_examples=300)
def test_any_damage_is_refused_as_a_whole_or_harmless(in_shadowing, data, value):
    model, optimizer, good = in_shadowing
    slot, record = model.slots[FIRST], copy.deepcopy(good)
    change(data.draw(st.sampled_from(sorted(paths_in(good)))), value)(record)
    before = picture(model, optimizer)
    try:
        slot.set_extra_state(record)
    except KasminaError:
        assert same_picture(before, picture(model, optimizer))
        return
    assert type(slot.stage) is SeedStage
    assert 0.0 <= slot.alpha <= 1.0
    model.step_epoch(1.0)
    train_once(model, optimizer)
    json.dumps(slot.get_extra_state())
    slot.set_extra_state(copy.deepcopy(good))


def test_a_load_that_fails_in_a_later_slot_takes_back_the_earlier_ones():
    model, optimizer = grown(S.PROBATIONARY)
    model.step_epoch(1.0)
    bring_to(model, S.TRAINING, SECOND)
    state = copy.deepcopy(model.state_dict())
    state["kasmina_slots.4._extra_state"] = model.slots[SECOND].get_extra_state() | {"version": 99}
    train_once(model, optimizer)
    before = picture(model, optimizer)
    slot = model.slots[FIRST]
    kept = (slot.seed, slot.state, list(slot.notes.stage.gains), slot.last_evidence, slot.last_gate)
    with pytest.raises(CheckpointError, match="slot '4' has another version"):
        model.load_state_dict(state)
    assert same_picture(before, picture(model, optimizer))
    assert kept == (slot.seed, slot.state, slot.notes.stage.gains, slot.last_evidence, slot.last_gate)
    assert kept[4] is not None


def test_an_empty_slot_leaves_no_key_and_a_bare_host_loads():
    model, _ = make_model(registry=make_registry())
    bare = model.host
    assert list(model.state_dict()) == list(bare.state_dict())
    bring_to(model, S.TRAINING)
    model.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert model.slots[FIRST].stage is S.DORMANT
    assert model.slots[FIRST].seed is None
