"""Paired evidence: losses of the same samples with and without a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, final

import torch
from torch import Tensor

from kasmina_core.gates.sequential import PairedGain
from kasmina_core.records import Count, Mark, Range, Record

_NOTHING: Mapping[float, Tensor] = MappingProxyType({})


@final
@dataclass(frozen=True, slots=True)
class SeedEvidence(Record):
    """Paired losses, or values of a metric, of the same held-out samples with and without a seed.

    With ``d_i = loss_i without - loss_i with`` over ``n`` samples (``with - without`` for a metric that grows with
    quality), ``gain`` is the mean of ``d``, ``standard_error`` its standard deviation over ``sqrt(n)`` and
    ``t = gain / standard_error``. Pairing removes the spread between samples, so that a small gain shows in few of
    them. Any loss or metric with one number per sample will do. Samples must be independent: in text a sample is a
    sequence, not a token.

    Attributes:
        samples: ``n``.
        gain: What the seed saves per sample at alpha 1, in units of the loss or metric; positive is good.
        standard_error: Of the gain, same units.
        loss_with: Mean loss or metric with the seed at alpha 1.
        loss_without: Mean loss or metric with the slot empty.
        deviation: ``rms(seed - host) / rms(host)`` at the slot, the largest of the batches.
        skewness: Of ``d``.
        smaller: Gains at smaller alphas, ``(alpha, gain)``, measured on the same samples.
        since_blending: Gain of the model with the seed over the host as it was when blending began, on the same
            samples; ``None`` before, or where the samples are others.
        informative: Samples that bear the gain at alpha 1; see `PairedGain`.
    """

    samples: Count
    gain: float
    standard_error: float
    loss_with: float
    loss_without: float
    deviation: float
    skewness: float = 0.0
    smaller: tuple[tuple[Annotated[float, Range(above=0.0, below=1.0)], PairedGain], ...] = ()
    since_blending: PairedGain | None = None
    informative: Annotated[Count | None, Mark.LATER] = None

    @property
    def paired(self) -> PairedGain:
        """The gain at alpha 1."""
        return PairedGain(self.samples, self.gain, self.standard_error, self.skewness, self.informative)

    @property
    def gains(self) -> dict[float, PairedGain]:
        """The gains by alpha, alpha 1 first."""
        return {1.0: self.paired, **dict(self.smaller)}

    @property
    def t(self) -> float:
        """``gain / standard_error``; 0 where both are 0 (the seed changes nothing), NaN if either is not finite."""
        return self.paired.t

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the gain for a single look; that of a gate holds over all of its looks."""
        return self.paired.interval(0.05)

    @classmethod
    def from_losses(
        cls,
        with_seed: Tensor,
        without_seed: Tensor,
        deviation: float = math.nan,
        *,
        smaller: Mapping[float, Tensor] = _NOTHING,
        before_blending: Tensor | None = None,
        higher_is_better: bool = False,
    ) -> SeedEvidence:
        """Compare vectors of per-sample losses of the same samples in the same order.

        Booleans are 0 and 1. Where all vectors hold them no loss can be larger than those seen, so that every sample is
        informative.

        Args:
            with_seed: With the seed at alpha 1, ``(n,)``.
            without_seed: With the slot empty, ``(n,)``.
            deviation: See the attribute.
            smaller: With the seed at other alphas, by alpha.
            before_blending: Of the host as it was when blending began; ignored if there are not ``n`` of them.
            higher_is_better: Whether the vectors hold a metric that grows with quality.

        Raises:
            ValueError: If they are not vectors of one length of at least 2.

        >>> import torch
        >>> SeedEvidence.from_losses(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 5.0])).gain
        1.3333333333333333
        """
        vectors = [with_seed, *smaller.values()]
        for vector in vectors:
            require_paired(vector, without_seed)
        sign = -1.0 if higher_is_better else 1.0
        is_bounded = all(v.dtype == torch.bool for v in (without_seed, *vectors))
        a, b = _wide(with_seed), _wide(without_seed)

        def gain(before: Tensor, after: Tensor) -> PairedGain:
            return PairedGain.of(sign * (before - after), is_bounded=is_bounded)

        found = gain(b, a)
        since = None
        if before_blending is not None and before_blending.shape == b.shape:
            since = gain(_wide(before_blending), a)
        return cls(
            samples=found.samples,
            gain=found.gain,
            standard_error=found.standard_error,
            loss_with=a.mean().item(),
            loss_without=b.mean().item(),
            deviation=float(deviation),
            skewness=found.skewness,
            smaller=tuple((float(alpha), gain(b, _wide(losses))) for alpha, losses in smaller.items()),
            since_blending=since,
            informative=found.informative,
        )


def require_paired(with_seed: Tensor, without_seed: Tensor) -> None:
    """Check that two tensors can be the losses of the same samples.

    Raises:
        ValueError: If they are not vectors of one length of at least 2.
    """
    if with_seed.dim() != 1 or with_seed.shape != without_seed.shape or with_seed.numel() < 2:
        raise ValueError(
            "Evidence needs two vectors of per-sample losses of the same samples, at least two of them.\n"
            f"  with the seed:    {tuple(with_seed.shape)}\n"
            f"  without the seed: {tuple(without_seed.shape)}\n"
            "The evaluator must return one loss per held-out sample: reduction='none'."
        )


def _wide(losses: Tensor) -> Tensor:
    return losses.detach().double().cpu()
