"""One run: at a constant rate, with a decayed end on a copy at each budget. Every pass of it is charged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR

from benchmarks.sizes.data import LENGTH, Stream, load
from benchmarks.sizes.hosts import make_host, options_of, registry_of, slot_of
from benchmarks.sizes.settings import (
    DECAY_SHARE,
    EPOCHS_PER_BUDGET,
    LAG,
    TREND,
    TUNING,
    WARMUP_STEPS,
    Arm,
    Setting,
)
from kasmina_core import (
    FlopLedger,
    GrowthConfig,
    MorphogeneticModel,
    NoGrowthPolicy,
    PlanPolicy,
    PlateauPolicy,
    Policy,
    SeedGerminated,
    SeedStage,
    StraightInsertion,
    Topology,
    blueprint_sizes,
    decay_branch,
    tie_optimizer,
)
from kasmina_core.experiments.arm import forward_kind

EVALUATION_BATCH = 256


def losses_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean loss of each sequence, ``(n,)``, in nats a byte."""
    found = []
    for part in rows.split(EVALUATION_BATCH):
        logits = model(part[:, :-1])
        found.append(F.cross_entropy(logits.mT, part[:, 1:], reduction="none").mean(1))
    return torch.cat(found)


@torch.no_grad()
def held_out_loss(model: nn.Module, split: str) -> float:
    """Return the mean loss on a split; nobody decides by it, so it is not charged."""
    was = model.training
    model.eval()
    loss = float(losses_of(model, load().splits[split]).mean())
    model.train(was)
    return loss


@cache
def unit(setting: Setting, tokens: float) -> tuple[float, int]:
    """Return the FLOPs of the budget 1, and the parameters of the four-block model that it is made of."""
    with torch.random.fork_rng(devices=[]):
        host = make_host(setting.kind, setting.dim, 4)
    ledger = FlopLedger()
    inputs, targets = Stream(0, setting.batch).at(0)
    ledger.charge("learn", lambda: F.cross_entropy(host(inputs).mT, targets).backward())
    parameters = sum(p.numel() for p in host.parameters())
    steps = tokens * parameters / (setting.batch * LENGTH)
    return steps * ledger.total, parameters


class Germinations:
    """Notes where the seeds came in."""

    def __init__(self, spent: Callable[[], float]) -> None:
        self._spent = spent
        self.found: list[tuple[float, str, int]] = []

    def emit(self, event: object) -> None:
        """Note a germination."""
        if isinstance(event, SeedGerminated):
            self.found.append((self._spent(), event.slot, event.parameters))


def make_policy(arm: Arm, setting: Setting, tokens: float) -> Policy:
    """Return who decides when an arm grows: nothing of the run that is reported is known to it."""
    one, parameters = unit(setting, tokens)
    topology = Topology.SIGNAL if setting.kind == "cnn" else Topology.TRANSFORMER
    blueprints = {topology: ["block"]}
    options = options_of(setting.kind) | {"copies": arm.copies}
    if arm.plateau:
        return PlateauPolicy(blueprints)
    if arm.needs_share is not None:
        return PlanPolicy(
            blueprints,
            needs=one / parameters**2,
            share=arm.needs_share,
            unit="flops",
            options=options,
            doubles="copies",
            max_waves=3,
            sizes=blueprint_sizes(registry_of(setting.kind)),
        )
    if arm.at:
        return PlanPolicy(
            blueprints,
            at=[share * one for share in arm.at],
            unit="flops",
            options=options,
            doubles="copies",
            straight=arm.is_straight,
        )
    return NoGrowthPolicy()


def _after_wave(arm: Arm, optimizer: Optimizer, warmup: LinearLR) -> LinearLR:
    """Do what a remedy does at a wave, and return the warm-up that goes on."""
    if arm.fresh_moments:
        optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] *= arm.rate_kept
    return _warmup(optimizer) if arm.warm_again else warmup


def _warmup(optimizer: Optimizer) -> LinearLR:
    return LinearLR(optimizer, 1 / WARMUP_STEPS, total_iters=WARMUP_STEPS)


