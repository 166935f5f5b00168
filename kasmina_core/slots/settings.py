"""Settings that a slot reads: how its seed learns, blends in and cools down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, final

from kasmina_core.blending import AlphaSchedule
from kasmina_core.topology import Topology


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
