"""Controllers as files and as policies: weights and JSON, nothing that runs."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kasmina_core import CheckpointError, Topology, default_registry, start_arm
from rl_cases import MLP, NORM, toy
from safetensors.numpy import load

from kasmina_rl import RUN_FIELDS, SLOT_FIELDS, ControllerError, Encoder, LearnedPolicy
from kasmina_rl.encoding import timing
from kasmina_rl.episodes import toy_task
from kasmina_rl.learned import SCORES, Controller, bundled, checksum
from kasmina_rl.playing import play
from kasmina_rl.training import ControllerPlayer, start_weights

CANDIDATES = {Topology.VECTOR: [NORM, MLP]}


def linear(**biases: float) -> Controller:
    weights = {name: np.zeros(size, np.float32) for name, size in SCORES.items()}
    for name, bias in biases.items():
        weights[name][-1] = bias
    return Controller("linear", weights, 2, (NORM, MLP), {"why": "a test"})


GREEDY = {"germinate": 1.0, "advance": 2.0, "cull": -1.0, "revert": -1.0}


def test_a_controller_is_written_and_read_bit_for_bit(tmp_path):
    path = tmp_path / "c.safetensors"
    linear(**GREEDY).save(path)
    read = Controller.load(path)
    assert (read.kind, read.slots, read.candidates, read.record) == (
        "linear",
        2,
        (NORM, MLP),
        {"why": "a test"},
    )
    assert all(np.array_equal(read.weights[name], linear(**GREEDY).weights[name]) for name in SCORES)


def run(policy, epochs=12):
    arm = start_arm(toy_task(), seed=0, budget=1e8)
    for _ in range(epochs):
        arm.train_epoch()
        arm.end_epoch()
        arm.model.follow(policy)
        assert all(outcome.done for outcome in arm.model.outcomes), arm.model.outcomes
    return arm


def test_a_learned_policy_grows_and_never_asks_for_what_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    linear(**GREEDY).save(path)
    arm = run(LearnedPolicy(CANDIDATES, path))
    assert [slot.blueprint for slot in arm.model.observe().slots] == [NORM, NORM]
    only = run(LearnedPolicy({Topology.VECTOR: [MLP]}, path), 4)
    assert [slot.blueprint for slot in only.model.observe().slots] == [MLP, MLP]


def test_a_linear_controller_grows_blueprints_it_never_saw(tmp_path):
    path = tmp_path / "c.safetensors"
    linear(**GREEDY).save(path)
    arm = run(LearnedPolicy({Topology.VECTOR: ["vector:bottleneck"]}, path), 4)
    assert {slot.blueprint for slot in arm.model.observe().slots} == {"vector:bottleneck"}


def test_a_file_says_whether_its_controller_draws_and_policy_and_table_keep_to_it(tmp_path):
    path, env = tmp_path / "c.safetensors", toy(epochs=3)
    seen = start_arm(toy_task(), seed=0).model.observe()
    for draws in (False, True):
        dataclasses.replace(linear(), draws=draws).save(path)
        player = ControllerPlayer(Controller.load(path))
        acts = []
        for _ in range(2):
            env.reset(options={"episode": 0})
            player.begin(env)
            acts.append([player.act(env, env.action_masks()) for _ in range(12)])
        assert acts[0] == acts[1], "an episode is always played the same way"
        policy = LearnedPolicy(CANDIDATES, path)
        decided = {str(policy.decide(seen)) for _ in range(12)}
        assert (len(set(acts[0])) > 1, len(decided) > 1) == (draws, draws)
        still = LearnedPolicy(CANDIDATES, path, sample=False)
        assert len({str(still.decide(seen)) for _ in range(12)}) == 1


def test_a_controller_of_an_older_version_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "good"
    path.write_bytes(hostile(path)["an older version"])
    with pytest.raises(ControllerError, match=r"found: .* version 1\n.* must be trained again"):
        Controller.load(path)


def test_products_say_what_is_late_and_how_long_a_seed_is_undecided():
    dormant, training, kept = (np.zeros(len(SLOT_FIELDS), np.float32) for _ in range(3))
    dormant[0], training[2], kept[6] = 1.0, 1.0, 1.0
    for slot in (dormant, training, kept):
        slot[SLOT_FIELDS.index("epochs_in_stage")] = 1.5
    slots = np.stack([dormant, training, kept])
    run = np.zeros(len(RUN_FIELDS), np.float32)
    for left, is_known, late in ((0.1, 1.0, 2.0), (0.5, 1.0, 0.0), (0.0, 0.0, 0.0)):
        run[:2] = left, is_known
        late_undecided, late_empty, undecided_for = timing(run, slots)
        assert late_undecided.tolist() == pytest.approx([0.0, late, 0.0])
        assert late_empty.tolist() == pytest.approx([late, 0.0, 0.0])
        assert undecided_for.tolist() == [0.0, 1.5, 0.0]


def test_what_training_starts_from_ends_no_episode_with_a_seed_on_trial():
    """Gates keep nothing that is not asked for, so that each seed is undecided until it is culled."""
    env = toy(epochs=40)
    weights = start_weights()
    weights["advance"][-1] = -9.0
    play(env, ControllerPlayer(Controller("linear", weights, 2, (NORM, MLP))), 0)
    assert [slot.blueprint for slot in env.seen.slots] == ["", ""]


def test_a_sampled_policy_resumes_as_it_would_have_gone_on(tmp_path):
    path = tmp_path / "c.safetensors"
    linear().save(path)
    policy = LearnedPolicy(CANDIDATES, path, sample=True, seed=3)
    seen = [start_arm(toy_task(), seed=0).model.observe()]
    for _ in range(3):
        policy.decide(seen[0])
    state = json.loads(json.dumps(policy.state_dict()))
    expected = [policy.decide(seen[0]) for _ in range(6)]
    again = LearnedPolicy(CANDIDATES, path, sample=True)
    again.load_state_dict(state)
    assert [again.decide(seen[0]) for _ in range(6)] == expected
    for damaged in ({}, {"encoder": 1, "dice": {}}, {"encoder": None, "dice": {"state": 1}}, None):
        with pytest.raises(CheckpointError):
            again.load_state_dict(damaged)


def test_a_controller_decides_in_the_environment_as_the_policy_does(tmp_path):
    """The same encoder serves both."""
    env, path = toy(epochs=40), tmp_path / "c.safetensors"
    linear(**GREEDY).save(path)
    env.reset(seed=0, options={"episode": 0})
    policy, player = LearnedPolicy(CANDIDATES, path), ControllerPlayer(Controller.load(path))
    mask = env.action_masks()
    env.step(0)
    for _ in range(6):
        mask = env.action_masks()
        number = player.act(env, mask)
        decided = policy.decide(env.seen)
        assert [env.actions.number(command) for command in decided] == ([number] if number else [])
        if env.step(number)[2]:
            break


def test_a_network_for_other_slots_is_refused():
    wrong = {"0.weight": np.zeros((9, 3), np.float32), "0.bias": np.zeros(9, np.float32)}
    with pytest.raises(ControllerError, match="do not fit"):
        Controller("mlp", wrong, 2, (NORM, MLP))


class Boom:
    def __reduce__(self):
        return (Path("/tmp/kasmina-rl-was-hacked").touch, ())


def hostile(path: Path) -> dict[str, bytes]:
    linear(**GREEDY).save(path)
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])

    def with_about(**changes):
        about = json.loads(header["__metadata__"]["controller"]) | changes
        text = json.dumps(about)
        metadata = {"controller": text, "crc32": checksum(text, load(good))}
        changed = json.dumps(header | {"__metadata__": metadata}).encode()
        return struct.pack("<Q", len(changed)) + changed + good[8 + length :]

    nan = linear(**GREEDY)
    nan.weights["wait"][0] = np.nan
    nan_path = path.with_suffix(".nan")
    nan.save(nan_path)
    return {
        "empty": b"",
        "truncated": good[:-20],
        "cut in the header": good[:40],
        "a pickle": pickle.dumps(Boom()),
        "a huge header": struct.pack("<Q", 1 << 60) + b"{}",
        "another version": with_about(version=99),
        "an older version": with_about(version=1),
        "another format": with_about(format="x"),
        "other fields": with_about(fields=["a"]),
        "slots as text": with_about(slots="2"),
        "draws as text": with_about(draws="no"),
        "many slots": with_about(kind="mlp", slots=10**9),
        "nested": b"[" * 100_000,
        "not finite": nan_path.read_bytes(),
    }


KINDS = (
    "empty", "truncated", "cut in the header", "a pickle", "a huge header", "another version", "an older version", "another format",
    "other fields", "slots as text", "draws as text", "many slots", "nested", "not finite",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_one_clear_error(kind, tmp_path):
    files = hostile(tmp_path / "good")
    assert set(files) == set(KINDS)
    path = tmp_path / "bad.safetensors"
    path.write_bytes(files[kind])
    with pytest.raises(ControllerError):
        LearnedPolicy(CANDIDATES, path)
    assert not Path("/tmp/kasmina-rl-was-hacked").exists()


def test_a_bit_that_turned_makes_no_other_controller(tmp_path):
    path = tmp_path / "c.safetensors"
    linear(**GREEDY).save(path)
    good = path.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    for place in [*range(0, length, 23), *range(length, len(good), 5)]:
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ControllerError):
            Controller.load(path)


def test_a_controller_without_a_checksum_is_read_with_a_warning(tmp_path):
    path = tmp_path / "c.safetensors"
    linear(**GREEDY).save(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]["crc32"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.warns(UserWarning, match="has no checksum"):
        assert Controller.load(path).record == {"why": "a test"}


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ControllerError, match="no controller that can be read"):
        LearnedPolicy(CANDIDATES, tmp_path / "nothing")


def test_the_pack_offers_the_policy_and_its_controller_is_small_and_says_how_it_was_trained():
    assert "rl:learned" in default_registry().policies()
    controller = Controller.load(bundled())
    assert bundled().stat().st_size < 100_000
    assert {"env", "algo", "seed", "steps", "episodes"} <= set(controller.record)
    assert play(toy(epochs=4), ControllerPlayer(controller), 0).steps >= 1


def test_importing_the_pack_imports_no_torch():
    code = "import sys, kasmina_rl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_encoder_counts_what_culled_seeds_cost():
    env = toy(epochs=40)
    env.reset(seed=0)
    encoder = Encoder(env.candidates)
    for action in (0, 2, 0, 0):
        env.step(action)
    culls = [
        n
        for n, mask in enumerate(env.action_masks())
        if mask and type(env.actions.commands[n]).__name__ == "Cull"
    ]
    seen, *_ = env.step(culls[0])
    assert 0 < seen["run"][12] < 1
    assert encoder.state_dict()["lost"] == 0.0
