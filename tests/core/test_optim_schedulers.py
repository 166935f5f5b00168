"""Learning-rate schedulers of a tied optimiser follow its seeds' parameter groups."""

from __future__ import annotations

import copy
import gc
import inspect
import math

import pytest
import torch
from state_helpers import FIRST, SECOND, bring_to, make_model, train_once
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler, swa_utils
from torch.optim.swa_utils import SWALR

from kasmina_core import GerminationError, SeedStage, tie_optimizer, untie_optimizer

RATE, FACTOR = 0.25, 0.5  # powers of two: a scaled schedule is then exact


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def sequential(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.25, total_iters=3),
        lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        lr_scheduler.StepLR(optimizer, 2),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [4, 6])


def chained(optimizer):
    inner = [lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9), lr_scheduler.StepLR(optimizer, 3)]
    return lr_scheduler.ChainedScheduler([lr_scheduler.ChainedScheduler(inner), sequential(optimizer)])


CASES = {
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    lr_scheduler.StepLR: lambda o: lr_scheduler.StepLR(o, 2),
    lr_scheduler.MultiStepLR: lambda o: lr_scheduler.MultiStepLR(o, [3, 6]),
    lr_scheduler.ConstantLR: lambda o: lr_scheduler.ConstantLR(o, 0.25, 6),
    lr_scheduler.LinearLR: lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=8),
    lr_scheduler.ExponentialLR: lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lr_scheduler.SequentialLR: sequential,
    lr_scheduler.ChainedScheduler: chained,
    lr_scheduler.CosineAnnealingLR: lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    lr_scheduler.CosineAnnealingWarmRestarts: lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    lr_scheduler.PolynomialLR: lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    lr_scheduler.OneCycleLR: lambda o: lr_scheduler.OneCycleLR(o, [8 * r for r in rates(o)], 20),
    lr_scheduler.CyclicLR: lambda o: lr_scheduler.CyclicLR(o, rates(o), [8 * r for r in rates(o)], 3),
    lr_scheduler.ReduceLROnPlateau: lambda o: lr_scheduler.ReduceLROnPlateau(
        o, factor=0.5, patience=0, min_lr=[r / 8 for r in rates(o)]
    ),
    SWALR: lambda o: SWALR(o, [r / 8 for r in rates(o)], anneal_epochs=6),
}
OPTIMISERS = {
    "SGD": lambda parameters: SGD(parameters, RATE, momentum=0.5),
    "AdamW": lambda parameters: AdamW(parameters, RATE),
}
every_scheduler = pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
every_optimiser = pytest.mark.parametrize("make_optimizer", OPTIMISERS.values(), ids=OPTIMISERS)


def step(scheduler):
    """One epoch: the optimiser (which has no gradients) and then the scheduler."""
    scheduler.optimizer.step()
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def settings(optimizer):
    """What groups say, but for whose they are."""
    return [
        {k: v for k, v in group.items() if k not in ("params", "kasmina_slot")}
        for group in optimizer.param_groups
    ]


def per_group_lists(scheduler):
    names = ("base_lrs", "_last_lr", "max_lrs", "min_lrs", "lr_lambdas", "base_momentums", "max_momentums")
    parts = [part for s in getattr(scheduler, "_schedulers", ()) for part in per_group_lists(s)]
    return parts + [list(vars(scheduler)[name]) for name in names if name in vars(scheduler)]


def grown(make_scheduler, make_optimizer=OPTIMISERS["SGD"], **options):
    model, _ = make_model()
    optimizer = make_optimizer(model.host_parameters())
    scheduler = make_scheduler(optimizer)
    tie_optimizer(model, optimizer, schedulers=[scheduler], **options)
    return model, optimizer, scheduler


def both_from_the_start(make_scheduler, make_optimizer, factor=FACTOR):
    groups = [
        {"params": [nn.Parameter(torch.ones(1))]},
        {"params": [nn.Parameter(torch.ones(1))], "lr": RATE * factor},
    ]
    optimizer = make_optimizer(groups)
    return optimizer, make_scheduler(optimizer)


def lambda_lr(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)


