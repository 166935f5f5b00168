"""Bootstrap intervals of paired differences, and how well a rule tells good seeds from bad ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Final, final

import numpy as np

RESAMPLES: Final = 4000
"""Bootstrap samples of an interval."""


@final
@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % bootstrap interval.

    Attributes:
        middle: The statistic of the data itself.
        low: 2.5 % of the resamples lie below; NaN for fewer than two values.
        high: 2.5 % of them lie above.
        n: Values.
    """

    middle: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if self.n == 0:
            return "-"
        if self.n < 2:
            return f"{self.middle:+.3f} [one run]"
        return f"{self.middle:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def bootstrap(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float] = fmean, seed: int = 0
) -> Interval:
    """Return a statistic with its 95 % percentile interval over resamples with replacement.

    Args:
        values: One number a run; of paired runs, the difference.
        statistic: ``fmean`` or ``median``.
        seed: Of the resampling, so that one list always gives one interval.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13
    """
    if not values:
        return Interval(math.nan, math.nan, math.nan, 0)
    if len(values) < 2:
        return Interval(statistic(values), math.nan, math.nan, 1)
    data = np.asarray(values, dtype=float)
    drawn = data[np.random.default_rng(seed).integers(0, len(data), (RESAMPLES, len(data)))]
    found = np.median(drawn, axis=1) if statistic is median else drawn.mean(axis=1)
    low, high = np.percentile(found, [2.5, 97.5])
    return Interval(statistic(values), float(low), float(high), len(values))


def paired(first: dict[int, float], second: dict[int, float]) -> list[float]:
    """Return ``first - second`` for the seeds that both have, by rising seed."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share; (0, 1) of nothing.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    p, scale = hits / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


@final
@dataclass(frozen=True, slots=True)
class Judged:
    """One seed, what a rule said of it, and the truth.

    Attributes:
        useful: Whether it was made to be useful.
        accepted: Whether the rule took it.
        gain: Loss per test sample that it saves at the moment of the decision, or of the last chance to take it.
    """

    useful: bool
    accepted: bool
    gain: float


@final
@dataclass(frozen=True, slots=True)
class RuleScore:
    """How a rule did.

    Attributes:
        precision: Useful seeds among those accepted; NaN if none was.
        recall: Accepted among the useful ones; NaN if there were none.
        regret: Mean over all seeds of what a better decision would have saved: ``max(0, -gain)`` of an accepted seed,
            ``max(0, gain)`` of a refused one. Units of the loss.
        harm: Mean over all seeds of ``max(0, -gain)`` of those accepted: regret against the host alone.
        profit: Mean over all seeds of the gain of those accepted.
    """

    precision: float
    recall: float
    regret: float
    harm: float
    profit: float


def score(judged: Sequence[Judged]) -> RuleScore:
    """Score a rule on seeds.

    Raises:
        ValueError: If there are none.
    """
    if not judged:
        raise ValueError("A rule cannot be scored on no seeds.")
    taken = [seed for seed in judged if seed.accepted]
    useful = [seed for seed in judged if seed.useful]
    harm = sum(max(0.0, -seed.gain) for seed in taken) / len(judged)
    missed = sum(max(0.0, seed.gain) for seed in judged if not seed.accepted) / len(judged)
    return RuleScore(
        precision=fmean(seed.useful for seed in taken) if taken else math.nan,
        recall=fmean(seed.accepted for seed in useful) if useful else math.nan,
        regret=harm + missed,
        harm=harm,
        profit=sum(seed.gain for seed in taken) / len(judged),
    )
