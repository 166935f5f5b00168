"""Growth by a plan: in waves, at points of the run that are set beforehand."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

from kasmina_core.errors import KasminaError, did_you_mean
from kasmina_core.lifecycle import SeedStage
from kasmina_core.policies.growing import Candidates, GrowingPolicy, Pair, SeedCare, living_seeds
from kasmina_core.policies.memory import Remembering
from kasmina_core.policies.protocol import Advance, Command, Cull, Germinate, Observation, SlotObservation
from kasmina_core.records import Count, is_plain
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    from kasmina_core.blueprints.catalogue import BlueprintRegistry

UNITS: Final[Mapping[str, int]] = {"epochs": 1, "steps": 1, "flops": 2, "seconds": 2}
"""Units of a plan, each with the power of its parameters with which a model's need grows: a model twice as large needs
twice the samples, and twice the operations for each of them."""

_ALL: Final = 1 << 30
"""More slots than a model has."""

LEAST_EPOCHS: Final = 3
"""Epochs before the first wave that is put in straight: the host's trend needs as many."""

Sizes = Callable[[SlotObservation, str, Mapping[str, Any]], int]
"""Returns how many parameters a blueprint with these options would have in a slot."""


def blueprint_sizes(registry: BlueprintRegistry) -> Sizes:
    """Return a function that counts the parameters of a registry's blueprints, on modules that hold no memory.

    Args:
        registry: Offers the blueprints, such as ``default_registry().blueprints``.
    """

    @cache
    def counted(blueprint: str, topology: Topology, dim: int, options: str) -> int:
        import torch

        from kasmina_core.quiet import private_rng

        with torch.device("meta"), private_rng(0):
            module = registry.create(blueprint, dim, topology=topology, options=json.loads(options))
        return sum(p.numel() for p in module.parameters())

    def size(slot: SlotObservation, blueprint: str, options: Mapping[str, Any]) -> int:
        return counted(blueprint, slot.topology, slot.dim, json.dumps(dict(options), sort_keys=True))

    return size


