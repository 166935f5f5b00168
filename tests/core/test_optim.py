"""An optimiser tied to a model gains and loses parameter groups with its seeds."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from state_helpers import FIRST, SECOND, WIDTH, Scale, bring_to, make_model, make_registry, train_once
from torch import nn

from kasmina_core import BlueprintSpec, SeedStage, Topology, tie_optimizer

S = SeedStage


def tied(kind=torch.optim.AdamW, registry=None, **options):
    model, _ = make_model(registry=registry)
    optimizer = kind(model.host_parameters(), lr=1e-2)
    assert tie_optimizer(model, optimizer, **options) is optimizer
    return model, optimizer


def slots_of(optimizer):
    return [group.get("kasmina_slot") for group in optimizer.param_groups]


def ids_in(optimizer):
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def host_state(model, optimizer):
    return {
        name: {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[p].items()}
        for name, p in model.host.named_parameters()
    }


def same_state(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[n][k], b[n][k]) for n in a for k in a[n] if torch.is_tensor(a[n][k])
    )


def test_a_germination_adds_a_group_with_its_own_settings():
    model, optimizer = tied(lr_factor=0.5, weight_decay=0.25)
    model.germinate(FIRST, "scale")
    assert slots_of(optimizer) == [None, FIRST]
    group = optimizer.param_groups[1]
    assert [id(p) for p in group["params"]] == [id(p) for p in model.seed_parameters(FIRST)]
    assert group["lr"] == 0.5 * 1e-2
    assert group["weight_decay"] == 0.25
    assert group["betas"] == optimizer.param_groups[0]["betas"]


def test_the_rate_of_a_seed_follows_the_present_rate_of_the_host():
    model, optimizer = tied()
    optimizer.param_groups[0]["lr"] = 1e-4
    model.germinate(FIRST, "scale")
    assert optimizer.param_groups[1]["lr"] == 1e-4
    assert optimizer.param_groups[1]["weight_decay"] == optimizer.param_groups[0]["weight_decay"]


def test_a_seed_learns_through_the_tied_optimiser():
    model, optimizer = tied()
    bring_to(model, S.TRAINING)
    before = [p.clone() for p in model.seed_parameters()]
    train_once(model, optimizer)
    assert not any(map(torch.equal, before, model.seed_parameters()))


def test_a_cull_takes_group_and_state_and_frees_the_memory():
    model, optimizer = tied()
    bring_to(model, S.TRAINING)
    train_once(model, optimizer)
    seeds = model.seed_parameters()
    assert all(p in optimizer.state for p in seeds)
    watched = [weakref.ref(p) for p in seeds] + [weakref.ref(optimizer.state[p]["exp_avg"]) for p in seeds]
    del seeds
    model.cull(FIRST)
    gc.collect()
    assert slots_of(optimizer) == [None]
    assert [ref() for ref in watched] == [None] * 4
    assert set(optimizer.state) == set(model.host_parameters())
    train_once(model, optimizer)


def test_survivors_keep_their_adam_state_bit_for_bit():
    model, optimizer = tied()
    train_once(model, optimizer)
    before = host_state(model, optimizer)
    bring_to(model, S.TRAINING, SECOND)
    model.germinate(FIRST, "scale")
    assert same_state(before, host_state(model, optimizer))
    train_once(model, optimizer)
    before = host_state(model, optimizer)
    survivor = [optimizer.state[p]["exp_avg"].clone() for p in model.seed_parameters(SECOND)]
    model.cull(FIRST)
    assert same_state(before, host_state(model, optimizer))
    assert all(
        map(torch.equal, survivor, (optimizer.state[p]["exp_avg"] for p in model.seed_parameters(SECOND)))
    )
    assert slots_of(optimizer) == [None, SECOND]


def test_a_fossil_keeps_its_group_and_state():
    model, optimizer = tied()
    bring_to(model, S.PROBATIONARY)
    train_once(model, optimizer)
    model.step_epoch(1.0)
    model.step_epoch(1.0)
    groups, states = ids_in(optimizer), len(optimizer.state)
    step = optimizer.state[model.seed_parameters()[0]]["step"].item()
    assert model.advance_stage(FIRST).passed
    assert ids_in(optimizer) == groups
    assert len(optimizer.state) == states
    train_once(model, optimizer)
    assert optimizer.state[model.seed_parameters()[0]]["step"].item() == step + 1


@pytest.mark.parametrize("order", [(FIRST, SECOND), (SECOND, FIRST)])
def test_the_order_of_groups_does_not_depend_on_who_grew_first(order):
    model, optimizer = tied()
    for slot in order:
        model.germinate(slot, "scale")
    assert slots_of(optimizer) == [None, FIRST, SECOND]


def test_a_saved_optimiser_fits_a_loaded_model_whichever_seed_was_first():
    model, optimizer = tied()
    bring_to(model, S.TRAINING, SECOND)
    train_once(model, optimizer)
    model.germinate(FIRST, "scale")
    model.step_epoch(1.0)
    train_once(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for when in ("tie, then load", "load, then tie"):
        fresh, _ = make_model()
        again = torch.optim.AdamW(fresh.host_parameters(), lr=1e-2)
        if when == "tie, then load":
            tie_optimizer(fresh, again)
            fresh.load_state_dict(saved[0])
        else:
            fresh.load_state_dict(saved[0])
            tie_optimizer(fresh, again)
        again.load_state_dict(saved[1])
        for slot in (FIRST, SECOND):
            for old, new in zip(model.seed_parameters(slot), fresh.seed_parameters(slot), strict=True):
                assert torch.equal(optimizer.state[old]["exp_avg"], again.state[new]["exp_avg"])
                assert optimizer.state[old]["step"] == again.state[new]["step"]


def test_seeds_that_are_there_already_get_groups_of_their_own():
    model, _ = make_model()
    bring_to(model, S.TRAINING)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_once(model, optimizer)
    average = optimizer.state[model.seed_parameters()[0]]["exp_avg"].clone()
    tie_optimizer(model, optimizer, lr_factor=2.0)
    assert slots_of(optimizer) == [None, FIRST]
    assert sorted(ids_in(optimizer)) == sorted(id(p) for p in model.parameters())
    assert optimizer.param_groups[1]["lr"] == 2e-2
    assert torch.equal(optimizer.state[model.seed_parameters()[0]]["exp_avg"], average)
    model.cull(FIRST)
    assert sorted(ids_in(optimizer)) == sorted(id(p) for p in model.host_parameters())
    assert set(optimizer.state) == set(model.host_parameters())


def test_several_groups_of_the_host_stay_as_they_are():
    model, _ = make_model()
    first, *rest = model.host_parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.1, momentum=0.9)
    tie_optimizer(model, optimizer)
    model.germinate(SECOND, "scale")
    model.germinate(FIRST, "scale")
    assert slots_of(optimizer) == [None, None, FIRST, SECOND]
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1, 0.5, 0.5]
    model.cull(SECOND)
    assert slots_of(optimizer) == [None, None, FIRST]
    assert [len(g["params"]) for g in optimizer.param_groups[:2]] == [1, len(rest)]


def test_a_seed_that_borrows_a_host_parameter_never_takes_it_away():
    registry = make_registry()
    borrowed = []

    class Borrows(Scale):
        def __init__(self, dim):
            super().__init__(dim)
            self.borrowed = borrowed[0]

    registry.register(BlueprintSpec("borrows", Topology.CNN, Borrows, lambda dim: 0), pack="p")
    model, optimizer = tied(registry=registry)
    borrowed.append(model.host[1].weight)
    bring_to(model, S.TRAINING, blueprint="borrows")
    assert len(optimizer.param_groups[0]["params"]) == len(model.host_parameters())
    assert len(optimizer.param_groups[1]["params"]) == 2
    train_once(model, optimizer)
    model.cull(FIRST)
    assert len(optimizer.param_groups[0]["params"]) == len(model.host_parameters())
    assert borrowed[0] in optimizer.state


def test_a_cull_does_not_go_through_the_hosts_parameters(monkeypatch):
    model, optimizer = tied()
    bring_to(model, S.TRAINING)
    train_once(model, optimizer)
    monkeypatch.setattr(model.host, "named_parameters", None)
    for listener in model.growth.listeners:
        listener.seed_removed(FIRST, model.slots[FIRST].seed_parameters())
    assert len(optimizer.param_groups) == 1


def test_a_seed_without_parameters_adds_no_group():
    registry = make_registry()
    registry.register(
        BlueprintSpec("nothing", Topology.CNN, lambda dim: nn.Identity(), lambda dim: 0), pack="p"
    )
    model, optimizer = tied(registry=registry)
    bring_to(model, S.TRAINING, blueprint="nothing")
    assert slots_of(optimizer) == [None]
    train_once(model, optimizer)
    model.step_epoch(1.0)
    model.cull(FIRST)


def test_two_optimisers_can_be_tied_and_a_refusal_of_one_reaches_neither():
    model, first = tied()
    second = tie_optimizer(model, torch.optim.SGD(model.host_parameters(), lr=0.1))

    class Refuses:
        def seed_added(self, slot, parameters):
            raise PermissionError("full")

        def seed_removed(self, slot, parameters):
            raise AssertionError("it never had any")

    model.germinate(FIRST, "scale")
    assert slots_of(first) == slots_of(second) == [None, FIRST]
    model.listen(Refuses())
    with pytest.raises(PermissionError):
        model.germinate(SECOND, "scale")
    assert slots_of(first) == slots_of(second) == [None, FIRST]
    assert model.slots[SECOND].stage is S.DORMANT


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_the_host_steps_as_if_the_culled_seed_had_never_been(kind):
    model, optimizer = tied(kind)
    bare, reference = tied(kind)
    for epoch in range(6):
        if epoch == 1:
            model.germinate(FIRST, "scale")
        if epoch == 4:
            assert model.slots[FIRST].stage is S.TRAINING
            model.cull(FIRST)
        assert torch.equal(train_once(model, optimizer), train_once(bare, reference))
        if epoch < 3:
            model.step_epoch(1.0)
    assert all(map(torch.equal, model.host_parameters(), bare.host_parameters()))
    assert same_state(host_state(model, optimizer), host_state(bare, reference))
    assert len(model.host_parameters()) == 8
    assert model.slots[FIRST].point.dim == WIDTH
