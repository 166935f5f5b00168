"""Settings that a slot reads: how its seed learns, blends in and cools down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol, final

from kasmina_core.blending import AlphaSchedule
from kasmina_core.records import Record
from kasmina_core.topology import Topology

LEAST_TREND: Final = 3
"""Epochs that a trend needs: a line through two points has no error."""


@final
class Incubation(Enum):
    """How a seed learns in TRAINING.

    - ``STRAIGHT_THROUGH``: in the host's own pass; its deviation is bounded. Costs the seed alone.
    - ``COUNTERFACTUAL``: in a pass of its own where its output replaces the host's, run by
      `MorphogeneticModel.incubate`. Costs one more pass; the seed sees the effect of its output and stays bounded.
    """

    STRAIGHT_THROUGH = "straight-through"
    COUNTERFACTUAL = "counterfactual"


@final
class RampUnit(Enum):
    """What moves alpha: ``step_epoch`` or, per optimiser step, ``step``."""

    EPOCH = "epoch"
    STEP = "step"


@final
@dataclass(frozen=True, slots=True)
class StraightInsertion(Record):
    """How a seed that is put in straight joins the model, and when it is judged.

    It learns nothing before it contributes, and gates G1, G2 and G4 are not asked. G5 is, after ``lag``: the model is
    then compared with what the host would have become, as its own metrics before the insertion foretell
    (`TrendGap`). The host is kept for a revert in any case, see ``GrowthConfig.keep_snapshot``.

    Attributes:
        ramp_steps: Steps of the alpha ramp, the first of them at the insertion; 1 sets alpha 1 at once, and G3 is then
            not asked either.
        ramp_unit: What a step of the ramp is.
        lag: Epochs or optimiser steps (calls of `MorphogeneticModel.step`) after the insertion before G5 judges.
            The loss right after it misleads.
        lag_unit: What ``lag`` counts.
        trend_epochs: Epochs before the insertion whose metrics make the host's trend, at most; at least 3.

    Raises:
        ValueError: If a number is out of range.
    """

    ramp_steps: int = 1
    ramp_unit: RampUnit = RampUnit.STEP
    lag: int = 3
    lag_unit: RampUnit = RampUnit.EPOCH
    trend_epochs: int = 8

    def __post_init__(self) -> None:
        for name, least in (("ramp_steps", 1), ("lag", 0), ("trend_epochs", LEAST_TREND)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        for name in ("ramp_unit", "lag_unit"):
            object.__setattr__(self, name, RampUnit(getattr(self, name)))


@final
@dataclass(frozen=True, slots=True)
class GradientPolicy:
    """Whether the seed's input is detached while it blends in.

    Detached, the host upstream learns from its own path alone; attached, host and seed co-adapt. From SHADOWING on
    the input is always attached: a detached one would freeze everything upstream.
    """

    detach_input_in_blending: bool


class SlotSettings(Protocol):
    """The part of a `GrowthConfig` that a slot reads; see there for each field."""

    @property
    def incubation(self) -> Incubation: ...
    @property
    def max_deviation(self) -> float: ...
    @property
    def max_incubation_deviation(self) -> float: ...
    @property
    def incubate_every(self) -> int: ...
    @property
    def ramp_unit(self) -> RampUnit: ...
    @property
    def straight(self) -> StraightInsertion: ...
    @property
    def embargo_epochs(self) -> int: ...
    @property
    def isolation_every(self) -> int: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def gradient_policies(self) -> Mapping[Topology, GradientPolicy]: ...
    @property
    def seed(self) -> int: ...
    @property
    def gates(self) -> Any:
        """For the judge; the slot does not look into it."""
        ...

    def make_schedule(self) -> AlphaSchedule:
        """Return a new ramp."""
        ...
