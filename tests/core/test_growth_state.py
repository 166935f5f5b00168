"""What has grown, as plain data without weights, and rebuilt in a fresh model or refused as a whole."""

from __future__ import annotations

import copy

import pytest
import torch
from state_helpers import (
    EVERY_STAGE,
    FIRST,
    SECOND,
    WIDTH,
    Scale,
    bring_to,
    make_host,
    make_model,
    open_config,
    picture,
    same_picture,
    train_once,
)

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    CheckpointError,
    InjectionPoint,
    MorphogeneticModel,
    OtherBlueprintVersion,
    SeedStage,
    Topology,
    growth_of,
    rebuild_growth,
    tie_optimizer,
)
from kasmina_core.growth.plain_data import from_json, to_json


def through_json(data):
    return from_json(to_json(data, "topology"), "topology")


def registry_of(version, factory=Scale, name="scale"):
    registry = BlueprintRegistry()
    spec = BlueprintSpec(name, Topology.CNN, factory, lambda dim: 2 * dim, options={"gain": 0.1})
    registry.register(spec, pack="mine", distribution="kasmina-mine", version=version)
    return registry


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_a_fresh_model_is_rebuilt_with_the_seeds_the_other_had_at_birth(stage):
    model, _ = make_model()
    bring_to(model, stage)
    born = [p.clone() for p in model.seed_parameters()]  # nothing was trained
    fresh, _ = make_model()
    rebuild_growth(fresh, through_json(growth_of(model)))
    assert growth_of(fresh) == growth_of(model)
    assert fresh.epoch == model.epoch
    assert len(born) == len(fresh.seed_parameters())
    assert all(map(torch.equal, born, fresh.seed_parameters()))
    assert all(map(torch.equal, model.host.state_dict().values(), fresh.host.state_dict().values()))


def test_the_number_of_germinations_of_an_empty_slot_comes_along():
    model, _ = make_model()
    model.germinate(FIRST, "scale")
    model.cull(FIRST, "no use")
    while model.slots[FIRST].state is not None:
        model.step_epoch()
    fresh, _ = make_model()
    rebuild_growth(fresh, growth_of(model))
    assert fresh.germinate(FIRST, "scale").seed_id == model.germinate(FIRST, "scale").seed_id == f"{FIRST}-2"
    assert all(map(torch.equal, model.seed_parameters(), fresh.seed_parameters()))


def test_a_grown_model_is_emptied_and_its_optimiser_follows():
    model, _ = make_model()
    optimizer = tie_optimizer(model, torch.optim.Adam(model.host_parameters(), 1e-2))
    empty = growth_of(model)
    bring_to(model, SeedStage.TRAINING, SECOND)
    train_once(model, optimizer)
    rebuild_growth(model, empty)
    assert model.slots[SECOND].stage is SeedStage.DORMANT
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == len(model.host_parameters())


def refused(model, data, says, error=CheckpointError):
    optimizer = tie_optimizer(model, torch.optim.Adam(model.host_parameters(), 1e-2))
    bring_to(model, SeedStage.TRAINING, SECOND)
    train_once(model, optimizer)
    before = picture(model, optimizer)
    counters = (model.epoch, model.growth.sequence, model.growth.last_metric)
    with pytest.raises(error, match=says.replace("\n", "\n.*")) as caught:
        rebuild_growth(model, data)
    assert same_picture(before, picture(model, optimizer))
    assert counters == (model.epoch, model.growth.sequence, model.growth.last_metric)
    return str(caught.value)


def shadowing(**registries):
    model, _ = make_model(**registries)
    bring_to(model, SeedStage.SHADOWING)
    return growth_of(model)


def change(data, path, value):
    data = copy.deepcopy(data)
    *way, last = path
    inside = data
    for step in way:
        inside = inside[step]
    inside[last] = value
    return data


