"""Whether a seed that is culled from TRAINING leaves a trace: every bit of the host's run with it and without it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.growth.arms import ALONE, ARMS
from benchmarks.growth.blueprints import KINDS
from benchmarks.growth.growing import RECIPE, LifecycleTraining, start
from benchmarks.growth.settings import Setting
from benchmarks.growth.training import Training
from kasmina_core import SeedStage
from kasmina_core.quiet import private_rng

INTERVALS: Final = 6
TWO_LOOKS: Final = 2
"""Looks in TRAINING after which a seed is culled; G2 waits one more."""


def _blueprint(setting: Setting, seed: int) -> str:
    suffix = "" if setting.name == "digits" else "-t"
    names = [*setting.good, *(f"bad:{name}{suffix}" for name in KINDS)]
    return names[seed % len(names)]


def compare(setting: Setting, arm: str, host: str, schedule: str, seed: int) -> dict[str, Any]:
    """Run the bare host, and the same with a seed in each slot that is culled in TRAINING; compare every bit.

    Args:
        setting: What is trained.
        arm: A lifecycle: it says how the seeds incubate.
        host: Name of the host.
        schedule: Of the learning rate.
        seed: Of both runs; it also chooses the blueprint.
    """
    # Operations are no clock here: both runs have the same steps, and the schedule goes by them.
    steps = INTERVALS * setting.interval
    bare = start(setting, ARMS[ALONE], host, seed, 1e-2, schedule, math.inf)
    held = replace(RECIPE, min_training=TWO_LOOKS + 1)
    seeded = start(setting, ARMS[arm], host, seed, 1e-2, schedule, math.inf, held)
    assert isinstance(seeded, LifecycleTraining)
    seeded.policy = None
    culled = 0
    traces: list[list[float]] = []
    states: list[Tensor] = []
    for training in (bare, seeded):
        losses = []
        with private_rng(seed):
            for number in range(INTERVALS):
                training.lr = 1e-2 * (1.0 - number / INTERVALS if schedule == "cosine" else 1.0)
                losses.append(training.train(setting.interval))
                losses.append(training.evaluate("val")[0])
                if training is seeded:
                    culled += _meddle(seeded, number, losses[-1], _blueprint(setting, seed))
            states.append(torch.get_rng_state())
        traces.append(losses)
    host_of = seeded.model.host
    differing = [
        name
        for name, tensor in bare.module.state_dict().items()
        if not torch.equal(tensor, host_of.state_dict()[name])
    ]
    checks = {
        "weights and statistics": not differing,
        "optimiser": _same_moments(bare, seeded),
        "losses": traces[0] == traces[1],
        "random numbers": bool(torch.equal(*states)),
    }
    return {
        "steps": steps,
        "culled": culled,
        "blueprint": _blueprint(setting, seed),
        "checks": checks,
        "differing": differing,
    }


def _meddle(seeded: LifecycleTraining, number: int, val: float, blueprint: str) -> int:
    seeded.look(val, 0.0)
    culled = 0
    for name, slot in seeded.model.slots.items():
        if slot.stage is SeedStage.TRAINING and slot.state is not None:
            if slot.state.metrics.epochs_in_current_stage >= TWO_LOOKS:
                seeded.model.cull(name, "the benchmark asks for it")
                culled += 1
        elif slot.stage is SeedStage.DORMANT and number < 2:
            seeded.model.germinate(name, blueprint)
    return culled


def _same_moments(bare: Training, seeded: LifecycleTraining) -> bool:
    named = dict(seeded.model.host.named_parameters())
    for name, parameter in bare.module.named_parameters():
        one = bare.optimizer.state[parameter]
        other = seeded.optimizer.state[named[name]]
        if one.keys() != other.keys() or not all(
            torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one
        ):
            return False
    return True
