"""Base of policies that grow: candidates, refusals, and the care of living seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from kasmina_core.errors import MisuseWarning, warn_caller
from kasmina_core.lifecycle import LIVING, SeedStage
from kasmina_core.policies.memory import Remembering, remembered
from kasmina_core.policies.protocol import Advance, Command, Cull, Germinate, Observation, SlotObservation
from kasmina_core.policies.triggers import Trigger
from kasmina_core.records import Count
from kasmina_core.topology import Topology

Pair = tuple[str, str]
"""A slot and a blueprint that could grow in it."""

Candidates = Mapping[Topology, Sequence[str]] | Callable[[SlotObservation], Sequence[str]]
"""Blueprints by topology, or a function of a slot's observation; ids or short names."""


@final
@dataclass(frozen=True, slots=True)
class SeedCare:
    """Fossilise what passes G5, cull what takes too long or was stopped; a paused seed stays.

    Attributes:
        max_training_epochs: Epochs in GERMINATED or TRAINING after which a seed that its gate refuses is culled.
        max_probation_epochs: Epochs in SHADOWING, PROBATIONARY or, once the ramp is done, BLENDING after which a seed
            that its gate refuses is culled.
        revert: Whether a cull puts the host back where a snapshot of it was kept.

    Raises:
        ValueError: If a number is below 1.
    """

    max_training_epochs: int = 8
    max_probation_epochs: int = 8
    revert: bool = True

    def __post_init__(self) -> None:
        for name in ("max_training_epochs", "max_probation_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}.")

    def judge(self, slot: SlotObservation) -> Command | None:
        """Return the command for a living seed, if any."""
        if slot.is_stopped:
            distance = "not known" if slot.deviation is None else f"{slot.deviation:.4g} times its RMS"
            return self.cull(slot, f"stopped in incubation: its deviation from the host is {distance}")
        if slot.is_paused:
            return None
        if slot.stage is SeedStage.PROBATIONARY and slot.gate_passed:
            return Advance(slot.slot)
        limit = {
            SeedStage.GERMINATED: self.max_training_epochs,
            SeedStage.TRAINING: self.max_training_epochs,
            SeedStage.BLENDING: self.max_probation_epochs if slot.ramp_progress >= 1.0 else None,
            SeedStage.SHADOWING: self.max_probation_epochs,
            SeedStage.PROBATIONARY: self.max_probation_epochs,
        }.get(slot.stage)
        if limit is not None and slot.epochs_in_stage >= limit:
            return self.cull(slot, f"{slot.epochs_in_stage} epochs in {slot.stage.name}: {slot.gate_reason}")
        return None

    def cull(self, slot: SlotObservation, reason: str) -> Cull:
        """Return the command that removes a seed, and reverts the host if that is possible."""
        return Cull(slot.slot, reason, revert=self.revert and slot.can_revert)


