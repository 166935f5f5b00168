"""What one can know of a seed: the same samples, with it and without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, final

from torch import Tensor

from kasmina_core.errors import CheckpointError


@final
@dataclass(frozen=True, slots=True)
class SeedEvidence:
    """Paired losses of the same held-out samples with and without a seed.

    With ``d_i = loss_i without - loss_i with`` over ``n`` samples, ``gain`` is the mean of ``d``, ``standard_error``
    its standard deviation over ``sqrt(n)`` and ``t = gain / standard_error``. Pairing removes the spread between
    samples, so that a small gain shows in few of them.

    Attributes:
        samples: ``n``.
        gain: Loss the seed saves per sample, in units of the loss; positive is good.
        standard_error: Of the gain, same units.
        loss_with: Mean loss with the seed at alpha 1.
        loss_without: Mean loss with the slot empty.
        deviation: ``rms(seed - host) / rms(host)`` at the slot, the largest of the batches.
    """

    samples: int
    gain: float
    standard_error: float
    loss_with: float
    loss_without: float
    deviation: float

    @property
    def t(self) -> float:
        """``gain / standard_error``; 0 where both are 0 (the seed changes nothing), NaN if either is not finite."""
        if not (math.isfinite(self.gain) and math.isfinite(self.standard_error)):
            return math.nan
        if self.standard_error == 0.0:
            return 0.0 if self.gain == 0.0 else math.copysign(math.inf, self.gain)
        return self.gain / self.standard_error

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the gain, ``gain ± 1.96 * standard_error`` (normal approximation)."""
        return self.gain - 1.96 * self.standard_error, self.gain + 1.96 * self.standard_error

    @classmethod
    def from_losses(
        cls, with_seed: Tensor, without_seed: Tensor, deviation: float = math.nan
    ) -> SeedEvidence:
        """Compare two vectors of per-sample losses of the same samples in the same order.

        Raises:
            ValueError: If they are not two vectors of one length of at least 2.

        >>> import torch
        >>> SeedEvidence.from_losses(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 5.0])).gain
        1.3333333333333333
        """
        if with_seed.dim() != 1 or with_seed.shape != without_seed.shape or with_seed.numel() < 2:
            raise ValueError(
                "Evidence needs two vectors of per-sample losses of the same samples, at least two of them.\n"
                f"  with the seed:    {tuple(with_seed.shape)}\n"
                f"  without the seed: {tuple(without_seed.shape)}\n"
                "The evaluator must return one loss per held-out sample: reduction='none'."
            )
        a, b = with_seed.detach().double().cpu(), without_seed.detach().double().cpu()
        saved = b - a
        n = saved.numel()
        return cls(
            samples=n,
            gain=saved.mean().item(),
            standard_error=saved.std().item() / math.sqrt(n),
            loss_with=a.mean().item(),
            loss_without=b.mean().item(),
            deviation=float(deviation),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SeedEvidence:
        """Rebuild from `to_dict`.

        Raises:
            CheckpointError: If a field is missing, unknown or no number.
        """
        try:
            evidence = cls(**data)
        except TypeError as error:
            raise CheckpointError(f"The saved evidence cannot be read: {error}") from error
        for f in fields(cls):
            value = getattr(evidence, f.name)
            wanted = int if f.name == "samples" else (int, float)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise CheckpointError(f"SeedEvidence.{f.name} cannot be {value!r}.")
        return evidence
