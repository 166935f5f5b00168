"""Optimiser state by name: whatever the order of groups, each parameter gets its own, or nothing is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from state_helpers import FIRST, SECOND, bring_to, make_model, picture, same_picture, train_once

from kasmina_core import (
    CheckpointError,
    SeedStage,
    load_named_optimizer_state,
    named_optimizer_state,
    tie_optimizer,
)

MAKERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, 1e-2),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, 1e-2, fused=True),
    "adam-amsgrad": lambda groups: torch.optim.Adam(groups, 1e-2, amsgrad=True),
    "sgd-momentum": lambda groups: torch.optim.SGD(groups, 1e-2, momentum=0.9),
    "sgd": lambda groups: torch.optim.SGD(groups, 1e-2),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, 1e-2),
    "tensor-lr": lambda groups: torch.optim.Adam(groups, torch.tensor(1e-2)),
}


def two_groups(model, turned=False):
    parameters = model.host_parameters()
    groups = [{"params": parameters[:3], "lr": 0.02}, {"params": parameters[3:], "weight_decay": 0.1}]
    return groups[::-1] if turned else groups


def trained(maker, *, names=False, turned=False):
    model, _ = make_model()
    bring_to(model, SeedStage.BLENDING)
    groups = list(model.host.named_parameters()) if names else two_groups(model, turned)
    optimizer = tie_optimizer(model, maker(groups))
    bring_to(model, SeedStage.TRAINING, SECOND, "normed")
    for _ in range(2):
        train_once(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_state_goes_where_it_belongs_in_any_order_of_groups(kind, turned):
    model, optimizer = trained(MAKERS[kind])
    saved = copy.deepcopy(named_optimizer_state(model, optimizer))
    fresh, _ = make_model()
    fresh.load_state_dict(model.state_dict())
    again = tie_optimizer(fresh, MAKERS[kind](two_groups(fresh, turned)))
    if turned:
        again.param_groups.reverse()
        for group in again.param_groups:
            group["params"].reverse()
    load_named_optimizer_state(fresh, again, saved)
    assert same_picture(named_optimizer_state(fresh, again)["state"], saved["state"])
    assert {g.get("kasmina_slot") for g in again.param_groups} == {None, FIRST, SECOND}
    for _ in range(3):
        assert torch.equal(train_once(model, optimizer), train_once(fresh, again))
    assert same_picture(picture(model)["weights"], picture(fresh)["weights"])


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_parameters_may_have_been_given_with_names_or_without(before, after):
    def made(model, names):
        groups = model.host.named_parameters() if names else model.host_parameters()
        return tie_optimizer(model, torch.optim.Adam(list(groups), 1e-2))

    model, _ = make_model()
    optimizer = made(model, before)
    bring_to(model, SeedStage.TRAINING)
    train_once(model, optimizer)
    fresh, _ = make_model()
    fresh.load_state_dict(model.state_dict())
    again = made(fresh, after)
    load_named_optimizer_state(fresh, again, copy.deepcopy(named_optimizer_state(model, optimizer)))
    assert torch.equal(train_once(model, optimizer), train_once(fresh, again))
    assert same_picture(picture(model)["weights"], picture(fresh)["weights"])
    assert all(("param_names" in group) == after for group in again.param_groups)


def test_state_loads_in_another_dtype():
    model, optimizer = trained(MAKERS["adamw"])
    fresh = make_model()[0].to(torch.float64)
    fresh.load_state_dict(model.state_dict())
    again = tie_optimizer(fresh, MAKERS["adamw"](two_groups(fresh)))
    load_named_optimizer_state(fresh, again, copy.deepcopy(named_optimizer_state(model, optimizer)))
    assert {s["exp_avg"].dtype for s in again.state.values()} == {torch.float64}


def test_a_compiled_models_names_are_those_of_the_model():
    model, optimizer = trained(MAKERS["sgd-momentum"])
    compiled = torch.compile(model, backend="eager")
    assert (
        named_optimizer_state(compiled, optimizer)["state"].keys()
        == named_optimizer_state(model, optimizer)["state"].keys()
    )


def test_a_parameter_outside_of_the_model_is_known_by_its_place():
    model, _ = make_model()
    more = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.host_parameters(), more], 0.1, momentum=0.9)
    more.grad = torch.ones(2)
    optimizer.step()
    saved = named_optimizer_state(model, optimizer)
    assert list(saved["state"]) == ["#8"]
    again = torch.optim.SGD([*model.host_parameters(), more], 0.1, momentum=0.9)
    load_named_optimizer_state(model, again, saved)
    assert torch.equal(again.state[more]["momentum_buffer"], torch.ones(2))


DAMAGE = [
    (lambda d: d.update({"class": "SGD"}), "another kind of optimiser.*saved: SGD.*here:  AdamW"),
    (lambda d: d.pop("groups"), "groups cannot be None"),
    (lambda d: d.update(state=[]), "state cannot be"),
    (lambda d: d["groups"].pop(), "lacks|other groups"),
    (
        lambda d: d["groups"].append({"params": ["host.gone"]}),
        "a group that this one lacks: 1 parameters, such as 'host.gone'",
    ),
    (
        lambda d: d["groups"][0]["params"].append(d["groups"][1]["params"][0]),
        "it holds 'host.3.bias' twice|twice",
    ),
    (
        lambda d: d["groups"][0].update(lr="fast"),
        "The saved lr of the group of 'host.0.weight' cannot be 'fast'",
    ),
    (lambda d: d["groups"][0].update(betas=[0.9]), r"betas .* cannot be \[0.9\]"),
    (lambda d: d["groups"][0].update(params=5), "params cannot be 5"),
    (lambda d: d["groups"][0].update(amsgrad=True), "state of 'host.0.weight' lacks max_exp_avg_sq"),
    (
        lambda d: d["state"].update({"host.0.wieght": {}}),
        "is none of its parameters. Did you mean 'host.0.weight'",
    ),
    (
        lambda d: d["state"]["host.0.weight"].update(exp_avg=torch.zeros(2)),
        r"saved: *\(2,\).*parameter: *\(4, 1, 3, 3\)",
    ),
    (lambda d: d["state"]["host.0.weight"].update(step="many"), "step of 'host.0.weight' cannot be 'many'"),
    (lambda d: d["state"].update({"host.0.weight": 3}), "state for 'host.0.weight'"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE)
def test_what_does_not_fit_is_refused_and_the_optimiser_is_as_before(damage, says):
    model, optimizer = trained(MAKERS["adamw"])
    saved = copy.deepcopy(named_optimizer_state(model, optimizer))
    damage(saved)
    before, groups = picture(model, optimizer), [dict(group) for group in optimizer.param_groups]
    with pytest.raises(CheckpointError, match=f"(?s){says}"):
        load_named_optimizer_state(model, optimizer, saved)
    assert same_picture(before, picture(model, optimizer))
    assert [group["lr"] for group in groups] == [group["lr"] for group in optimizer.param_groups]


def test_an_optimiser_that_is_not_tied_is_told_to_be():
    model, optimizer = trained(MAKERS["adamw"])
    fresh, _ = make_model()
    fresh.load_state_dict(model.state_dict())
    loose = MAKERS["adamw"](two_groups(fresh))
    with pytest.raises(
        CheckpointError, match=r"(?s)a group that this one lacks.*kasmina_slots.*tie_optimizer"
    ):
        load_named_optimizer_state(fresh, loose, named_optimizer_state(model, optimizer))
