"""Attacks on the reward: none earns more than what it does is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kasmina_core import (
    Advance,
    BlueprintSpec,
    Germinate,
    Pause,
    SetAlpha,
    TelemetryEventType,
    Topology,
    default_registry,
)
from rl_cases import MLP, NORM, grow, legal, loop, play, toy
from torch import nn

from kasmina_rl import GateShaping
from kasmina_rl.environment import LAST


def test_waiting_earns_exactly_0():
    rewards, info, _ = play(toy(), lambda env, mask: 0)
    assert rewards == [0.0] * 16
    assert (info["value"], info["half_width"], info["seeds_kept"]) == (0.0, 0.0, 0)


def test_a_cycle_of_germinating_and_culling_earns_minus_its_flops():
    env = toy()
    rewards, _, infos = play(env, loop)
    alone, own = env.alone, env.epoch
    host = env.losses_if_kept()
    assert torch.equal(host, alone.reward[own]), "culled in TRAINING a seed leaves no trace"
    assert env.flops > alone.flops[own], "but it was paid for"
    gaps = [float((alone.at(info["flops"]) - alone.reward[info["epoch"]]).mean()) for info in infos[1:]]
    assert sum(rewards) == pytest.approx(np.mean(gaps[-LAST:]), abs=1e-6)


@pytest.mark.parametrize("wanted", [grow(MLP), grow(NORM), loop], ids=["mlp", "norm", "loop"])
def test_the_rewards_of_an_episode_add_up_to_its_value(wanted):
    rewards, info, infos = play(toy(epochs=30), wanted)
    assert sum(rewards) == pytest.approx(info["value"], abs=1e-9)
    assert [i["value"] for i in infos[1:]] == pytest.approx(np.cumsum(rewards).tolist())


def toggle(env, mask):
    """Blend in, and out again."""
    alpha = (0.0, 1.0, 0.5)[env.epoch % 3]
    return legal(env, mask, SetAlpha("first", alpha), Germinate("first", MLP))


def entangle(env, mask):
    """Make the host depend on a seed that is never decided: it stands still, half blended in."""
    slot = env.seen.slots[0]
    if slot.alpha >= 0.5:
        return legal(env, mask, Pause("first"))
    return legal(env, mask, SetAlpha("first", 0.75), Advance("first"), Germinate("first", MLP))


def decide_late(env, mask):
    """Leave a seed on trial for good, so that the loss with it is never the one that counts."""
    return legal(env, mask, Germinate("first", MLP))


@pytest.mark.parametrize("wanted", [toggle, entangle, decide_late, loop, grow(NORM)])
def test_no_attack_earns_more_than_its_honest_worth(wanted):
    env = toy(epochs=30, actions="full")
    rewards, info, _ = play(env, wanted)
    losses = env.report()
    worth = losses["alone"] - losses["kept"]  # on samples that decided nothing
    assert sum(rewards) <= worth + 3 * (info["half_width"] + 0.01)


class Noise(nn.Module):
    """A seed that learns nothing: noise of fixed weights, as large as a parameter says."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.full((), 0.5))
        self.register_buffer("turn", torch.randn(dim, dim))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.size * torch.sin(20 * features @ self.turn)


@pytest.fixture
def noise():
    blueprints = default_registry().blueprints
    spec = BlueprintSpec("noise", Topology.VECTOR, Noise, lambda dim: 1, "Noise of fixed weights")
    entry = blueprints.register(spec, pack="attack")
    yield entry.id
    blueprints.unregister(entry.id)


def test_seeds_of_noise_earn_nothing(noise):
    env = toy(epochs=60, blueprints=(noise,), actions="full")

    def wanted(env, mask):
        whole = [SetAlpha(slot, 1.0) for slot in ("first", "second")]
        return legal(
            env,
            mask,
            Advance("first"),
            Advance("second"),
            *whole,
            Germinate("first", noise),
            Germinate("second", noise),
        )

    rewards, info, infos = play(env, wanted)
    kinds = [event.type for each in infos for event in each["events"]]
    assert kinds.count(TelemetryEventType.SEED_GERMINATED) >= 2
    losses = env.report()
    assert sum(rewards) <= max(0.0, losses["alone"] - losses["kept"]) + 3 * (info["half_width"] + 0.01)
    assert sum(rewards) < 0.1


def test_a_seed_on_trial_counts_nothing():
    env = toy(epochs=60)
    play(env, decide_late)
    bare = env.losses_if_kept()
    with env.arm.model.bypassed("first"):
        assert torch.equal(bare, env.arm.losses("test"))
    assert not torch.equal(bare, env.arm.losses("test"))


def test_a_lucky_epoch_is_one_of_five():
    env = toy(epochs=30)
    _, info, _ = play(env, grow(MLP))
    gaps = [float(gap.mean()) for gap in env.gaps]
    assert info["value"] == pytest.approx(np.mean(gaps[-LAST:]), abs=1e-6)
    assert info["value"] < max(gaps) or math.isclose(max(gaps), 0.0)


def test_growth_that_helps_earns_what_it_is_worth():
    env = toy(epochs=90, blueprints=(MLP,))
    rewards, info, _ = play(env, grow(MLP))
    losses = env.report()
    assert info["seeds_kept"] >= 1
    assert sum(rewards) > 0.2
    assert sum(rewards) == pytest.approx(losses["alone"] - losses["kept"], abs=0.1)


def test_samples_of_the_reward_are_seen_by_nobody_else():
    env = toy()
    env.reset(seed=0)
    task, report = env.dealt.task, env.dealt.report
    rows = {name: {tuple(row) for row in task.splits[name].inputs.tolist()} for name in task.splits}
    rows["report"] = {tuple(row) for row in report.test.inputs.tolist()}
    names = list(rows)
    assert all(not rows[a] & rows[b] for a in names for b in names if a < b)
    env.reset(seed=0, options={"episode": 99})
    assert not torch.equal(env.dealt.task.test.inputs, task.test.inputs)


@pytest.mark.parametrize("wanted", [grow(MLP), loop])
def test_shaping_by_gates_adds_nothing_to_an_episode(wanted):
    env = toy(epochs=20)
    shaped = GateShaping(env, gamma=1.0, scale=0.5)
    _, info = shaped.reset(seed=0, options={"episode": 0})
    total, plain, moved, done = 0.0, 0.0, 0.0, False
    while not done:
        _, reward, done, _, info = shaped.step(wanted(env, info["action_mask"]))
        total, plain, moved = total + reward, plain + info["reward"], moved + abs(reward - info["reward"])
    assert total == pytest.approx(plain, abs=1e-9)
    assert moved > 0.05
