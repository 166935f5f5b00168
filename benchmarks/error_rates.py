"""How often the gates' test accepts a seed that does nothing: ``python -m benchmarks.error_rates``.

Paired differences are drawn whose true mean is 0, and looked at eight times. *Drifting*: before each look a fifth of the
samples is drawn anew. *Fresh*: all of them are. *Power*: the same differences, drifting, with a gain of 4 standard errors
(of all samples together) added. Beside the test stands a fixed threshold, ``t >= 3``, at drifting looks. Where fewer than
one look in twenty could be judged, the row says *never measured*; otherwise the last column has the share that could not.
With 1,000 samples half as many runs are made.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from kasmina_core.gates.sequential import LevelSpending, PairedGain

Draw = Callable[[tuple[int, int], torch.Generator], Tensor]
SIZES: Final = (100, 300, 1000)
DRAWN_ANEW: Final = 0.2
GAIN: Final = 4.0


def normal(shape: tuple[int, int], source: torch.Generator) -> Tensor:
    """Draw from the standard normal."""
    return torch.randn(shape, generator=source, dtype=torch.float64)


def uniform(shape: tuple[int, int], source: torch.Generator) -> Tensor:
    """Draw from (0, 1]."""
    return 1.0 - torch.rand(shape, generator=source, dtype=torch.float64)


def student(freedom: int) -> Draw:
    """Return a draw of Student's t."""

    def draw(shape: tuple[int, int], source: torch.Generator) -> Tensor:
        squares = sum(normal(shape, source).square() for _ in range(freedom))
        return normal(shape, source) / (squares / freedom) ** 0.5

    return draw


def lognormal(sigma: float, sign: float) -> Draw:
    """Return a draw of lognormal numbers less their mean, with the long tail up or down."""
    return lambda shape, source: sign * ((sigma * normal(shape, source)).exp() - math.exp(sigma**2 / 2))


def exponential_down(shape: tuple[int, int], source: torch.Generator) -> Tensor:
    """Draw 1 less the exponential."""
    return 1.0 + uniform(shape, source).log()


def mostly_zero(draw: Draw, share: float) -> Draw:
    """Return a draw in which only a share of the samples differs at all."""
    return lambda shape, source: draw(shape, source) * (uniform(shape, source) <= share)


def points(*chances: tuple[float, float], noise: float = 0.0) -> Draw:
    """Return a draw of values with their probabilities, and 0 with what is left, plus normal noise."""

    def draw(shape: tuple[int, int], source: torch.Generator) -> Tensor:
        at, drawn, low = uniform(shape, source), torch.zeros(shape, dtype=torch.float64), 0.0
        for value, chance in chances:
            drawn[(at > low) & (at <= low + chance)] = value
            low += chance
        return drawn + noise * normal(shape, source) if noise else drawn

    return draw


NULLS: Final[dict[str, Draw]] = {
    "normal": normal,
    "Student's t(3)": student(3),
    "lognormal(.5), tail up": lognormal(0.5, 1.0),
    "lognormal(.5), tail down": lognormal(0.5, -1.0),
    "exponential, tail down": exponential_down,
    "lognormal(1), tail up": lognormal(1.0, 1.0),
    "lognormal(1), tail down": lognormal(1.0, -1.0),
    "30 % not 0, normal": mostly_zero(normal, 0.3),
    "30 % not 0, lognormal(.5) down": mostly_zero(lognormal(0.5, -1.0), 0.3),
    "30 % not 0, lognormal(1) down": mostly_zero(lognormal(1.0, -1.0), 0.3),
    "10 % not 0, lognormal(1) down": mostly_zero(lognormal(1.0, -1.0), 0.1),
    "-5 with 1 %, +1 with 5 %": points((-5.0, 0.01), (1.0, 0.05)),
    "-5, +1 so, noise of .05": points((-5.0, 0.01), (1.0, 0.05), noise=0.05),
    "-20 with .25 %, +1 with 5 %": points((-20.0, 0.0025), (1.0, 0.05)),
    "-5 with 5 %, +1 with 25 %": points((-5.0, 0.05), (1.0, 0.25)),
    "-5 with 1/6, +1 with 5/6": points((-5.0, 1 / 6), (1.0, 5 / 6)),
    "right or wrong, 10 % change": points((-1.0, 0.05), (1.0, 0.05)),
    "right or wrong, 2 % change": points((-1.0, 0.01), (1.0, 0.01)),
}
BOUNDED: Final = {"right or wrong, 10 % change", "right or wrong, 2 % change"}


