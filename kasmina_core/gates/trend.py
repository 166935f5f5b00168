"""Trend of a host's metric, and what a model has gained over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class TrendGap:
    """Gain of a model over what its host would have become without the seeds that were put in.

    The host's metric is taken to approach some value as one over the square root of its epochs. With
    ``x = -1 / sqrt(epoch)``, a line through the ``n`` metrics before the insertion, fitted by least squares with residual
    deviation ``s``, foretells the metric at ``x``, with the standard error of one new observation::

        s * sqrt(1 + 1 / n + (x - mean(x_i))² / sum((x_i - mean(x_i))²))

    A host that was getting worse is taken to have stayed at its mean. The figures are exact for independent normal
    residuals; those of a smooth curve are neither, so no error rate is promised. Of lines over the epochs, their
    logarithm, ``-1 / sqrt(epoch)`` and ``-1 / epoch``, the first two asked too much of hosts left alone (language models
    and convolutions at 4 to 16 epochs: up to 4.8 and 1.3 nats behind their line), and the last too little.

    Attributes:
        gain: Metric now minus the one foretold, or the reverse where lower is better; positive is good.
        standard_error: Of the gain, same units.
        freedom: Degrees of freedom of the error, ``n - 2``.
    """

    gain: float
    standard_error: float
    freedom: int

    @classmethod
    def of(
        cls, before: Sequence[tuple[int, float]], epoch: int, metric: float, *, higher_is_better: bool
    ) -> TrendGap | None:
        """Compare a metric with the trend of those before; ``None`` for fewer than three, or one that is not finite.

        Args:
            before: Epochs that the host had learned, each at least 1, and the metric then.
            epoch: Epochs that it has learned now.
            metric: The metric now.
            higher_is_better: Whether the metric grows with quality.

        >>> gap = TrendGap.of([(1, 3.0), (4, 2.0), (16, 1.5)], 64, 1.15, higher_is_better=False)
        >>> round(gap.gain, 6)
        0.1
        """
        sign = 1.0 if higher_is_better else -1.0
        n, y = len(before), [sign * value for _, value in before]
        if n < 3 or not all(map(math.isfinite, [*y, metric])):
            return None
        x, at = [_abscissa(each) for each, _ in before], _abscissa(epoch)
        x_mean, y_mean = math.fsum(x) / n, math.fsum(y) / n
        spread = math.fsum((each - x_mean) ** 2 for each in x)
        if spread == 0.0:
            return None
        slope = math.fsum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / spread
        slope = max(slope, 0.0)
        rest = math.fsum((b - y_mean - slope * (a - x_mean)) ** 2 for a, b in zip(x, y, strict=True))
        error = math.sqrt(rest / (n - 2) * (1 + 1 / n + (at - x_mean) ** 2 / spread))
        return cls(sign * metric - y_mean - slope * (at - x_mean), error, n - 2)

    @property
    def t(self) -> float:
        """``gain / standard_error``; infinite where the line had no residuals, 0 where the gain is 0 too."""
        if self.standard_error == 0.0:
            return 0.0 if self.gain == 0.0 else math.copysign(math.inf, self.gain)
        return self.gain / self.standard_error


def _abscissa(epoch: int) -> float:
    return -1.0 / math.sqrt(max(1, epoch))
