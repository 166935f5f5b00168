"""What an insertion costs at once: the worst rise of the validation loss, beside the host's own noise."""

from __future__ import annotations

import copy
import math
from statistics import fmean
from typing import Any, Final

from benchmarks.growth.arms import ALONE, ARMS, NAIVE, OURS
from benchmarks.growth.growing import RECIPE, InsertionTraining, LifecycleTraining, start
from benchmarks.growth.settings import Setting
from benchmarks.growth.training import Training
from kasmina_core import SeedStage
from kasmina_core.quiet import derived_seed, private_rng

ARMS_MEASURED: Final = (ALONE, *NAIVE, "straight-through", OURS)
RATE: Final = 1e-2
EVERY: Final = 3
"""Steps between two looks at the loss."""
WINDOW: Final = 2.0
"""Length of the window in ramps, so that a ramp and what follows are in it."""


def rises(setting: Setting, host: str, seed: int, plateau: int) -> dict[str, Any]:
    """Train a host to its plateau and grow it in every way; return each arm's worst rise of the loss.

    The rise is the largest validation loss within the window, less the mean over the interval before it. The window
    of a naive arm begins with the insertion, that of a lifecycle with its ramp. ``None``: the gate let nothing in.
    """
    weights: dict[str, Any] = {}
    moments: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for arm in ARMS_MEASURED:
        training = start(setting, ARMS[arm], host, seed, RATE, "constant", math.inf)
        with private_rng(derived_seed(seed, "transient")):
            if not weights:  # the first arm is the host alone
                training.train(plateau * setting.interval)
                weights = copy.deepcopy(training.module.state_dict())
                moments = copy.deepcopy(training.optimizer.state_dict())
            else:
                training.module.load_state_dict(weights)
                training.optimizer.load_state_dict(copy.deepcopy(moments))
        with private_rng(derived_seed(seed, "window")):
            found[arm] = _rise(training)
    return {"rises": found}


def _losses(training: Training, steps: int) -> list[float]:
    seen = []
    for _ in range(max(1, steps // EVERY)):
        training.train(EVERY)
        seen.append(training.evaluate("val")[0])
    return seen


def _rise(training: Training) -> float | None:
    setting = training.setting
    window = round(WINDOW * RECIPE.ramp * setting.interval)
    before = _losses(training, setting.interval)
    match training:
        case InsertionTraining():
            training.put_in(next(iter(training.points)), setting.good[0])
        case LifecycleTraining():
            training.policy = None
            name = next(iter(training.model.slots))
            slot = training.model.slots[name]
            training.model.germinate(name, setting.good[0])
            for _ in range(RECIPE.training + 1):
                training.look(before[-1], 0.0)
                if slot.stage is SeedStage.BLENDING:
                    break
                before = _losses(training, setting.interval)
            else:
                return None
    return max(_losses(training, window)) - fmean(before)
