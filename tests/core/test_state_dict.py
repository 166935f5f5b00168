"""A state_dict is tensors alone, with the names of the bare host, whoever compiled what."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from state_helpers import (
    EVERY_STAGE,
    FIRST,
    SECOND,
    bring_to,
    make_batch,
    make_host,
    make_model,
    make_registry,
    picture,
    same_picture,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict
from torch.func import functional_call
from torch.optim import SGD

from kasmina_core import CheckpointError, MorphogeneticModel, SeedStage
from kasmina_core.growth.plain_data import to_bytes
from kasmina_core.state_keys import NamesOf, plain_name

RECORD = f"kasmina_slots.{FIRST}._extra_state"


def compiled_(module):
    return torch.compile(module, backend="eager")


def grown(stage=SeedStage.BLENDING):
    model, _ = make_model()
    bring_to(model, stage)
    return model


def loaded_equals(model, other):
    x, _ = make_batch()
    model.eval(), other.eval()
    assert torch.equal(model(x), other(x))
    assert {n: s.get_extra_state() for n, s in model.slots.items()} == {
        n: s.get_extra_state() for n, s in other.slots.items()
    }


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_safetensors_takes_a_state_dict_and_a_fresh_model_takes_the_file(stage, tmp_path):
    model = grown(stage)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh, _ = make_model()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert fresh.slots[FIRST].stage is stage
    if stage is not SeedStage.DORMANT:  # without a seed the number of germinations is in no tensor
        loaded_equals(model, fresh)


def test_the_record_in_a_state_dict_is_json_that_others_can_read():
    model = grown()
    record = model.state_dict()[RECORD]
    assert (record.dtype, record.dim(), record.device.type) == (torch.uint8, 1, "cpu")
    read = json.loads(bytes(record.tolist()))
    assert read["state"]["blueprint_id"] == "mine:scale"
    assert read == model.slots[FIRST].get_extra_state()


def test_a_slot_takes_the_tensor_and_the_dict():
    model, other = grown(), grown(SeedStage.TRAINING)
    for form in (model.state_dict()[RECORD], model.slots[FIRST].get_extra_state()):
        fresh = copy.deepcopy(other)
        fresh.slots[FIRST].set_extra_state(form)
        assert fresh.slots[FIRST].get_extra_state() == model.slots[FIRST].get_extra_state()


HOSTILE = [
    (torch.zeros(0, dtype=torch.uint8), "damaged or something else"),
    (torch.zeros(9), "no text in a tensor.\n.*found: *torch.float32"),
    (torch.zeros((2, 2), dtype=torch.uint8), r"shape \(2, 2\)"),
    (torch.zeros(5, dtype=torch.uint8, device="meta"), "on meta"),
    (torch.full((7,), 255, dtype=torch.uint8), "damaged or something else: 'utf-8'"),
    (b"[1,", "damaged or something else"),
    (b"[1, 2]", "another version.\n  saved: *'list'"),
    (b"[" * 500_000, "nested too deep"),
    (b'{"a":' * 80 + b"1" + b"}" * 80, "nested deeper|another version"),
    (b'{"version": ' + b"9" * 5000 + b"}", "the number 99999999999999999999… has too many digits"),
    (b'{"version": 2, "version": 2}', "it names 'version' twice"),
    (b'{"version": NaN}', "NaN is no JSON"),
    (b'{"$float": "huge"}', r"damaged: \$float cannot hold 'huge'"),
    (b'{"$map": [[[1], 2]]}', r"damaged: \$map cannot hold"),
    (b'{"$map": [[1, 2], [1, 3]]}', r"damaged: \$map cannot hold"),
    (b'{"$tensor": "x"}', r"damaged: \$tensor cannot hold 'x'"),
    (b'{"$tuple": [1], "more": 1}', r"damaged: \$tuple cannot hold"),
]


@pytest.mark.parametrize(("value", "says"), HOSTILE, ids=[says[:30] for _, says in HOSTILE])
def test_foreign_bytes_are_refused_and_nothing_is_changed(value, says):
    model = grown()
    if isinstance(value, bytes):
        value = torch.tensor(list(value), dtype=torch.uint8)
    before = picture(model)
    with pytest.raises(CheckpointError, match=says.replace("\n", "\n.*")):
        model.slots[FIRST].set_extra_state(value)
    state = model.state_dict() | {RECORD: value, "0.weight": torch.zeros_like(model.host[0].weight)}
    with pytest.raises(CheckpointError):
        model.load_state_dict(state)
    assert same_picture(before, picture(model))


def test_a_truncated_record_is_refused_wherever_it_is_cut():
    model = grown()
    whole = model.state_dict()[RECORD]
    before = picture(model)
    for length in range(0, len(whole), 37):
        with pytest.raises(CheckpointError):
            model.slots[FIRST].set_extra_state(whole[:length])
    assert same_picture(before, picture(model))


def test_a_number_of_germinations_that_is_none_is_refused():
    model = grown(SeedStage.DORMANT)
    state = model.state_dict()
    state._metadata[f"kasmina_slots.{FIRST}"]["germinations"] = "many"
    grown_model = grown()
    before = picture(grown_model)
    with pytest.raises(CheckpointError, match="must be a whole number of at least 0, not 'many'"):
        grown_model.load_state_dict(state)
    assert same_picture(before, picture(grown_model))


# -- dtype and device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_grown_model_loads_in_another_dtype_and_back(dtype):
    model = grown()
    other = make_model()[0].to(dtype)
    other.load_state_dict(model.state_dict())
    assert {p.dtype for p in other.parameters()} == {dtype}
    assert other.slots[FIRST].get_extra_state() == model.slots[FIRST].get_extra_state()
    back = grown(SeedStage.DORMANT)
    back.load_state_dict(other.state_dict())
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert back.slots[FIRST].alpha == model.slots[FIRST].alpha


def test_an_empty_state_clears_a_grown_model():
    model, empty = grown(), make_model()[0]
    model.load_state_dict(empty.state_dict())
    assert model.slots[FIRST].stage is SeedStage.DORMANT
    assert list(model.state_dict()) == list(empty.host.state_dict())


def on_meta():
    with torch.device("meta"):
        host = copy.deepcopy(make_host()).to("meta")
    return MorphogeneticModel(
        host, (FIRST, SECOND), example=torch.zeros(2, 1, 5, 5, device="meta"), registry=make_registry()
    )


def test_a_model_made_on_meta_loads_a_grown_one_with_assign():
    model, fresh = grown(), on_meta()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert {t.device.type for t in [*fresh.parameters(), *fresh.buffers()]} == {"cpu"}
    loaded_equals(model, fresh)
    fresh.germinate(SECOND, "scale")
    assert {p.device.type for p in fresh.seed_parameters()} == {"cpu"}


def test_a_model_made_on_meta_loads_a_grown_one_once_it_is_emptied_onto_a_device():
    model, fresh = grown(), on_meta().to_empty(device="cpu")
    fresh.load_state_dict(model.state_dict())
    loaded_equals(model, fresh)


# -- compiled ---------------------------------------------------------------------------------------------------------


def test_a_compiled_models_state_loads_in_one_that_is_not_and_back():
    model = grown()
    compiled = compiled_(model)
    state = compiled.state_dict()
    assert all(key.startswith("_orig_mod.") for key in state)
    fresh, _ = make_model()
    fresh.load_state_dict(state)
    loaded_equals(model, fresh)
    fresh_compiled = compiled_(make_model()[0])
    fresh_compiled.load_state_dict(state)
    loaded_equals(model, fresh_compiled._orig_mod)


def test_the_count_of_germinations_survives_in_a_compiled_models_state():
    model, _ = make_model()
    model.germinate(FIRST, "scale")
    model.cull(FIRST, "no use")
    while model.slots[FIRST].state is not None:
        model.step_epoch()
    fresh, _ = make_model()
    fresh.load_state_dict(compiled_(model).state_dict())
    assert fresh.slots[FIRST].germinations == 1


def parts_compiled(*names):
    host = make_host()
    for name in names:
        host[int(name)] = compiled_(host[int(name)])
    return MorphogeneticModel(
        host, (FIRST, SECOND), example=torch.zeros(2, 1, 5, 5), registry=make_registry()
    )


@pytest.mark.parametrize("into", [(), ("0",), ("0", "3")])
def test_hosts_load_from_each_other_whichever_parts_of_them_are_compiled(into):
    model = parts_compiled("3")
    bring_to_open = grown()
    state = bring_to_open.state_dict()
    model.load_state_dict(state)
    assert "3._orig_mod.weight" in model.state_dict()
    fresh = parts_compiled(*into)
    fresh.load_state_dict(model.state_dict())
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, state[plain_name(name)]), name


def test_a_host_with_a_compiled_part_and_a_plain_one_load_from_each_other():
    host = make_host()
    host[0] = compiled_(host[0])
    model = MorphogeneticModel(host, (FIRST,), example=torch.zeros(2, 1, 5, 5))
    plain = make_host()
    with torch.no_grad():
        plain[0].weight.fill_(3.0)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(host[0]._orig_mod.weight, plain[0].weight)


def test_other_wrappers_are_not_taken_off():
    model = grown()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    before = picture(model)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state)
    assert same_picture(before, picture(model))


def test_two_keys_for_one_tensor_are_refused():
    model = grown()
    state = model.state_dict()
    state["_orig_mod.0.weight"] = torch.zeros_like(state["0.weight"])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_orig_mod\.0\.weight"):
        model.load_state_dict(state)


class Nested(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def test_a_compiled_model_inside_of_another_module_loads_plain():
    model = grown()
    fresh, _ = make_model()
    Nested(fresh).load_state_dict(Nested(compiled_(model)).state_dict())
    loaded_equals(model, fresh)


def test_names_follow_wrappers_inside_of_wrappers():
    inner = nn.Sequential(compiled_(nn.Linear(1, 1)), nn.Linear(1, 1))
    own = NamesOf(nn.ModuleDict({"a": compiled_(inner), "b": nn.Linear(1, 1)}))
    assert own("a.0.weight") == "a._orig_mod.0._orig_mod.weight"
    assert own("a.1.weight") == own("_orig_mod.a.1._orig_mod.weight") == "a._orig_mod.1.weight"
    assert own("b.weight") == "b.weight"


class HostInHost(nn.Module):
    """Has a weight and a child named host that has one too."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.host = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        return self.host(x * self.weight)


