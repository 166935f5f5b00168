"""When a policy may germinate: on a plateau of the metric, or at fixed times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, final

from kasmina_core.policies.memory import Remembering
from kasmina_core.policies.protocol import Observation
from kasmina_core.records import Count


class Trigger(Protocol):
    """Decides when another seed may germinate."""

    def is_due(self, observation: Observation, growing: bool) -> bool:
        """Called once per epoch; return whether a seed may germinate.

        Args:
            observation: The model after the epoch.
            growing: Whether a seed is alive; the answer is then False.
        """
        ...

    def spend(self) -> None:
        """Called when a seed was germinated."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


@final
class Plateau(Remembering):
    """The metric's best has not improved by ``min_delta`` (relative to its size) for ``patience`` epochs.

    Epochs in which a seed grows do not count, nor do epochs without a finite metric.

    Args:
        patience: Epochs without improvement, at least 1.
        min_delta: Smallest improvement that counts, as a share of the best metric.

    Raises:
        ValueError: If a number is out of range.
    """

    remembers: ClassVar[dict[str, Any]] = {"best": float | None, "stale": Count}

    def __init__(self, patience: int = 3, min_delta: float = 0.01) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, not {patience!r}.")
        if not 0.0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be at least 0 and finite, not {min_delta!r}.")
        self.patience = patience
        self.min_delta = min_delta
        self._best: float | None = None
        self._stale = 0

    def is_due(self, observation: Observation, growing: bool) -> bool:
        """Record an epoch and return whether there is a plateau."""
        metric = observation.metric
        if metric is not None and math.isfinite(metric):
            sign = 1.0 if observation.higher_is_better else -1.0
            if self._best is None or sign * (metric - self._best) > self.min_delta * abs(self._best):
                self._best, self._stale = metric, 0
            else:
                self._stale += 1
        if growing:
            self._stale = 0
        return self._stale >= self.patience and metric is not None and math.isfinite(metric)

    @property
    def stale(self) -> int:
        """Epochs in a row, up to the last one, without an improvement."""
        return self._stale

    def spend(self) -> None:
        """Wait for the next plateau."""
        self._stale = 0


@final
class FixedTimes(Remembering):
    """Once at each of the given epochs, or as soon after it as the seeds before allow.

    Args:
        epochs: Epochs, as the model counts them; each at least 0.

    Raises:
        ValueError: If there is none, or one is negative.
    """

    remembers: ClassVar[dict[str, Any]] = {"spent": Count}

    def __init__(self, epochs: Sequence[int]) -> None:
        self.epochs = sorted(map(int, epochs))
        if not self.epochs or self.epochs[0] < 0:
            raise ValueError(f"epochs must be a list of numbers of at least 0, not {list(epochs)!r}.")
        self._spent = 0

    def is_due(self, observation: Observation, growing: bool) -> bool:
        """Return whether the next time has come; never while the metric is NaN or infinite."""
        metric = observation.metric
        diverged = metric is not None and not math.isfinite(metric)
        left = self.epochs[self._spent :]
        return bool(left) and left[0] <= observation.epoch and not growing and not diverged

    def spend(self) -> None:
        """Wait for the next time."""
        self._spent += 1