def run_arm(
    setting: Setting,
    arm: Arm,
    seed: int,
    rate: float,
    budgets: Iterable[float],
    tokens: float,
) -> dict[str, Any]:
    """Train an arm, with an end at each budget.

    Args:
        setting: The host.
        arm: The way of training.
        seed: Of the weights and of the order of the text; runs are paired by it.
        rate: Adam's rate after the warm-up.
        budgets: Shares of `unit`, rising.
        tokens: Bytes per parameter that make the budget 1.

    Returns:
        ``ends``: by budget the FLOPs, parameters and test loss (validation loss of tuning seeds); ``curve``: FLOPs and
        mean training loss per epoch, of bytes that were new; ``seeds``: FLOPs, slot and parameters of each germination;
        ``fossils``; ``outcomes`` of commands that were refused.
    """
    one, _ = unit(setting, tokens)
    split = "val" if seed >= TUNING else "test"
    ledger = FlopLedger()
    births = Germinations(lambda: ledger.total / one)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        host = make_host(setting.kind, setting.dim, arm.layers)
        model = MorphogeneticModel(
            host,
            [slot_of(setting.kind, arm.layers, arm.is_first)],
            config=GrowthConfig.recommended(
                seed=seed,
                nested_slots=3,
                ramp_epochs=2,
                straight=StraightInsertion(ramp_steps=arm.ramp_steps, lag=LAG, trend_epochs=TREND),
            ),
            registry=registry_of(setting.kind),
            telemetry=births,
        )
        if arm.grows and not arm.is_straight:
            gate = load().splits["gate"]

            def judge() -> Tensor:
                kind = ("gate", forward_kind(model))
                return ledger.charge(kind, partial(losses_of, model, gate))

            model.evaluate_with(judge)
        optimizer = tie_optimizer(model, torch.optim.Adam(model.parameters(), rate), lr_factor=arm.seed_rate)
        warmup = _warmup(optimizer)
        policy, stream = make_policy(arm, setting, tokens), Stream(seed, setting.batch)
        ends: list[dict[str, float]] = []
        curve: list[tuple[float, float]] = []
        refused: list[str] = []
        recent: list[float] = []
        step, due, left = 0, 1, list(budgets)
        last = left[-1]
        model.train()
        while left:
            inputs, targets = stream.at(step)

            def loss(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                return F.cross_entropy(model(inputs).mT, targets)

            def learn(loss: Callable[[], Tensor] = loss) -> Tensor:
                value = loss()
                value.backward()
                return value.detach()

            optimizer.zero_grad()
            before = ledger.total
            kind = forward_kind(model)
            recent.append(float(ledger.charge(("learn", kind), learn)))
            cost = ledger.total - before
            incubating = tuple(slot.is_incubating for slot in model.slots.values())
            if any(incubating):
                ledger.charge(("incubate", kind, incubating), partial(model.incubate, loss))
            model.step()
            optimizer.step()
            warmup.step()
            step += 1
            if ledger.total >= due * one / EPOCHS_PER_BUDGET:
                due = math.floor(ledger.total / one * EPOCHS_PER_BUDGET) + 1
                metric = fmean(recent)
                curve.append((ledger.total / one, metric))
                recent.clear()
                model.step_epoch(metric, flops=float(ledger.total), budget=last * one)
                born = len(births.found)
                model.follow(policy)
                if len(births.found) > born:
                    warmup = _after_wave(arm, optimizer, warmup)
                refused += [o.refusal for o in model.outcomes if not o.done]
            while left and ledger.total >= (1 - DECAY_SHARE) * left[0] * one:
                budget = left.pop(0)
                steps = max(1, round((budget * one - ledger.total) / cost))
                with decay_branch(model, optimizer, steps=steps) as branch:
                    for k in range(steps):
                        more, following = stream.at(step + k)
                        branch.zero_grad()
                        F.cross_entropy(branch.model(more).mT, following).backward()
                        branch.step()
                    ends.append(
                        {
                            "budget": budget,
                            "flops": (ledger.total + steps * cost) / one,
                            "steps": step + steps,
                            "parameters": sum(p.numel() for p in branch.model.parameters()),
                            "loss": held_out_loss(branch.model, split),
                        }
                    )
    return {
        "ends": ends,
        "curve": curve,
        "seeds": births.found,
        "fossils": [s.name for s in model.slots.values() if s.stage is SeedStage.FOSSILIZED],
        "lost_epochs": model.lost_epochs,
        "refused": refused[:5],
        "flops": one,
    }
