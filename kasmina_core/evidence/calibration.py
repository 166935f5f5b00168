"""Calibration on a user's own task: seeds that cannot have learned anything, judged as seeds are judged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, median
from typing import Any, ClassVar, Final, TypeVar, cast, final

import torch
from torch import Tensor, nn

from kasmina_core.errors import KasminaError
from kasmina_core.evidence.measuring import GateSamples, SeedMeasurer
from kasmina_core.gates.sequential import LevelSpending, Look, PairedGain, judge, samples_needed
from kasmina_core.gates.thresholds import GateThresholds
from kasmina_core.lifecycle import SeedStage
from kasmina_core.quiet import derived_seed
from kasmina_core.records import Record
from kasmina_core.slots.forward import ForwardMode
from kasmina_core.slots.slot import SeedSlot
from kasmina_core.slotted import SlottedModel
from kasmina_core.verdicts import Finding

RESAMPLES: Final = 100
"""Resampled null seeds for each placebo."""

_Model = TypeVar("_Model", bound=SlottedModel)


class CalibrationError(KasminaError):
    """Nothing can be calibrated; the message says what is missing and what to do."""


@final
@dataclass(frozen=True, slots=True)
class Rate(Record):
    """How often something happened.

    Attributes:
        count: Times it happened.
        trials: Times it could have.
    """

    derived: ClassVar = ("interval",)

    count: int
    trials: int

    @property
    def share(self) -> float:
        """``count / trials``."""
        return self.count / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the probability. Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953"""
        z, n, p = NormalDist().inv_cdf(0.975), self.trials, self.share
        centre, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - reach) / (1 + z * z / n)), min(1.0, (centre + reach) / (1 + z * z / n))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count} of {self.trials} ({self.share:.1%}, 95 % interval {low:.1%} to {high:.1%})"


@final
@dataclass(frozen=True, slots=True)
class Placebo(Record):
    """One seed that learned from targets that say nothing.

    Attributes:
        slot: Slot that held it.
        blueprint: What it was made from.
        findings: What G2 would have found at each look.
        accepted_at: First look at which G2 would have accepted it; ``None`` if at none.
        spread: Standard deviation of the paired differences at the first look, in units of the loss.
    """

    slot: str
    blueprint: str
    findings: tuple[Finding, ...]
    accepted_at: int | None
    spread: float


@final
@dataclass(frozen=True, slots=True)
class Quantiles(Record):
    """The 5 %, 50 % and 95 % quantiles of what placebos gave at one look."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Take the quantiles of some values, linearly interpolated."""
        found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.05, 0.5, 0.95]).double())
        return cls(*found.tolist())