def test_every_scheduler_of_torch_has_a_case():
    # By what a class can do, not by its base: a new one need not derive from LRScheduler to be one.
    found = {
        kind
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and kind.__module__ == module.__name__ and not name.startswith("_")
        if hasattr(kind, "step") or hasattr(kind, "get_lr")
    }
    assert found - {lr_scheduler.LRScheduler} == set(CASES), "give the new scheduler a case"
    exported = {getattr(lr_scheduler, name) for name in lr_scheduler.__all__}
    assert exported - {lr_scheduler.LRScheduler} <= set(CASES)


@every_optimiser
@every_scheduler
@pytest.mark.parametrize("born", [0, 2, 5])
def test_a_seed_follows_the_schedule_as_if_its_group_had_always_been_there(kind, make_optimizer, born):
    model, optimizer, scheduler = grown(CASES[kind], make_optimizer, lr_factor=FACTOR)
    reference, expected = both_from_the_start(CASES[kind], make_optimizer)
    for epoch in range(12):
        if epoch == born:
            model.germinate(FIRST, "scale")
        if epoch >= born:
            assert settings(optimizer) == settings(reference)
            assert scheduler.get_last_lr() == expected.get_last_lr() == rates(optimizer)
        step(scheduler)
        step(expected)
    assert rates(optimizer) == rates(reference)
    assert rates(optimizer)[1] == rates(optimizer)[0] * FACTOR


@every_optimiser
@every_scheduler
def test_a_cull_leaves_the_scheduler_as_if_the_seed_had_never_been(kind, make_optimizer):
    model, optimizer, scheduler = grown(CASES[kind], make_optimizer, lr_factor=FACTOR)
    _, reference, expected = grown(CASES[kind], make_optimizer)
    for epoch in range(12):
        if epoch == 2:
            bring_to(model, SeedStage.TRAINING)
        if epoch == 7:
            model.cull(FIRST)
        assert settings(optimizer)[0] == settings(reference)[0]
        step(scheduler)
        step(expected)
    assert settings(optimizer) == settings(reference)
    assert scheduler.get_last_lr() == expected.get_last_lr()
    assert [len(values) for values in per_group_lists(scheduler)] == [
        len(values) for values in per_group_lists(expected)
    ]


