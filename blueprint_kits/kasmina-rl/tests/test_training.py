"""Trainings of a few steps: they go on where they stopped, and their controllers play."""

from __future__ import annotations

import gc
import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import kasmina_rl
from kasmina_rl.command import _claim, _small_heap, cli, main
from kasmina_rl.learned import Controller, ControllerError
from kasmina_rl.playing import Row
from kasmina_rl.training import RequestError, Settings, export_model, train

OPTIONS = {"episodes": 2, "epochs": 3, "blueprints": ["vector:norm"]}
TEXTS = [f"--option={name}={json.dumps(value)}" for name, value in OPTIONS.items()]


def settings(out, steps, **changes):
    asked = {"options": OPTIONS, "algo": "es", "steps": steps, "seed": 1, "out": out}
    return Settings("Kasmina/Toy-v0", **(asked | changes))


# TensorBoard's own, where it is installed.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("algo", "saved"), [("es", "evolution.json"), ("ppo", "ppo.pt")])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(algo, saved, tmp_path):
    assert kasmina_rl.__all__
    said = []
    whole = train(settings(tmp_path / "a", 48, algo=algo), said.append)
    train(settings(tmp_path / "b", 24, algo=algo), said.append)
    parts = train(settings(tmp_path / "b", 48, algo=algo, resume=True), said.append)
    assert all(np.array_equal(whole.weights[name], parts.weights[name]) for name in whole.weights)
    assert whole.record["generations"] == parts.record["generations"] >= 2
    assert whole.record["steps"] <= 48
    episodes = (2, 4, 6, 8) if algo == "es" else range(1, 9)
    assert [line.split(",")[1] for line in said[: len(episodes)]] == [f" {n} of 8 episodes" for n in episodes]
    assert said[-1] == f"ended after {parts.record['steps']} steps: another generation could take 24"
    assert Controller.load(tmp_path / "a" / "controller.safetensors").record["env"] == "Kasmina/Toy-v0"
    with pytest.raises(ControllerError, match="no training to resume"):
        train(settings(tmp_path / "c", 48, algo=algo, resume=True), said.append)
    assert not (tmp_path / "c").exists()
    (tmp_path / "a" / saved).write_text("{}")
    with pytest.raises(ControllerError, match=r"There is no .* to resume in"):
        train(settings(tmp_path / "a", 96, algo=algo, resume=True), said.append)
    with pytest.raises(RequestError, match=r"something else:\n  seed: 1 there, 2 asked for"):
        train(settings(tmp_path / "b", 96, algo=algo, resume=True, seed=2), said.append)


class StoppedError(Exception):
    pass


def stop_after(lines):
    said = []

    def say(text):
        said.append(text)
        if len(said) == lines:
            raise StoppedError

    return say


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("algo", ["es", "ppo", "maskable-ppo"])
def test_a_training_that_was_stopped_before_anything_was_saved_begins_anew(algo, tmp_path):
    if algo == "maskable-ppo":
        pytest.importorskip("sb3_contrib")
    out = tmp_path / "a"
    with pytest.raises(StoppedError):
        train(settings(out, 32, algo=algo), stop_after(1))
    assert {path.name for path in out.iterdir() if path.is_file()} == {"training.json"}
    resumed = train(settings(out, 32, algo=algo, resume=True), print)
    whole = train(settings(tmp_path / "b", 32, algo=algo), print)
    assert all(np.array_equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)
    assert whole.record["episodes"] == resumed.record["episodes"]


@pytest.mark.filterwarnings("ignore")
def test_a_network_s_training_that_was_stopped_goes_on_from_its_last_rollout(tmp_path):
    pytest.importorskip("sb3_contrib")
    with pytest.raises(StoppedError):
        train(settings(tmp_path, 128, algo="maskable-ppo"), stop_after(3))
    said = []
    resumed = train(settings(tmp_path, 128, algo="maskable-ppo", resume=True), said.append)
    assert [line.split(" of ")[0] for line in said[:-1]] == ["step 96", "step 128"]
    assert resumed.record["steps"] == 128
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("option", [{"actions": "full"}, {"per_slot": True}])
def test_actions_that_no_controller_chooses_among_are_refused(option, tmp_path):
    asked = settings(tmp_path / "out", 24, options=OPTIONS | option)
    with pytest.raises(RequestError, match="one of the basic actions"):
        train(asked, print)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_network_is_trained_resumed_and_exported_without_unpickling(tmp_path):
    pytest.importorskip("sb3_contrib")
    out = tmp_path / "ppo"
    controller = train(settings(out, 64, algo="maskable-ppo"), print)
    assert controller.kind == "mlp"
    again = train(settings(out, 100, algo="maskable-ppo", resume=True), print)
    assert again.record["steps"] == 96
    assert again.record["episodes"] > controller.record["episodes"] >= 64 // 3
    exported = export_model(out / "model.zip")
    assert all(np.array_equal(exported.weights[name], again.weights[name]) for name in again.weights)

    from sb3_contrib import MaskablePPO

    model = MaskablePPO.load(out / "model.zip", device="cpu")
    env = kasmina_rl.flat(kasmina_rl.GrowEnv(preset="toy", **OPTIONS))
    seen, info = env.reset(seed=0)
    action, _ = model.predict(seen, action_masks=info["action_mask"].astype(bool), deterministic=True)
    scores = again.scores(env.unwrapped.encoder.encode(env.unwrapped.seen))
    assert int(action) == int(np.where(info["action_mask"], scores, -np.inf).argmax())
    shutil.copy(out / "model.zip", tmp_path / "alone.zip")
    with pytest.raises(ControllerError, match=r"training\.json beside it"):
        export_model(tmp_path / "alone.zip")


