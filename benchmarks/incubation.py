"""What ways to incubate a seed cost, how far they let it drift, and what it then gains: ``python -m benchmarks.incubation``.

A small digits host is trained to its plateau. Then, for each way, the same seed learns apart for some epochs while the
host goes on, is blended in without asking a gate, and trains on with the host. Runs of one number share host, data and
order, so that ways are compared in pairs; intervals are bootstrap intervals of the mean over runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from kasmina_cnn import CNNHost
from torch import Tensor, nn

from kasmina_core import (
    GateThresholds,
    GrowthConfig,
    Incubation,
    MorphogeneticModel,
    QualityGates,
    RampUnit,
    SeedSlot,
    SeedStage,
    bound_deviation,
    straight_through,
    tie_optimizer,
)
from kasmina_core.evidence.replay import ReplayTape
from kasmina_core.experiments.flops import FlopLedger
from kasmina_core.experiments.tasks import Task, load_task
from kasmina_core.isolation import relative_deviation
from kasmina_core.lifecycle import SeedState
from kasmina_core.quiet import kept_buffers
from kasmina_core.slots.forward import ForwardMode
from kasmina_core.slots.owner import Judge, Trial
from kasmina_core.verdicts import CheckVerdict, GateCheck, GateLevel, GateResult

SLOT, BATCH = "block2", 32
OPEN = QualityGates(
    thresholds=GateThresholds(
        min_training_epochs=0, min_shadowing_epochs=0, min_probation_epochs=10**6, max_output_deviation=1e30
    )
)


class Open:
    """A judge that lets a seed move whenever it is asked to, whatever a gate would say."""

    def __init__(self, judge: Judge) -> None:
        self.joined, self._judge = judge.joined, judge

    def judge_trial(self, state: SeedState, trial: Trial) -> GateResult:
        return self._judge.judge_trial(state, trial)

    def judge(self, slot: SeedSlot, gate: GateLevel | int) -> GateResult:
        return GateResult(GateLevel(gate), (GateCheck("open", 1.0, CheckVerdict.PASSED),))

    def foresee(self, slot: SeedSlot, gate: GateLevel) -> bool | None:
        return True


@dataclass(frozen=True)
class Way:
    """A way to incubate."""

    name: str
    counterfactual: bool = False
    every: int = 1
    share: float = 1.0
    replay: bool = False
    bound: float = 0.1
    surrogate: int = 0
    pull: bool = True
    learns: bool = True


WAYS = [
    Way("not at all", learns=False),
    Way("counterfactual", counterfactual=True),
    Way("counterfactual, every 2nd step", counterfactual=True, every=2),
    Way("counterfactual, every 4th step", counterfactual=True, every=4),
    Way("counterfactual, every 8th step", counterfactual=True, every=8),
    Way("counterfactual, half the batch", counterfactual=True, share=0.5),
    Way("counterfactual, a quarter of the batch", counterfactual=True, share=0.25),
    Way("counterfactual, tail alone (replay)", counterfactual=True, replay=True),
    Way("straight-through, bound .1"),
    Way("straight-through, bound .1, not pulled back", pull=False),
    Way("straight-through, bound .5", bound=0.5),
    Way("straight-through, bound .5, not pulled back", bound=0.5, pull=False),
    Way("straight-through, no bound", bound=float("inf")),
    Way("straight-through, curvature every 4th", bound=float("inf"), surrogate=4),
]


@dataclass
class Result:
    """What one run of one way gave."""

    deviation: float = 0.0
    gain: float = 0.0
    at_half: float = 0.0
    final: float = 0.0
    flops: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


class Curvature:
    """Adds ``c * (seed - host)`` to the straight-through gradient at the seed's output; ``c`` is measured now and then.

    With the gradients of the loss at the seed's output, ``g0`` where the host's features go on and ``g1`` where the
    seed's do, ``c`` is the mean curvature along ``d = seed - host``: ``max(0, (g1 - g0) . d / |d|^2)``, averaged.
    """

    def __init__(self, model: MorphogeneticModel, every: int) -> None:
        self.model, self.slot, self.every = model, model.slots[SLOT], every
        self.calls, self.coefficient = 0, 0.0
        self.delta = self.gradient = torch.zeros(())
        self.handle = self.slot.seed.register_forward_hook(self._watch)  # type: ignore[union-attr]

    def _watch(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad or self.slot.mode != ForwardMode.STRAIGHT_THROUGH:
            return
        self.delta = (output - args[0]).detach()

        def bend(gradient: Tensor) -> Tensor:
            self.gradient = gradient
            return gradient + self.coefficient * self.delta

        output.register_hook(bend)

    def measure(self, closure: Callable[[], Tensor]) -> None:
        """Measure the curvature, if it is time; call it after the host's backward."""
        self.calls += 1
        if (self.calls - 1) % self.every:
            return
        seen: list[Tensor] = []
        handle = self.slot.seed.register_forward_hook(lambda m, a, out: seen.append(out))  # type: ignore[union-attr]
        with self.model.evaluation(), torch.enable_grad(), self.slot.forced(ForwardMode.REPLACE):
            self.slot.seed.train()  # type: ignore[union-attr]
            loss = closure()
            (there,) = torch.autograd.grad(loss, seen[0])
        handle.remove()
        square = float(self.delta.square().sum())
        if square > 0:
            found = max(0.0, float(((there - self.gradient) * self.delta).sum()) / square)
            self.coefficient = 0.7 * self.coefficient + 0.3 * found if self.coefficient else found