@final
class PlannedPoints(Remembering):
    """The points of a plan: how far the run has come, and where the next wave is due.

    Args:
        unit: One of `UNITS`.
        next_point: Returns where the next wave is due, given how many there were; ``None`` if there is no other.
        earliest: Epoch before which none is due.
        clock: Returns seconds from any start.
    """

    remembers: ClassVar[dict[str, Any]] = {"waves": Count, "seconds": float}

    def __init__(
        self,
        unit: str,
        next_point: Callable[[int, Observation], float | None],
        earliest: int,
        clock: Callable[[], float],
    ) -> None:
        self.unit = unit
        self.earliest = earliest
        self._next_point = next_point
        self._clock = clock
        self._waves = 0
        self._seconds = 0.0
        self._last_tick = clock() if unit == "seconds" else 0.0
        self._is_due = False

    @property
    def waves(self) -> int:
        """Waves so far."""
        return self._waves

    @property
    def wave(self) -> int:
        """Number of the wave that may germinate now, from 0: the next one, or what is made up for of the last one."""
        return self._waves if self._is_due else max(0, self._waves - 1)

    def progress(self, observation: Observation) -> float:
        """Return what the run has spent, in the unit.

        Raises:
            KasminaError: If the observation does not say it.
        """
        if self.unit == "seconds":
            return self._seconds
        found = {"epochs": observation.epoch, "steps": observation.steps, "flops": observation.flops}[
            self.unit
        ]
        if found is None:
            raise KasminaError(
                "A plan in flops must be told what is spent: step_epoch(metric, flops=spent_so_far)."
            )
        return float(found)

    def is_due(self, observation: Observation, growing: bool) -> bool:
        """Return whether the next wave's point has been reached; never while seeds of the last one are on trial."""
        if self.unit == "seconds":
            now = self._clock()
            self._seconds += now - self._last_tick
            self._last_tick = now
        reached = self.progress(observation)
        metric = observation.metric
        self._is_due = False
        if growing or observation.epoch < self.earliest or (metric is not None and not math.isfinite(metric)):
            return False
        point = self._next_point(self._waves, observation)
        self._is_due = point is not None and reached >= point
        return self._is_due

    def spend(self) -> None:
        """Wait for the next point; a seed in the place of one that gate G0 refused is of the same wave."""
        self._waves += self._is_due

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the clock goes on from here."""
        super().load_state_dict(state)
        self._last_tick = self._clock() if self.unit == "seconds" else 0.0


@final
class PlanPolicy(GrowingPolicy):
    """Grow in waves at points that are set beforehand, each in all free slots at once.

    One of three says when. ``at``: these points. ``shares``: these shares of a budget. ``needs``: without a known end,
    when ``share`` of what the *next* size needs is spent. A model of ``n`` parameters is taken to need ``needs * n``
    epochs or steps, or ``needs * n²`` FLOPs or seconds; the next size has all free slots filled. A wave comes after the
    first epoch that reaches its point, and waits until no seed of the one before is on trial.

    By default seeds are put in straight, see `SeedSlot.germinate`. They then stand or fall together: a wave is kept once
    G5 passes all of its seeds, and taken back, in reverse order and with the host put back, when G5 has refused it in
    ``patience`` epochs. With ``straight=False`` each seed lives the whole lifecycle, and is kept or culled as in
    `PlateauPolicy`.

    Args:
        blueprints: Candidates by topology: a mapping, or a function of a slot's observation; the first that gate G0 does
            not refuse is grown. Ids or short names.
        at: Points of the waves, rising.
        shares: Shares of the budget, rising, in (0, 1).
        needs: What a model needs per parameter (``epochs``, ``steps``) or per squared parameter (``flops``, ``seconds``).
        share: With ``needs``, share of the next size's need, in (0, 1].
        unit: What points and budget count: ``epochs``; ``steps``, calls of `MorphogeneticModel.step`; ``flops``, as given
            to ``step_epoch``; or ``seconds`` since the policy was made, or loaded. Clocks differ between processes: let
            one of them decide.
        budget: What shares are of. Default that of the observation, in FLOPs.
        options: Options of the blueprints, plain data.
        doubles: Name of an option, such as ``copies``, that is twice as large in each wave as in the one before.
        straight: Whether seeds are put in straight; then no wave comes before the third epoch.
        patience: Epochs in which G5 may refuse a wave that was put in straight; also epochs without a finite metric until
            the model counts as diverged.
        max_training_epochs, max_probation_epochs: As in `PlateauPolicy`, for ``straight=False``.
        max_waves: Waves at most; ``None`` for all that the plan has and the model has slots for.
        revert: Whether a cull puts the host back.
        sizes: Returns the parameters of a blueprint in a slot, such as `blueprint_sizes`; required with ``needs``.
        clock: Returns seconds from any start.

    Raises:
        ValueError: If the plan is none: the message has the line to write.
        TypeError: If ``blueprints`` is neither a mapping to lists nor a function.
        TopologyError: If it maps something that is no topology.
    """

    remembers: ClassVar = GrowingPolicy.remembers | {"wave": list[str], "refusals": Count}

    def __init__(
        self,
        blueprints: Candidates,
        *,
        at: Sequence[float] | None = None,
        shares: Sequence[float] | None = None,
        needs: float | None = None,
        share: float = 0.1,
        unit: str = "epochs",
        budget: float | None = None,
        options: Mapping[str, Any] | None = None,
        doubles: str | None = None,
        straight: bool = True,
        patience: int = 8,
        max_training_epochs: int = 8,
        max_probation_epochs: int = 8,
        max_waves: int | None = None,
        revert: bool = True,
        sizes: Sizes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if unit not in UNITS:
            raise ValueError(f"There is no unit {unit!r}.{did_you_mean(str(unit), UNITS)}")
        _demand_one_plan(at, shares, needs)
        for name, points, most in (("at", at, math.inf), ("shares", shares, 1.0)):
            _demand_rising(name, points, most)
        for name, number in (("needs", needs), ("budget", budget)):
            if number is not None and not 0.0 < number < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {number!r}.")
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be above 0 and at most 1, not {share!r}.")
        if shares is not None and budget is None and unit != "flops":
            raise ValueError(
                f"shares are of a budget: give budget=, in {unit}. (In flops it is that of step_epoch(flops=, budget=).)"
            )
        if needs is not None and sizes is None:
            raise ValueError(
                "needs asks for sizes=, such as blueprint_sizes(default_registry().blueprints): it counts the next size."
            )
        for name, count in (("patience", patience), ("max_waves", max_waves)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, not {count!r}.")
        self.options = dict(options or {})
        if not is_plain(self.options):
            raise ValueError(f"options must be plain data, not {options!r:.200}.")
        first = self.options.get(doubles) if doubles is not None else 1
        if type(first) is not int or first < 1:
            raise ValueError(
                f"doubles={doubles!r} names an option that starts as a whole number of at least 1: options={{{doubles!r}: 1}}."
            )
        self._at, self._shares, self._needs, self._share = at, shares, needs, share
        self._budget, self._sizes = budget, sizes
        self.doubles, self.straight, self.max_waves = doubles, straight, max_waves
        self.points = PlannedPoints(unit, self._point, LEAST_EPOCHS if straight else 0, clock)
        care = SeedCare(max_training_epochs, max_probation_epochs, revert)
        super().__init__(blueprints, self.points, care, max_growing=_ALL, patience=patience)
        self._wave: list[str] = []
        self._refusals = 0

    def decide(self, observation: Observation) -> Sequence[Command]:
        """Return at most one command per slot."""
        commands = super().decide(observation)
        if any(isinstance(command, Germinate) for command in commands):
            self._wave = [command.slot for command in commands if isinstance(command, Germinate)]
            self._refusals = 0
        culls = {command.slot: command for command in commands if isinstance(command, Cull)}
        wave = [slot for slot in self._on_trial(observation) if not slot.is_paused]
        if not any(slot.slot in culls for slot in wave):
            return commands
        # The last one first: the host can be put back for an earlier one once the later ones are gone.
        wave.sort(key=lambda slot: self._wave.index(slot.slot), reverse=True)
        reason = next(iter(culls.values())).reason
        revert = self.care.revert and wave[0].can_revert
        others = [c for c in commands if getattr(c, "slot", "") not in {slot.slot for slot in wave}]
        return [*(Cull(slot.slot, reason, revert=revert) for slot in wave), *others]

    def judge(self, observation: Observation, slot: SlotObservation) -> Command | None:
        """Keep or take back a wave that was put in straight as a whole; any other seed as in `SeedCare`."""
        wave = self._on_trial(observation)
        if slot not in wave:
            return self.care.judge(slot)
        if any(one.is_paused for one in wave):
            return None
        if all(one.stage is SeedStage.PROBATIONARY and one.gate_passed for one in wave):
            return Advance(slot.slot)
        if self._refusals >= self.silence:
            return Cull(slot.slot, f"its wave was refused in {self._refusals} epochs: {slot.gate_reason}")
        return None

    def learn(self, observation: Observation) -> None:
        """Count the epochs in which G5 refused the wave."""
        wave = self._on_trial(observation)
        judged = [slot for slot in wave if slot.stage is SeedStage.PROBATIONARY and not slot.is_paused]
        self._refusals += any(slot.gate_verdict == "failed" for slot in judged)

    def germinate(self, pair: Pair) -> Germinate:
        """Return the command that grows a pair, with the options of the wave."""
        command = super().germinate(pair)
        return Germinate(command.slot, command.blueprint, self._options(self.points.wave), self.straight)

    def _options(self, wave: int) -> dict[str, Any]:
        doubled = {self.doubles: self.options[self.doubles] * 2**wave} if self.doubles is not None else {}
        return self.options | doubled

    def _on_trial(self, observation: Observation) -> list[SlotObservation]:
        """Return the slots of the wave whose seeds were put in straight and are neither kept nor gone."""
        return [slot for slot in living_seeds(observation) if slot.slot in self._wave and slot.unasked]

    def _point(self, waves: int, observation: Observation) -> float | None:
        """Return where the next wave is due; ``None`` if there is none."""
        if self.max_waves is not None and waves >= self.max_waves:
            return None
        if self._needs is not None:
            return self._share * self._needs * self._next_size(observation) ** UNITS[self.points.unit]
        points = self._at if self._at is not None else self._shares or ()
        if waves >= len(points):
            return None
        if self._at is not None:
            return points[waves]
        budget = self._budget if self._budget is not None else observation.budget
        if budget is None:
            raise KasminaError(
                "The shares of the plan are of a budget that nobody gave: step_epoch(metric, flops=spent, budget=all), "
                "or PlanPolicy(..., budget=all)."
            )
        return points[waves] * budget

    def _next_size(self, observation: Observation) -> float:
        """Return the parameters of the model once all free slots are filled; infinite where none is free."""
        first: dict[str, str] = {}
        for slot, blueprint in self.pairs(observation):
            first.setdefault(slot, blueprint)
        if not first or self._sizes is None:
            return math.inf
        slots = {slot.slot: slot for slot in observation.slots}
        options = self._options(self.points.waves)
        added = sum(self._sizes(slots[name], blueprint, options) for name, blueprint in first.items())
        return float(observation.host_parameters + observation.seed_parameters + added)


def _demand_one_plan(*plans: object) -> None:
    if sum(plan is not None for plan in plans) != 1:
        raise ValueError(
            "A plan says in one way when to grow: at=[200, 800] (points), shares=[0.1, 0.4] with budget= (of a run with a "
            "known end), or needs=, share=0.1 (without one)."
        )


def _demand_rising(name: str, points: Sequence[float] | None, most: float) -> None:
    if points is None:
        return
    fits = all(isinstance(p, int | float) and 0.0 <= p < most for p in points)
    if not points or not fits or any(a >= b for a, b in pairwise(points)):
        bound = "" if math.isinf(most) else f" and below {most:g}"
        raise ValueError(f"{name} must be rising numbers of at least 0{bound}, not {list(points)!r:.200}.")
