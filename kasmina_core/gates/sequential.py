"""A test of paired differences that may be looked at after every epoch.

*Level* means the probability of a wrong acceptance; *alpha* stays the blend weight of a seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Final, final

import torch
from torch import Tensor

from kasmina_core.records import Count, Mark, Record
from kasmina_core.verdicts import Finding

PLANNED_SHARE: Final = 0.8
"""Part of the level that the planned looks spend; the rest is for those that come later, without end."""

LEAST_INFORMATIVE: Final = 100
"""Samples that must differ for a test where most do not: of 100 differences with losses ten times as large as the gains
and a mean of 0, one in 10,000 draws holds no loss."""

DENSE: Final = 0.4
"""Share of samples that must differ for all samples to count."""

DIFFERS: Final = 0.25
"""By how much of the root mean square difference."""

SKEWNESS_BIAS: Final = 15.0
"""See `PairedGain`; the least of 5, 10, 15 and 20 with which lognormal(1) differences hold their level at n = 100."""

_NORMAL: Final = NormalDist()


def student_t_cdf(t: float, freedom: int) -> float:
    """Return the probability that Student's t with ``freedom`` degrees is at most ``t``, within .001.

    Wallace's normalising transform, ``z = (8f + 1) / (8f + 3) * sqrt(f * log(1 + t² / f))`` with the sign of ``t``.

    Source: Wallace 1959, https://doi.org/10.1214/aoms/1177706093 (second approximation)
    """
    if math.isinf(t):
        return 0.0 if t < 0 else 1.0
    z = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))
    return _NORMAL.cdf(math.copysign(z, t))


def student_t_quantile(probability: float, freedom: int) -> float:
    """Return the value that Student's t with ``freedom`` degrees stays below with ``probability``.

    The inverse of `student_t_cdf`; infinite at 0 and 1.
    """
    if probability <= 0.0 or probability >= 1.0:
        return -math.inf if probability <= 0.0 else math.inf
    z = _NORMAL.inv_cdf(probability)
    size = abs(z) * (8 * freedom + 3) / (8 * freedom + 1)
    exponent = size * size / freedom
    if exponent > 700:  # beyond what a float can hold
        return math.copysign(math.inf, z)
    return math.copysign(math.sqrt(freedom * math.expm1(exponent)), z)


def samples_needed(effect: float, spread: float, level: float, power: float = 0.8) -> int:
    """Return the paired samples at which a true mean of ``effect`` is accepted at one look with probability ``power``.

    ``n = ((t + z) * spread / effect)²`` with the quantiles of Student's t at ``1 - level`` and of the normal at ``power``.

    Args:
        effect: Gain per sample, above 0.
        spread: Standard deviation of the paired differences.
        level: Level of the look.
        power: Probability of accepting.
    """
    needed = 3
    for _ in range(20):  # the quantile depends on the number: a few rounds settle it
        quantile = student_t_quantile(1 - level, needed - 1) + _NORMAL.inv_cdf(power)
        again = max(3, math.ceil((quantile * spread / effect) ** 2))
        if again == needed:
            break
        needed = max(again, (needed + again) // 2)
    return needed


@final
@dataclass(frozen=True, slots=True)
class LevelSpending:
    """How much of a level each of many looks may spend, so that all of them together keep to it.

    The same held-out samples are looked at again and again while the seed changes, so the looks depend on each other
    in a way that nobody knows. A union bound holds all the same: the looks' levels only have to add up to the whole.
    Four fifths are spread evenly over the planned looks; look ``planned + j`` gets ``1 / (j * (j + 1))`` of the last
    fifth, which adds up to it over endless looks.

    Attributes:
        level: Probability that any look wrongly accepts, in (0, 1]. At 1 nothing is tested: every look passes.
        planned_looks: Looks that share the larger part, at least 1.

    Source: the idea of spending is that of Lan & DeMets 1983, https://doi.org/10.1093/biomet/70.3.659

    >>> spending = LevelSpending(0.05, planned_looks=8)
    >>> round(spending.at(1), 4), round(spending.at(9), 4), round(spending.at(10), 4)
    (0.005, 0.005, 0.0017)
    """

    level: float = 0.05
    planned_looks: int = 8

    def __post_init__(self) -> None:
        if not 0.0 < self.level <= 1.0:
            raise ValueError(f"A level must be above 0 and at most 1, not {self.level!r}.")
        if self.planned_looks < 1:
            raise ValueError(f"planned_looks must be at least 1, not {self.planned_looks!r}.")

    def at(self, look: int) -> float:
        """Return the level of one look, counted from 1.

        Raises:
            ValueError: If ``look`` is below 1.
        """
        if look < 1:
            raise ValueError(f"Looks are counted from 1, not {look!r}.")
        if self.level == 1.0:
            return 1.0
        if look <= self.planned_looks:
            return self.level * PLANNED_SHARE / self.planned_looks
        late = look - self.planned_looks
        return self.level * (1.0 - PLANNED_SHARE) / (late * (late + 1))

    def spent(self, looks: int) -> float:
        """Return what the first ``looks`` looks spend together, never above ``level``."""
        return min(self.level, sum(self.at(look) for look in range(1, looks + 1)))


@final
@dataclass(frozen=True, slots=True)
class Look:
    """Which look of a test this is.

    Attributes:
        number: Counted from 1 since the stage began.
        share: Part of the level that the seed may spend, in (0, 1]: what multiplicity leaves it.
    """

    number: int = 1
    share: float = 1.0


@final
@dataclass(frozen=True, slots=True)
class PairedGain(Record):
    """What ``n`` paired differences say of their mean.

    With mean ``x``, standard deviation ``s`` and skewness ``g`` of the differences, ``t = sqrt(n) * x / s`` is
    Student's. Differences of cross entropies are skewed: a seed may help a little on most samples and do great harm
    on a few, and then ``t`` is too often large by chance. Hall's transform takes that away::

        w = x / s
        hall(g) = sqrt(n) * (w + g * w² / 3 + g² * w³ / 27 + g / (6 * n))

    The skewness of ``n`` numbers is at most ``sqrt(n)``, so that a large one is underestimated. With
    ``f = 1 + 15 * g² / n`` `statistic` is the smallest of ``t``, ``hall(g)``, ``hall(g * sqrt(f))`` and
    ``hall(g * f)``. It is compared with Student's quantile.

    Where most samples do not differ, those that do are rare, and a large loss may be so rare that none was drawn; the
    other figures do not show it. `informative` counts the samples that bear such a mean, and takes the place of ``n`` in
    ``f``. If there are fewer than 100, `statistic` is NaN: the mean was never measured.

    Attributes:
        samples: ``n``.
        gain: Mean of the differences, in units of the loss or metric; positive is good.
        standard_error: Of the gain: ``s / sqrt(n)``.
        skewness: ``g``, the sample skewness without bias correction; 0 where the differences are all the same.
        informative: ``n`` if two fifths of the samples or more differ, each by more than a quarter of the root mean
            square difference, or if no sample does; otherwise ``sum(abs(d))² / sum(d²)``, which is ``k`` where ``k``
            samples differ alike. ``None``, as in files of earlier versions, stands for ``n``.

    Source: Hall 1992, https://doi.org/10.1111/j.2517-6161.1992.tb01872.x; Johnson 1978,
    https://doi.org/10.1080/01621459.1978.10480051
    """

    samples: Count
    gain: float
    standard_error: float
    skewness: float = 0.0
    informative: Annotated[Count | None, Mark.LATER] = None

    @classmethod
    def of(cls, differences: Tensor, *, is_bounded: bool = False) -> PairedGain:
        """Summarise a vector of at least two differences.

        Args:
            differences: ``(n,)``.
            is_bounded: Whether no loss can be larger than those seen, as of right and wrong answers: all samples are
                then informative.

        Raises:
            ValueError: If it is no vector, or shorter.
        """
        if differences.dim() != 1 or differences.numel() < 2:
            raise ValueError(
                f"Paired differences are a vector of at least two numbers, not {tuple(differences.shape)}."
            )
        return cls.of_rows(differences[None], is_bounded=is_bounded)[0]

    @classmethod
    def of_rows(cls, differences: Tensor, *, is_bounded: bool = False) -> list[PairedGain]:
        """Summarise each row of ``(m, n)`` differences; see `of`."""
        d = differences.detach().double().cpu()
        n = d.shape[1]
        mean, largest = d.mean(1), d.abs().amax(1)
        # A spread within the rounding of the numbers is none: its skewness would be that of the rounding.
        spread = d.std(1, correction=0)
        still = spread <= 1e-12 * largest
        skewness = (((d - mean[:, None]) / spread[:, None]) ** 3).mean(1).masked_fill(still, 0.0)
        error = (d.std(1) / math.sqrt(n)).masked_fill(still, 0.0)
        if is_bounded:
            informative = [n] * len(d)
        else:
            size = d.abs() / largest[:, None]  # in (0, 1], so that no square overflows
            squares = size.square().sum(1)
            share = (size > DIFFERS * (squares[:, None] / n).sqrt()).double().mean(1)
            weight = size.sum(1).square() / squares
            # Not a number where nothing differs, or where not all is finite: the other figures tell these apart.
            weight = torch.where((share >= DENSE) | weight.isnan(), float(n), weight.round())
            informative = [int(count) for count in weight.tolist()]
        figures = zip(mean.tolist(), error.tolist(), skewness.tolist(), informative, strict=True)
        return [cls(n, *row) for row in figures]

    @property
    def is_finite(self) -> bool:
        """Whether every figure is a finite number."""
        return all(map(math.isfinite, (self.gain, self.standard_error, self.skewness)))

    @property
    def is_sparse(self) -> bool:
        """Whether too few samples differ to test their mean."""
        return self._bearing < min(self.samples, LEAST_INFORMATIVE)

    @property
    def t(self) -> float:
        """``gain / standard_error``; 0 where both are 0 (nothing changed), NaN if either is not finite."""
        if not (math.isfinite(self.gain) and math.isfinite(self.standard_error)):
            return math.nan
        if self.standard_error == 0.0:
            return 0.0 if self.gain == 0.0 else math.copysign(math.inf, self.gain)
        return self.gain / self.standard_error

    @property
    def statistic(self) -> float:
        """The smallest of Student's ``t`` and Hall's transforms of it; NaN if `is_sparse` or a figure is not finite."""
        t = self.t
        if self.is_sparse or not self.is_finite:
            return math.nan
        if math.isinf(t) or self.samples < 3:
            return t
        n, root = self.samples, math.sqrt(self.samples)
        w = t / root
        return min(t, *(root * (w + g * w**2 / 3 + g**2 * w**3 / 27 + g / (6 * n)) for g in self._skewnesses))

    @property
    def p_value(self) -> float:
        """Probability of a statistic this large if the true gain were 0; NaN if it is not a number."""
        value = self.statistic
        return math.nan if math.isnan(value) else 1.0 - student_t_cdf(value, max(1, self.samples - 1))

    def critical(self, level: float) -> float:
        """Return what `statistic` must reach to be accepted at ``level``."""
        return student_t_quantile(1.0 - level, max(1, self.samples - 1))

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """Return an interval that leaves out the true gain with probability ``level``, half of it on each side.

        The lower end is above 0 exactly where `statistic` is accepted at ``level / 2``. Where `is_sparse`, nothing is
        left out: the interval is infinite.
        """
        if not self.is_finite:
            return math.nan, math.nan
        size = self.critical(level / 2)
        scale = self.standard_error * math.sqrt(self.samples)
        if self.is_sparse or scale == 0.0 or math.isinf(size):
            reach = math.inf if self.is_sparse or (math.isinf(size) and scale) else 0.0
            return self.gain - reach, self.gain + reach
        y = size / math.sqrt(self.samples)
        return (
            self.gain - scale * max(y, *(self._unhall(y, g) for g in self._skewnesses)),
            self.gain - scale * min(-y, *(self._unhall(-y, g) for g in self._skewnesses)),
        )

    @property
    def _bearing(self) -> int:
        return self.samples if self.informative is None else self.informative

    @property
    def _skewnesses(self) -> tuple[float, float, float]:
        g = self.skewness
        f = 1.0 + SKEWNESS_BIAS * g * g / max(1, self._bearing)
        # The one between matters: Hall's transform is not monotone in g, and far out it grows again.
        return g, g * math.sqrt(f), g * f

    def _unhall(self, y: float, g: float) -> float:
        """Return the ``w`` that Hall's transform takes to ``y * sqrt(n)``."""
        if abs(g) < 1e-6 or self.samples < 3:
            return y
        return 3.0 / g * (math.cbrt(1.0 + g * (y - g / (6 * self.samples))) - 1.0)


def judge(gains: Mapping[float, PairedGain], look: Look, spending: LevelSpending) -> Finding:
    """Judge gains at one or several blend weights at one look: the best of them, with Bonferroni's correction.

    Args:
        gains: Gains by alpha, at least one.
        look: Which look this is, and the seed's share of the level.
        spending: The level and how looks spend it.
    """
    tests = len(gains)
    alpha, best = max(
        gains.items(), key=lambda item: -math.inf if math.isnan(item[1].statistic) else item[1].statistic
    )
    is_open = spending.level == 1.0
    level = 1.0 if is_open else look.share * spending.at(look.number) / tests
    low, high = best.interval(level)
    return Finding(
        alpha=alpha,
        effect=best.gain,
        bound=best.interval(min(1.0, 2 * level))[0],
        low=low,
        high=high,
        samples=best.samples,
        p_value=best.p_value,
        look=look.number,
        level=level,
        spent=look.share * spending.spent(look.number),
        error_rate=1.0 if is_open else look.share * spending.level,
    )