@final
@dataclass(frozen=True, slots=True)
class Calibration:
    """What chance gives.

    Attributes:
        placebos: Every placebo seed.
        resampled: How often the test accepted null seeds made from the placebos' own differences: their mean taken away
            and samples drawn anew, the same ones at every look. This keeps the task's tails and skewness, and how looks
            depend on each other, and says whether the test holds its level *here*.
        samples: Held-out samples.
        thresholds: What was judged by.
    """

    placebos: tuple[Placebo, ...]
    resampled: Rate
    samples: int
    thresholds: GateThresholds

    @property
    def accepted(self) -> Rate:
        """How many of the placebos were accepted at any look."""
        return Rate(sum(p.accepted_at is not None for p in self.placebos), len(self.placebos))

    @property
    def gains(self) -> tuple[Quantiles, ...]:
        """Quantiles of the gain, by look: the noise floor."""
        return self._by_look(lambda finding: finding.effect)

    @property
    def scores(self) -> tuple[Quantiles, ...]:
        """Quantiles of the gain over its error, by look, as a normal quantile of its p-value."""
        normal = NormalDist()
        return self._by_look(lambda f: -normal.inv_cdf(min(1 - 1e-12, max(1e-12, f.p_value))))

    def _by_look(self, value: Callable[[Finding], float]) -> tuple[Quantiles, ...]:
        looks = len(self.placebos[0].findings)
        return tuple(Quantiles.of([value(p.findings[k]) for p in self.placebos]) for k in range(looks))

    @property
    def spread(self) -> float:
        """Median over placebos of the standard deviation of paired differences at the first look."""
        return median(p.spread for p in self.placebos)

    def samples_for(self, effect: float, spread: float | None = None) -> int:
        """Return the held-out samples at which a seed that truly gains ``effect`` is accepted at its first look in 80 of
        100 cases.

        Args:
            effect: Gain per sample, above 0.
            spread: Standard deviation of paired differences; that of the placebos by default. A seed that changes
                more than they do has a larger one: take it from its evidence, ``standard_error * sqrt(samples)``.

        Raises:
            ValueError: If ``effect`` is not above 0.
        """
        if not 0.0 < effect < math.inf:
            raise ValueError(f"effect must be above 0 and finite, not {effect!r}.")
        t = self.thresholds
        level = t.spending.at(1) / (1 + len(t.smaller_alphas))
        spread = self.spread if spread is None else spread
        return samples_needed(effect, spread, level)

    def propose(self, effect: float | None = None) -> GateThresholds:
        """Return thresholds for this task, otherwise those it was judged by.

        ``min_gain`` becomes what 95 of 100 placebos stayed below at every look, if that is above 0: a gain that chance
        gives is not worth a seed. Where the test was seen not to hold its level, ``error_rate`` is lowered in
        proportion. With ``effect`` given, ``min_samples`` is what that takes.

        Args:
            effect: Gain per sample that is to be found; see `samples_for`.
        """
        t = self.thresholds
        largest = [max(f.effect for f in p.findings) for p in self.placebos]
        floor = max(t.min_gain, 0.0, Quantiles.of(largest).high)
        rate = t.error_rate
        if rate < 1.0 and self.resampled.interval[0] > rate:
            rate = rate * rate / self.resampled.share
        samples = t.min_samples if effect is None else max(t.min_samples, self.samples_for(effect))
        return replace(
            t, min_gain=float(f"{floor:.3g}"), error_rate=float(f"{rate:.3g}"), min_samples=samples
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "samples": self.samples,
            "spread": self.spread,
            "accepted": self.accepted.to_dict(),
            "resampled": self.resampled.to_dict(),
            "error_rate": self.thresholds.error_rate,
            "gains": [q.to_dict() for q in self.gains],
            "scores": [q.to_dict() for q in self.scores],
            "placebos": [placebo.to_dict() for placebo in self.placebos],
        }


