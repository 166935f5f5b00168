"""What a slot costs in a training step, as ratios taken in one run: ``python -m benchmarks.slots``."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from kasmina_cnn import CNNHost
from torch import nn
from torch.nn.functional import cross_entropy

from kasmina_core import GrowthConfig, Incubation, MorphogeneticModel, SeedStage

Step = Callable[[], None]


def _host() -> CNNHost:
    torch.manual_seed(0)
    return CNNHost(in_channels=3, base_channels=16, n_blocks=4)


def _model(incubation: Incubation = Incubation.STRAIGHT_THROUGH) -> MorphogeneticModel:
    return MorphogeneticModel(_host(), config=GrowthConfig(incubation=incubation, isolation_every=0))


def _trained(module: nn.Module, x: torch.Tensor, y: torch.Tensor, after: Step | None = None) -> Step:
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(module(x), y).backward()
        if after is not None:
            after()
        optimizer.step()

    return step


def _seeded(incubation: Incubation) -> MorphogeneticModel:
    model = _model(incubation)
    model.germinate("block2", "conv_light")
    model.step_epoch()
    assert model.slots["block2"].stage is SeedStage.TRAINING
    return model


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, tuple[float, float, float]]:
    """Return, by name, median and quartiles of the ratio to a step of the bare host; one ratio a round."""
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    plain, apart = _seeded(Incubation.STRAIGHT_THROUGH), _seeded(Incubation.COUNTERFACTUAL)
    watched = _seeded(Incubation.STRAIGHT_THROUGH)
    bare = _trained(_host(), x, y)

    def check() -> None:
        slot = watched.slots["block2"]
        slot.step_epoch()  # what was measured is fresh for one epoch
        slot.check_isolation()

    steps = {
        "3 dormant slots": _trained(_model(), x, y),
        "a seed in straight-through TRAINING": _trained(plain, x, y),
        "a seed in counterfactual TRAINING": _trained(
            apart, x, y, lambda: apart.incubate(lambda: cross_entropy(apart(x), y)) and None
        ),
        "one measurement of isolation, alone": check,
    }
    for step in (bare, *steps.values()):
        step()
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        base = min(_seconds(bare) for _ in range(3))
        for name, step in steps.items():
            ratios[name].append(min(_seconds(step) for _ in range(3)) / base)
        print(f"\rround {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    result = {}
    for name, found in ratios.items():
        low, middle, high = statistics.quantiles(found, n=4)
        result[name] = (middle, low, high)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(max(2, options.rounds))
    if options.json:
        print(json.dumps(result))
        return
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, {options.rounds} rounds")
    print(f"{'step / step of the bare host':<40}{'median':>8}  quartiles")
    for name, (middle, low, high) in result.items():
        print(f"{name:<40}{middle:>8.3f}  {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
