"""PPO in one file: its parts against simpler ones, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rl_cases import toy

from kasmina_rl.encoding import flatten
from kasmina_rl.learned import SCORES, linear_scores
from kasmina_rl.ppo import LAMBDA, Episode, LinearActor, Ppo, advantages


def drawn(seed: int = 0):
    dice = np.random.default_rng(seed)
    return {name: dice.standard_normal(size).astype(np.float32) for name, size in SCORES.items()}


def test_the_actor_scores_as_the_controller_does():
    env = toy()
    env.reset(seed=0)
    rows = [env.step(action)[0] for action in (0, 1, 0)]
    stacked = [torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]]
    scores = LinearActor(drawn())(*stacked).detach().numpy()
    expected = np.stack([linear_scores(drawn(), row) for row in rows])
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_advantages_are_sums_of_what_the_values_did_not_expect():
    rewards, values = [0.0, 1.0, -2.0], torch.tensor([0.5, 0.25, 1.0])
    surprises = [0.0 + 0.25 - 0.5, 1.0 + 1.0 - 0.25, -2.0 + 0.0 - 1.0]
    expected = [
        sum(LAMBDA**k * surprise for k, surprise in enumerate(surprises[t:])) for t in range(len(rewards))
    ]
    assert advantages(rewards, values).tolist() == pytest.approx(expected)


def test_what_earned_more_is_chosen_more_often_and_what_is_masked_never():
    env = toy()
    seen, _ = env.reset(seed=0)
    seen = {name: numbers.copy() for name, numbers in seen.items()}
    zeros = {name: np.zeros(size, np.float32) for name, size in SCORES.items()}
    learner, dice = Ppo(zeros, len(flatten(seen)), seed=0), np.random.default_rng(0)
    mask = np.zeros(len(env.actions.commands), bool)
    mask[[0, 1]] = True

    def odds() -> list[float]:
        rows = [torch.from_numpy(numbers)[None] for numbers in seen.values()]
        return learner.logs(rows, torch.from_numpy(mask)[None]).exp()[0].tolist()

    assert odds()[:2] == pytest.approx([0.5, 0.5])
    for _ in range(4):
        played = [Episode([seen], [mask], [action], [float(action)]) for action in (0, 1) * 4]
        learner.learn(played, dice)
    assert odds()[1] > 0.6
    assert sum(odds()[:2]) == pytest.approx(1.0)


def test_drawn_actions_are_legal_and_an_episode_adds_up_to_its_value():
    env = toy(epochs=8)
    seen, _ = env.reset(seed=0)
    played = Ppo(drawn(), len(flatten(seen)), seed=0).play(env, 3, np.random.default_rng(0))
    assert all(mask[action] for mask, action in zip(played.masks, played.actions, strict=True))
    assert sum(played.rewards) == pytest.approx(float(torch.stack(env.gaps[-5:]).mean()), abs=1e-6)


def test_an_environment_can_be_played_where_gradients_are_off():
    env, other = toy(epochs=4), toy(epochs=4)
    with torch.no_grad():
        env.reset(seed=0)
        quiet = [env.step(action)[1] for action in (1, 0)]
    other.reset(seed=0)
    assert quiet == [other.step(action)[1] for action in (1, 0)]
