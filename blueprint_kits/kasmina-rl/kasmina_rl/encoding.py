"""Encoding of observations as numbers, for the environment and for the policies that were trained in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, final

import numpy as np
from kasmina_core import (
    CheckpointError,
    Observation,
    SeedStage,
    SlotObservation,
    blueprint_costs,
    default_registry,
)
from numpy.typing import NDArray

VERSION: Final = 2
"""Version of the numbers that a controller scores; a saved one of another version is refused."""

BOUND: Final = 5.0
"""Every number lies in [-BOUND, BOUND]."""

RUN_FIELDS: Final = (
    "budget_left",
    "budget_known",
    "epoch",
    "loss_now",
    "loss_1_ago",
    "loss_2_ago",
    "loss_3_ago",
    "loss_known",
    "slope",
    "host_parameters",
    "seed_parameters",
    "seeds_kept",
    "lost_to_culls",
    "lost_known",
)
"""Numbers of a run. Losses are logarithms of the ratio to the first; ``slope`` is their fall over the last three epochs."""

BLUEPRINT_FIELDS: Final = (
    "log_parameters",
    "log_multiply_adds",
    "mixes_positions",
    "has_convolution",
    "has_norm",
)
"""Numbers of a blueprint in a slot, so that one that was never seen fits."""

_STAGES: Final = ("dormant", "germinated", "training", "blending", "shadowing", "probationary", "fossilized")

SLOT_FIELDS: Final = (
    *(f"is_{stage}" for stage in _STAGES),
    "is_cooling",
    *BLUEPRINT_FIELDS,
    "alpha",
    "epochs_in_stage",
    "ramp",
    "gain",
    "gain_t",
    "gain_known",
    "improvement",
    "improvement_known",
    "deviation",
    "deviation_known",
    "violations",
    "gate_score",
    "gate_passed",
    "gate_known",
    "can_advance",
    "can_revert",
    "is_paused",
)
"""Numbers of a slot. What is not known is 0, with 0 in the field that says so."""

TIMING_FIELDS: Final = ("late_undecided", "late_empty", "undecided_for")
"""Products that a linear score cannot form of the others; see `timing`."""

LATE: Final = 0.3
"""Share of the budget below which it is late: a seed's life on Toy takes a tenth to three tenths."""

Numbers = NDArray[np.float32]


def timing(run: Any, slots: Any) -> tuple[Any, Any, Any]:
    """Return `TIMING_FIELDS` of each slot, ``(..., s)`` each.

    With ``late = 10 * max(0, LATE - budget_left)``, 0 where the budget is not known: ``late`` where the slot holds a seed
    that is not decided, ``late`` where it is empty, and ``epochs_in_stage`` where its seed is not decided; else 0.

    Args:
        run: `RUN_FIELDS`, ``(..., r)``; an array or a tensor.
        slots: `SLOT_FIELDS`, ``(..., s, f)``, of the same kind.
    """
    late = run[..., 1:2] * (10 * (LATE - run[..., 0:1])).clip(0)
    undecided = slots[..., 1:6].sum(-1)
    return (
        undecided * late,
        slots[..., 0] * late,
        undecided * slots[..., SLOT_FIELDS.index("epochs_in_stage")],
    )


def describe(blueprint: str, slot: SlotObservation) -> list[float]:
    """Return `BLUEPRINT_FIELDS` of a blueprint in a slot; zeros where nobody offers it."""
    return list(_DESCRIBED(blueprint, slot))


def _describer() -> Callable[[str, SlotObservation], tuple[float, ...]]:
    known: dict[tuple[str, str, int], tuple[float, ...]] = {}

    def described(blueprint: str, slot: SlotObservation) -> tuple[float, ...]:
        key = (blueprint, slot.topology.value, slot.dim)
        if key not in known:
            known[key] = _measured(blueprint, slot)
        return known[key]

    return described


def _measured(blueprint: str, slot: SlotObservation) -> tuple[float, ...]:
    import torch

    registry = default_registry().blueprints
    cost = blueprint_costs(registry, count_operations=True)(slot, blueprint)
    with torch.random.fork_rng(devices=[]):
        module = registry.create(blueprint, slot.dim, topology=slot.topology)
    kinds = {type(part).__name__ for part in module.modules()}
    return (
        math.log10(1 + cost.parameters) / 2,
        math.log10(1 + cost.flops) / 3,
        float(bool(registry.get(blueprint, slot.topology).spec.mixes)),
        float(any("Conv" in kind for kind in kinds)),
        float(any("Norm" in kind for kind in kinds)),
    )


_DESCRIBED: Final = _describer()