DAMAGE = [
    (["version"], 2, "another version.\n  saved: *2"),
    (["epoch"], -1, "epoch must be a whole number of at least 0, not -1"),
    (["events"], 1 << 63, "events must be a whole number of at least 0, not 9223372036854775808"),
    (["last_metric"], "good", "last_metric must be a number, not 'good'"),
    (["slots"], [], r"slots cannot be \[\]"),
    (["slots", FIRST], 3, "slot '2' cannot be 3"),
    (["slots", FIRST, "record", "state", "slot"], "7", "belongs to another slot"),
    (
        ["slots", FIRST, "record", "state", "metrics", "alpha"],
        float("nan"),
        "slot '2' cannot be read: state.metrics.alpha must be .*, not nan",
    ),
    (["slots", FIRST, "point", "dim"], 5, "another point than in the saved model.*\n.*'dim': 5"),
    (["slots", FIRST, "point", "path"], "3", "another point than in the saved model.*\n.*'path': '3'"),
    (["slots", FIRST, "point"], None, "another point"),
    (
        ["slots", FIRST, "tensors", "weight"],
        [9, 1, 1],
        r"makes other parameters.*weight: \[9, 1, 1\] saved, \[4, 1, 1\]",
    ),
    (["slots", FIRST, "tensors"], 4, "makes other parameters"),
]


@pytest.mark.parametrize(("path", "value", "says"), DAMAGE, ids=[str(path[-1]) for path, *_ in DAMAGE])
def test_a_damaged_topology_is_refused_and_nothing_is_changed(path, value, says):
    refused(make_model()[0], change(shadowing(), path, value), f"(?s){says}")


def test_a_renamed_slot_is_refused_by_name():
    data = shadowing()
    points = [InjectionPoint("middle", FIRST, WIDTH, Topology.CNN), SECOND]
    data["slots"]["midle"] = data["slots"].pop(FIRST)
    data["slots"]["midle"]["record"]["state"]["slot"] = "midle"
    model = MorphogeneticModel(make_host(), points, example=torch.zeros(2, 1, 5, 5), config=open_config())
    with pytest.raises(
        CheckpointError, match=r"a slot 'midle', and this one has none.* Did you mean 'middle'\?"
    ):
        rebuild_growth(model, data)


def test_a_missing_pack_names_what_to_install():
    says = refused(make_model()[0], rare(), "install that")
    assert "blueprint: mine:rare" in says
    assert "It came from kasmina-mine==1.2: install that from where you have the pack." in says


def rare():
    model, _ = make_model(registry=registry_of("1.2", name="rare"))
    bring_to(model, SeedStage.TRAINING, blueprint="rare")
    return growth_of(model)


def test_no_command_is_made_of_what_a_file_says():
    data = change(rare(), ["slots", FIRST, "blueprint", "distribution"], "x'; rm -rf ~; '")
    says = refused(make_model()[0], data, "cannot be had")
    assert "rm -rf" not in says
    assert "from no installed distribution" in says


def test_another_version_that_fits_is_said_and_one_that_does_not_is_refused():
    saved = shadowing(registry=registry_of("1.0"))
    model, _ = make_model(registry=registry_of("2.0"))
    with pytest.warns(OtherBlueprintVersion, match=r"(?s)kasmina-mine==1\.0.*kasmina-mine==2\.0"):
        rebuild_growth(model, saved)
    assert model.slots[FIRST].stage is SeedStage.SHADOWING

    class Wider(Scale):
        def __init__(self, dim, gain=0.1):
            super().__init__(dim, gain)
            self.more = torch.nn.Parameter(torch.zeros(()))

    other, _ = make_model(registry=registry_of("2.0", Wider))
    with pytest.raises(
        CheckpointError,
        match=r"(?s)makes other parameters.*==1\.0.*==2\.0.*more: None saved, \[\] here.*Install what it was saved with, kasmina-mine==1\.0",
    ):
        rebuild_growth(other, saved)
    assert other.slots[FIRST].stage is SeedStage.DORMANT


class Refuses:
    def seed_added(self, slot, parameters):
        raise PermissionError("full")

    def seed_removed(self, slot, parameters):
        pass


def test_a_listener_that_refuses_makes_the_load_undo_itself():
    model, _ = make_model()
    data = shadowing()
    optimizer = tie_optimizer(model, torch.optim.SGD(model.host_parameters(), 1e-2))
    model.listen(Refuses())
    before = picture(model, optimizer)
    with pytest.raises(PermissionError, match="full"):
        rebuild_growth(model, data)
    assert same_picture(before, picture(model, optimizer))
