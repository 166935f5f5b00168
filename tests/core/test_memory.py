"""A model and all that it holds is freed with its last reference, without Python's collector."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from state_helpers import EVERY_STAGE, FIRST, SECOND, bring_to, make_batch, make_model, open_config

from kasmina_core import KasminaError, MorphogeneticModel, SeedStage, Telemetry, tie_optimizer


@contextmanager
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def train(model: MorphogeneticModel, optimizer: torch.optim.Optimizer) -> None:
    x, y = make_batch()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model.incubate(lambda: F.cross_entropy(model(x), y))
    model.step()
    optimizer.step()


def lived(stage: SeedStage) -> list[weakref.ref[object]]:
    """Take a model through all that holds on to it, and return weak references to it and its parts."""
    model, _ = make_model(open_config(keep_snapshot=True), evaluate=False)
    host, (x, y) = model.host, make_batch()
    model.emit_to(Telemetry([]))
    # The host's forward passes the slots too. An evaluator that holds the model would be held by it.
    model.evaluate_with(lambda: F.cross_entropy(host(x), y, reduction="none"))
    optimizer = tie_optimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    train(model, optimizer)
    scheduler.step()
    bring_to(model, stage, FIRST)
    bring_to(model, SeedStage.TRAINING, SECOND)
    train(model, optimizer)
    model.screen()
    model.attribute()
    model.cull(SECOND, keep=True)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    seeds = [slot.seed for slot in model.slots.values() if slot.seed is not None]
    return [
        weakref.ref(one)
        for one in (model, twin, host, host[0].weight, optimizer, *model.slots.values(), *seeds)
    ]


@pytest.fixture(autouse=True, scope="module")
def _first_use() -> None:
    """Let torch make what it makes at first use."""
    lived(SeedStage.TRAINING)


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_a_model_is_freed_with_its_last_reference(stage: SeedStage) -> None:
    with collector_off():
        alive = [reference() for reference in lived(stage)]
    assert alive == [None] * len(alive)


def test_a_slot_that_outlives_its_model_says_so() -> None:
    model, recorder = make_model()
    bring_to(model, SeedStage.TRAINING)
    slot = model.slots[FIRST]
    model.evaluate_with(None)
    with collector_off():
        del model
        with pytest.raises(KasminaError, match="The model of slot '2' is gone"):
            slot.step_epoch(1.0)
    assert recorder.events