class GrowingPolicy(Remembering):
    """Germinates seeds when a trigger says so; what, and what is kept, is for others to say.

    A pair that gate G0 refuses is not tried again; another one is germinated instead. If the metric is not finite for
    ``patience`` epochs, a `RuntimeWarning` is raised once, and a seed that contributes is culled. If the candidates fit
    no slot of the model, a `MisuseWarning` is raised once, when the first seed is due.

    Write a policy by overriding `choose`, and where needed `judge`, `learn` and `remembers`.

    Args:
        blueprints: Candidates by topology: a mapping, or a function of a slot's observation. Ids or short names.
        trigger: Decides when.
        care: Decides what becomes of a seed.
        max_seeds: Seeds to keep at most; ``None`` for as many as there are slots.
        max_growing: Seeds that grow at the same time, at most, each in a slot of its own. They are germinated together,
            and the trigger waits until each was kept or culled.
        patience: Epochs without a finite metric until the model counts as diverged.

    Raises:
        TypeError: If ``blueprints`` is neither a mapping to lists nor a function.
        TopologyError: If it maps something that is no topology.
        ValueError: If ``max_growing`` is below 1.
    """

    remembers: ClassVar[dict[str, Any]] = {"silent": Count, "pending": set[Pair], "refused": set[Pair]}

    def __init__(
        self,
        blueprints: Candidates,
        trigger: Trigger,
        care: SeedCare | None = None,
        *,
        max_seeds: int | None = None,
        max_growing: int = 1,
        patience: int = 3,
    ) -> None:
        if max_growing < 1:
            raise ValueError(f"max_growing must be at least 1, not {max_growing!r}.")
        self._candidates = candidates_by_slot(blueprints)
        self.trigger = trigger
        self.care = care or SeedCare()
        self.max_seeds = max_seeds
        self.max_growing = max_growing
        self.silence = patience
        self._silent = 0
        self._pending: set[Pair] = set()
        self._refused: set[Pair] = set()
        self._is_told = False

    def choose(self, observation: Observation, pairs: Sequence[Pair]) -> Pair | None:
        """Return which of the pairs to grow now; there is at least one. Default: the first."""
        return pairs[0]

    def judge(self, observation: Observation, slot: SlotObservation) -> Command | None:
        """Return the command for a living seed, if any."""
        return self.care.judge(slot)

    def learn(self, observation: Observation) -> None:
        """Called with each epoch before anything is decided."""

    def decide(self, observation: Observation) -> Sequence[Command]:
        """Return at most one command per slot."""
        was_refused = self._note_refusals(observation)
        diverged = self._note_silence(observation)
        self.learn(observation)
        living = living_seeds(observation)
        due = self.trigger.is_due(observation, bool(living))
        if living:
            return [
                command
                for slot in living
                if (command := self._part(slot, diverged) or self.judge(observation, slot)) is not None
            ]
        kept = sum(slot.stage is SeedStage.FOSSILIZED for slot in observation.slots)
        wanted = self.max_growing if self.max_seeds is None else min(self.max_growing, self.max_seeds - kept)
        if not (due or was_refused) or wanted < 1:
            return ()
        pairs = self.pairs(observation)
        if not pairs and not self._refused:
            self._tell_of_misfit(observation)
        commands: list[Command] = []
        while pairs and len(commands) < wanted and (choice := self.choose(observation, pairs)) is not None:
            commands.append(self.germinate(choice))
            pairs = [pair for pair in pairs if pair[0] != choice[0]]
        if commands:
            self.trigger.spend()
        return commands

    def pairs(self, observation: Observation) -> list[Pair]:
        """Return the pairs that could be grown now, ordered by blueprint, then slot."""
        free = [slot for slot in observation.slots if slot.stage is SeedStage.DORMANT]
        ranked = [
            (rank, order, slot.slot, blueprint)
            for order, slot in enumerate(free)
            for rank, blueprint in enumerate(self._candidates(slot))
            if (slot.slot, blueprint) not in self._refused
        ]
        return [(slot, blueprint) for _, _, slot, blueprint in sorted(ranked)]

    def germinate(self, pair: Pair) -> Germinate:
        """Return the command that grows a pair, and note whether gate G0 refuses it."""
        self._pending.add(pair)
        return Germinate(*pair)

    def _tell_of_misfit(self, observation: Observation) -> None:
        """Warn, once, if a dormant slot waits and no slot of the model, free or not, has a candidate."""
        free = [slot.slot for slot in observation.slots if slot.stage is SeedStage.DORMANT]
        if self._is_told or not free or any(len(self._candidates(slot)) for slot in observation.slots):
            return
        self._tell("blueprints names none for the topology of a slot of this model", observation)

    def _tell(self, why: str, observation: Observation) -> None:
        """Warn, once, that nothing can ever be germinated."""
        if self._is_told:
            return
        self._is_told = True
        slots = "".join(
            f"  slot '{slot.slot}': {slot.topology.value}, width {slot.dim}\n" for slot in observation.slots
        )
        warn_caller(
            f"{type(self).__name__} will never germinate a seed: {why}.\n{slots}"
            "Give it blueprints that fit these slots (kasmina plugins lists those that are installed).",
            MisuseWarning,
        )

    def _note_refusals(self, observation: Observation) -> bool:
        dormant = {slot.slot for slot in observation.slots if slot.stage is SeedStage.DORMANT}
        refused = {pair for pair in self._pending if pair[0] in dormant}
        self._refused |= refused
        self._pending = set()
        return bool(refused)

    def _note_silence(self, observation: Observation) -> bool:
        """Count epochs without a finite metric; return whether the model has diverged for too long."""
        metric = observation.metric
        if metric is not None and math.isfinite(metric):
            self._silent = 0
            return False
        self._silent += 1
        if self._silent == self.silence:
            what = "no metric: give step_epoch(metric) one" if metric is None else f"a metric of {metric}"
            warn_caller(
                f"{type(self).__name__} has seen {what}, for {self._silent} epoch{'s' * (self._silent > 1)}. "
                "It germinates nothing on a plateau until there is a finite one.",
                RuntimeWarning,
            )
        return metric is not None and self._silent >= self.silence

    def _part(self, slot: SlotObservation, diverged: bool) -> Command | None:
        if diverged and slot.alpha > 0.0 and not slot.is_paused:
            return self.care.cull(slot, f"the model's metric has not been finite for {self._silent} epochs")
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data, the trigger's included."""
        return super().state_dict() | {"trigger": self.trigger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; see `Remembering.load_state_dict`."""
        found = self.read_state(state)
        self.trigger.load_state_dict(remembered(state, "trigger", dict[str, Any]))
        vars(self).update(found)


def living_seeds(observation: Observation) -> list[SlotObservation]:
    """Return the slots with a living seed."""
    return [slot for slot in observation.slots if slot.stage in LIVING]


def candidates_by_slot(blueprints: Candidates) -> Callable[[SlotObservation], Sequence[str]]:
    """Return candidates as a function of a slot's observation.

    Raises:
        TypeError: If they are neither a function nor a mapping to lists.
        TopologyError: If they map something that is no topology.
    """
    if callable(blueprints):
        return blueprints
    if not isinstance(blueprints, Mapping):
        raise TypeError(
            f"blueprints must map topologies to lists of ids, such as {{Topology.CNN: ['norm']}}, not {blueprints!r}."
        )
    listed: dict[Topology, tuple[str, ...]] = {}
    for topology, names in blueprints.items():
        if isinstance(names, str):
            raise TypeError(f"blueprints[{topology!r}] must be a list of ids, not the text {names!r}.")
        listed[Topology(topology)] = tuple(names)
    return lambda slot: listed.get(slot.topology, ())
