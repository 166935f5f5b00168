"""The sequential test: its quantiles, what its looks spend, and how often it errs on differences that are null."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kasmina_core.gates.sequential import (
    LevelSpending,
    Look,
    PairedGain,
    judge,
    student_t_cdf,
    student_t_quantile,
)

stats = pytest.importorskip("scipy.stats")

# -- Student's t -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [5, 9, 29, 99, 999])
def test_the_cdf_is_within_a_thousandth_of_scipys(freedom: int) -> None:
    for probability in (1e-5, 1e-3, 0.005, 0.05, 0.3, 0.5, 0.9, 0.999):
        t = stats.t.ppf(probability, freedom)
        assert student_t_cdf(t, freedom) == pytest.approx(probability, abs=1e-3)


@pytest.mark.parametrize("freedom", [29, 99, 199, 999])
def test_small_probabilities_are_within_half_a_percent_where_gates_use_them(freedom: int) -> None:
    for tail in (1e-4, 1e-3, 0.005, 0.05):
        t = stats.t.ppf(1 - tail, freedom)
        assert 1 - student_t_cdf(t, freedom) == pytest.approx(tail, rel=5e-3)
        assert student_t_quantile(1 - tail, freedom) == pytest.approx(t, rel=1e-3)


@given(st.floats(1e-9, 1 - 1e-9), st.integers(1, 10**6))
def test_the_quantile_is_the_inverse_of_the_cdf(probability: float, freedom: int) -> None:
    t = student_t_quantile(probability, freedom)
    if math.isfinite(t):
        assert student_t_cdf(t, freedom) == pytest.approx(probability, abs=1e-6)


def test_the_ends_are_infinite() -> None:
    assert student_t_quantile(0.0, 5) == -math.inf
    assert student_t_quantile(1.0, 5) == math.inf
    assert student_t_quantile(0.5, 5) == 0.0
    assert student_t_cdf(-math.inf, 5) == 0.0
    assert student_t_cdf(math.inf, 5) == 1.0


# -- spending ----------------------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 0.999), st.integers(1, 50))
def test_endless_looks_never_spend_more_than_the_level(level: float, planned: int) -> None:
    spending = LevelSpending(level, planned)
    looks = [spending.at(look) for look in range(1, 5000)]
    assert all(part > 0 for part in looks)
    assert 0.99 * level < sum(looks) <= level * (1 + 1e-9)
    assert spending.spent(planned) == pytest.approx(0.8 * level)
    assert spending.spent(4999) <= level


def test_a_level_of_one_tests_nothing() -> None:
    gains = {1.0: PairedGain(10, -5.0, 0.1)}
    finding = judge(gains, Look(7), LevelSpending(1.0))
    assert finding.level == 1.0
    assert gains[1.0].critical(finding.level) == -math.inf


@pytest.mark.parametrize(
    "make", [lambda: LevelSpending(0.0), lambda: LevelSpending(1.1), lambda: LevelSpending(0.05, 0)]
)
def test_impossible_spending_is_refused(make: Callable[[], LevelSpending]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


def test_looks_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="counted from 1, not 0"):
        LevelSpending().at(0)


# -- one look ----------------------------------------------------------------------------------------------------------


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_skewness_the_statistic_is_students() -> None:
    d = torch.randn(50, generator=numbers(), dtype=torch.float64) + 0.3
    d = torch.cat([d, 2 * d.mean() - d])  # symmetric about its mean
    found = PairedGain.of(d)
    expected = stats.ttest_1samp(d.numpy(), 0.0, alternative="greater")
    assert found.skewness == pytest.approx(0.0, abs=1e-9)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue, abs=1e-5)
    low, high = stats.t.interval(0.95, 99, loc=found.gain, scale=found.standard_error)
    assert found.interval(0.05) == pytest.approx((low, high), rel=1e-3)


@given(st.integers(0, 10**6), st.sampled_from([0.001, 0.01, 0.05, 0.2]), st.booleans())
def test_a_gain_is_accepted_exactly_where_its_lower_bound_is_above_zero(
    seed: int, level: float, flip: bool
) -> None:
    d = torch.randn(40, generator=numbers(seed), dtype=torch.float64).exp()
    d = (d.mean() - d if flip else d - d.mean()) + 0.3
    found = PairedGain.of(d)
    accepted = found.statistic >= found.critical(level)
    assert accepted == (found.interval(2 * level)[0] >= 0)
    assert accepted == (found.p_value <= level)
    low, high = found.interval(level)
    assert low <= found.gain <= high


@pytest.mark.parametrize("constant", [0.0, 0.3, -0.3])
def test_differences_that_are_all_the_same_have_no_spread(constant: float) -> None:
    found = PairedGain.of(torch.full((30,), constant))
    assert found.standard_error == 0.0
    assert found.statistic == (math.copysign(math.inf, constant) if constant else 0.0)
    assert found.interval(0.05) == pytest.approx((constant, constant), abs=1e-6)


def test_what_is_not_finite_is_never_a_number() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        found = PairedGain.of(torch.tensor([1.0, 2.0, bad]))
        assert math.isnan(found.statistic)
        assert math.isnan(found.p_value)
        assert all(map(math.isnan, found.interval()))


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_a_gain_needs_a_vector_of_two(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two numbers"):
        PairedGain.of(torch.zeros(shape))


# -- how often it errs -------------------------------------------------------------------------------------------------


def lognormal(sigma: float) -> Callable[[tuple[int, int], torch.Generator], Tensor]:
    def draw(shape: tuple[int, int], source: torch.Generator) -> Tensor:
        x = (sigma * torch.randn(shape, generator=source, dtype=torch.float64)).exp()
        return x - math.exp(sigma**2 / 2)

    return draw


def normal(shape: tuple[int, int], source: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def mostly_zero(
    draw: Callable[[tuple[int, int], torch.Generator], Tensor],
) -> Callable[[tuple[int, int], torch.Generator], Tensor]:
    return lambda shape, source: draw(shape, source) * (torch.rand(shape, generator=source) < 0.3)


NULLS = {
    "normal": normal,
    "skewed up": lognormal(0.5),
    "skewed down": lambda shape, source: -lognormal(0.5)(shape, source),
    "far up": lognormal(1.0),
    "far down": lambda shape, source: -lognormal(1.0)(shape, source),
    "mostly zero": mostly_zero(normal),
    "mostly zero, skewed up": mostly_zero(lognormal(0.5)),
    "mostly zero, skewed down": mostly_zero(lambda shape, source: -lognormal(0.5)(shape, source)),
}


def accepted(draw: Callable[..., Tensor], n: int, runs: int, looks: int = 8, kept: float = 0.8) -> int:
    """Runs in which a null seed is accepted at any of several looks at the same samples, while it changes."""
    source, spending, count = numbers(n), LevelSpending(0.05, looks), 0
    same = draw((runs, n), source)
    columns = [kept * same + (1 - kept) * draw((runs, n), source) for _ in range(looks)]
    for gains in zip(*map(PairedGain.of_rows, columns), strict=True):
        count += any(
            gain.p_value <= judge({1.0: gain}, Look(number), spending).level
            for number, gain in enumerate(gains, 1)
        )
    return count


@pytest.mark.parametrize("n", [30, 100, 300])
@pytest.mark.parametrize("name", NULLS)
def test_a_seed_that_does_nothing_is_accepted_no_more_often_than_asked(name: str, n: int) -> None:
    runs = 400
    wrong = accepted(NULLS[name], n, runs)
    # The number that 999 of 1000 such simulations stay below if the rate is what is asked.
    assert wrong <= stats.binom.ppf(0.999, runs, 0.05), f"{wrong} of {runs}"


def exact_rate(n: int, level: float, chances: dict[float, float], *, is_bounded: bool = False) -> float:
    """The probability that one look accepts, summed over all counts of two values; what is left of 1 is 0."""
    (low, p), (high, q) = chances.items()
    lows = range(int(stats.binom.isf(1e-7, n, p)) + 2)
    highs = range(int(stats.binom.isf(1e-7, n, q)) + 2)
    counts = [(a, b) for a in lows for b in highs if a + b <= n]
    rows = torch.zeros(len(counts), n, dtype=torch.float64)
    for row, (a, b) in zip(rows, counts, strict=True):
        row[:a], row[a : a + b] = low, high
    gains = PairedGain.of_rows(rows, is_bounded=is_bounded)
    weights = stats.multinomial.pmf([[a, b, n - a - b] for a, b in counts], n, [p, q, 1 - p - q])
    return float(sum(w for w, gain in zip(weights, gains, strict=True) if gain.p_value <= level))


@pytest.mark.parametrize("level", [0.005, 0.0005])
@pytest.mark.parametrize("n", [100, 300])
@pytest.mark.parametrize(
    "chances",
    [
        {-5.0: 0.01, 1.0: 0.05},
        {-10.0: 0.005, 1.0: 0.05},
        {-5.0: 0.05, 1.0: 0.25},
        {-1.0: 0.1, 2.0: 0.05},
        {-5.0: 1 / 6, 1.0: 5 / 6},
    ],
    ids=str,
)
def test_differences_of_two_sizes_are_accepted_no_more_often_than_asked(
    chances: dict[float, float], n: int, level: float
) -> None:
    assert sum(value * chance for value, chance in chances.items()) == pytest.approx(0.0)
    assert exact_rate(n, level, chances) <= level


@pytest.mark.parametrize("n", [100, 300])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_right_and_wrong_answers_need_no_number_of_differences(share: float, n: int) -> None:
    rate = exact_rate(n, 0.005, {-1.0: share, 1.0: share}, is_bounded=True)
    assert rate <= 1.2 * 0.005  # Student's t of so few values is not exact


@pytest.mark.parametrize("n", [100, 300])
@pytest.mark.parametrize("name", ["far down", "skewed down", "normal"])
def test_twelve_looks_at_fresh_samples_keep_to_the_level(name: str, n: int) -> None:
    runs, looks, source, spending = 1000, 12, numbers(n), LevelSpending()
    rows = [PairedGain.of_rows(NULLS[name]((runs, n), source)) for _ in range(looks)]
    wrong = sum(
        any(gain.p_value <= spending.at(number) for number, gain in enumerate(run, 1))
        for run in zip(*rows, strict=True)
    )
    assert wrong <= stats.binom.ppf(0.999, runs, 0.05), f"{wrong} of {runs}"


# -- few samples that differ -------------------------------------------------------------------------------------------


def sparse(n: int, differ: int, noise: float = 0.0) -> Tensor:
    d = noise * torch.randn(n, generator=numbers(), dtype=torch.float64)
    d[:differ] += 1.0
    return d


@given(st.integers(100, 400), st.data())
def test_samples_that_differ_alike_are_counted(n: int, data: st.DataObject) -> None:
    differ = data.draw(st.integers(1, n))
    found = PairedGain.of(sparse(n, differ))
    assert found.informative == (differ if differ < 0.4 * n else n)
    assert found.is_sparse == (differ < min(100, 0.4 * n))


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.02, 0.05])
def test_the_mean_of_few_differences_was_never_measured(noise: float) -> None:
    found = PairedGain.of(sparse(300, 30, noise))
    assert found.t > 5
    assert math.isnan(found.statistic)
    assert math.isnan(found.p_value)
    assert found.interval() == (-math.inf, math.inf)
    finding = judge({1.0: found}, Look(), LevelSpending())
    assert not finding.p_value <= finding.level


def test_of_several_gains_one_that_could_be_measured_is_judged() -> None:
    dense = PairedGain.of(torch.randn(300, generator=numbers(), dtype=torch.float64) + 0.5)
    finding = judge({1.0: PairedGain.of(sparse(300, 30)), 0.3: dense}, Look(), LevelSpending())
    assert finding.alpha == 0.3
    assert finding.p_value <= finding.level


def test_rows_are_summarised_as_each_alone() -> None:
    rows = torch.stack([torch.randn(50, generator=numbers(i), dtype=torch.float64).exp() for i in range(5)])
    rows[3] = 0.0
    for row, found in zip(rows, PairedGain.of_rows(rows), strict=True):
        assert astuple(found) == pytest.approx(astuple(PairedGain.of(row)))


def test_a_fixed_threshold_looked_at_again_and_again_errs_more_often_than_once() -> None:
    runs, source = 400, numbers(1)
    columns = [normal((runs, 100), source) for _ in range(8)]
    t_values = torch.stack([c.mean(1) / c.std(1) * 10 for c in columns])
    every_look = int((t_values > 1.66).any(0).sum())
    assert every_look > stats.binom.ppf(0.999, runs, 0.05)
    assert int((t_values[0] > 1.66).sum()) <= stats.binom.ppf(0.999, runs, 0.05)


@pytest.mark.parametrize("n", [100, 300])
def test_a_seed_that_helps_is_accepted(n: int) -> None:
    source, found = numbers(2), 0
    for _ in range(200):
        d = torch.randn(n, generator=source, dtype=torch.float64) + 4.0 / math.sqrt(n)
        gain = PairedGain.of(d)
        found += gain.p_value <= judge({1.0: gain}, Look(1), LevelSpending()).level
    assert found >= stats.binom.ppf(0.001, 200, 0.85)
