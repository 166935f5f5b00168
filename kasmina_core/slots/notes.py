"""Notes of a slot on its seed, by lifetime (seed, stage, epoch): an object is replaced as its lifetime ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast, final

import torch
from torch import Tensor

from kasmina_core.sharding import whole_tensor
from kasmina_core.verdicts import Evidence, GateLevel, GateResult


@final
class GradientNorms:
    """Number, sum and maximum of L2 norms.

    Args:
        count: How many there were.
        total: Their sum.
        largest: Their maximum.
    """

    # No module's attributes, which cost more to set than a small seed's norm to compute.
    __slots__ = ("_largest", "_total", "count")

    def __init__(self, count: int = 0, total: float = 0.0, largest: float = 0.0) -> None:
        self.count = count
        self._total, self._largest = torch.tensor([total, largest], device="cpu").unbind()

    def note(self, gradients: Sequence[Tensor]) -> None:
        """Take the gradients of one step, at least one; sharded ones are asked for whole."""
        norm = whole_tensor(_total_norm(gradients).detach()).float()
        if self.count == 0:
            # It begins the sums: a zero from the host would have to be waited for.
            self._total = self._largest = norm
        else:
            self._total = self._total.to(norm.device) + norm
            self._largest = torch.maximum(self._largest.to(norm.device), norm)
        self.count += 1

    @property
    def mean(self) -> float:
        """Their mean; there must be one."""
        return float(self._total) / self.count

    @property
    def largest(self) -> float:
        """The largest."""
        return float(self._largest)

    def record(self) -> tuple[int, float, float]:
        """Return the arguments that make such an object again."""
        return self.count, float(self._total), float(self._largest)


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    first = gradients[0]
    if all(type(g) is Tensor and g.dtype == first.dtype and g.device == first.device for g in gradients):
        # What get_total_norm does, without its sorting by device and dtype.
        norms: list[Tensor] = list(torch._foreach_norm(list(gradients)))
        return cast("Tensor", torch.linalg.vector_norm(torch.stack(norms)))
    return torch.nn.utils.get_total_norm(gradients)


@final
@dataclass(slots=True)
class EpochNotes:
    """Notes that end with the epoch.

    Attributes:
        evidence_is_fresh: Whether the evidence is of this epoch.
        isolation_is_fresh: Whether isolation was measured in this epoch.
        look: Number of the look that was counted in this epoch; 0 for none.
        failure: What the measurement for the gates raised in this epoch, as text; empty if nothing.
        norms: Gradient norms of the epoch's steps.
    """

    evidence_is_fresh: bool = False
    isolation_is_fresh: bool = False
    look: int = 0
    norms: GradientNorms = field(default_factory=GradientNorms)
    failure: str = ""


@final
@dataclass(slots=True)
class StageNotes:
    """Notes that end with the stage.

    Attributes:
        gains: Gains as measured, oldest first.
        looks: Looks of the gates' test.
    """

    gains: list[float] = field(default_factory=list)
    looks: int = 0


@final
@dataclass(slots=True)
class SeedNotes:
    """Notes that end with the seed.

    Attributes:
        evidence: The evidence as last measured.
        host_losses: Held-out losses of the host as last measured in TRAINING, one per sample.
        frozen_by_pause: Names of the seed's parameters that ``resume`` makes trainable again.
        error_share: Part of the gates' error rate that the seed may spend, in (0, 1].
        incubations: Calls of ``incubate`` since germination.
        is_coupled: Whether samples were found to change what the seed learns from others; ``None`` if that was not tried.
        steps_since_isolation: Optimiser steps since isolation was measured.
        steps: Optimiser steps in which the seed was active.
        trend: Of a seed that was put in straight, epochs that the host had learned and the metric then, oldest first.
        stage: Notes that end with the stage.
        epoch: Notes that end with the epoch.
        answers: Results of gates, in the order asked. They end with the epoch, with the stage, and when a command
            changes what a gate looks at.
    """

    evidence: Evidence | None = None
    host_losses: Tensor | None = None
    frozen_by_pause: list[str] = field(default_factory=list)
    error_share: float = 1.0
    incubations: int = 0
    is_coupled: bool | None = None
    steps_since_isolation: int = 0
    steps: int = 0
    trend: tuple[tuple[int, float], ...] = ()
    stage: StageNotes = field(default_factory=StageNotes)
    epoch: EpochNotes = field(default_factory=EpochNotes)
    answers: dict[GateLevel, GateResult] = field(default_factory=dict)

    def begin_stage(self) -> None:
        """End the notes of the stage."""
        self.stage, self.answers = StageNotes(), {}

    def begin_epoch(self) -> None:
        """End the notes of the epoch."""
        self.epoch, self.answers = EpochNotes(), {}

    def take_look(self) -> int:
        """Count a look of the gates' test, at most one per epoch and stage, and return its number."""
        if not self.look_is_counted:
            self.stage.looks += 1
            self.epoch.look = self.stage.looks
        return self.stage.looks

    @property
    def look_is_counted(self) -> bool:
        """Whether the stage's last look was counted in this epoch."""
        return self.stage.looks > 0 and self.epoch.look == self.stage.looks
