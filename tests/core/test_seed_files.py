"""Seeds in a file of their own, grafted onto the same host elsewhere or refused as a whole."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from state_helpers import (
    COOLDOWN,
    FIRST,
    SECOND,
    WAY,
    WIDTH,
    bring_to,
    make_batch,
    make_host,
    make_model,
    make_registry,
    open_config,
    picture,
    rewrite_seeds,
    same_picture,
    train_once,
)
from test_growth_state import registry_of

from kasmina_core import (
    CheckpointError,
    InjectionPoint,
    MorphogeneticModel,
    OtherBlueprintVersion,
    SeedSaved,
    SeedStage,
    Telemetry,
    Topology,
    UnknownNameError,
    graft_seeds,
    save_seeds,
    tie_optimizer,
)


def grown(stage=SeedStage.FOSSILIZED, blueprint="normed", **more):
    model, _ = make_model(**more)
    optimizer = tie_optimizer(model, torch.optim.Adam(model.host_parameters(), 1e-2))
    bring_to(model, stage, blueprint=blueprint)
    for _ in range(2):
        train_once(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("stage", WAY)
def test_a_grafted_seed_is_the_one_that_was_saved(stage, tmp_path):
    model, _ = grown(stage)
    file = save_seeds(tmp_path / "seeds.safetensors", model)
    assert file.stat().st_size < 6000
    other, _ = make_model()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("kasmina_slots")})
    assert graft_seeds(file, other) == [FIRST]
    x, _ = make_batch()
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert other.slots[FIRST].stage is stage
    assert other.slots[FIRST].alpha == model.slots[FIRST].alpha


def test_a_graft_leaves_other_seeds_and_their_optimiser_state_alone(tmp_path):
    file = save_seeds(tmp_path / "seeds.safetensors", grown()[0])
    other, _ = make_model()
    optimizer = tie_optimizer(other, torch.optim.Adam(other.host_parameters(), 1e-2))
    bring_to(other, SeedStage.TRAINING, SECOND)
    train_once(other, optimizer)
    seed, state = other.slots[SECOND].seed, {id(p): dict(s) for p, s in optimizer.state.items()}
    graft_seeds(file, other)
    assert other.slots[SECOND].seed is seed
    assert all(same_picture(dict(optimizer.state[p]), state[id(p)]) for p in list(optimizer.state))
    assert [group.get("kasmina_slot") for group in optimizer.param_groups] == [None, FIRST, SECOND]
    train_once(other, optimizer)


def test_seeds_are_chosen_and_put_elsewhere_by_name(tmp_path):
    model, _ = grown()
    bring_to(model, SeedStage.TRAINING, SECOND)
    file = save_seeds(tmp_path / "seeds.safetensors", model, [FIRST])
    other, _ = make_model()
    assert graft_seeds(file, other, {FIRST: SECOND}) == [SECOND]
    assert other.slots[SECOND].state.slot == SECOND
    assert all(map(torch.equal, model.seed_parameters(FIRST), other.seed_parameters(SECOND)))
    assert other.slots[FIRST].stage is SeedStage.DORMANT
    other.load_state_dict(other.state_dict())
    with pytest.raises(UnknownNameError, match="no saved seed '4'"):
        graft_seeds(file, other, {SECOND: FIRST})
    with pytest.raises(UnknownNameError, match="no slot 'x'"):
        graft_seeds(file, other, {FIRST: "x"})


def test_what_gates_had_measured_elsewhere_is_measured_anew(tmp_path):
    model, _ = grown(SeedStage.PROBATIONARY)
    model.step_epoch(1.0)
    other, _ = make_model()
    graft_seeds(save_seeds(tmp_path / "seeds.safetensors", model), other)
    assert other.slots[FIRST].last_gate is None
    calls = other.growth.evaluator.calls
    other.measure(FIRST)
    assert other.growth.evaluator.calls > calls


@pytest.mark.parametrize("stage", [SeedStage.DORMANT, *COOLDOWN])
def test_a_slot_without_a_seed_has_nothing_to_save(stage, tmp_path):
    model, _ = make_model()
    bring_to(model, stage)
    for slots in (None, [FIRST]):
        with pytest.raises(CheckpointError, match=r"no seed to save in: (all slots|2)"):
            save_seeds(tmp_path / "seeds.safetensors", model, slots)
    assert list(tmp_path.iterdir()) == []


def refused(file, model, says, onto=None):
    optimizer = tie_optimizer(model, torch.optim.Adam(model.host_parameters(), 1e-2))
    train_once(model, optimizer)
    before = picture(model, optimizer)
    with pytest.raises(CheckpointError, match=f"(?s){says}") as caught:
        graft_seeds(file, model, onto)
    assert same_picture(before, picture(model, optimizer))
    return str(caught.value)


def test_an_occupied_slot_is_refused_and_so_are_two_seeds_for_one(tmp_path):
    model, _ = grown()
    bring_to(model, SeedStage.TRAINING, SECOND)
    file = save_seeds(tmp_path / "seeds.safetensors", model)
    other, _ = make_model()
    bring_to(other, SeedStage.TRAINING, SECOND)
    refused(file, other, "Slot '4' is not dormant but TRAINING: it holds '4-1'")
    refused(file, make_model()[0], "Two seeds cannot be grafted onto one slot", {FIRST: FIRST, SECOND: FIRST})


def test_another_width_is_refused(tmp_path):
    file = save_seeds(tmp_path / "seeds.safetensors", grown()[0])
    host = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 1), torch.nn.Sequential(torch.nn.ReLU()))
    points = [InjectionPoint(FIRST, "1", 6, Topology.CNN)]
    model = MorphogeneticModel(
        host, points, example=torch.zeros(1, 1, 5, 5), registry=make_registry(), config=open_config()
    )
    with pytest.raises(CheckpointError, match=f"(?s)does not fit slot '2'.*'dim': {WIDTH}.*'dim': 6"):
        graft_seeds(file, model)
    assert model.slots[FIRST].stage is SeedStage.DORMANT


def test_a_missing_pack_names_what_to_install_and_another_version_is_said(tmp_path):
    model, _ = grown(blueprint="scale", registry=registry_of("1.0"))
    file = save_seeds(tmp_path / "seeds.safetensors", model)
    refused(file, make_model(registry=registry_of("1.0", name="more"))[0], r"install that from where")
    other, _ = make_model(registry=registry_of("2.0"))
    with pytest.warns(OtherBlueprintVersion, match=r"(?s)==1\.0.*==2\.0"):
        graft_seeds(file, other)


def changed(file, change):
    """Rewrite a file with other tensors and another text."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        data = json.loads(opened.metadata()["kasmina_seeds"])
    change(tensors, data)
    rewrite_seeds(file, tensors, data)
    return file


