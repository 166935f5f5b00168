"""Settings of the growth of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Self, final, get_type_hints

from kasmina_core.blending import AlphaSchedule
from kasmina_core.errors import CheckpointError
from kasmina_core.gates.gates import QualityGates
from kasmina_core.gates.thresholds import GateProfile, GateThresholds, chosen
from kasmina_core.records import demand_fields, read
from kasmina_core.slots.settings import GradientPolicy, Incubation, RampUnit, StraightInsertion
from kasmina_core.topology import Topology

_ADDED: Final = {"straight", "joint_incubation"}
"""Fields that earlier versions did not write."""


@final
@dataclass(frozen=True, slots=True)
class GrowthConfig:
    """How the slots of a model treat their seeds.

    Attributes:
        incubation: How seeds learn in TRAINING.
        max_deviation: Largest deviation of a seed from the host in straight-through TRAINING, as a share of the
            host's RMS per sample; ``inf`` for none.
        max_incubation_deviation: Deviation from the host, ``rms(seed - host) / rms(host)`` over a batch, beyond which
            a seed in TRAINING is stopped; NaN stops it too. It is measured on what would be blended in,
            before ``max_deviation`` bounds it. ``inf`` for no limit.
        incubate_every: Calls of `MorphogeneticModel.incubate` of which one runs the counterfactual pass; in between
            the seed does not learn.
        joint_incubation: Whether seeds that learn in one call of `MorphogeneticModel.incubate` share a pass, each on a part
            of the batch of its own. See there.
        keep_snapshot: Whether the host is copied in memory when a seed begins to blend in, so that
            `MorphogeneticModel.cull` can put it back. It costs the host's size and its optimiser's state once more. For
            a seed that is put in straight it is copied in any case.
        ramp_steps: Steps of the alpha ramp.
        ramp_unit: What a step of the ramp is.
        temperature: Steepness of the ramp in steps; ``None`` for ``ramp_steps / 12``.
        straight: How seeds that are put in straight (``germinate(..., straight=True)``) join, and when they are judged.
        embargo_epochs: Epochs in EMBARGOED before the slot is reset.
        isolation_every: Optimiser steps between two measurements of isolation in TRAINING; 0 for once an epoch only.
        higher_is_better: Whether the metric given to ``step_epoch`` grows with quality.
        gradient_policies: Gradient policy of each topology; for one that is left out, the topology's own
            (``Topology.detach_input_in_blending``).
        nested_slots: How many further slots open at each point, one behind the other, each when the seed before it has
            become a fossil; see `MorphogeneticModel.open_slot`. 0 for none.
        gates: The quality gates; `GateThresholds` stand for gates that have them.
        pack_gate_checks: Whether the gate checks of packs (``kasmina_gate_checks``) join the gates: those of the packs that
            the model's registry holds. They may refuse a transition, never allow one.
        seed: Number from which the weights of each new seed are derived, so that they draw on no global generator.

    Raises:
        TypeError: If ``gates`` are neither gates nor thresholds, or ``straight`` is no `StraightInsertion`.
        ValueError: If a value is out of range.
    """

    incubation: Incubation = Incubation.STRAIGHT_THROUGH
    max_deviation: float = 0.1
    max_incubation_deviation: float = 10.0
    incubate_every: int = 1
    joint_incubation: bool = False
    keep_snapshot: bool = False
    ramp_steps: int = 5
    ramp_unit: RampUnit = RampUnit.EPOCH
    temperature: float | None = None
    straight: StraightInsertion = field(default_factory=StraightInsertion)
    embargo_epochs: int = 3
    isolation_every: int = 100
    higher_is_better: bool = False
    gradient_policies: Mapping[Topology, GradientPolicy] = field(
        default_factory=lambda: {
            topology: GradientPolicy(topology.detach_input_in_blending) for topology in Topology
        }
    )
    gates: QualityGates = field(default_factory=QualityGates)
    pack_gate_checks: bool = True
    nested_slots: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "incubation", chosen("incubation", Incubation, self.incubation))
        object.__setattr__(self, "ramp_unit", chosen("ramp_unit", RampUnit, self.ramp_unit))
        gates: object = self.gates
        if isinstance(gates, GateThresholds):
            object.__setattr__(self, "gates", QualityGates(thresholds=gates))
        elif not isinstance(gates, QualityGates):
            raise TypeError(f"gates must be QualityGates or GateThresholds, not {gates!r:.200}.")
        if not isinstance(self.straight, StraightInsertion):
            raise TypeError(f"straight must be a StraightInsertion, not {self.straight!r:.200}.")
        for name in ("max_deviation", "max_incubation_deviation"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)!r}.")
        if self.incubate_every < 1:
            raise ValueError(f"incubate_every must be at least 1, not {self.incubate_every!r}.")
        for name in ("embargo_epochs", "isolation_every", "nested_slots"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)!r}.")
        if odd := [key for key in self.gradient_policies if not isinstance(key, Topology)]:
            raise ValueError(f"gradient_policies must map topologies, such as Topology.CNN, not {odd[0]!r}.")
        if type(self.ramp_steps) is not int or self.ramp_steps < 1:
            raise ValueError(f"ramp_steps must be a whole number of at least 1, not {self.ramp_steps!r}.")
        self.make_schedule()

    def make_schedule(self) -> AlphaSchedule:
        """Return a new ramp."""
        return AlphaSchedule(self.ramp_steps, temperature=self.temperature)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: what `from_dict` takes.

        Raises:
            ValueError: If the gates have ``extra_checks``: a function is not written down.
        """
        if self.gates.extra_checks:
            names = ", ".join(check.name for check in self.gates.extra_checks)
            raise ValueError(
                f"Gates with extra_checks cannot be written, because these are functions: {names}."
            )
        written = {f.name: getattr(self, f.name) for f in fields(self)}
        return written | {
            "incubation": self.incubation.value,
            "ramp_unit": self.ramp_unit.value,
            "straight": self.straight.to_dict(),
            "gradient_policies": {
                topology.value: policy.detach_input_in_blending
                for topology, policy in self.gradient_policies.items()
            },
            "gates": {"profile": self.gates.profile.value, "thresholds": self.gates.thresholds.to_dict()},
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Rebuild from `to_dict`.

        Raises:
            CheckpointError: If a field is missing, unknown, of another type or out of range.
            TopologyError: If no loaded pack has one of the topologies.
        """
        what = f"The saved {cls.__name__}"
        hints = get_type_hints(cls) | {"gradient_policies": dict[str, bool], "gates": dict[str, Any]}
        data = read(dict[str, Any], data, what)
        demand_fields(data, hints.keys() - _ADDED, hints, what)
        values = {name: read(hint, data[name], what, name) for name, hint in hints.items() if name in data}
        profile = read(GateProfile, values["gates"].get("profile"), what, "gates.profile")
        thresholds = GateThresholds.from_dict(values["gates"].get("thresholds"), f"{what}, gates.thresholds,")
        values["gates"] = QualityGates(profile, thresholds)
        values["gradient_policies"] = {
            Topology(name): GradientPolicy(detach) for name, detach in values["gradient_policies"].items()
        }
        try:
            return cls(**values)
        except ValueError as error:
            raise CheckpointError(f"{what} cannot be read: {error}") from error

    @classmethod
    def recommended(
        cls, steps_per_epoch: int | None = None, *, ramp_epochs: float = 4.0, **changes: Any
    ) -> Self:
        """Return the settings that ``kasmina grow`` uses: counterfactual incubation, proof in probation, a kept snapshot.

        Call `MorphogeneticModel.incubate` in each step, or the seeds do not learn.

        Args:
            steps_per_epoch: Optimiser steps of an epoch; alpha then moves at each of them. ``None``: at each epoch.
            ramp_epochs: Length of the alpha ramp.
            changes: Fields to set otherwise.

        Raises:
            ValueError: If ``steps_per_epoch`` is no whole number of at least 1, or a field is out of range.

        >>> GrowthConfig.recommended(steps_per_epoch=38, seed=1).ramp_steps
        152
        """
        by_step = steps_per_epoch is not None
        if by_step and (type(steps_per_epoch) is not int or steps_per_epoch < 1):
            raise ValueError(
                f"steps_per_epoch must be a whole number of at least 1, not {steps_per_epoch!r}."
            )
        settings: dict[str, Any] = {
            "incubation": Incubation.COUNTERFACTUAL,
            "ramp_unit": RampUnit.STEP if by_step else RampUnit.EPOCH,
            "ramp_steps": max(
                1, round(ramp_epochs * (steps_per_epoch if steps_per_epoch is not None else 1))
            ),
            "keep_snapshot": True,
            "gates": GateThresholds.proof_in_probation(),
        }
        return cls(**(settings | changes))