@every_scheduler
def test_germination_and_cull_change_nothing_for_the_groups_that_stay(kind):
    model, optimizer, scheduler = grown(CASES[kind], lr_factor=FACTOR)
    for _ in range(3):
        step(scheduler)
    groups, lists = copy.deepcopy(settings(optimizer)), per_group_lists(scheduler)
    bring_to(model, SeedStage.TRAINING, SECOND)
    model.germinate(FIRST, "scale")
    assert settings(optimizer)[:1] == groups
    assert [values[:1] for values in per_group_lists(scheduler)] == lists
    assert {len(values) for values in per_group_lists(scheduler)} == {3}
    model.step_epoch(1.0)
    model.cull(FIRST)
    model.cull(SECOND)
    assert settings(optimizer) == groups
    assert per_group_lists(scheduler) == lists


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
@pytest.mark.parametrize("schedule", [lr_scheduler.OneCycleLR, lr_scheduler.ChainedScheduler])
def test_the_host_learns_bit_for_bit_as_without_the_culled_seed(kind, implementation, schedule):
    def make_optimizer(parameters):
        more = {"momentum": 0.9} if kind is SGD else {}
        return kind(parameters, 2**-7, **more, **{implementation: True})

    model, optimizer, scheduler = grown(CASES[schedule], make_optimizer, lr_factor=FACTOR)
    bare, reference, expected = grown(CASES[schedule], make_optimizer)
    for epoch in range(8):
        if epoch == 1:
            model.germinate(FIRST, "scale")
        if epoch == 5:
            assert model.slots[FIRST].stage is SeedStage.TRAINING
            model.cull(FIRST)
        assert torch.equal(train_once(model, optimizer), train_once(bare, reference))
        scheduler.step()
        expected.step()
        if epoch in (2, 3):
            assert len(optimizer.state) == len(reference.state) + 2
        if epoch < 3:
            model.step_epoch(1.0)
    for ours, theirs in zip(model.host_parameters(), bare.host_parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert optimizer.state[ours].keys() == reference.state[theirs].keys()
        for key, value in optimizer.state[ours].items():
            other = reference.state[theirs][key]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other


def test_lists_follow_the_order_of_the_groups_whichever_seed_was_first():
    model, optimizer, scheduler = grown(lambda_lr)
    model.germinate(SECOND, "scale")
    scheduler.base_lrs[1] = 8.0
    model.germinate(FIRST, "scale")
    assert [group.get("kasmina_slot") for group in optimizer.param_groups] == [None, FIRST, SECOND]
    assert scheduler.base_lrs == [RATE, RATE, 8.0]
    step(scheduler)
    assert rates(optimizer) == [0.9 * RATE, 0.9 * RATE, 0.9 * 8.0]
    model.step_epoch(1.0)
    model.cull(FIRST)
    assert scheduler.base_lrs == [RATE, 8.0]
    assert len(scheduler.lr_lambdas) == 2


def test_a_seed_follows_the_first_of_several_groups():
    model, _ = make_model()
    first, *rest = model.host_parameters()
    optimizer = SGD([{"params": [first], "lr": 1.0}, {"params": rest}], lr=RATE)
    lambdas = [lambda epoch: 0.5**epoch, lambda epoch: 1.0]
    scheduler = lr_scheduler.LambdaLR(optimizer, lambdas)
    tie_optimizer(model, optimizer, lr_factor=FACTOR, schedulers=[scheduler])
    step(scheduler)
    model.germinate(FIRST, "scale")
    step(scheduler)
    assert scheduler.lr_lambdas == [*lambdas, lambdas[0]]
    assert rates(optimizer) == [0.25, RATE, 0.25 * FACTOR]


def test_a_floor_that_all_groups_share_is_not_scaled():
    model, optimizer, scheduler = grown(
        lambda o: lr_scheduler.CosineAnnealingLR(o, 6, eta_min=0.125), lr_factor=FACTOR
    )
    step(scheduler)
    model.germinate(FIRST, "scale")
    for _ in range(5):
        step(scheduler)
    assert rates(optimizer) == pytest.approx([0.125, 0.125])


def test_one_floor_of_a_plateau_scheduler_is_scaled_like_the_rate():
    model, optimizer, scheduler = grown(
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=RATE / 4),
        lr_factor=FACTOR,
    )
    model.germinate(FIRST, "scale")
    for _ in range(6):
        step(scheduler)
    assert rates(optimizer) == [RATE / 4, RATE / 4 * FACTOR]


def test_several_schedulers_follow_at_once():
    model, _ = make_model()
    optimizer = SGD(model.host_parameters(), RATE)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    decay = lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.5)
    tie_optimizer(model, optimizer, schedulers=(each for each in (plateau, decay)))
    model.germinate(FIRST, "scale")
    for _ in range(3):
        step(plateau)
        step(decay)
    assert rates(optimizer) == [RATE * 0.5**5] * 2  # the plateau needs one value to compare with