@final
class Encoder:
    """Encodes the observations of one run, in the order in which they were made.

    It remembers the losses and what seeds cost, so that one object serves one run, and `reset` begins another. The
    cost of a seed is what an epoch takes above the first one's cost, shared by the seeds that live in it; it is lost
    when such a seed is culled.

    Args:
        candidates: Blueprints that may be grown, in the order of the actions.
    """

    def __init__(self, candidates: Sequence[str]) -> None:
        self.candidates = tuple(candidates)
        self.reset()

    def reset(self) -> None:
        """Begin another run."""
        self._losses: list[float] = []
        self._flops: list[float] = [0.0]
        self._living: dict[str, float] = {}
        self._lost = 0.0

    def note(self, seen: Observation) -> None:
        """Take an epoch's observation; each once."""
        if seen.metric is not None and math.isfinite(seen.metric):
            self._losses.append(-seen.metric if seen.higher_is_better else seen.metric)
        alive = [s.seed_id for s in seen.slots if SeedStage.GERMINATED <= s.stage < SeedStage.FOSSILIZED]
        kept = {s.seed_id for s in seen.slots if s.stage is SeedStage.FOSSILIZED}
        if seen.flops is not None:
            spent = seen.flops - self._flops[-1]
            self._flops.append(seen.flops)
            extra = max(0.0, spent - (self._flops[1] - self._flops[0]))
            for seed in self._living:
                self._living[seed] += extra / len(self._living)
        for seed in [s for s in self._living if s not in alive]:
            cost = self._living.pop(seed)
            self._lost += 0.0 if seed in kept else cost
        for seed in alive:
            self._living.setdefault(seed, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers, as plain data."""
        return {
            "losses": list(self._losses),
            "flops": list(self._flops),
            "living": dict(self._living),
            "lost": self._lost,
        }

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: If it is damaged; nothing has changed then.
        """
        try:
            losses, flops = map(float, state["losses"]), map(float, state["flops"])
            living = {str(seed): float(cost) for seed, cost in state["living"].items()}
            found = list(losses), list(flops), living, float(state["lost"])
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"The saved state of an encoder is damaged: {error!r:.200}") from error
        self._losses, self._flops, self._living, self._lost = found

    def encode(self, seen: Observation) -> dict[str, Numbers]:
        """Return the numbers of an observation that was noted: ``run``, ``slots`` ``(s, n)`` and ``candidates`` ``(k, m)``."""
        found = {
            "run": np.array(self._run(seen), np.float32),
            "slots": np.array([self._slot(slot) for slot in seen.slots], np.float32),
            "candidates": np.array([self._candidate(name, seen) for name in self.candidates], np.float32),
        }
        return {name: np.clip(numbers, -BOUND, BOUND) for name, numbers in found.items()}

    def _run(self, seen: Observation) -> list[float]:
        left, spent = seen.flops_left, seen.flops
        losses = [_log_ratio(loss, self._losses[0]) for loss in self._losses[-4:]]
        last = [losses[-1 - i] if i < len(losses) else (losses[0] if losses else 0.0) for i in range(4)]
        return [
            left / seen.budget if left is not None and seen.budget else 0.0,
            float(left is not None),
            math.log1p(seen.epoch) / 2,
            *last,
            float(bool(losses)),
            10.0 * (last[3] - last[0]) / 3,
            math.log10(1 + seen.host_parameters) / 2,
            math.log10(1 + seen.seed_parameters) / 2,
            float(sum(slot.stage is SeedStage.FOSSILIZED for slot in seen.slots)),
            self._lost / spent if spent else 0.0,
            float(spent is not None),
        ]

    def _slot(self, slot: SlotObservation) -> list[float]:
        has_seed = SeedStage.GERMINATED <= slot.stage <= SeedStage.FOSSILIZED
        stages = [float(slot.stage.name.lower() == stage) for stage in _STAGES]
        scale = self._losses[0] if self._losses and self._losses[0] > 0 else 1.0
        gain, t, better, deviation = (
            slot.gain,
            slot.gain_t,
            slot.improvement_since_stage_start,
            slot.deviation,
        )
        return [
            *stages,
            float(not any(stages)),
            *(describe(slot.blueprint, slot) if has_seed else [0.0] * len(BLUEPRINT_FIELDS)),
            slot.alpha,
            math.log1p(slot.epochs_in_stage),
            slot.ramp_progress,
            _number(gain, 20 / scale),
            _number(t, 1 / 3),
            _known(gain),
            _number(better, 20 / scale),
            _known(better),
            _number(deviation, 1.0),
            _known(deviation),
            float(slot.isolation_violations),
            _number(slot.gate_score, 1.0),
            float(bool(slot.gate_passed)),
            float(slot.gate_passed is not None),
            float(bool(slot.can_advance)),
            float(slot.can_revert),
            float(slot.is_paused),
        ]

    def _candidate(self, name: str, seen: Observation) -> list[float]:
        for slot in seen.slots:
            entry = default_registry().blueprints.get(name)
            if entry.spec.topology is slot.topology and entry.spec.refusal(slot.dim) is None:
                return describe(name, slot)
        return [0.0] * len(BLUEPRINT_FIELDS)


def flatten(encoded: dict[str, Numbers]) -> Numbers:
    """Return all numbers of an encoded observation in one vector, as controllers take them."""
    return np.concatenate([encoded["run"], encoded["slots"].ravel(), encoded["candidates"].ravel()])


def _log_ratio(loss: float, first: float) -> float:
    return math.log(loss / first) if loss > 0 and first > 0 else loss - first


def _number(value: float | None, scale: float) -> float:
    return value * scale if value is not None and math.isfinite(value) else 0.0


def _known(value: float | None) -> float:
    return float(value is not None and math.isfinite(value))
