"""Training of controllers: an evolution strategy and PPO on linear ones, MaskablePPO on networks."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, final

import gymnasium
import numpy as np

from kasmina_rl.encoding import RUN_FIELDS, SLOT_FIELDS, TIMING_FIELDS
from kasmina_rl.environment import GrowEnv
from kasmina_rl.learned import SCORES, Controller, ControllerError, choose
from kasmina_rl.playing import play
from kasmina_rl.wrappers import flat

ABOUT: Final = "training.json"
"""What a folder of a training says of it."""


class RequestError(ControllerError):
    """A training that was not begun, as what it is asked for cannot be kept; its folder is as it was."""


@final
class ControllerPlayer:
    """Plays a controller: the legal action of the highest score, or drawn, in an episode always the same."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.dice: np.random.Generator | None = None

    def begin(self, env: GrowEnv) -> None:
        """Begin to draw, if the controller does."""
        self.dice = np.random.default_rng(env.episode) if self.controller.draws else None

    def act(self, env: GrowEnv, mask: Any) -> int:
        """Return the action."""
        scores = self.controller.scores(env.encoder.encode(env.seen))
        return choose(scores, mask.astype(bool), self.dice)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a training is asked for.

    Attributes:
        env: Id of the environment.
        options: Keywords of the environment.
        algo: ``es``, ``ppo`` or ``maskable-ppo``.
        steps: Steps in the environment, all together: at most so many. ``es`` and ``ppo`` end with their last generation
            that is sure to fit, MaskablePPO with its last rollout.
        seed: For episodes, and what the algorithm draws.
        out: Folder for what comes of it, new or empty.
        resume: Whether to go on from what lies there, of a training that was asked for the same. One that was stopped
            before anything was saved begins anew.
    """

    env: str
    options: Mapping[str, Any]
    algo: str
    steps: int
    seed: int
    out: Path
    resume: bool = False

    def about(self, env: GrowEnv) -> dict[str, Any]:
        """Return what is written beside the controller."""
        return {
            "env": self.env,
            "options": dict(self.options),
            "algo": self.algo,
            "seed": self.seed,
            "slots": len(env.actions.slots),
            "candidates": list(env.candidates),
        }


def make_env(settings: Settings) -> GrowEnv:
    """Make the environment of a training."""
    env: Any = gymnasium.make(settings.env, disable_env_checker=True, **settings.options).unwrapped
    return env  # type: ignore[no-any-return]


def train(settings: Settings, say: Callable[[str], object]) -> Controller:
    """Train, and write model, controller and what was asked for into the folder.

    Raises:
        ControllerError: If there is no such algorithm, its packages are missing, or there is nothing to resume.
        RequestError: If the folder holds something, or a training that was asked for something else; or the steps are too
            few.
    """
    algorithms = {"es": _evolve, "ppo": _ppo, "maskable-ppo": _maskable_ppo}
    if settings.algo not in algorithms:
        raise ControllerError(f"There is no algorithm '{settings.algo}'. Known: {', '.join(algorithms)}.")
    load_packages(settings.algo)
    env = make_env(settings)
    if env.actions.kinds != "basic" or env.per_slot:
        raise RequestError(
            "Controllers choose one of the basic actions: leave out --option actions=… and per_slot=…"
        )
    about = settings.about(env)
    _check_folder(settings, about)
    least, why = _least_steps(settings, env)
    if settings.steps < least:
        raise RequestError(f"{settings.steps:,} steps are too few: {why}. Ask for {least:,} at least.")
    settings.out.mkdir(parents=True, exist_ok=True)
    replace(settings.out / ABOUT, json.dumps(about, indent=2) + "\n")
    began = time.perf_counter()
    found = algorithms[settings.algo](settings, env, about, say)
    record = {**about, **found.record, "seconds": round(time.perf_counter() - began, 1)}
    controller = dataclasses.replace(found, record=record)
    controller.save(settings.out / "controller.safetensors")
    return controller


def replace(path: Path, content: str | bytes) -> None:
    """Write a file whole: whoever reads it, or stops this, finds what was there or what comes, never a part."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    beside.replace(path)


