"""The groups of seeds: named, with settings of their own, in every optimiser of torch."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref

import pytest
import torch
from state_helpers import FIRST, SECOND, bring_to, make_model, train_once
from torch import nn
from torch.optim import SGD, Adam, AdamW

from kasmina_core import GerminationError, SeedStage, tie_optimizer, untie_optimizer

IMPLEMENTATIONS = [
    *((kind, {"foreach": True}) for kind in (SGD, Adam, AdamW)),
    *((kind, {"fused": True}) for kind in (SGD, Adam, AdamW)),
]
REFUSED = {torch.optim.LBFGS, torch.optim.SparseAdam}  # one group only; sparse gradients only
EVERY = [
    (kind, {})
    for kind in vars(torch.optim).values()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
]
CASES = [case for case in EVERY if case[0] not in REFUSED] + IMPLEMENTATIONS


def matrix(p):
    return p.ndim == 2


def make(model, kind, options):
    momentum = {"momentum": 0.9} if kind is SGD else {}
    only = [p for p in model.host_parameters() if kind is not torch.optim.Muon or matrix(p)]
    return kind(only, lr=2**-7, **momentum, **options)


def states(model, optimizer):
    return {
        name: copy.deepcopy(optimizer.state[p])
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(x, b[name][key]) if torch.is_tensor(x) else x == b[name][key]
        for name in a
        for key, x in a[name].items()
    )


def assert_names_are_right(model, optimizer, prefix=""):
    known = {id(p): prefix + name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [known[id(p)] for p in group["params"]]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_every_optimiser_takes_a_seed_and_forgets_it(kind, options):
    model, _ = make_model()
    bare, _ = make_model()
    optimizer, reference = make(model, kind, options), make(bare, kind, options)
    tie_optimizer(model, optimizer, takes=matrix if kind is torch.optim.Muon else None)
    rest = tie_optimizer(model, SGD([{"params": []}], 0.1), takes=lambda p: not matrix(p))
    for epoch in range(7):
        if epoch in (1, 5):
            before = states(model, optimizer)
            if epoch == 1:
                model.germinate(FIRST, "scale")
                model.germinate(SECOND, "scale")
            else:
                before = {name: state for name, state in before.items() if f".{FIRST}.seed" not in name}
                model.cull(FIRST)
            after = states(model, optimizer)
            assert same(before, {name: after[name] for name in before})
        assert torch.equal(train_once(model, optimizer), train_once(bare, reference))
        rest.step()
        if epoch < 4:
            model.step_epoch(1.0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in optimizer.state} <= held
    assert held <= {id(p) for p in model.parameters()}
    assert all(map(torch.equal, model.host_parameters(), bare.host_parameters()))
    if kind is not torch.optim.Muon:
        assert any(p in optimizer.state for p in model.seed_parameters(SECOND))


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_a_fossil_keeps_identity_and_state_bit_for_bit(kind, implementation):
    model, _ = make_model()
    optimizer = tie_optimizer(model, make(model, kind, {implementation: True}))
    bring_to(model, SeedStage.PROBATIONARY)
    for _ in range(2):
        train_once(model, optimizer)
        model.step_epoch(1.0)
    parameters, before = model.seed_parameters(), states(model, optimizer)
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    assert model.advance_stage(FIRST).passed
    assert model.slots[FIRST].stage is SeedStage.FOSSILIZED
    assert all(a is b for a, b in zip(parameters, model.seed_parameters(), strict=True))
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups
    assert same(before, states(model, optimizer))


@pytest.mark.parametrize("prefix", ["", "net."])
def test_an_optimiser_of_named_parameters_knows_seeds_by_their_names(prefix):
    model, _ = make_model()
    whole = nn.ModuleDict({"net": model}) if prefix else model
    optimizer = tie_optimizer(model, AdamW(whole.named_parameters(), 1e-2))
    assert_names_are_right(model, optimizer, prefix)
    model.germinate(SECOND, "scale")
    model.germinate(FIRST, "scale")
    assert_names_are_right(model, optimizer, prefix)
    assert optimizer.param_groups[1]["param_names"] == [
        f"{prefix}kasmina_slots.{FIRST}.seed.{name}" for name in ("weight", "bias")
    ]
    model.step_epoch(1.0)
    train_once(model, optimizer)
    model.cull(FIRST)
    assert_names_are_right(model, optimizer, prefix)
    train_once(model, optimizer)


def test_names_are_right_for_seeds_that_were_in_a_group_of_the_host():
    model, _ = make_model()
    bring_to(model, SeedStage.TRAINING)
    optimizer = tie_optimizer(model, AdamW(model.named_parameters(), 1e-2))
    assert len(optimizer.param_groups) == 2
    assert_names_are_right(model, optimizer)
    model.cull(FIRST)
    assert_names_are_right(model, optimizer)


def test_names_are_right_after_a_load_by_whichever_way():
    grown, _ = make_model()
    bring_to(grown, SeedStage.TRAINING, SECOND)
    for load in (lambda m: m.load_state_dict(grown.state_dict()), load_as_a_part_of_something):
        model, _ = make_model()
        optimizer = tie_optimizer(model, AdamW(model.named_parameters(), 1e-2))
        model.germinate(FIRST, "scale")
        load(model) if load is not load_as_a_part_of_something else load(model, grown)
        assert [group.get("kasmina_slot") for group in optimizer.param_groups] == [None, SECOND]
        assert_names_are_right(model, optimizer)


def load_as_a_part_of_something(model, grown):
    nn.ModuleDict({"net": model}).load_state_dict(nn.ModuleDict({"net": grown}).state_dict())


def test_settings_can_depend_on_slot_and_blueprint():
    model, _ = make_model()
    asked = []

    def factor(slot, blueprint):
        asked.append((slot, blueprint))
        return 0.5 if slot == FIRST else 2.0

    optimizer = tie_optimizer(
        model,
        AdamW(model.host_parameters(), 0.25, weight_decay=0.125),
        lr_factor=factor,
        weight_decay=lambda slot, blueprint: 0.0 if blueprint.endswith(":scale") else 1.0,
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    tie_optimizer(model, optimizer, lr_factor=factor, schedulers=[schedule])
    model.germinate(FIRST, "scale")
    model.germinate(SECOND, "normed")
    assert [slot for slot, _ in asked] == [FIRST, SECOND]
    assert all(blueprint.endswith((":scale", ":normed")) for _, blueprint in asked)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125, 0.5]
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.0625, 0.25]


def test_weight_decay_can_depend_on_the_blueprint():
    model, _ = make_model()
    optimizer = tie_optimizer(
        model,
        AdamW(model.host_parameters(), 0.25, weight_decay=0.125),
        weight_decay=lambda slot, blueprint: 0.0 if blueprint.endswith(":scale") else 1.0,
    )
    model.germinate(FIRST, "scale")
    model.germinate(SECOND, "normed")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.125, 0.0, 1.0]


def test_a_seed_takes_the_settings_of_the_first_group():
    model, _ = make_model()
    own = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    optimizer = tie_optimizer(model, AdamW([{"params": model.host_parameters(), **own}], weight_decay=0.7))
    model.germinate(FIRST, "scale")
    group = next(g for g in optimizer.param_groups if g.get("kasmina_slot") == FIRST)
    assert {name: group[name] for name in own} == own


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "half"])
def test_a_setting_that_is_no_number_is_refused_at_once_or_at_germination(bad):
    model, _ = make_model()
    optimizer = SGD(model.host_parameters(), 0.1)
    with pytest.raises(ValueError, match="lr_factor must be a finite number"):
        tie_optimizer(model, optimizer, lr_factor=bad)
    tie_optimizer(model, optimizer, weight_decay=lambda slot, blueprint: bad)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="weight_decay must be a finite number"):
        model.germinate(FIRST, "scale")
    assert len(optimizer.param_groups) == 1
    assert model.slots[FIRST].stage is SeedStage.DORMANT
    assert model.state_dict().keys() == before.keys()
    assert model.seed_parameters() == []


def test_an_untied_optimiser_keeps_its_groups_and_is_not_kept_alive():
    model, _ = make_model()
    optimizer = tie_optimizer(model, AdamW(model.host_parameters(), 1e-2))
    model.germinate(FIRST, "scale")
    untie_optimizer(model, optimizer)
    model.germinate(SECOND, "scale")
    assert [group.get("kasmina_slot") for group in optimizer.param_groups] == [None, FIRST]
    watched = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watched() is None


def test_lbfgs_is_refused_with_what_to_do():
    model, _ = make_model()
    with pytest.raises(
        TypeError, match=r"LBFGS steps its first parameter group alone[\s\S]*another optimiser"
    ):
        tie_optimizer(model, torch.optim.LBFGS(model.host_parameters()))


def test_muon_refuses_a_seed_it_cannot_step_before_anything_changes():
    model, _ = make_model()
    muon = torch.optim.Muon([p for p in model.host_parameters() if matrix(p)])
    tie_optimizer(model, muon)
    with pytest.raises(GerminationError, match=r"Muon steps matrices only[\s\S]*2 of 2, such as \(4, 1, 1\)"):
        model.germinate(FIRST, "scale")
    assert len(muon.param_groups) == 1
    assert model.slots[FIRST].stage is SeedStage.DORMANT


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_an_optimiser_without_any_host_parameter_trains_the_seeds_of_a_frozen_host(kind):
    model, _ = make_model()
    model.host.requires_grad_(False)
    frozen = [p.clone() for p in model.host_parameters()]
    optimizer = tie_optimizer(model, kind([{"params": []}], lr=1e-2))
    bring_to(model, SeedStage.TRAINING)
    before = [p.clone() for p in model.seed_parameters()]
    train_once(model, optimizer)
    assert not any(map(torch.equal, before, model.seed_parameters()))
    assert all(map(torch.equal, frozen, model.host_parameters()))
    model.cull(FIRST)
    assert [group["params"] for group in optimizer.param_groups] == [[]]
    assert not optimizer.state


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}])
def test_rates_that_are_tensors_are_scaled_into_tensors_of_their_own(options):
    model, _ = make_model()
    optimizer = tie_optimizer(
        model, AdamW(model.host_parameters(), torch.tensor(0.25), **options), lr_factor=0.5
    )
    bring_to(model, SeedStage.TRAINING)
    host, seed = optimizer.param_groups
    assert torch.equal(seed["lr"], torch.tensor(0.125))
    seed["lr"].fill_(0.0)
    assert host["lr"] == 0.25
    before = [p.clone() for p in model.seed_parameters()]
    train_once(model, optimizer)
    assert all(map(torch.equal, before, model.seed_parameters()))