@pytest.mark.parametrize(
    ("learned_from", "tuned_on", "mean", "claim"),
    [
        (72, 75, 0.3, "better than the tuned plateau policy"),
        (72, 72, 0.1, "not shown to be better than the tuned plateau policy"),
        (
            72,
            60,
            0.3,
            "no claim can be made: it learned from 72 episodes, and .* tuned on 60; give --tuning 72",
        ),
        (None, 900, 0.3, "no claim can be made: its record does not say"),
    ],
)
def test_a_controller_is_called_better_only_than_a_policy_tuned_on_as_many_episodes(
    learned_from, tuned_on, mean, claim
):
    assert re.match(claim, _claim(Row("controller", mean, 0.2, 0.1, 0.0, 50), learned_from, tuned_on))


def test_what_is_older_than_an_episode_is_not_searched_and_what_is_made_in_it_is():
    class Scheduler:
        pass

    def found():
        return [one for one in gc.get_referrers(Scheduler) if type(one) is Scheduler]

    old = Scheduler()
    with _small_heap():
        new = Scheduler()
        assert found() == [new]
    assert set(found()) == {old, new}


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path):
    kept = tmp_path / "controller.safetensors"
    kept.write_bytes(b"trained before")
    with pytest.raises(RequestError, match=r"holds something already\..* --resume"):
        train(settings(tmp_path, 24), print)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"trained before"]


@pytest.mark.parametrize(("algo", "least"), [("es", 24), ("maskable-ppo", 32)])
def test_fewer_steps_than_a_training_must_take_are_refused(tmp_path, algo, least):
    if algo != "es":
        pytest.importorskip("sb3_contrib")
    with pytest.raises(RequestError, match=f"{least - 1} steps are too few: .* Ask for {least} at least"):
        train(settings(tmp_path / "out", least - 1, algo=algo), print)
    assert not (tmp_path / "out").exists()


def invoke(*arguments):
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_commands_train_compare_and_say_what_there_is_to_learn(tmp_path):
    out = tmp_path / "run"
    said = invoke("train", "--env=Toy", *TEXTS, "--steps=24", f"--out={out}")
    assert "controller.safetensors" in said
    said = invoke("headroom", *TEXTS, "--episodes=2", f"--out={tmp_path / 'h.json'}")
    assert "spreads above waiting" in said
    assert "wait " in said
    assert json.loads((tmp_path / "h.json").read_text())["rows"][0]["mean"] == 0.0
    assert "of a bare epoch" in invoke("speed", *TEXTS, "--episodes=1")
    controller = f"--controller={out / 'controller.safetensors'}"
    said = invoke(
        "evaluate", *TEXTS, "--episodes=2", "--tuning=17", controller, f"--out={tmp_path / 'e.json'}"
    )
    for arm in (
        "random",
        "wait",
        "best fixed time",
        "plateau, tuned",
        "bandit",
        "than the tuned plateau policy",
    ):
        assert arm in said
    assert "tuned on 30 episodes: plateau" in said
    assert {"rows", "pairs", "reports", "tuned", "claims"} == set(
        json.loads((tmp_path / "e.json").read_text())
    )


def test_a_request_at_fault_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr("sys.argv", ["kasmina-rl", "train", *TEXTS, "--steps=24", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"Error: {tmp_path}: it holds something already.")


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    bad = tmp_path / "x.zip"
    bad.write_bytes(b"nothing")
    monkeypatch.setattr("sys.argv", ["kasmina-rl", "export", str(bad), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert capsys.readouterr().err.startswith(f"Error: {bad} is no model")


def test_a_file_that_is_there_is_not_written_over(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(b"before")
    for command in (
        ["export", "model.zip", str(kept)],
        ["headroom", f"--out={kept}"],
        ["evaluate", f"--out={kept}"],
    ):
        monkeypatch.setattr("sys.argv", ["kasmina-rl", *command])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        assert "is there already: nothing was written" in capsys.readouterr().err
    assert kept.read_bytes() == b"before"


def test_a_training_stopped_by_hand_says_how_it_goes_on(tmp_path, monkeypatch):
    def stopped(settings, say):
        raise KeyboardInterrupt

    monkeypatch.setattr("kasmina_rl.training.train", stopped)
    result = CliRunner().invoke(cli, ["train", *TEXTS, "--steps=24", f"--out={tmp_path / 'a'}"])
    assert result.exit_code == 130
    assert "The same command with --resume goes on" in result.output


def test_a_controller_that_does_not_fit_is_refused_before_anything_is_tuned(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    width = len(kasmina_rl.RUN_FIELDS) + 2 * len(kasmina_rl.SLOT_FIELDS) + 10
    weights = {"0.weight": np.zeros((11, width), np.float32), "0.bias": np.zeros(11, np.float32)}
    Controller("mlp", weights, 2, ("vector:norm", "vector:mlp"), {}).save(path)
    monkeypatch.setattr("kasmina_rl.command._best", lambda *_: pytest.fail("tuned"))
    result = CliRunner().invoke(cli, ["evaluate", *TEXTS, f"--controller={path}"])
    assert isinstance(result.exception, ControllerError)
    assert "trained with: 2 slots, candidates vector:norm, vector:mlp" in str(result.exception)