def drifting(draw: Draw, shape: tuple[int, int], looks: int, source: torch.Generator) -> list[Tensor]:
    """Return what each look sees of samples a fifth of which changes from look to look."""
    seen = [draw(shape, source)]
    while len(seen) < looks:
        changes = uniform(shape, source) <= DRAWN_ANEW
        seen.append(torch.where(changes, draw(shape, source), seen[-1]))
    return seen


def fresh(draw: Draw, shape: tuple[int, int], looks: int, source: torch.Generator) -> list[Tensor]:
    """Return what each look sees of samples that are others every time."""
    return [draw(shape, source) for _ in range(looks)]


def rates(seen: list[Tensor], *, is_bounded: bool = False) -> tuple[float, float, float]:
    """Judge ``(runs, n)`` differences of several looks.

    Returns:
        The share of runs that the test accepts at any look, the share that ``t >= 3`` does, and the share of looks at
        which the mean was never measured.
    """
    spending = LevelSpending(0.05)
    looks = [PairedGain.of_rows(rows, is_bounded=is_bounded) for rows in seen]
    runs = list(zip(*looks, strict=True))
    tested = sum(any(g.p_value <= spending.at(k) for k, g in enumerate(run, 1)) for run in runs)
    fixed = sum(any(g.t >= 3.0 for g in run) for run in runs)
    unknown = sum(g.is_sparse for run in runs for g in run)
    return tested / len(runs), fixed / len(runs), unknown / (len(runs) * len(looks))


def row(name: str, n: int, runs: int, looks: int, source: torch.Generator) -> str:
    """Return the figures of one null at one number of samples as text."""
    draw, is_bounded, shape = NULLS[name], name in BOUNDED, (runs, n)
    drifted = drifting(draw, shape, looks, source)
    found, fixed, unknown = rates(drifted, is_bounded=is_bounded)
    anew = rates(fresh(draw, shape, looks, source), is_bounded=is_bounded)[0]
    gain = GAIN * float(torch.cat(drifted).std()) / math.sqrt(n)
    # A seed that acts on few samples gains on those.
    useful = [
        torch.where(seen != 0, seen + gain / float((seen != 0).double().mean()), seen) for seen in drifted
    ]
    power = rates(useful, is_bounded=is_bounded)[0]
    start = f"{name:<32} {n:>5}"
    if unknown > 0.95:
        return f"{start}  {'never measured':>16}  {'':>6}  {fixed:6.1%}"
    return f"{start}  {found:8.1%}  {anew:6.1%}  {power:6.1%}  {fixed:6.1%}  {unknown:7.1%}"


def main() -> None:
    """Print a row for each null and number of samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--looks", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source = torch.Generator().manual_seed(given.seed)
    print(f"{given.runs} runs, {given.looks} looks, asked for 5 %; accepted at any look")
    print(
        f"{'differences':<32} {'n':>5}  {'drifting':>8}  {'fresh':>6}  {'power':>6}  {'t >= 3':>6}  unknown"
    )
    for name in NULLS:
        for n in SIZES:
            runs = given.runs // 2 if n == SIZES[-1] else given.runs
            print(row(name, n, runs, given.looks, source), flush=True)


if __name__ == "__main__":
    main()
