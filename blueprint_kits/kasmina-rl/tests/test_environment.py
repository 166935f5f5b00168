"""The environment keeps Gymnasium's rules, is exact, and refuses what it masks."""

from __future__ import annotations

import os
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from kasmina_core import Advance, Germinate, TelemetryEventType
from rl_cases import MLP, at_random, grow, legal, play, toy

import kasmina_rl
from kasmina_rl import RUN_FIELDS, SLOT_FIELDS, flat

STEPS = int(os.environ.get("KASMINA_RL_STEPS", "250"))


def test_gymnasium_finds_nothing_wrong():
    env = gymnasium.make("kasmina_rl:Kasmina/Toy-v0", epochs=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it wishes for a box that is symmetric and in [-1, 1]
        check_env(env.unwrapped, skip_render_check=True)
        check_env(flat(env.unwrapped), skip_render_check=True)
    assert set(env.observation_space["run"].shape) == {len(RUN_FIELDS)}


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments_play_what_one_plays(mode):
    arguments = {"epochs": 6, "episodes": 3}
    envs = gymnasium.make_vec(
        "kasmina_rl:Kasmina/Toy-v0",
        num_envs=2,
        vectorization_mode=mode,
        vector_kwargs={"context": "spawn"} if mode == "async" else {},
        **arguments,
    )
    one = gymnasium.make("Kasmina/Toy-v0", **arguments)
    try:
        seen, _ = envs.reset(seed=[5, 6])
        for position, seed in enumerate((5, 6)):
            alone, _ = one.reset(seed=seed)
            assert all(np.array_equal(alone[key], seen[key][position]) for key in alone)
        one.reset(seed=6)
        for actions in ([0, 0], [1, 2], [0, 0]):
            seen, rewards, *_ = envs.step(np.array(actions))
            alone, reward, *_ = one.step(actions[1])
            assert all(np.array_equal(alone[key], seen[key][1]) for key in alone)
            assert rewards[1] == reward
    finally:
        envs.close()


@pytest.mark.parametrize("action", [10**6, -1, 1.5, "wait"])
def test_what_is_no_action_is_refused_with_those_that_are(action):
    env = toy()
    env.reset(seed=0)
    with pytest.raises(gymnasium.error.InvalidAction, match=r"no action of Discrete\(11\): .* from 0 to 10"):
        env.step(action)
    assert env.epoch == 0
    several = toy(per_slot=True)
    several.reset(seed=0)
    with pytest.raises(gymnasium.error.InvalidAction, match=r"2 whole numbers from 0 to 5, one per slot"):
        several.step([0, 6])


def test_equal_seeds_and_actions_agree_in_every_bit():
    def run(env):
        found = [env.reset(seed=7)]
        for action in (0, 0, 2, 0, 0, 0, 6, 0):
            found.append(env.step(action))
        return found

    first, second = run(toy(epochs=40)), run(toy(epochs=40))
    for (seen, *rest), (again, *other) in zip(first, second, strict=True):
        assert all(np.array_equal(seen[key], again[key]) for key in seen)
        assert len(rest) == len(other)
    assert [step[1] for step in first[1:]] == [step[1] for step in second[1:]]
    assert first[-1][4]["flops"] == second[-1][4]["flops"]


def test_a_seed_draws_the_episode():
    env = toy()
    drawn = []
    for _ in range(2):
        env.reset(seed=1)
        drawn.append([env.episode, *(env.reset() and env.episode for _ in range(3))])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 4
    few = toy(episodes=2)
    few.reset(seed=1)
    assert {few.reset() and few.episode for _ in range(20)} == {0, 1}


@pytest.mark.parametrize("per_slot", [False, True])
def test_an_action_is_refused_exactly_where_it_is_masked(per_slot):
    env = toy(epochs=30, actions="full", per_slot=per_slot)
    dice, steps, refused, done = np.random.default_rng(0), 0, 0, True
    each = len(env.actions.of_slot[0]) + 1
    while steps < (60 if per_slot else STEPS):
        if done:
            _, info = env.reset(seed=steps)
        mask = info["action_mask"]
        # Most legal actions are not to advance or to wait: that would never get far.
        onward = [n for n, c in enumerate(env.actions.commands) if isinstance(c, Advance) and mask[n]]
        if per_slot:
            action = np.array([dice.integers(each), 0])
            allowed = bool(mask[action[0]])
        else:
            action = int(dice.integers(len(mask))) if dice.random() < 0.7 or not onward else onward[0]
            allowed = bool(mask[action])
        _, _, done, _, info = env.step(action)
        assert bool(info["refusals"]) != allowed, (env.commands_of(action), info["refusals"], env.render())
        steps, refused = steps + 1, refused + (not allowed)
    assert refused > 5
    assert steps - refused > 5


def test_the_mask_is_what_a_maskable_learner_asks_for():
    env = flat(toy())
    _, info = env.reset(seed=0)
    assert env.action_masks().dtype == bool
    assert np.array_equal(env.action_masks(), info["action_mask"].astype(bool))
    assert env.action_masks()[0]


def test_events_and_a_reading_of_the_slots_come_with_each_step():
    env = toy(epochs=60)
    _, _, infos = play(env, grow(MLP))
    kinds = {event.type for info in infos for event in info["events"]}
    assert {TelemetryEventType.SEED_GERMINATED, TelemetryEventType.EPOCH_ENDED} <= kinds
    assert "of the budget, value" in env.render()


def test_what_is_not_known_is_0_and_says_so():
    env = toy()
    seen, _ = env.reset(seed=0)
    run = dict(zip(RUN_FIELDS, seen["run"].tolist(), strict=True))
    slot = dict(zip(SLOT_FIELDS, seen["slots"][0].tolist(), strict=True))
    assert (run["budget_left"], run["budget_known"], run["loss_known"]) == (0.0, 0.0, 0.0)
    assert (slot["gain"], slot["gain_known"], slot["is_dormant"]) == (0.0, 0.0, 1.0)
    seen, *_ = env.step(0)
    run = dict(zip(RUN_FIELDS, seen["run"].tolist(), strict=True))
    assert run["budget_left"] == pytest.approx(1 - 1 / 16)
    assert run["budget_known"] == run["loss_known"] == 1.0


def test_a_spent_budget_wants_a_reset():
    env = toy(epochs=1)
    env.reset(seed=0)
    assert env.step(0)[2]
    with pytest.raises(gymnasium.error.ResetNeeded, match="budget"):
        env.step(0)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"blueprints": ("cnn:norm",)}, "fits? no slot"),
        ({"blueprints": ("vector:nothing",)}, "vector:nothing"),
        ({"actions": "all"}, "'basic' or 'full'"),
    ],
)
def test_what_cannot_be_played_is_an_error(changes, error):
    with pytest.raises(Exception, match=error):
        toy(**changes)


def test_a_wait_before_the_first_seed_is_looked_up_and_what_follows_is_exact():
    """The model made late equals one that was there from the start."""
    late, early = toy(epochs=40), toy(epochs=40)
    for env in (late, early):
        env.reset(seed=0, options={"episode": 3})
    early.materialise()
    for step in range(6):
        action = legal(late, late.action_masks(), Germinate("second", MLP)) if step == 3 else 0
        results = [env.step(action) for env in (late, early)]
        assert results[0][1] == results[1][1]
        assert all(np.array_equal(results[0][0][key], results[1][0][key]) for key in results[0][0])


def test_random_play_stays_in_the_observation_space():
    env = toy(epochs=12, actions="full")
    play(env, at_random(2))
    assert env.observation_space.contains(env.encoder.encode(env.seen))


def test_the_registered_ids_are_there():
    ids = [name for name in gymnasium.registry if name.startswith("Kasmina/")]
    assert sorted(ids) == ["Kasmina/Chars-v0", "Kasmina/Digits-v0", "Kasmina/Grow-v0", "Kasmina/Toy-v0"]
    assert kasmina_rl.__all__ == sorted(kasmina_rl.__all__)