def test_a_rate_that_is_a_tensor_is_followed_without_sharing_it():
    model, _ = make_model()
    optimizer = Adam(model.host_parameters(), torch.tensor(RATE), foreach=False)
    scheduler = lambda_lr(optimizer)
    tie_optimizer(model, optimizer, schedulers=[scheduler])
    model.germinate(FIRST, "scale")
    host, seed = optimizer.param_groups
    tensors = [host["lr"], seed["lr"], seed["initial_lr"], *scheduler.base_lrs, *scheduler.get_last_lr()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    step(scheduler)
    assert torch.equal(seed["lr"], host["lr"])
    assert math.isclose(seed["lr"].item(), 0.9 * RATE, rel_tol=1e-6)


def test_seeds_that_are_there_already_follow_too():
    model, _ = make_model()
    bring_to(model, SeedStage.TRAINING)
    optimizer = SGD(model.parameters(), RATE)
    scheduler = lambda_lr(optimizer)
    tie_optimizer(model, optimizer, lr_factor=FACTOR, schedulers=[scheduler])
    step(scheduler)
    assert rates(optimizer) == [0.9 * RATE, 0.9 * RATE * FACTOR]


def test_tying_again_takes_up_a_scheduler_that_was_made_later():
    model, optimizer, early = grown(lambda_lr, lr_factor=FACTOR)
    model.germinate(SECOND, "scale")
    step(early)
    late = lr_scheduler.CosineAnnealingLR(optimizer, 8)
    tie_optimizer(model, optimizer, lr_factor=FACTOR, schedulers=[late])
    model.germinate(FIRST, "scale")
    assert len(late.base_lrs) == len(optimizer.param_groups) == 3
    for _ in range(4):
        step(late)
    assert rates(optimizer)[1:] == [rates(optimizer)[0] * FACTOR] * 2
    model.step_epoch(1.0)
    model.cull(SECOND)
    assert len(late.base_lrs) == len(optimizer.param_groups) == 2


@every_scheduler
def test_a_grown_run_goes_on_from_its_saved_states(kind):
    model, optimizer, scheduler = grown(CASES[kind], lr_factor=FACTOR)
    step(scheduler)
    model.germinate(FIRST, "scale")
    step(scheduler)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    fresh, again, resumed = grown(CASES[kind], lr_factor=FACTOR)
    fresh.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    for _ in range(6):
        assert settings(again) == settings(optimizer)
        step(scheduler)
        step(resumed)
    fresh.step_epoch(1.0)
    fresh.cull(FIRST)
    step(resumed)
    assert len(rates(again)) == 1


def test_a_state_dict_taken_before_does_not_change_with_the_groups():
    model, _, scheduler = grown(lambda o: lr_scheduler.StepLR(o, 2))
    saved = scheduler.state_dict()
    model.germinate(FIRST, "scale")
    assert saved["base_lrs"] == saved["_last_lr"] == [RATE]


class Wavy(lr_scheduler.LRScheduler):
    """A scheduler with a list per group that nobody knows."""

    def __init__(self, optimizer):
        self.phases = [0.0] * len(optimizer.param_groups)
        super().__init__(optimizer)

    def get_lr(self):
        return [
            lr * (1 + math.sin(phase + self.last_epoch))
            for lr, phase in zip(self.base_lrs, self.phases, strict=True)
        ]


class Halving(lr_scheduler.LRScheduler):
    """A scheduler of one's own that keeps nothing but what all keep."""

    def get_lr(self):
        return [lr * 0.5**self.last_epoch for lr in self.base_lrs]


def test_a_scheduler_of_ones_own_follows_if_it_keeps_nothing_more():
    model, optimizer, scheduler = grown(Halving, lr_factor=FACTOR)
    step(scheduler)
    model.germinate(FIRST, "scale")
    step(scheduler)
    assert rates(optimizer) == [RATE / 4, RATE / 4 * FACTOR]


@pytest.mark.parametrize("inside", [False, True])
def test_a_germination_that_a_scheduler_cannot_follow_is_refused_before_anything_changed(inside):
    def make_scheduler(optimizer):
        wavy = Wavy(optimizer)
        return lr_scheduler.ChainedScheduler([lambda_lr(optimizer), wavy]) if inside else wavy

    model, optimizer, scheduler = grown(make_scheduler)
    other = tie_optimizer(model, SGD(model.host_parameters(), RATE))
    groups, lists = copy.deepcopy(settings(optimizer)), per_group_lists(scheduler)
    with pytest.raises(
        GerminationError, match=r"Wavy cannot follow .* for slot '2'\.\n  values in phases: 1,"
    ):
        model.germinate(FIRST, "scale")
    assert settings(optimizer) == groups
    assert per_group_lists(scheduler) == lists
    assert len(other.param_groups) == 1
    assert model.slots[FIRST].stage is SeedStage.DORMANT
    assert model.seed_parameters() == []
    train_once(model, optimizer)
    scheduler.step()


def test_a_refusal_by_a_later_listener_takes_the_schedulers_entry_back():
    class Refuses:
        def seed_added(self, slot, parameters):
            raise PermissionError("full")

        def seed_removed(self, slot, parameters):
            raise AssertionError("it never had any")

    model, optimizer, scheduler = grown(lambda_lr)
    lists = per_group_lists(scheduler)
    model.listen(Refuses())
    with pytest.raises(PermissionError):
        model.germinate(FIRST, "scale")
    assert per_group_lists(scheduler) == lists
    step(scheduler)
    assert rates(optimizer) == [0.9 * RATE]


def test_a_scheduler_that_lost_count_of_the_groups_refuses_a_germination():
    model, optimizer, _ = grown(lambda_lr)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(GerminationError, match=r"LambdaLR.*\n  values in .*: 1\n  parameter groups: 2"):
        model.germinate(FIRST, "scale")
    assert len(optimizer.param_groups) == 2


def test_a_scheduler_of_another_optimiser_is_refused():
    model, _, scheduler = grown(lambda_lr)
    other = SGD(model.host_parameters(), RATE)
    with pytest.raises(ValueError, match="LambdaLR was made for another optimiser than the SGD"):
        tie_optimizer(model, other, schedulers=[scheduler])


def test_what_is_no_scheduler_of_torch_is_refused():
    model, _ = make_model()
    with pytest.raises(TypeError, match="object is not a torch"):
        tie_optimizer(model, SGD(model.host_parameters(), RATE), schedulers=[object()])


@every_scheduler
@pytest.mark.parametrize("when", ["before the tie", "after the tie", "after the seed"])
def test_a_scheduler_that_nobody_named_follows_as_if_it_had_been(kind, when):
    model, _ = make_model()
    optimizer = SGD(model.host_parameters(), RATE, momentum=0.5)
    reference, expected = both_from_the_start(CASES[kind], OPTIMISERS["SGD"])
    scheduler = CASES[kind](optimizer) if when == "before the tie" else None
    tie_optimizer(model, optimizer, lr_factor=FACTOR)
    if when == "after the tie":
        scheduler = CASES[kind](optimizer)
    bring_to(model, SeedStage.TRAINING)
    scheduler = scheduler or CASES[kind](optimizer)
    for _ in range(6):
        step(scheduler)
        step(expected)
        assert settings(optimizer) == settings(reference)
    model.cull(FIRST)
    step(scheduler)
    step(expected)
    assert settings(optimizer) == settings(reference)[:1]


def test_a_load_of_many_seeds_looks_for_schedulers_once_and_all_seeds_follow_the_one_found(monkeypatch):
    model, _ = make_model()
    saved = make_model()[0]
    for slot in (FIRST, SECOND):
        bring_to(saved, SeedStage.FOSSILIZED, slot)
    optimizer = tie_optimizer(model, SGD(model.host_parameters(), RATE), lr_factor=FACTOR)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    looks, look = [], gc.get_referrers
    monkeypatch.setattr(gc, "get_referrers", lambda *kinds: looks.append(kinds[0]) or look(*kinds))
    model.load_state_dict(saved.state_dict())
    assert len(looks) == 1  # averages and schedulers together, for two seeds
    assert scheduler.base_lrs == [RATE, RATE * FACTOR, RATE * FACTOR]
    later = lr_scheduler.StepLR(optimizer, 1)
    model.load_state_dict(make_model()[0].state_dict())
    assert later.base_lrs == scheduler.base_lrs == [RATE]


def test_a_germination_looks_through_the_heap_once_and_a_cull_once(monkeypatch):
    model, optimizer, scheduler = grown(lambda_lr)
    looks, look = [], gc.get_referrers
    monkeypatch.setattr(gc, "get_referrers", lambda *kinds: looks.append(kinds) or look(*kinds))
    model.germinate(FIRST, "scale")
    assert len(looks) == 1
    model.cull(FIRST)
    assert len(looks) == 2
    assert len(scheduler.base_lrs) == len(optimizer.param_groups) == 1


def test_a_scheduler_made_between_two_seeds_follows_the_second():
    model, optimizer, early = grown(lambda_lr)
    model.germinate(FIRST, "scale")
    late = lr_scheduler.CyclicLR(optimizer, RATE, 1.0)
    model.germinate(SECOND, "scale")
    step(early)
    step(late)
    assert len(late.base_lrs) == len(early.base_lrs) == 3


def test_an_unnamed_scheduler_with_lists_of_its_own_refuses_a_germination_unless_told_otherwise():
    model, _ = make_model()
    optimizer = SGD(model.host_parameters(), RATE)
    scheduler = Wavy(optimizer)
    tie_optimizer(model, optimizer)
    with pytest.raises(GerminationError, match=r"Wavy cannot follow(.*\n)*.*schedulers=\(\)"):
        model.germinate(FIRST, "scale")

    class Extends:
        def seed_added(self, slot, parameters):
            scheduler.base_lrs.append(scheduler.base_lrs[0])
            scheduler.phases.append(0.0)

        def seed_removed(self, slot, parameters):
            raise AssertionError("it stays")

    tie_optimizer(model, optimizer, schedulers=())
    model.listen(Extends())
    model.germinate(FIRST, "scale")
    step(scheduler)
    assert rates(optimizer)[0] == rates(optimizer)[1] != RATE


class Foreign:
    """A scheduler that is none of torch's, as timm has them."""

    def __init__(self, optimizer):
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])