def _check_folder(settings: Settings, about: Mapping[str, Any]) -> None:
    out = settings.out
    if not settings.resume:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RequestError(
                f"{out}: it holds something already. Name a folder that is new or empty; --resume goes on from a training."
            )
        return
    try:
        before = dict(json.loads((out / ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ControllerError(f"There is no training to resume in {out}: {error!r:.200}") from error
    now = json.loads(json.dumps(about))
    if other := [name for name in now if before.get(name) != now[name]]:
        lines = "".join(f"\n  {name}: {before.get(name)!r} there, {now[name]!r} asked for" for name in other)
        raise RequestError(
            f"The training in {out} cannot be resumed, it was asked for something else:{lines}"
        )


def _least_steps(settings: Settings, env: GrowEnv) -> tuple[int, str]:
    if settings.algo != "maskable-ppo":
        most = _most_steps(env)
        return most, f"a generation is {GENERATION} episodes of up to {env.epochs} steps"
    return ROLLOUT, "the shortest rollout is longer"


class Scalars:
    """Writes scalars for TensorBoard, where it is installed."""

    def __init__(self, folder: Path) -> None:
        self._writer: Any = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def add(self, step: int, **values: float) -> None:
        """Write values at a step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"growth/{name}", value, step)
            self._writer.flush()

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()


# -- evolution -----------------------------------------------------------------------------------------------------

GENERATION: Final = 8
"""Episodes between two updates of a linear controller."""

PAIRS: Final = GENERATION // 2
"""Directions of a generation; each is tried forward and backward on the same episode."""

ROLLOUT: Final = 32
"""Steps between two updates of a network, at least."""

SIGMA: Final = 0.3
RATE: Final = 0.3


_TIMING: Final = len(RUN_FIELDS) + len(SLOT_FIELDS)


def start_weights() -> dict[str, Any]:
    """Return the weights that training starts from.

    Grow at once, and advance where the gate allows. Cull, and revert where that can be, a seed that is undecided for more
    than eight epochs of its stage or when the budget ends, and germinate nothing then. Nothing else is known.
    """
    parts = {name: np.zeros(size, np.float32) for name, size in SCORES.items()}
    late_undecided, late_empty, undecided_for = range(_TIMING, _TIMING + len(TIMING_FIELDS))
    parts["wait"][-1], parts["germinate"][-1], parts["advance"][-1] = 0.5, 1.0, 2.0
    parts["cull"][-1], parts["revert"][-1] = -4.5, -4.0
    for name in ("cull", "revert"):
        parts[name][[late_undecided, undecided_for]] = 2.0
    parts["germinate"][late_empty] = -2.0
    return parts


def _most_steps(env: GrowEnv) -> int:
    """Return how many steps a generation may take: no epoch costs less than one of the host alone."""
    return GENERATION * env.epochs


def _weights(vector: Any) -> dict[str, Any]:
    ends = np.cumsum(list(SCORES.values()))[:-1]
    return {name: part.astype(np.float32) for name, part in zip(SCORES, np.split(vector, ends), strict=True)}


def _evolve(
    settings: Settings, env: GrowEnv, about: Mapping[str, Any], say: Callable[[str], object]
) -> Controller:
    """Evolve a linear controller (OpenAI's evolution strategy, https://arxiv.org/abs/1703.03864)."""
    path = settings.out / "evolution.json"
    vector, steps, episodes, generation = np.concatenate([*start_weights().values()]), 0, 0, 0
    if settings.resume and path.exists():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            vector = np.array(saved["vector"], np.float32).reshape(vector.shape)
            steps, episodes, generation = saved["steps"], saved["episodes"], saved["generation"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ControllerError(
                f"There is no evolution to resume in {settings.out}: {error!r:.200}"
            ) from error
    scalars, n = Scalars(settings.out), env.episodes or 100_000
    while steps + _most_steps(env) <= settings.steps:
        dice = np.random.default_rng([settings.seed, generation])
        noise = dice.standard_normal((PAIRS, len(vector))).astype(np.float32)
        values = np.empty((PAIRS, 2))
        for i in range(PAIRS):
            episode = int(dice.integers(n))
            for side, sign in enumerate((1.0, -1.0)):
                weights = _weights(vector + sign * SIGMA * noise[i])
                tried = Controller("linear", weights, len(env.actions.slots), env.candidates)
                played = play(env, ControllerPlayer(tried), episode)
                values[i, side], steps, episodes = played.value, steps + played.steps, episodes + 1
            tried_so_far = values[: i + 1]
            say(
                f"step {steps:,} of {settings.steps:,}: generation {generation + 1}, {2 * i + 2} of {GENERATION} episodes, "
                f"value {tried_so_far.mean():+.4f}, best {tried_so_far.max():+.4f}"
            )
        # Ranks, so that one lucky episode moves no more than another.
        ranks = values.ravel().argsort().argsort().reshape(values.shape) / (values.size - 1) - 0.5
        vector = (vector + RATE * ((ranks[:, 0] - ranks[:, 1]) @ noise) / PAIRS).astype(np.float32)
        generation += 1
        state = {"vector": vector.tolist(), "steps": steps, "episodes": episodes, "generation": generation}
        replace(path, json.dumps(state))
        scalars.add(steps, value=float(values.mean()), best=float(values.max()))
    say(f"ended after {steps:,} steps: another generation could take {_most_steps(env):,}")
    scalars.close()
    record = {"steps": steps, "episodes": episodes, "generations": generation}
    return Controller("linear", _weights(vector), len(env.actions.slots), env.candidates, record)


# -- PPO -----------------------------------------------------------------------------------------------------------


def _ppo(
    settings: Settings, env: GrowEnv, about: Mapping[str, Any], say: Callable[[str], object]
) -> Controller:
    """Train a linear controller with `Ppo`, by generations of whole episodes."""
    import io

    import torch

    from kasmina_rl.ppo import Ppo

    path, numbers = settings.out / "ppo.pt", flat(env).observation_space.shape
    assert numbers is not None
    learner, steps, episodes, generation = Ppo(start_weights(), numbers[0], settings.seed), 0, 0, 0
    if settings.resume and path.exists():
        try:
            saved = torch.load(path, "cpu", weights_only=True)
            learner.load_state_dict(saved["learner"])
            steps, episodes, generation = (int(saved[name]) for name in ("steps", "episodes", "generation"))
        except Exception as error:
            raise ControllerError(f"There is no PPO to resume in {settings.out}: {error!r:.200}") from error
    scalars, n = Scalars(settings.out), env.episodes or 100_000
    while steps + _most_steps(env) <= settings.steps:
        dice = np.random.default_rng([settings.seed, generation])
        played = []
        for i in range(GENERATION):
            played.append(learner.play(env, int(dice.integers(n)), dice))
            steps, episodes = steps + len(played[-1].rewards), episodes + 1
            values = [sum(episode.rewards) for episode in played]
            say(
                f"step {steps:,} of {settings.steps:,}: generation {generation + 1}, {i + 1} of {GENERATION} episodes, "
                f"value {np.mean(values):+.4f}, best {max(values):+.4f}"
            )
        shown = learner.learn(played, dice)
        generation += 1
        content = io.BytesIO()
        state = {"steps": steps, "episodes": episodes, "generation": generation}
        torch.save({"learner": learner.state_dict(), **state}, content)
        replace(path, content.getvalue())
        scalars.add(steps, value=float(np.mean(values)), best=max(values), **shown)
    say(f"ended after {steps:,} steps: another generation could take {_most_steps(env):,}")
    scalars.close()
    record = {"steps": steps, "episodes": episodes, "generations": generation}
    weights = learner.actor.weights()
    return Controller("linear", weights, len(env.actions.slots), env.candidates, record, draws=True)


# -- MaskablePPO ---------------------------------------------------------------------------------------------------


def load_packages(algo: str) -> None:
    """Import what an algorithm needs besides torch.

    Raises:
        ControllerError: If it is not installed.
    """
    if find_spec("tensorboard") is not None:
        import torch.utils.tensorboard  # noqa: F401
    if algo == "maskable-ppo":
        try:
            import sb3_contrib  # noqa: F401
            import stable_baselines3  # noqa: F401
        except ImportError as error:
            raise ControllerError(
                f"maskable-ppo needs stable-baselines3 and sb3-contrib: {error}\n"
                "Install them with: pip install 'stable-baselines3>=2.7' 'sb3-contrib>=2.7'"
            ) from error


def _maskable_ppo(
    settings: Settings, env: GrowEnv, about: Mapping[str, Any], say: Callable[[str], object]
) -> Controller:
    """Train a network with sb3-contrib's MaskablePPO."""
    import io

    from sb3_contrib import MaskablePPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.monitor import Monitor

    zipped, counted = settings.out / "model.zip", settings.out / "episodes.json"
    monitored, before = Monitor(flat(env)), 0
    resumes = settings.resume and zipped.exists()
    if resumes:
        try:
            model = MaskablePPO.load(zipped, env=monitored)  # pickled data of our own training
            before = int(json.loads(counted.read_text(encoding="utf-8")))
        except Exception as error:
            raise ControllerError(
                f"There is no model to resume in {settings.out}: {type(error).__name__}: {error!s:.200}"
            ) from error
    else:
        model = MaskablePPO(
            "MlpPolicy",
            monitored,
            n_steps=min(512, max(ROLLOUT, settings.steps // 4)),
            batch_size=32,
            gamma=1.0,
            ent_coef=0.005,
            seed=settings.seed,
            device="cpu",
            tensorboard_log=str(settings.out / "tensorboard") if find_spec("tensorboard") else None,
        )

    def episodes() -> int:
        return before + len(monitored.get_episode_rewards()) + 1  # the last one was not played to its end

    def save() -> None:
        content = io.BytesIO()
        model.save(content)
        replace(counted, f"{episodes()}\n")
        replace(zipped, content.getvalue())

    class Say(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if self.num_timesteps > begun:
                save()

        def _on_rollout_end(self) -> None:
            ended = [episode["r"] for episode in self.model.ep_info_buffer or ()]
            mean = f"{np.mean(ended):+.4f} over {len(ended)} episodes" if ended else "no episode has ended"
            say(f"step {self.num_timesteps:,} of {settings.steps:,}: value {mean}")

    begun = model.num_timesteps
    if rollouts := max(settings.steps - begun, 0) // model.n_steps:
        model.learn(rollouts * model.n_steps, callback=Say(), reset_num_timesteps=not resumes)
        save()
    say(f"ended after {model.num_timesteps:,} steps: another rollout takes {model.n_steps:,}")
    return export_model(zipped, {"steps": int(model.num_timesteps), "episodes": episodes()})


def export_model(path: Path, record: Mapping[str, Any] | None = None) -> Controller:
    """Return the controller of a model that stable-baselines3 saved. Only its weights are read; nothing is unpickled.

    Args:
        path: The zip file, in the folder of its training.
        record: More for the controller's record.

    Raises:
        ControllerError: If it is none, or its folder lacks `ABOUT`.
    """
    import io

    import torch

    try:
        about = json.loads((path.parent / ABOUT).read_text(encoding="utf-8"))
        slots, candidates = int(about["slots"]), tuple(map(str, about["candidates"]))
        with zipfile.ZipFile(path) as archive:
            policy = torch.load(io.BytesIO(archive.read("policy.pth")), "cpu", weights_only=True)
        layers = sorted(
            {int(key.split(".")[2]) for key in policy if key.startswith("mlp_extractor.policy_net.")}
        )
        names = [f"mlp_extractor.policy_net.{i}" for i in layers] + ["action_net"]
        weights = {
            f"{i}.{part}": policy[f"{name}.{part}"].numpy()
            for i, name in enumerate(names)
            for part in ("weight", "bias")
        }
    except Exception as error:
        raise ControllerError(
            f"{path} is no model of a training that can be exported: {type(error).__name__}: {error!s:.300}\n"
            f"It needs the weights of an MlpPolicy (policy.pth), and {ABOUT} beside it."
        ) from error
    return Controller("mlp", weights, slots, candidates, {**about, **(record or {})}, draws=True)
