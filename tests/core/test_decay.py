"""A run can end at any budget: a copy decays, and the run goes on as if nobody had looked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import DropoutSeed, cnn_model, grow_to, images, labels, same_tensors, snapshot

from kasmina_core import SeedStage, decay_branch, tie_optimizer


class Run:
    def __init__(self, make=lambda p: torch.optim.Adam(p, 1e-2), **tie):
        self.model = cnn_model(incubation="counterfactual")
        self.optimizer = tie_optimizer(self.model, make(self.model.parameters()), **tie)
        self.warmup = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.25, total_iters=3)

    def learn(self, steps=2):
        self.model.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images()), labels()).backward()
            self.model.step()
            self.optimizer.step()
            self.warmup.step()

    def grown(self):
        self.learn()
        grow_to(self.model, "norm", SeedStage.FOSSILIZED, "dropout")
        self.learn(3)
        return self

    def everything(self):
        states = [self.optimizer.state[p] for p in self.model.parameters()]
        return snapshot(self.model), [{k: v.clone() for k, v in one.items()} for one in states]


def decay(branch, steps):
    rates = []
    branch.model.train()
    for _ in range(steps):
        branch.zero_grad()
        F.cross_entropy(branch.model(images()), labels()).backward()
        rates.append([group["lr"] for group in branch.optimizers[0].param_groups])
        branch.step()
    return rates


def test_the_run_goes_on_bit_for_bit_as_if_there_had_been_no_branch():
    torch.manual_seed(5)
    plain = Run().grown()
    plain.learn(4)
    torch.manual_seed(5)
    run = Run().grown()
    assert any(isinstance(m, DropoutSeed) for m in run.model.modules())  # it draws random numbers
    with decay_branch(run.model, run.optimizer, steps=3) as branch:
        decay(branch, 5)
    assert not same_tensors(snapshot(branch.model), snapshot(run.model))
    run.learn(4)
    assert same_tensors(run.everything(), plain.everything())


def test_the_branch_begins_as_the_run_is_and_its_rates_fall_to_the_end():
    run = Run(lr_factor=0.5).grown()
    with decay_branch(run.model, run.optimizer, steps=4, final=0.2) as branch:
        assert same_tensors(snapshot(branch.model), snapshot(run.model))
        (own,) = branch.optimizers
        for p, q in zip(run.model.parameters(), branch.model.parameters(), strict=True):
            assert same_tensors(own.state[q], run.optimizer.state[p])
        rates = decay(branch, 6)
    present = [group["lr"] for group in run.optimizer.param_groups]
    assert present == pytest.approx([1e-2, 5e-3])
    for k, found in enumerate(rates):
        factor = 1 - 0.8 * min(k, 4) / 4
        assert found == pytest.approx([rate * factor for rate in present])
    with decay_branch(run.model, run.optimizer, steps=3) as branch:
        decay(branch, 3)
        assert [group["lr"] for group in branch.optimizers[0].param_groups] == [0.0, 0.0]


def test_a_decay_in_a_branch_is_a_decay_of_the_run_itself():
    torch.manual_seed(5)
    run, twin = Run().grown(), None
    torch.manual_seed(5)
    twin = Run().grown()
    torch.manual_seed(6)
    with decay_branch(run.model, run.optimizer, steps=4) as branch:
        decay(branch, 4)
    torch.manual_seed(6)
    for k in range(4):
        for group in twin.optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - k / 4)
        twin.optimizer.zero_grad()
        F.cross_entropy(twin.model(images()), labels()).backward()
        twin.optimizer.step()
    for a, b in zip(branch.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_several_optimisers_decay_together_and_a_seed_that_is_culled_in_the_branch_leaves_them():
    model = cnn_model()
    weights = torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], 0.1, momentum=0.9)
    others = torch.optim.Adam([p for p in model.parameters() if p.ndim < 2], 0.01)
    tie_optimizer(model, weights, takes=lambda p: p.ndim > 1)
    tie_optimizer(model, others, takes=lambda p: p.ndim < 2)
    grow_to(model, "norm", SeedStage.BLENDING, "conv")
    with decay_branch(model, weights, others, steps=2) as branch:
        decay(branch, 1)
        assert [[g["lr"] for g in one.param_groups] for one in branch.optimizers] == [[0.05] * 2, [0.005] * 2]
        branch.model.cull("norm")
        assert [len(one.param_groups) for one in branch.optimizers] == [1, 1]
    assert [len(one.param_groups) for one in (weights, others)] == [2, 2]
    assert model.slots["norm"].stage is SeedStage.BLENDING


def test_a_seed_that_is_born_after_the_warm_up_gets_the_present_rate():
    run = Run()
    run.learn(5)
    run.model.germinate("norm2", "conv")
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([1e-2, 1e-2])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": 3, "final": 1.5}, r"final must be in \[0, 1\], not 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, says):
    run = Run()
    with pytest.raises(ValueError, match=says), decay_branch(run.model, run.optimizer, **arguments):
        pass


def test_what_is_no_run_is_refused():
    run, other = Run(), Run()
    with (
        pytest.raises(ValueError, match=r"decay_branch\(model, optimizer, steps=500\)"),
        decay_branch(run.model, steps=3),
    ):
        pass
    with (
        pytest.raises(ValueError, match="parameters of something else"),
        decay_branch(run.model, other.optimizer, steps=3),
    ):
        pass
    with (
        pytest.raises(TypeError, match="not Sequential"),
        decay_branch(run.model.host, run.optimizer, steps=3),
    ):
        pass