def not_pulled_back(host: Tensor, seed: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Bound what the loss sees of a seed, and leave a seed that is beyond the bound there."""
    bounded = bound_deviation(host.detach(), seed, bound)
    return straight_through(host, bounded), relative_deviation(host, seed)


class Run:
    """One number: a host at its plateau, from which every way starts."""

    def __init__(self, number: int, epochs: dict[str, int]) -> None:
        self.number, self.epochs = number, epochs
        self.task: Task = load_task("digits", number)
        torch.manual_seed(number)
        host = CNNHost(base_channels=3, width_factor=1)
        optimizer = torch.optim.Adam(host.parameters(), 3e-3)
        order = torch.Generator().manual_seed(number)
        for _ in range(epochs["host"]):
            for inputs, targets in self.task.batches("train", BATCH, order):
                optimizer.zero_grad()
                self.task.loss(host(inputs), targets).mean().backward()
                optimizer.step()
        self.host, self.optimizer, self.order = host.state_dict(), optimizer.state_dict(), order.get_state()
        self.alone = self.go(None)

    def go(self, way: Way | None) -> Result:
        """Train from the plateau, with a seed that is incubated in a way, or without one."""
        if way is None or way.pull:
            return self._go(way)
        with patch("kasmina_core.slots.forward.isolated", not_pulled_back):
            return self._go(way)

    def _go(self, way: Way | None) -> Result:
        steps = -(-len(self.task.train.inputs) // BATCH)
        config = GrowthConfig(
            incubation=Incubation.COUNTERFACTUAL
            if way and way.counterfactual
            else Incubation.STRAIGHT_THROUGH,
            max_deviation=way.bound if way else 0.1,
            max_incubation_deviation=float("inf"),
            incubate_every=way.every if way else 1,
            ramp_unit=RampUnit.STEP,
            ramp_steps=4 * steps,
            gates=OPEN,
            isolation_every=0,
        )
        model = MorphogeneticModel(CNNHost(base_channels=3, width_factor=1), config=config)
        model.host.load_state_dict(self.host)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        tie_optimizer(model, optimizer)
        order = torch.Generator()
        order.set_state(self.order)
        ledger, result, slot = FlopLedger(), Result(), model.slots[SLOT]
        curvature = None
        if way is not None:
            model.germinate(SLOT, "conv_heavy")
            model.advance_stage(SLOT)
            if not way.learns:
                slot.pause()
            if way.surrogate:
                curvature = Curvature(model, way.surrogate)
        torch.manual_seed(self.number)
        for _ in range(self.epochs["incubation"]):
            self._epoch(model, optimizer, order, ledger, way, curvature)
        if way is not None:
            result.flops = float(ledger.total)
            if curvature is not None:
                curvature.handle.remove()
                result.notes["coefficient"] = curvature.coefficient
            if slot.state is not None and slot.state.is_paused:
                slot.resume()
            with model.evaluation():
                with slot.forced(ForwardMode.MEASURE):
                    slot.begin_measurement()
                    with_seed = self._loss(model, "val")
                    result.deviation = float(slot.deviation)
                with model.bypassed(SLOT):
                    without = self._loss(model, "val")
                result.gain = without - with_seed
            slot.judge = Open(slot.judge)
            slot.advance_stage(SeedStage.BLENDING)
            slot.set_alpha(0.5)
            with model.evaluation():
                result.at_half = without - self._loss(model, "val")
            slot.set_alpha(0.0)
        else:
            result.flops = float(ledger.total)
        tests = []
        for epoch in range(self.epochs["after"]):
            self._epoch(model, optimizer, order, ledger, way, None)
            if way is not None and slot.alpha == 1.0 and slot.stage is SeedStage.BLENDING:
                slot.advance_stage(SeedStage.SHADOWING)
            if epoch >= self.epochs["after"] - 4:
                with model.evaluation():
                    tests.append(self._loss(model, "test"))
        result.final = statistics.fmean(tests)
        return result

    def _loss(self, model: nn.Module, split: Any) -> float:
        data = self.task.splits[split]
        return float(self.task.loss(model(data.inputs), data.targets).mean())

    def _epoch(
        self,
        model: MorphogeneticModel,
        optimizer: torch.optim.Optimizer,
        order: torch.Generator,
        ledger: FlopLedger,
        way: Way | None,
        curvature: Curvature | None,
    ) -> None:
        model.train()
        for inputs, targets in self.task.batches("train", BATCH, order):
            optimizer.zero_grad()
            self._learn(model, inputs, targets, ledger, way, curvature)
            model.step()
            optimizer.step()

    def _learn(
        self,
        model: MorphogeneticModel,
        inputs: Tensor,
        targets: Tensor,
        ledger: FlopLedger,
        way: Way | None,
        curvature: Curvature | None,
    ) -> None:
        slot, whole = model.slots[SLOT], len(inputs)
        share = max(2, round(whole * way.share)) if way else whole
        tape = ReplayTape(model.host, slot) if way and way.replay and slot.is_incubating else None

        def loss(n: int = whole) -> Tensor:
            return self.task.loss(model(inputs[:n]), targets[:n]).mean()

        if tape is not None:  # tapes are for passes without gradient; what the main pass computes is the same
            with torch.no_grad(), kept_buffers(model), tape.recording():
                loss()

        def incubate() -> None:
            if tape is None:
                model.incubate(lambda: loss(share))
                return
            with tape.replaying():
                model.incubate(loss)

        key = (slot.mode, whole)
        ledger.charge(("learn", *key), lambda: loss().backward())
        turn = slot.notes.incubations % model.growth_config.incubate_every == 0 and slot.is_incubating
        ledger.charge(("incubate", turn, share, *key), incubate)
        if curvature is not None:
            due = curvature.calls % curvature.every == 0
            ledger.charge(("curvature", due, *key), lambda: curvature.measure(loss))


def interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean."""
    source = random.Random(seed)
    means = sorted(statistics.fmean(source.choices(values, k=len(values))) for _ in range(2000))
    return means[49], means[1949]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--host-epochs", type=int, default=60)
    parser.add_argument("--incubation-epochs", type=int, default=8)
    parser.add_argument("--after-epochs", type=int, default=14)
    parser.add_argument("--only", default="", help="part of the names of the ways to measure")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    epochs = {
        "host": options.host_epochs,
        "incubation": options.incubation_epochs,
        "after": options.after_epochs,
    }
    ways = [way for way in WAYS if options.only in way.name]
    results: dict[str, list[tuple[Result, Result]]] = {way.name: [] for way in ways}
    for number in range(options.runs):
        run = Run(number, epochs)
        for way in ways:
            results[way.name].append((run.go(way), run.alone))
            print(f"\rrun {number + 1}/{options.runs}: {way.name:<45}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = {}
    for name, pairs in results.items():
        saved = [alone.final - one.final for one, alone in pairs]
        rows[name] = {
            "flops": statistics.fmean(one.flops / alone.flops for one, alone in pairs),
            "deviation": statistics.median(one.deviation for one, _ in pairs),
            "largest deviation": max(one.deviation for one, _ in pairs),
            "gain before": statistics.fmean(one.gain for one, _ in pairs),
            "at half": statistics.fmean(one.at_half for one, _ in pairs),
            "saved": statistics.fmean(saved),
            "interval": interval(saved),
            "better than alone": sum(s > 0 for s in saved),
            "runs": len(saved),
        }
    if options.json:
        print(json.dumps(rows))
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {options.runs} runs, {epochs}")
    print(
        f"{'incubation':<42}{'FLOPs':>6} {'deviation (largest)':>20} {'gain':>8} {'at .5':>8}  saved at the end"
    )
    for name, row in rows.items():
        low, high = row["interval"]
        print(
            f"{name:<42}{row['flops']:>6.2f} {row['deviation']:>10.2f} ({row['largest deviation']:>7.2f})"
            f" {row['gain before']:>8.3f} {row['at half']:>8.3f}  {row['saved']:.4f} [{low:.4f}, {high:.4f}]"
            f" {row['better than alone']}/{row['runs']}"
        )


if __name__ == "__main__":
    main()