def test_a_scheduler_that_is_none_of_torchs_is_noticed_when_the_optimiser_is_tied():
    model, _ = make_model()
    optimizer = SGD(model.host_parameters(), RATE)
    Foreign(optimizer)
    with pytest.raises(ValueError, match=r"SGD.*'initial_lr'(.*\n)*.*schedulers=\[scheduler\](.*\n)*.*=\(\)"):
        tie_optimizer(model, optimizer)
    tie_optimizer(model, optimizer, schedulers=())
    model.germinate(FIRST, "scale")
    assert rates(optimizer) == [RATE, RATE]


def test_a_scheduler_that_is_none_of_torchs_and_made_later_refuses_the_germination():
    model, _ = make_model()
    optimizer = tie_optimizer(model, SGD(model.host_parameters(), RATE))
    Foreign(optimizer)
    with pytest.raises(GerminationError, match=r"none of torch's is to be found"):
        model.germinate(FIRST, "scale")
    assert len(optimizer.param_groups) == 1


def test_a_scheduler_that_has_done_its_part_and_is_gone_does_not_refuse_a_germination():
    model, _ = make_model()
    optimizer = SGD(model.host_parameters(), RATE)
    scheduler = lambda_lr(optimizer)
    tie_optimizer(model, optimizer)
    step(scheduler)
    del scheduler
    model.germinate(FIRST, "scale")
    assert rates(optimizer) == [0.9 * RATE] * 2


