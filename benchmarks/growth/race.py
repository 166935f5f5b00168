"""One run of an arm, from its first step to the end of its budget."""

from __future__ import annotations

from collections import deque
from statistics import fmean
from typing import Any, Final

from benchmarks.growth.arms import ARMS
from benchmarks.growth.growing import RECIPE, Recipe, start
from benchmarks.growth.settings import Setting, make_host
from benchmarks.growth.training import Training
from kasmina_core.quiet import derived_seed, private_rng

LAST: Final = 5
"""The final figures are means over the models at so many last looks: one look's are mostly noise."""


def budget_of(setting: Setting, host: str) -> float:
    """Return the operations of a run: so many intervals of the host alone."""
    probe = Training(setting, make_host(setting, host, 0), 0, 1e-3, "constant", 1.0)
    with private_rng(0):
        probe.train(1)
    return float(probe.ledger.total * setting.interval * setting.intervals)


def race(
    setting: Setting,
    arm: str,
    host: str,
    schedule: str,
    lr: float,
    seed: int,
    recipe: Recipe = RECIPE,
) -> dict[str, Any]:
    """Train an arm and return what is to be known of the run, as plain data.

    ``curve`` has an entry a look: operations, CPU seconds of training (looking on is not in them), validation loss.
    ``log`` says what happened to seeds: interval, slot, what, blueprint.
    """
    training = start(setting, ARMS[arm], host, seed, lr, schedule, budget_of(setting, host), recipe)
    curve: list[tuple[float, float, float]] = []
    last: deque[tuple[float, float, float]] = deque(maxlen=LAST)
    # A grown model has about half as many looks as the host.
    nearly_done = 1.0 - 2.4 * LAST / setting.intervals
    with private_rng(derived_seed(seed, "training")):
        while training.ledger.total < training.budget:
            loss = training.train(setting.interval)
            training.intervals += 1
            val, _, accuracy = training.evaluate("val")
            curve.append((float(training.ledger.total), round(training.seconds, 3), round(val, 5)))
            if training.spent > nearly_done:
                test, metric, _ = training.evaluate("test")
                last.append((val, test, metric))
            training.look(val, accuracy)
    val, test, metric = map(fmean, zip(*last, strict=True))
    return {
        "train": loss,
        "val": val,
        "test": test,
        "metric": metric,
        "parameters": sum(p.numel() for p in training.module.parameters()),
        "trainable": sum(p.numel() for p in training.module.parameters() if p.requires_grad),
        "intervals": training.intervals,
        "flops": float(training.ledger.total),
        "seconds": training.seconds,
        "curve": curve,
        "log": training.log,
    }
