"""An arm trains one model epoch by epoch and pays for it; equal arms are equal bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kasmina_core import Arm, Germinate, SeedStage, Task, start_arm


def make_task() -> Task:
    """Two classes in four dimensions; the task's own host draws random numbers as it trains."""
    generator = torch.Generator().manual_seed(3)
    splits = {}
    for name, n in (("train", 48), ("gate", 120), ("val", 16), ("test", 16)):
        inputs = torch.randn(n, 4, generator=generator)
        splits[name] = (inputs, (inputs.prod(1) > 0).long())
    return Task(
        "sign", "classification", splits, n_classes=2, batch_size=16, lr=1e-2, host=make_host, slots=("0",)
    )


def make_host() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


class GrowAt:
    def __init__(self, epoch):
        self.epoch = epoch

    def decide(self, observation):
        return [Germinate("0", "vector:mlp")] if observation.epoch == self.epoch else []


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_an_arm_that_grows_nothing_equals_its_host_alone_whatever_runs_between_epochs():
    grown, alone = start_arm(make_task(), seed=1), start_arm(make_task(), seed=1, grows=False)
    for _ in range(3):
        grown.train_epoch()
        grown.end_epoch()
        torch.randn(100)
        alone.train_epoch()
        alone.evaluate("val")
    assert same(alone.module, grown.model.host)
    assert grown.ledger.total == alone.ledger.total > 0
    assert grown.epochs == alone.epochs == 3
    other = start_arm(make_task(), seed=2, grows=False)
    assert not same(other.module, alone.module)


def test_incubation_and_gates_are_charged_and_evaluation_is_not():
    arm = start_arm(make_task(), budget=1e9)
    arm.train_epoch()
    bare = arm.ledger.total
    arm.losses("test"), arm.evaluate("val")
    assert arm.ledger.total == bare
    arm.end_epoch()
    arm.model.follow(GrowAt(1))
    for _ in range(2):
        before = arm.ledger.total
        arm.train_epoch()
        arm.end_epoch()
    assert arm.model.slots["0"].stage is SeedStage.TRAINING
    assert arm.ledger.total - before > 2 * bare
    trained = arm.ledger.total
    arm.end_epoch()  # its gates measure, and are charged after this
    seen = arm.model.observe()
    assert (seen.flops, seen.budget) == (trained, 1e9)
    assert arm.ledger.total > trained


def test_an_arm_goes_on_from_another_ones_account_of_costs():
    first = start_arm(make_task())
    first.train_epoch()
    spent = first.ledger.total
    second = start_arm(make_task(), ledger=first.ledger)
    second.train_epoch()
    assert first.ledger.total == 2 * spent


def test_an_epoch_can_be_cut_short():
    arm, calls = start_arm(make_task()), iter([False, True])
    assert arm.train_epoch(lambda: next(calls)) is not None
    assert arm.train_epoch(lambda: True) is None
    assert arm.epochs == 1


def test_a_host_alone_has_no_model_to_grow():
    alone = Arm(make_host(), make_task())
    with pytest.raises(TypeError, match="host alone"):
        alone.end_epoch()