class WrapsOptimizer(torch.optim.Optimizer):
    """Hands everything to the optimiser inside, as accelerate's does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getstate__(self):
        return {"optimizer": self.optimizer}

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class WrapsScheduler:
    def __init__(self, scheduler):
        self.scheduler = scheduler

    def step(self):
        self.scheduler.step()


@pytest.mark.parametrize("made_for", ["the wrapper", "the optimiser inside"])
@pytest.mark.parametrize("tied", ["the wrapper", "the optimiser inside"])
@pytest.mark.parametrize("named", ["wrapped", "plain", "not"])
def test_wrappers_of_optimisers_and_schedulers_are_tied_as_what_they_wrap(made_for, tied, named):
    model, _ = make_model()
    inside = SGD(model.host_parameters(), RATE)
    wrapper = WrapsOptimizer(inside)
    scheduler = lambda_lr(wrapper if made_for == "the wrapper" else inside)
    names = {"wrapped": [WrapsScheduler(scheduler)], "plain": [scheduler], "not": None}
    given = wrapper if tied == "the wrapper" else inside
    assert tie_optimizer(model, given, schedulers=names[named]) is given
    model.germinate(FIRST, "scale")
    wrapper.step()
    scheduler.step()
    assert rates(inside) == [0.9 * RATE] * 2
    untie_optimizer(model, wrapper)
    model.germinate(SECOND, "scale")
    assert len(inside.param_groups) == 2
