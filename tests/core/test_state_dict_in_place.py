"""A seed that is there already takes the values of a state_dict, as any module does; what a load takes away is said."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from state_helpers import (
    FIRST,
    SECOND,
    bring_to,
    make_host,
    make_model,
    open_config,
    picture,
    same_picture,
    train_once,
)
from torch import nn
from torch.optim import AdamW

from kasmina_core import (
    GrowingAveragedModel,
    MisuseWarning,
    MorphogeneticModel,
    SeedStage,
    growth_of,
    load_checkpoint,
    rebuild_growth,
    save_checkpoint,
    tie_optimizer,
)

SEED = f"kasmina_slots.{FIRST}.seed"
EARLY_AND_LATE = [
    (SeedStage.TRAINING, SeedStage.TRAINING),
    (SeedStage.TRAINING, SeedStage.BLENDING),
    (SeedStage.BLENDING, SeedStage.FOSSILIZED),
]


def trained(stage=SeedStage.BLENDING, blueprint="scale"):
    model, _ = make_model()
    optimizer = tie_optimizer(model, AdamW(model.host_parameters(), 1e-2))
    bring_to(model, stage, blueprint=blueprint)
    for _ in range(2):
        train_once(model, optimizer)
    return model, optimizer


def parameters(model):
    return [id(p) for p in model.seed_parameters()]


def reload_alone(model, state):
    model.load_state_dict(state)


def reload_inside_of_another(model, state):
    nn.ModuleDict({"net": model}).load_state_dict({f"net.{key}": value for key, value in state.items()})


@pytest.mark.parametrize("blueprint", ["scale", "normed"])
@pytest.mark.parametrize("reload", [reload_alone, reload_inside_of_another])
def test_a_models_own_state_changes_nothing_of_its_training(blueprint, reload):
    plain, reloaded = trained(blueprint=blueprint), trained(blueprint=blueprint)
    model, optimizer = reloaded
    optimizer.param_groups[1]["lr"] = plain[1].param_groups[1]["lr"] = 0.5
    train_once(*plain), train_once(*reloaded)
    before = picture(model, optimizer)
    reload(model, copy.deepcopy(model.state_dict()))
    assert same_picture(before, picture(model, optimizer))
    for _ in range(3):
        assert torch.equal(train_once(*plain), train_once(*reloaded))


@pytest.mark.parametrize(("early", "late"), EARLY_AND_LATE)
def test_the_best_weights_come_back_into_the_same_parameters(early, late):
    model, optimizer = trained(early)
    best, record = copy.deepcopy(model.state_dict()), model.slots[FIRST].get_extra_state()
    for _ in range(40):
        if model.slots[FIRST].stage is late:
            break
        train_once(model, optimizer)
        if model.slots[FIRST].stage is SeedStage.PROBATIONARY and model.slots[FIRST].last_gate:
            model.advance_stage(FIRST)
        else:
            model.step_epoch(1.0)
    train_once(model, optimizer)
    objects = parameters(model)
    moments = {p: copy.deepcopy(optimizer.state[p]) for p in model.seed_parameters()}
    model.load_state_dict(best)
    assert parameters(model) == objects
    assert all(same_picture(moments[p], optimizer.state[p]) for p in model.seed_parameters())
    assert model.slots[FIRST].get_extra_state() == record
    assert all(torch.equal(value, best[key]) for key, value in model.state_dict().items())
    fresh, _ = make_model()
    fresh.load_state_dict(best)
    x = torch.ones(2, 1, 5, 5)
    assert torch.equal(model.eval()(x), fresh.eval()(x))


def test_a_seed_of_another_blueprint_or_other_options_is_built_anew():
    for blueprint, options in (("normed", {}), ("scale", {"gain": 0.5})):
        model, optimizer = trained()
        other, _ = make_model()
        other.germinate(FIRST, blueprint, **options)
        before = parameters(model)
        model.load_state_dict(copy.deepcopy(other.state_dict()))
        assert not set(before) & set(parameters(model))
        assert [id(p) for p in optimizer.param_groups[1]["params"]] == parameters(model)
        assert model.slots[FIRST].get_extra_state() == other.slots[FIRST].get_extra_state()


@pytest.mark.parametrize("was_paused", [True, False])
def test_a_pause_comes_and_goes_with_a_load(was_paused):
    model, _ = trained(SeedStage.TRAINING)
    if was_paused:
        model.slots[FIRST].pause()
    saved = copy.deepcopy(model.state_dict())
    model.slots[FIRST].resume() if was_paused else model.slots[FIRST].pause()
    model.load_state_dict(saved)
    assert model.slots[FIRST].state.is_paused is was_paused
    assert all(p.requires_grad is not was_paused for p in model.seed_parameters())
    if was_paused:
        model.slots[FIRST].resume()
    assert all(p.requires_grad for p in model.seed_parameters())


@pytest.mark.parametrize("pause", [True, False])
def test_a_load_that_fails_gives_a_seed_its_values_gradients_and_pause_back(pause):
    model, optimizer = trained(blueprint="normed")
    other, _ = trained(blueprint="normed")
    if pause:
        other.slots[FIRST].pause()
    state = {
        key: value + 1 if value.is_floating_point() else value for key, value in other.state_dict().items()
    }
    before, objects = picture(model, optimizer), parameters(model)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state | {"more": torch.ones(1)})
    assert same_picture(before, picture(model, optimizer))
    assert parameters(model) == objects


def test_assigned_parameters_reach_a_tied_optimiser():
    model, optimizer = trained()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == parameters(model)


def test_growth_that_is_rebuilt_without_weights_has_those_of_its_birth():
    model, _ = trained()
    fresh, _ = make_model()
    rebuild_growth(fresh, growth_of(model))
    birth = copy.deepcopy(fresh.state_dict())
    rebuild_growth(model, growth_of(model))
    assert all(torch.equal(v, birth[k]) for k, v in model.state_dict().items() if k.startswith(SEED))


def test_growth_with_a_seed_of_millions_of_values_is_rebuilt():
    def wide():
        host = nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 3))
        return MorphogeneticModel(host, ["1"], example=torch.zeros(2, 600))

    model, fresh = wide(), wide()
    model.germinate("1", "mlp")
    rebuild_growth(fresh, growth_of(model))
    assert sum(p.numel() for p in fresh.seed_parameters()) > 2_000_000


def test_a_checkpoint_goes_back_into_the_run_that_saved_it(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "best", model, optimizer=optimizer)
    before = picture(model, optimizer)
    expected = [train_once(model, optimizer) for _ in range(3)]
    load_checkpoint(tmp_path / "best", model, optimizer=optimizer)
    after = picture(model, optimizer)
    assert all(same_picture(before[k], after[k]) for k in ("weights", "records", "optimizers", "seeds"))
    assert all(torch.equal(train_once(model, optimizer), loss) for loss in expected)


def test_an_average_takes_its_own_state_again():
    model, optimizer = trained()
    average = GrowingAveragedModel(model)
    twin = GrowingAveragedModel(model)
    for step in range(4):
        train_once(model, optimizer)
        average.update_parameters(model), twin.update_parameters(model)
        if step == 1:
            average.load_state_dict(copy.deepcopy(average.state_dict()))
    assert same_picture(dict(average.state_dict()), dict(twin.state_dict()))


# -- what is missing ----------------------------------------------------------------------------------------------


def without(model, name):
    return {key: value.clone() for key, value in model.state_dict().items() if key != f"{SEED}.{name}"}


def test_a_tensor_that_is_missing_keeps_its_value_where_the_seed_is_there():
    model, _ = trained()
    state = without(model, "weight")
    with torch.no_grad():
        for p in model.seed_parameters():
            p.fill_(0.3)
    assert model.load_state_dict(state, strict=False).missing_keys == [f"{SEED}.weight"]
    assert (model.slots[FIRST].seed.weight == 0.3).all()
    assert torch.equal(model.slots[FIRST].seed.bias, state[f"{SEED}.bias"])


@pytest.mark.parametrize("strict", [True, False])
def test_a_seed_that_must_be_built_is_refused_without_all_its_tensors(strict):
    state = without(trained()[0], "weight")
    fresh, _ = make_model()
    before = picture(fresh)
    with pytest.raises(RuntimeError, match=rf"slot '{FIRST}' lacks {SEED}\.weight.*was built anew"):
        fresh.load_state_dict(state, strict=strict)
    assert same_picture(before, picture(fresh))


def test_keys_are_named_as_in_the_file():
    model, _ = trained()
    state = copy.deepcopy(model.state_dict())
    del state["0.weight"]
    state |= {"more": torch.ones(1), "7.bias": torch.ones(9)}
    for load, prefix in ((reload_alone, ""), (reload_inside_of_another, "net.")):
        with pytest.raises(RuntimeError) as error:
            load(model, state)
        said = str(error.value)
        assert f'Missing key(s) in state_dict: "{prefix}0.weight"' in said
        assert f'Unexpected key(s) in state_dict: "{prefix}more"' in said
        assert f"size mismatch for {prefix}7.bias" in said
    state["7.bias"] = torch.ones(3)
    keys = model.load_state_dict(state, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["0.weight"], ["more"])


# -- fossils that go ----------------------------------------------------------------------------------------------


def losses(load, model, state):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(model, state)
    return [w for w in said if issubclass(w.category, MisuseWarning)]


def test_fossils_that_go_with_a_bare_hosts_state_are_named():
    model, _ = make_model(open_config(nested_slots=1))
    bring_to(model, SeedStage.FOSSILIZED)
    bring_to(model, SeedStage.FOSSILIZED, f"{FIRST}__2")
    [said] = losses(lambda m, s: m.load_state_dict(s), model, make_host().state_dict())
    assert f"'{FIRST}' (mine:scale, '{FIRST}-1'), '{FIRST}__2' (mine:scale" in str(said.message)
    assert said.filename == __file__
    assert model.slots[FIRST].stage is SeedStage.DORMANT

    model, _ = make_model()
    bring_to(model, SeedStage.FOSSILIZED)
    assert len(losses(reload_inside_of_another, model, make_host().state_dict())) == 1


def test_nothing_is_told_where_no_fossil_is_lost_unawares():
    grown, _ = make_model()
    bring_to(grown, SeedStage.FOSSILIZED)
    other, _ = make_model()
    bring_to(other, SeedStage.TRAINING, SECOND)
    assert not losses(reload_alone, grown, grown.state_dict())
    assert not losses(reload_alone, copy.deepcopy(grown), make_model()[0].state_dict())  # before it grew
    assert not losses(reload_alone, other, make_host().state_dict())  # only a living seed goes
    bring_to(other, SeedStage.TRAINING, SECOND)
    assert not losses(reload_alone, grown, other.state_dict())  # of a model that grew in another way
