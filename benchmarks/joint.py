"""What seeds learn that share a counterfactual pass, at equal FLOPs: ``python -m benchmarks.joint``.

A small digits host is trained to its plateau. Then three seeds learn apart, each at a place of its own, while the host
goes on, until as many FLOPs are spent as `--epochs` epochs take with a pass for each seed. Ways are compared in pairs:
runs of one number share host, data, order and the seeds' first weights. *Gain* is the validation loss that a seed saves
when it is put in at alpha 1, mean over the seeds; *all* is what they save together. Intervals are bootstrap intervals of
the mean over runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from kasmina_cnn import CNNHost

from benchmarks.incubation import BATCH, interval
from kasmina_core import GrowthConfig, Incubation, MorphogeneticModel, tie_optimizer
from kasmina_core.experiments.flops import FlopLedger
from kasmina_core.experiments.tasks import load_task
from kasmina_core.slots.forward import ForwardMode

RATE = 3e-3


@dataclass(frozen=True)
class Way:
    """A way to incubate: over which share of the batch, how often, and whether in one pass for all seeds."""

    name: str
    share: float = 1.0
    every: int = 1
    joint: bool = False


WAYS = (
    Way("a pass each"),
    Way("one pass for all", joint=True),
    Way("a third of the batch each", share=1 / 3),
    Way("a pass each, every 3rd step", every=3),
)


@dataclass(frozen=True)
class Result:
    """What one run of one way gave."""

    gain: float
    together: float
    host: float
    steps: int
    flops: int


def _host() -> CNNHost:
    return CNNHost(n_blocks=4, base_channels=4, width_factor=1)


class Run:
    """One number: a host at its plateau, from which every way starts."""

    def __init__(self, number: int, host_epochs: int) -> None:
        self.number = number
        self.task = load_task("digits", number)
        torch.manual_seed(number)
        host = _host()
        optimizer = torch.optim.Adam(host.parameters(), RATE)
        order = torch.Generator().manual_seed(number)
        for _ in range(host_epochs):
            for inputs, targets in self.task.batches("train", BATCH, order):
                optimizer.zero_grad()
                self.task.loss(host(inputs), targets).mean().backward()
                optimizer.step()
        self.host, self.optimizer, self.order = host.state_dict(), optimizer.state_dict(), order.get_state()

    def go(self, way: Way, epochs: int, budget: int | None) -> Result:
        """Train from the plateau for so many epochs or, if there is one, until the budget of FLOPs is spent."""
        host = _host()
        host.load_state_dict(self.host)
        config = GrowthConfig(
            incubation=Incubation.COUNTERFACTUAL,
            incubate_every=way.every,
            joint_incubation=way.joint,
            max_incubation_deviation=float("inf"),
            isolation_every=0,
            seed=self.number,
        )
        model = MorphogeneticModel(host, config=config)
        optimizer = torch.optim.Adam(model.host_parameters(), RATE)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        tie_optimizer(model, optimizer)
        for name in model.slots:
            model.germinate(name, "cnn:conv_heavy")
            model.advance_stage(name)
        order = torch.Generator()
        order.set_state(self.order)
        ledger, steps, epoch = FlopLedger(), 0, 0
        while epoch < epochs if budget is None else ledger.total < budget:
            model.train()
            for inputs, targets in self.task.batches("train", BATCH, order):
                if budget is not None and ledger.total >= budget:
                    break
                optimizer.zero_grad()
                self._learn(model, way, inputs, targets, ledger)
                model.step()
                optimizer.step()
                steps += 1
            epoch += 1
        names = list(model.slots)
        without = self._loss(model, ())
        gains = [without - self._loss(model, (name,)) for name in names]
        together = without - self._loss(model, names)
        return Result(statistics.fmean(gains), together, without, steps, ledger.total)

    def _learn(
        self,
        model: MorphogeneticModel,
        way: Way,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        ledger: FlopLedger,
    ) -> None:
        whole = len(inputs)
        share = max(2, round(whole * way.share))
        notes = next(iter(model.slots.values())).notes
        turn = notes.incubations % way.every == 0
        ledger.charge(("learn", whole), lambda: self.task.loss(model(inputs), targets).mean().backward())
        ledger.charge(  # the first joint call is tried, which costs more than the later ones
            ("incubate", turn, share, notes.is_coupled),
            lambda: model.incubate(lambda: self.task.loss(model(inputs[:share]), targets[:share]).mean()),
        )

    def _loss(self, model: MorphogeneticModel, with_seeds: Sequence[str]) -> float:
        data = self.task.splits["val"]
        with ExitStack() as stack:
            stack.enter_context(model.evaluation())
            for name in with_seeds:
                stack.enter_context(model.slots[name].forced(ForwardMode.MEASURE))
            return float(self.task.loss(model(data.inputs), data.targets).mean())


def measure(runs: int, host_epochs: int, epochs: int) -> dict[str, list[Result]]:
    """Return the results of every way, one for each run."""
    results: dict[str, list[Result]] = {way.name: [] for way in WAYS}
    for number in range(runs):
        run = Run(number, host_epochs)
        budget = None
        for way in WAYS:
            results[way.name].append(run.go(way, epochs, budget))
            budget = budget or results[way.name][-1].flops
            print(f"\rrun {number + 1}/{runs}: {way.name:<40}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--host-epochs", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--fast", action="store_true", help="as little as possible: does it run?")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.fast:
        options.runs, options.host_epochs, options.epochs = 1, 1, 1
    torch.set_num_threads(1)
    results = measure(options.runs, options.host_epochs, options.epochs)
    base = results[WAYS[0].name]
    rows = {}
    for name, found in results.items():
        less = [b.gain - one.gain for one, b in zip(found, base, strict=True)]
        rows[name] = {
            "steps": statistics.fmean(one.steps for one in found),
            "flops": statistics.fmean(one.flops / b.flops for one, b in zip(found, base, strict=True)),
            "gain": statistics.fmean(one.gain for one in found),
            "all": statistics.fmean(one.together for one in found),
            "host": statistics.fmean(one.host for one in found),
            "gain less than with a pass each": statistics.fmean(less),
            "interval": interval(less),
            "runs": len(found),
        }
    if options.json:
        print(json.dumps(rows))
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {vars(options)}")
    print(
        f"{'way':<30}{'steps':>7}{'FLOPs':>7}{'gain':>9}{'all':>9}{'host':>9}  gain less than with a pass each"
    )
    for name, row in rows.items():
        low, high = row["interval"]
        print(
            f"{name:<30}{row['steps']:>7.0f}{row['flops']:>7.2f}{row['gain']:>9.4f}{row['all']:>9.4f}{row['host']:>9.4f}"
            f"  {row['gain less than with a pass each']:.4f} ({low:.4f} to {high:.4f})"
        )


if __name__ == "__main__":
    main()
