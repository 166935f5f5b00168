"""A trainable seed that no optimiser holds is reported at the first step, once, and never without a reason."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from state_helpers import FIRST, SECOND, bring_to, make_batch, make_model, train_once
from torch.optim import SGD, AdamW
from torch.optim import optimizer as torch_optimizer

from kasmina_core import SeedStage, UntrackedSeedWarning, tie_optimizer


def hooks():
    return len(torch_optimizer._global_optimizer_post_hooks)


@pytest.fixture(autouse=True)
def nothing_global_is_left(monkeypatch):
    # Models of other tests may be waiting for an optimiser still.
    monkeypatch.setattr(torch_optimizer, "_global_optimizer_post_hooks", OrderedDict())
    yield
    gc.collect()
    assert hooks() == 0


def grown(stage=SeedStage.TRAINING):
    model, _ = make_model()
    bring_to(model, stage)
    return model


def test_a_seed_that_nobody_holds_is_reported_at_the_first_step_and_never_again():
    model = grown()
    optimizer = SGD(model.host_parameters(), 0.1)
    train_once(model, optimizer)
    with pytest.warns(
        UntrackedSeedWarning, match=f"slot '{FIRST}': 2 of 2 parameters\nUse tie_optimizer"
    ) as said:
        train_once(model, optimizer)
    assert len(said) == 1
    for _ in range(3):
        train_once(model, optimizer)
    assert hooks() == 0


def test_it_points_at_the_line_of_the_training_loop():
    model = grown()
    optimizer = SGD(model.host_parameters(), 0.1)
    model.step()
    optimizer.step()
    with pytest.warns(UntrackedSeedWarning) as said:
        model.step()
    assert said[0].filename == __file__


@pytest.mark.parametrize("loop", ["step before", "step after", "epochs only"])
def test_every_order_of_the_loop_is_understood(loop):
    model = grown()
    optimizer = SGD(model.host_parameters(), 0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            if loop == "step before":
                model.step()
            optimizer.step()
            if loop == "step after":
                model.step()
            if loop == "epochs only":
                model.step_epoch(1.0)
    assert [warning.category for warning in said] == [UntrackedSeedWarning]


def test_two_forgotten_seeds_are_reported_together_and_a_later_one_by_itself():
    model = grown()
    bring_to(model, SeedStage.TRAINING, SECOND)
    optimizer = SGD(model.host_parameters(), 0.1)
    train_once(model, optimizer)
    with pytest.warns(UntrackedSeedWarning, match=f"'{FIRST}'.*\n.*'{SECOND}'") as said:
        train_once(model, optimizer)
    assert len(said) == 1
    model.cull(FIRST)
    while model.slots[FIRST].state is not None:
        model.step_epoch(1.0)
    model.germinate(FIRST, "scale")
    train_once(model, optimizer)
    with pytest.warns(UntrackedSeedWarning, match=f"'{FIRST}'") as said:
        train_once(model, optimizer)
    assert SECOND not in str(said[0].message).split("Use tie")[0]


def test_a_part_that_is_forgotten_is_reported_too():
    model = grown()
    optimizer = tie_optimizer(
        model, SGD(model.host_parameters(), 0.1), takes=lambda p: p is model.seed_parameters()[0]
    )
    train_once(model, optimizer)
    with pytest.warns(UntrackedSeedWarning, match="1 of 2"):
        train_once(model, optimizer)


@pytest.mark.parametrize("way", ["tied", "a group by hand", "all parameters", "two optimisers"])
def test_a_seed_that_is_held_is_not_reported(way):
    model = grown()
    optimizers = [SGD(model.parameters() if way == "all parameters" else model.host_parameters(), 0.1)]
    if way == "tied":
        tie_optimizer(model, optimizers[0])
    if way == "a group by hand":
        optimizers[0].add_param_group({"params": model.seed_parameters()})
    if way == "two optimisers":
        optimizers.append(AdamW(model.seed_parameters(), 0.1))
    for _ in range(3):
        for optimizer in optimizers:
            train_once(model, optimizer)
    assert hooks() == 0


def test_an_optimiser_that_has_not_stepped_yet_counts():
    model = grown()
    host, seeds = SGD(model.host_parameters(), 0.1), SGD(model.seed_parameters(), 0.1)
    for _ in range(3):
        train_once(model, host)  # as where the seed's optimiser steps every fourth time
    assert hooks() == 0
    del seeds


def test_a_tied_optimiser_costs_no_hook_at_all():
    model = grown()
    tie_optimizer(model, SGD(model.host_parameters(), 0.1))
    model.step()
    assert hooks() == 0


@pytest.mark.parametrize("scaler_skips", [False, True])
def test_nothing_is_said_while_nothing_steps(scaler_skips):
    model = grown()
    optimizer = SGD(model.host_parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    x, y = make_batch()
    for _ in range(4):
        scaler.scale(F.cross_entropy(model(x), y) * 1e6).backward()
        model.step()
        if scaler_skips:
            scaler.step(optimizer)
            scaler.update(2.0**127)
    assert hooks() == 1


def test_optimisers_of_other_models_say_nothing():
    model, other = grown(), make_model()[0]
    optimizer = SGD(other.parameters(), 0.1)
    for _ in range(3):
        model.step()
        optimizer.step()


def test_a_frozen_seed_need_not_be_held():
    model, _ = make_model()
    bring_to(model, SeedStage.TRAINING)
    for p in model.seed_parameters():
        p.requires_grad_(False)
    optimizer = SGD(model.host_parameters(), 0.1)
    for _ in range(3):
        train_once(model, optimizer)


@pytest.mark.parametrize("holds", ["nothing", "another seed"])
def test_a_seed_in_a_frozen_host_is_reported_too(holds):
    model, _ = make_model()
    model.host.requires_grad_(False)
    bring_to(model, SeedStage.TRAINING)
    optimizer = SGD([{"params": []}] if holds == "nothing" else model.seed_parameters(), 0.1)
    slot = FIRST
    if holds == "another seed":
        train_once(model, optimizer)
        slot = SECOND
        bring_to(model, SeedStage.TRAINING, SECOND)
    train_once(model, optimizer)
    with pytest.warns(UntrackedSeedWarning, match=f"'{slot}'"):
        train_once(model, optimizer)


def test_a_seed_that_is_culled_in_time_is_not_reported():
    model = grown()
    optimizer = SGD(model.host_parameters(), 0.1)
    train_once(model, optimizer)
    model.cull(FIRST)
    train_once(model, optimizer)
    assert hooks() == 0


def test_a_loaded_seed_is_new_to_this_process():
    saved = grown().state_dict()
    fresh, _ = make_model()
    fresh.load_state_dict(saved)
    optimizer = SGD(fresh.host_parameters(), 0.1)
    train_once(fresh, optimizer)
    with pytest.warns(UntrackedSeedWarning):
        train_once(fresh, optimizer)


def test_copies_take_no_hook_along_and_watch_for_themselves():
    model = grown()
    optimizer = SGD(model.host_parameters(), 0.1)
    model.step()
    assert hooks() == 1
    copied = copy.deepcopy(model)
    pickle.loads(pickle.dumps(model.state_dict()))
    assert hooks() == 1
    tie_optimizer(model, optimizer)
    train_once(model, optimizer)
    assert hooks() == 0
    forgetful = SGD(copied.host_parameters(), 0.1)
    train_once(copied, forgetful)
    with pytest.warns(UntrackedSeedWarning):
        train_once(copied, forgetful)


def test_a_model_that_is_gone_leaves_no_hook():
    model = grown()
    model.step()
    assert hooks() == 1
    del model
    gc.collect()
    assert hooks() == 0


def test_where_warnings_are_errors_the_model_goes_on_after_it():
    model = grown()
    optimizer = SGD(model.host_parameters(), 0.1)
    train_once(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UntrackedSeedWarning):
            model.step_epoch(1.0)
    epoch = model.epoch
    model.step_epoch(1.0)
    assert model.epoch == epoch + 1