DAMAGE = [
    (lambda t, d: d.update(version=9), "another version.*saved: *9"),
    (lambda t, d: d.update(slots=3), "says of its seeds is damaged"),
    (lambda t, d: d["slots"][FIRST].pop("point"), "says of its seeds is damaged"),
    (
        lambda t, d: d["slots"][FIRST]["record"]["state"].update(stage=99),
        r"stage must be a SeedStage .*, not 99",
    ),
    (lambda t, d: d["slots"][FIRST]["record"].update(state=None), "damaged or holds no seed"),
    (lambda t, d: d["slots"][FIRST]["record"].update(germinations="x"), "cannot be read"),
    (
        lambda t, d: d["slots"][FIRST]["tensors"].update(weight=[7]),
        r"makes other parameters.*weight: \[7\] saved",
    ),
    (lambda t, d: t.pop(f"{FIRST}.weight"), "cannot be grafted.*Missing key"),
    (lambda t, d: t.update({f"{SECOND}.weight": torch.ones(3)}), "cannot be grafted.*size mismatch|other"),
]


@pytest.mark.parametrize(("change", "says"), DAMAGE)
def test_what_does_not_fit_is_refused_and_no_slot_is_half_done(change, says, tmp_path):
    model, _ = grown()
    bring_to(model, SeedStage.SHADOWING, SECOND)
    refused(changed(save_seeds(tmp_path / "seeds.safetensors", model), change), make_model()[0], says)


def test_a_foreign_or_truncated_file_is_refused(tmp_path):
    file = tmp_path / "seeds.safetensors"
    refused(file, make_model()[0], r"There is no file .*seeds\.safetensors")
    save_file(make_host().state_dict(), file)
    refused(file, make_model()[0], "holds no seeds: save_seeds did not write it")
    whole = save_seeds(file, grown()[0]).read_bytes()
    for length in range(0, len(whole), 301):
        file.write_bytes(whole[:length])
        refused(file, make_model()[0], "damaged or no safetensors file")


