"""Growth within a budget of parameters, operations or seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

from kasmina_core.lifecycle import CONTRIBUTING, SeedStage
from kasmina_core.policies.growing import Candidates, GrowingPolicy, Pair, SeedCare, living_seeds
from kasmina_core.policies.memory import remembered
from kasmina_core.policies.protocol import Command, Observation, SlotObservation
from kasmina_core.policies.triggers import Plateau
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    from kasmina_core.blueprints.catalogue import BlueprintRegistry


@final
@dataclass(frozen=True, slots=True)
class SeedCost:
    """What a seed costs.

    Attributes:
        parameters: Its parameters.
        flops: Multiply-adds of its forward pass on one sample.
    """

    parameters: int
    flops: int = 0


Costs = Callable[[SlotObservation, str], SeedCost]
"""Returns what a blueprint would cost in a slot."""


def blueprint_costs(registry: BlueprintRegistry, *, count_operations: bool = False) -> Costs:
    """Return a function that gives the cost of a registry's blueprints: declared parameters, counted operations.

    Operations are counted once per blueprint and shape of features, on a module that is then dropped; the global random
    numbers stay as they are.

    Args:
        registry: Offers the blueprints, such as ``default_registry().blueprints``.
        count_operations: Whether to count operations; they are 0 otherwise.
    """

    @cache
    def measured(blueprint: str, topology: Topology, dim: int, shape: tuple[int, ...]) -> SeedCost:
        import torch

        from kasmina_core.checks.flops import count_flops
        from kasmina_core.quiet import private_rng

        declared = registry.get(blueprint, topology).spec.declared_params(dim)
        if declared is not None and not count_operations:
            return SeedCost(declared)
        with private_rng(0):
            module = registry.create(blueprint, dim, topology=topology)
            parameters = sum(p.numel() for p in module.parameters()) if declared is None else declared
            if not count_operations:
                return SeedCost(parameters)
            return SeedCost(parameters, count_flops(module, torch.randn((1, *shape[1:]))).multiply_adds)

    return lambda slot, blueprint: measured(blueprint, slot.topology, slot.dim, slot.shape)


_HOLDS_A_SEED: Final = range(SeedStage.GERMINATED, SeedStage.FOSSILIZED + 1)


@final
class BudgetPolicy(GrowingPolicy):
    """Grow what gains most per cost, and never exceed a budget.

    The score of a blueprint is its mean measured gain over its cost as a share of the budget (of the scarcest one, if
    several are given). Each affordable blueprint is tried once, the cheapest first; then the best score goes first. A
    seed about to blend in that would leave too little for one with a higher score is culled, while that leaves no trace.

    A budget of seconds limits the time in which seeds grow. It ends growth one epoch early rather than late: a seed is
    germinated only if the longest life so far still fits, and a living one is culled when another epoch might not.
    Clocks differ between processes: let one of them decide.

    Args:
        parameters: Parameters that seeds may add.
        flops: Multiply-adds that seeds may add to a forward pass on one sample.
        seconds: Time that growing may take.
        costs: Returns what a blueprint costs in a slot, such as `blueprint_costs`; required for the first two.
        clock: Returns seconds from any start.
        blueprints, patience, min_delta, max_training_epochs, max_probation_epochs, revert: As in `PlateauPolicy`, errors
            too.

    Raises:
        ValueError: If no budget is given, one is not above 0, or ``costs`` is needed and missing.
    """

    remembers: ClassVar = GrowingPolicy.remembers | {"gains": dict[str, list[float]], "counted": set[str]}

    def __init__(
        self,
        blueprints: Candidates,
        *,
        parameters: int | None = None,
        flops: int | None = None,
        seconds: float | None = None,
        costs: Costs | None = None,
        clock: Callable[[], float] = time.monotonic,
        patience: int = 3,
        min_delta: float = 0.01,
        max_training_epochs: int = 8,
        max_probation_epochs: int = 8,
        revert: bool = True,
    ) -> None:
        given = {"parameters": parameters, "flops": flops, "seconds": seconds}
        if all(limit is None for limit in given.values()):
            raise ValueError("BudgetPolicy needs a budget: parameters=, flops= or seconds=.")
        for name, limit in given.items():
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} must be above 0, not {limit!r}.")
        if costs is None and (parameters is not None or flops is not None):
            raise ValueError(
                "A budget of parameters or flops needs costs=, such as blueprint_costs(default_registry().blueprints)."
            )
        care = SeedCare(max_training_epochs, max_probation_epochs, revert)
        super().__init__(blueprints, Plateau(patience, min_delta), care, patience=patience)
        self._limits = {k: v for k, v in (("parameters", parameters), ("flops", flops)) if v is not None}
        self._seconds = seconds
        self._costs = costs or (lambda slot, blueprint: SeedCost(0))
        self._clock = clock
        self._gains: dict[str, list[float]] = {}
        self._counted: set[str] = set()
        self._last_tick: float | None = None
        self._spent_seconds = self._life = self._longest_life = self._longest_epoch = 0.0

    def left(self, observation: Observation, apart_from: str = "") -> dict[str, float]:
        """Return the remaining parameters and flops, not counting the seed of the slot ``apart_from``."""
        left: dict[str, float] = dict(self._limits)
        for slot in observation.slots:
            if slot.stage in _HOLDS_A_SEED and slot.slot != apart_from:
                for name, amount in self._amounts(slot, slot.blueprint).items():
                    left[name] -= amount
        return left

    def _amounts(self, slot: SlotObservation, blueprint: str) -> dict[str, int]:
        """Return the cost of a blueprint in each budget; a seed that exists counts with its own parameters."""
        cost = self._costs(slot, blueprint)
        is_there = slot.stage in _HOLDS_A_SEED and slot.blueprint == blueprint
        return {
            name: slot.parameters if is_there and name == "parameters" else getattr(cost, name)
            for name in self._limits
        }

    def _score(self, slot: SlotObservation, blueprint: str) -> float:
        """Return the mean gain over the share of the scarcest budget; infinite for what was never measured."""
        gains = self._gains.get(blueprint)
        if not gains:
            return math.inf
        shares = [amount / self._limits[name] for name, amount in self._amounts(slot, blueprint).items()]
        share = max(shares, default=0.0)
        return fmean(gains) / share if share > 0 else fmean(gains) * math.inf if fmean(gains) else 0.0

    def _affordable(
        self, observation: Observation, pairs: Sequence[Pair], left: Mapping[str, float]
    ) -> list[tuple[SlotObservation, str]]:
        slots = {slot.slot: slot for slot in observation.slots}
        return [
            (slots[slot], blueprint)
            for slot, blueprint in pairs
            if all(amount <= left[name] for name, amount in self._amounts(slots[slot], blueprint).items())
        ]

    def choose(self, observation: Observation, pairs: Sequence[Pair]) -> Pair | None:
        """Return the affordable pair with the best score; unmeasured ones come first, the cheapest of them."""
        if self._seconds is not None and self._spent_seconds + self._longest_life >= self._seconds:
            return None
        affordable = self._affordable(observation, pairs, self.left(observation))
        if not affordable:
            self._tell_if_too_small(observation)
            return None

        def rank(option: tuple[SlotObservation, str]) -> tuple[float, int]:
            return -self._score(*option), sum(self._amounts(*option).values())

        slot, blueprint = min(affordable, key=rank)
        return slot.slot, blueprint

    def _tell_if_too_small(self, observation: Observation) -> None:
        """Warn, once, if the whole budget would not do for any candidate in any slot, free or not."""
        everything = [(slot.slot, name) for slot in observation.slots for name in self._candidates(slot)]
        if self._is_told or self._affordable(observation, everything, self._limits):
            return
        slots = {slot.slot: slot for slot in observation.slots}
        amounts = [self._amounts(slots[slot], blueprint) for slot, blueprint in everything]
        limits = (
            f"{limit:,} {name}, the least that one takes is {min(each[name] for each in amounts):,}"
            for name, limit in self._limits.items()
        )
        self._tell(f"its budget is too small for any candidate ({'; '.join(limits)})", observation)

    def judge(self, observation: Observation, slot: SlotObservation) -> Command | None:
        """Cull a seed that exceeds the budget or prevents a better use of it."""
        if self._seconds is not None and self._spent_seconds + self._longest_epoch > self._seconds:
            return self.care.cull(slot, f"{self._spent_seconds:.3g} of {self._seconds:.3g} seconds are spent")
        left = self.left(observation, apart_from=slot.slot)
        for name, amount in self._amounts(slot, slot.blueprint).items():
            if amount > left[name]:
                return self.care.cull(slot, f"it takes {amount:,} of {left[name]:,.0f} {name} that are left")
        if slot.stage is SeedStage.BLENDING and slot.alpha == 0.0 and not slot.is_paused:
            better = self._better_use(observation, slot, left)
            if better:
                return self.care.cull(slot, better)
        return super().judge(observation, slot)

    def _better_use(self, observation: Observation, slot: SlotObservation, left: Mapping[str, float]) -> str:
        mine = self._score(slot, slot.blueprint)
        after = {name: left[name] - amount for name, amount in self._amounts(slot, slot.blueprint).items()}
        free = [s.slot for s in observation.slots if s.stage is SeedStage.DORMANT]
        here = [(slot.slot, blueprint) for blueprint in self._candidates(slot)]
        others = [p for p in [*self.pairs(observation), *here] if p[1] != slot.blueprint]
        could = self._affordable(observation, others, left)
        still = {(s.slot, b) for s, b in self._affordable(observation, others, after) if s.slot in free}
        lost = [
            (self._score(s, b), b)
            for s, b in could
            if (s.slot, b) not in still and (s.slot, b) not in self._refused and b in self._gains
        ]
        score, blueprint = max(lost, default=(-math.inf, ""))
        if not score > mine:
            return ""
        return f"{blueprint} gains {score:.3g} for the whole budget's cost, this one {mine:.3g}"

    def learn(self, observation: Observation) -> None:
        """Note gains at the end of incubation, and the time."""
        living = living_seeds(observation)
        for slot in living:
            passed = slot.stage in CONTRIBUTING
            ends = passed or slot.is_stopped or slot.epochs_in_stage >= self.care.max_training_epochs
            if ends and slot.seed_id not in self._counted:
                self._counted.add(slot.seed_id)
                gain = slot.gain if slot.gain is not None and math.isfinite(slot.gain) else 0.0
                self._gains.setdefault(slot.blueprint, []).append(gain if passed else min(gain, 0.0))
        self._counted &= {slot.seed_id for slot in living}
        self._note_time(bool(living))

    def _note_time(self, growing: bool) -> None:
        if self._seconds is None:
            return
        now = self._clock()
        passed = now - self._last_tick if self._last_tick is not None else 0.0
        self._last_tick = now
        if growing:
            self._spent_seconds += passed
            self._life += passed
            self._longest_life = max(self._longest_life, self._life)
            self._longest_epoch = max(self._longest_epoch, passed)
        else:
            self._life = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        seconds = [self._spent_seconds, self._life, self._longest_life, self._longest_epoch]
        return super().state_dict() | {"seconds": seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the clock continues from here."""
        seconds = remembered(state, "seconds", tuple[float, float, float, float])
        super().load_state_dict(state)
        self._spent_seconds, self._life, self._longest_life, self._longest_epoch = seconds
        self._last_tick = self._clock() if self._seconds is not None else None