def calibrate(
    model: _Model,
    evaluate: Callable[[_Model], Tensor],
    placebo_loss: Callable[[_Model, torch.Generator], Tensor],
    *,
    blueprints: Sequence[str],
    slots: Sequence[str] | None = None,
    seeds: int = 20,
    looks: int = 6,
    steps: int = 20,
    lr: float = 1e-3,
    seed: int = 0,
    higher_is_better: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Let placebo seeds learn from targets that say nothing, and judge them as G2 would.

    Works on a copy: the model is left as it is. A placebo germinates in a dormant slot and learns by counterfactual
    passes, its host standing still; after every ``steps`` steps it is measured. Train the host first as far as it will
    be when growth begins: the noise of a raw host is another one.

    Args:
        model: A model with at least one dormant slot.
        evaluate: Returns the loss of every held-out sample, ``(n,)``, computed with the model that it is given; the same
            samples in the same order at every call.
        placebo_loss: Returns the scalar loss of the model that it is given on a training batch whose targets were
            shuffled, or drawn, with the generator.
        blueprints: Blueprints to make placebos from, taken in turn.
        slots: Names of slots to put them in, taken in turn; ``None`` for all dormant ones.
        seeds: Placebos, at least 2.
        looks: Looks at each.
        steps: Optimiser steps before each look.
        lr: Learning rate of Adam.
        seed: Decides every random number.
        higher_is_better: Whether ``evaluate`` returns a metric that grows with quality.
        progress: Called with the placebos done and their number.

    Raises:
        CalibrationError: If no slot is dormant, no blueprint is given, a number is out of range, or the losses do not
            fit.
        GerminationError: If a blueprint does not fit a slot.
    """
    names = [name for name, slot in model.slots.items() if slot.state is None]
    chosen = names if slots is None else [model.slots[name].name for name in slots]
    _require(bool(chosen), "No slot is dormant: placebos need one to grow in.")
    occupied = [name for name in chosen if name not in names]
    _require(
        not occupied, f"Slot '{occupied[0] if occupied else ''}' is not dormant: placebos need an empty one."
    )
    _require(bool(blueprints), "Name at least one blueprint to make placebos from.")
    for name, value, least in (("seeds", seeds, 2), ("looks", looks, 1), ("steps", steps, 1)):
        _require(value >= least, f"{name} must be at least {least}, not {value!r}.")
    _require(0.0 < lr < math.inf, f"lr must be above 0 and finite, not {lr!r}.")
    twin = copy.deepcopy(model)
    thresholds = twin.slots[chosen[0]].config.gates.thresholds
    measurer = SeedMeasurer(twin)
    samples = GateSamples(lambda: evaluate(twin), higher_is_better)
    source = torch.Generator().manual_seed(derived_seed(seed, "placebos"))
    placebos: list[Placebo] = []
    wrong = drawn = 0
    for number in range(seeds):
        slot = twin.slots[chosen[number % len(chosen)]]
        blueprint = blueprints[number // len(chosen) % len(blueprints)]
        slot.germinate(blueprint)
        slot.advance_stage()
        findings: list[Finding] = []
        differences: list[Tensor] = []
        learn = _learner(twin, slot, placebo_loss, lr, source)
        for look in range(1, looks + 1):
            for _ in range(steps):
                learn()
            try:
                measured = measurer.measure(slot, samples, thresholds.smaller_alphas)
            except ValueError as error:
                raise CalibrationError(str(error)) from error
            findings.append(judge(measured.evidence.gains, Look(look), thresholds.spending))
            differences.append(measured.differences)
        placebos.append(_placebo(slot, findings, differences, thresholds))
        wrong += _resampled(torch.stack(differences), thresholds.spending, source)
        drawn += RESAMPLES
        slot.cull("a placebo")
        while slot.stage is not SeedStage.DORMANT:
            slot.step_epoch()
        if progress is not None:
            progress(number + 1, seeds)
    return Calibration(tuple(placebos), Rate(wrong, drawn), placebos[0].findings[0].samples, thresholds)


def shuffled(targets: Tensor, generator: torch.Generator) -> Tensor:
    """Return the targets of a batch in another order: what is left of them says nothing of the inputs."""
    return targets[torch.randperm(len(targets), generator=generator).to(targets.device)]


def _learner(
    model: _Model,
    slot: SeedSlot,
    placebo_loss: Callable[[_Model, torch.Generator], Tensor],
    lr: float,
    source: torch.Generator,
) -> Callable[[], None]:
    """Return a function that makes one optimiser step of a seed alone."""
    parameters = [p for p in slot.seed_parameters() if p.requires_grad]
    _require(bool(parameters), f"The seed in slot '{slot.name}' has nothing to learn.")
    optimizer = torch.optim.Adam(parameters, lr)

    def step() -> None:
        optimizer.zero_grad()
        with model.evaluation(), torch.enable_grad(), slot.forced(ForwardMode.REPLACE):
            cast("nn.Module", slot.seed).train()
            loss = placebo_loss(model, source)
            _require(loss.numel() == 1, f"placebo_loss must return one number, not {tuple(loss.shape)}.")
            loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]  # torch
        optimizer.step()

    return step


def _placebo(
    slot: SeedSlot, findings: list[Finding], differences: list[Tensor], thresholds: GateThresholds
) -> Placebo:
    accepted = [f.look for f in findings if f.p_value <= f.level and f.effect >= thresholds.min_gain]
    blueprint = slot.state.blueprint_id if slot.state is not None else ""
    spread = float(differences[0].double().std())
    return Placebo(slot.name, blueprint, tuple(findings), accepted[0] if accepted else None, spread)


def _resampled(differences: Tensor, spending: LevelSpending, source: torch.Generator) -> int:
    """Return how many of `RESAMPLES` null seeds like this one the test accepts at any look.

    Args:
        differences: ``(looks, n)``.
    """
    null = differences.double() - differences.double().mean(1, keepdim=True)
    n = null.shape[1]
    count = 0
    for _ in range(RESAMPLES):
        picked = null[:, torch.randint(0, n, (n,), generator=source)]
        gains = PairedGain.of_rows(picked)
        count += any(gain.p_value <= spending.at(k) for k, gain in enumerate(gains, 1))
    return count


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise CalibrationError(message)
