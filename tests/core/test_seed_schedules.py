"""A seed's learning rate follows its own age, and every scheduler goes on as if it did not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import cnn_model, grow_to, images, labels, same_tensors, snapshot, walk_to
from torch.optim import lr_scheduler

from kasmina_core import ConstantRate, SeedStage, WarmupCosine, schedule_seeds, tie_optimizer

S = SeedStage
SCHEDULE = WarmupCosine(8, warmup_steps=2, final=0.25)


def seed_group(optimizer, slot="norm"):
    return next(g for g in optimizer.param_groups if g.get("kasmina_slot") == slot)


class Run:
    def __init__(self, schedule=SCHEDULE, lr=1e-2, make_scheduler=None, lr_factor=0.5, **kind):
        self.model = cnn_model()
        rate = torch.tensor(lr) if kind.get("tensor") else lr
        self.optimizer = torch.optim.Adam(self.model.parameters(), rate)
        self.scheduler = make_scheduler(self.optimizer) if make_scheduler else None
        schedulers = [self.scheduler] if self.scheduler else []
        tie_optimizer(self.model, self.optimizer, lr_factor=lr_factor, schedulers=schedulers)
        if schedule is not None:
            self.handles = schedule_seeds(self.model, self.optimizer, schedule)
        self.used, self.seen = [], []
        self.optimizer.register_step_pre_hook(self._note)

    def _note(self, optimizer, _args, _kwargs):
        self.used.append([float(g["lr"]) for g in optimizer.param_groups])

    def step(self, steps=1):
        for _ in range(steps):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images()), labels()).backward()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.seen.append([float(g["lr"]) for g in self.optimizer.param_groups])
        return self


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, 20)


def chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer, 0.2, total_iters=5), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


def test_a_run_with_a_late_seed_is_that_of_two_optimisers_set_by_hand():
    run = Run(make_scheduler=cosine).step(3)
    grow_to(run.model, "norm", S.SHADOWING, "conv")
    run.step(10)

    hand = cnn_model()
    host = torch.optim.Adam(hand.host.parameters(), 1e-2)
    falling = cosine(host)

    def step(seed=None):
        for optimizer in (host, seed):
            if optimizer is not None:
                optimizer.zero_grad()
        F.cross_entropy(hand(images()), labels()).backward()
        host.step()
        if seed is not None:
            seed.step()
        falling.step()

    for _ in range(3):
        step()
    grow_to(hand, "norm", S.SHADOWING, "conv")
    seed = torch.optim.Adam(hand.seed_parameters(), 0.0)
    for n in range(10):
        seed.param_groups[0]["lr"] = 0.5 * 1e-2 * SCHEDULE(n)
        step(seed)
    assert same_tensors(snapshot(run.model), snapshot(hand))


@pytest.mark.parametrize("make_scheduler", [cosine, chained], ids=["cosine", "chained"])
def test_the_scheduler_computes_as_if_seeds_had_none(make_scheduler):
    runs = [Run(schedule, make_scheduler=make_scheduler).step(3) for schedule in (SCHEDULE, None)]
    for run in runs:
        grow_to(run.model, "norm", S.TRAINING, "conv")
        run.step(6)
    assert runs[0].seen == runs[1].seen
    assert runs[0].used != runs[1].used


def test_without_a_scheduler_the_rate_is_that_of_the_group():
    run = Run()
    grow_to(run.model, "norm", S.TRAINING, "conv")
    run.step(5)
    assert [seed for _, seed in run.used] == [0.5 * 1e-2 * SCHEDULE(n) for n in range(5)]
    assert seed_group(run.optimizer)["lr"] == 0.5 * 1e-2


def test_age_is_counted_from_training_and_stands_still_while_paused():
    run = Run()
    grow_to(run.model, "norm", S.GERMINATED, "conv")
    run.step(2)
    assert "kasmina_steps" not in seed_group(run.optimizer)
    walk_to(run.model, "norm", S.TRAINING)
    run.step(2)
    run.model.slots["norm"].pause()
    run.step(3)
    run.model.slots["norm"].resume()
    run.step()
    assert seed_group(run.optimizer)["kasmina_steps"] == 3


def test_a_fossil_goes_over_to_the_hosts_schedule_without_a_jump():
    run = Run(make_scheduler=cosine)
    grow_to(run.model, "norm", S.PROBATIONARY, "conv")
    run.step(6)
    before = run.used[-1][1]
    walk_to(run.model, "norm", S.FOSSILIZED)
    theirs = seed_group(run.optimizer)["lr"]
    run.step(6)
    assert run.used[6][1] == pytest.approx(before)
    ratio = before / theirs
    for (_, used), seen in zip(run.used[7:], run.seen[6:], strict=False):
        assert used == pytest.approx(seen[1] * ratio)
    assert run.used[-1][1] < before  # the host's rate falls, and the fossil's with it


def test_where_the_hosts_rate_is_zero_a_fossil_has_none():
    run = Run(make_scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda n: float(n < 2)))
    grow_to(run.model, "norm", S.PROBATIONARY, "conv")
    run.step(4)
    assert run.used[-1][1] > 0
    walk_to(run.model, "norm", S.FOSSILIZED)
    assert run.step().used[-1][1] == 0.0


def test_a_tensor_rate_stays_the_tensor_it_was():
    run, plain = Run(tensor=True), Run()
    for r in (run, plain):
        grow_to(r.model, "norm", S.TRAINING, "conv")
    rate = seed_group(run.optimizer)["lr"]
    run.step(4)
    plain.step(4)
    assert seed_group(run.optimizer)["lr"] is rate
    assert [used for _, used in run.used] == pytest.approx([used for _, used in plain.used])
    assert float(rate) == pytest.approx(0.5 * 1e-2)


def test_a_resumed_run_goes_on_where_it_was():
    run = Run(make_scheduler=cosine)
    grow_to(run.model, "norm", S.SHADOWING, "conv")
    run.step(3)
    again = Run(make_scheduler=cosine)
    again.model.load_state_dict(run.model.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    again.scheduler.load_state_dict(run.scheduler.state_dict())
    run.step(4)
    again.step(4)
    assert again.used == run.used[3:]
    assert same_tensors(snapshot(run.model), snapshot(again.model))


def test_a_step_that_raised_does_not_mix_the_rates_up():
    run = Run(make_scheduler=cosine)
    grow_to(run.model, "norm", S.TRAINING, "conv")

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.optimizer.step(fails)
    run.step(2)
    assert seed_group(run.optimizer)["kasmina_steps"] == 2
    assert run.seen[-1][1] == pytest.approx(0.5 * 1e-2 * (1 + math.cos(math.pi * 2 / 20)) / 2)


def test_handles_end_it():
    run = Run()
    grow_to(run.model, "norm", S.TRAINING, "conv")
    for handle in run.handles:
        handle.remove()
    run.step()
    assert run.used[-1][1] == 0.5 * 1e-2


def test_constant_seeds_keep_their_rate_while_the_hosts_falls():
    run = Run(ConstantRate(), make_scheduler=cosine)
    grow_to(run.model, "norm", S.TRAINING, "conv")
    run.step(5)
    assert len({seed for _, seed in run.used}) == 1
    assert len({host for host, _ in run.used}) == 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"total_steps": 0}, "warmup_steps < total_steps, not 0 and 0"),
        ({"total_steps": 5, "warmup_steps": 5}, "not 5 and 5"),
        ({"total_steps": 5, "final": 1.5}, "final must be in"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        WarmupCosine(**arguments)