def test_a_bit_that_turned_anywhere_in_a_file_is_noticed_before_anything_is_built(tmp_path):
    file = save_seeds(tmp_path / "seeds.safetensors", grown(SeedStage.PROBATIONARY)[0])
    whole = file.read_bytes()
    model, _ = make_model()
    before = picture(model)
    seal = whole.index(b'"crc32')
    for place in {*range(0, len(whole), 29), *range(12), *range(seal, seal + 36)}:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is damaged|not as it was written|holds no seeds"):
            graft_seeds(file, model)
    assert same_picture(picture(model), before)
    file.write_bytes(whole)
    assert graft_seeds(file, model) == [FIRST]


def test_a_stage_that_is_another_by_one_bit_is_refused_with_both_checksums(tmp_path):
    file = save_seeds(tmp_path / "seeds.safetensors", grown(SeedStage.PROBATIONARY)[0])
    whole = file.read_bytes()
    assert whole.count(rb"\"stage\":6") == 1
    file.write_bytes(whole.replace(rb"\"stage\":6", rb"\"stage\":7"))
    refused(file, make_model()[0], r"crc32 written: \d+\n +crc32 found: +\d+")


def test_a_file_from_before_there_was_a_checksum_is_grafted_with_a_warning(tmp_path):
    model, _ = grown()
    file = save_seeds(tmp_path / "seeds.safetensors", model)
    with safe_open(file, "pt") as opened:
        text = opened.metadata()["kasmina_seeds"]
    save_file(load_file(file), file, {"kasmina_seeds": text})
    other, _ = make_model()
    with pytest.warns(UserWarning, match="a bit that turned in it is not noticed") as told:
        assert graft_seeds(file, other) == [FIRST]
    assert told[0].filename == __file__
    assert all(map(torch.equal, model.seed_parameters(FIRST), other.seed_parameters(FIRST)))


@pytest.mark.parametrize("place", ["file/seeds.safetensors", "nowhere/seeds.safetensors"])
def test_a_place_that_cannot_be_written_is_said_by_the_name_that_was_given(place, tmp_path):
    model, _ = grown()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError) as caught:
        save_seeds(tmp_path / place, model)
    assert f"The file of seeds {tmp_path / place} cannot be written: " in str(caught.value)
    assert ".writing" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


class TakesSeeds:
    """A sink that wants files of seeds."""

    def __init__(self, folder):
        self.seeds = str(folder)
        self.events = []

    def write(self, batch):
        self.events += batch

    def close(self):
        pass


def test_a_sink_that_asks_gets_the_file_of_each_seed_that_is_kept_or_culled(tmp_path):
    sink = TakesSeeds(tmp_path / "seeds")
    model, _ = make_model()
    with Telemetry([sink]) as telemetry:
        model.emit_to(telemetry)
        bring_to(model, SeedStage.FOSSILIZED, SECOND)
        bring_to(model, SeedStage.BLENDING)
        weight = model.slots[FIRST].seed.weight.detach().clone()
        model.cull(FIRST)
    saved = [event for event in sink.events if isinstance(event, SeedSaved)]
    assert [(e.slot, e.outcome, e.blueprint_id) for e in saved] == [
        (SECOND, "fossilized", "mine:scale"),
        (FIRST, "culled", "mine:scale"),
    ]
    assert sorted(str(file) for file in (tmp_path / "seeds").iterdir()) == sorted(e.file for e in saved)
    fresh, _ = make_model()
    for event in saved:
        graft_seeds(event.file, fresh)
    assert fresh.slots[SECOND].stage is SeedStage.FOSSILIZED
    assert fresh.slots[FIRST].stage is SeedStage.BLENDING
    assert torch.equal(fresh.slots[FIRST].seed.weight, weight)


def test_a_seed_that_cannot_be_saved_for_a_sink_stops_nothing(tmp_path):
    (tmp_path / "seeds").write_text("a file where the folder should be")
    sink = TakesSeeds(tmp_path / "seeds")
    model, _ = make_model()
    with Telemetry([sink]) as telemetry:
        model.emit_to(telemetry)
        model.germinate(FIRST, "scale")
        with pytest.warns(RuntimeWarning, match=f"Seed '{FIRST}-1' was not saved"):
            model.cull(FIRST)
    assert model.slots[FIRST].seed is None
    assert not any(isinstance(event, SeedSaved) for event in sink.events)
