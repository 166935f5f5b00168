"""How often the gates' test accepts a seed that does nothing: ``python -m benchmarks.error_rates``.

Paired differences are drawn whose true mean is 0, and looked at eight times while the seed changes: four fifths of each
difference stay, one fifth is new at every look. Beside the test stand two fixed thresholds on Student's t, looked at as
often. The last column is a seed whose true gain is 4 standard errors, normal differences: how often it is accepted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from kasmina_core.gates.sequential import LevelSpending, PairedGain, student_t_quantile

Draw = Callable[[tuple[int, int], torch.Generator], Tensor]
SIZES = (30, 100, 300)
KEPT = 0.8


def normal(shape: tuple[int, int], source: torch.Generator) -> Tensor:
    """Draw from the standard normal."""
    return torch.randn(shape, generator=source, dtype=torch.float64)


def lognormal(sigma: float, sign: float) -> Draw:
    """Return a draw of lognormal numbers less their mean, with the long tail up or down."""

    def draw(shape: tuple[int, int], source: torch.Generator) -> Tensor:
        return sign * ((sigma * normal(shape, source)).exp() - math.exp(sigma**2 / 2))

    return draw


def mostly_zero(draw: Draw, share: float) -> Draw:
    """Return a draw in which only a share of the samples differs at all."""
    return lambda shape, source: draw(shape, source) * (torch.rand(shape, generator=source) < share)


NULLS: dict[str, Draw] = {
    "normal": normal,
    "lognormal(.5), tail up": lognormal(0.5, 1.0),
    "lognormal(.5), tail down": lognormal(0.5, -1.0),
    "lognormal(1), tail up": lognormal(1.0, 1.0),
    "lognormal(1), tail down": lognormal(1.0, -1.0),
    "30 % not 0, normal": mostly_zero(normal, 0.3),
    "30 % not 0, lognormal(.5) down": mostly_zero(lognormal(0.5, -1.0), 0.3),
    "10 % not 0, normal": mostly_zero(normal, 0.1),
    "10 % not 0, lognormal(.5) down": mostly_zero(lognormal(0.5, -1.0), 0.1),
    "10 % not 0, lognormal(1) down": mostly_zero(lognormal(1.0, -1.0), 0.1),
}


def rates(
    draw: Draw, n: int, runs: int, looks: int, source: torch.Generator, gain: float = 0.0
) -> tuple[float, float, float]:
    """Return the share of runs accepted at any look by the test, by ``t >= 3``, and by Student's .95 quantile."""
    spending = LevelSpending(0.05, looks)
    same = draw((runs, n), source)
    columns = [KEPT * same + (1 - KEPT) * draw((runs, n), source) + gain for _ in range(looks)]
    once = student_t_quantile(0.95, n - 1)
    counts = [0, 0, 0]
    for run in range(runs):
        found = [PairedGain.of(column[run]) for column in columns]
        counts[0] += any(g.p_value <= spending.at(k) for k, g in enumerate(found, 1))
        counts[1] += any(g.t >= 3.0 for g in found)
        counts[2] += any(g.t >= once for g in found)
    test, fixed, uncorrected = (count / runs for count in counts)
    return test, fixed, uncorrected


def main() -> None:
    """Print a row for each null and number of samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--looks", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source = torch.Generator().manual_seed(given.seed)
    print(f"{given.runs} runs, {given.looks} looks, asked for 5 %; accepted at any look")
    print(f"{'differences':<32} {'n':>4}  {'test':>6}  {'t >= 3':>6}  {'t >= t(.95)':>11}")
    for name, draw in NULLS.items():
        for n in SIZES:
            found = rates(draw, n, given.runs, given.looks, source)
            print(f"{name:<32} {n:>4}  {found[0]:6.1%}  {found[1]:6.1%}  {found[2]:11.1%}", flush=True)
    for n in SIZES:
        spread = math.sqrt(KEPT**2 + (1 - KEPT) ** 2)
        found = rates(normal, n, given.runs, given.looks, source, gain=4.0 * spread / math.sqrt(n))
        print(
            f"{'a gain of 4 standard errors':<32} {n:>4}  {found[0]:6.1%}  {found[1]:6.1%}  {found[2]:11.1%}"
        )


if __name__ == "__main__":
    main()