def test_a_host_with_a_child_named_host_keeps_its_weights_apart():
    model = MorphogeneticModel(HostInHost(), ("host",), example=torch.zeros(1, 1, 5, 5))
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(copy.deepcopy(state))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert set(state) == {"weight", "host.weight", "host.bias"}


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), (1, (2,)), {1: "a"}, {"$tuple": [1]}, -0.0, "\ud800"]
)
def test_plain_data_comes_back_as_it_was(value):
    from kasmina_core.growth.plain_data import from_bytes

    back = from_bytes(to_bytes({"x": [value]}, "x"), "x")
    assert repr(back) == repr({"x": [value]})


class Bare(nn.Module):
    """A host with a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("shift", torch.ones(4, 1, 1))
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x * self.weight + self.shift)


def of_bare():
    return MorphogeneticModel(
        Bare(), ["act"], example=torch.randn(2, 4, 3, 3), registry=make_registry()
    ), "act"


@pytest.mark.parametrize("stage", [SeedStage.DORMANT, SeedStage.TRAINING, SeedStage.BLENDING])
@pytest.mark.parametrize("around", [lambda m: m, nn.Sequential], ids=["alone", "around"])
def test_torchs_own_state_dicts_have_the_same_keys_and_can_be_set_again(stage, around):
    model = grown(stage)
    saved = get_model_state_dict(around(model))
    keys = around(model).state_dict().keys()
    assert keys == saved.keys()
    assert get_state_dict(around(model), SGD(model.parameters(), 0.1))[0].keys() == saved.keys()
    fresh, _ = make_model()
    set_model_state_dict(around(fresh), saved)
    loaded_equals(model, fresh)


def test_torchs_own_state_dicts_find_parameters_of_the_host_itself():
    model, _ = of_bare()
    assert get_model_state_dict(model).keys() == Bare().state_dict().keys()


@pytest.mark.parametrize("stage", [SeedStage.DORMANT, SeedStage.TRAINING, SeedStage.BLENDING])
def test_functional_call_takes_a_state_dict(stage):
    model, (x, _) = grown(stage).eval(), make_batch()
    state = model.state_dict()
    assert torch.equal(functional_call(model, state, (x,)), model(x))
    other = {k: torch.zeros_like(v) if v.is_floating_point() else v for k, v in state.items()}
    assert not functional_call(model, other, (x,)).any()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_functional_call_swaps_what_a_host_holds_itself():
    model, _ = of_bare()
    x, parameter = torch.rand(2, 4, 3, 3), model.host.weight
    given = {"weight": torch.zeros(4, 1, 1), "shift": torch.full((4, 1, 1), 2.0)}
    assert torch.equal(functional_call(model, given, (x,)), torch.full_like(x, 2.0))
    assert torch.equal(model(x), x + 1)
    assert model.host.weight is parameter
    assert not {"weight", "shift"} & vars(model).keys()
