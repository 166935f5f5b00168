"""Candidate seeds compared before one of them is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, final

from kasmina_core.lifecycle import CONTRIBUTING, LIVING, SeedStage
from kasmina_core.policies.growing import Candidates, GrowingPolicy, Pair, SeedCare
from kasmina_core.policies.protocol import Command, Germinate, Observation, Regerminate, SlotObservation
from kasmina_core.policies.triggers import Plateau


@final
class TournamentPolicy(GrowingPolicy):
    """Incubate candidates one after another in each slot, and grow the one that gains most.

    A plateau opens a tournament. In every free slot, in parallel, each candidate spends ``incubation_epochs`` in TRAINING
    and is culled from there, or from BLENDING before alpha moves, so none leaves a trace in the host. The best of each
    slot is kept with its weights. After the last one, the seed with the largest gain above 0 continues with its weights,
    or from new ones if they were lost (`save_checkpoint` saves them, a copy of the model does not). The gates then
    decide on it as on any seed. A slot is free again after its embargo, so with ``n`` candidates per slot a tournament
    takes about ``n * (incubation_epochs + embargo_epochs + 3)`` epochs.

    Args:
        incubation_epochs: Epochs in TRAINING before a candidate is measured, at least 1; its gain is only measured
            once G2's dwell is over.
        contenders: Candidates per slot at most, the first ones; ``None`` for all.
        blueprints, patience, min_delta, max_seeds, revert: As in `PlateauPolicy`, errors too.
        max_training_epochs, max_probation_epochs: As in `PlateauPolicy`, for the winner.
    """

    remembers: ClassVar = GrowingPolicy.remembers | {
        "waiting": list[Pair],
        "inside": dict[str, str],
        "results": list[tuple[str, str, str, float]],
        "winner": tuple[str, str, str] | None,
    }

    def __init__(
        self,
        blueprints: Candidates,
        *,
        incubation_epochs: int = 5,
        contenders: int | None = None,
        patience: int = 3,
        min_delta: float = 0.01,
        max_training_epochs: int = 8,
        max_probation_epochs: int = 8,
        max_seeds: int | None = None,
        revert: bool = True,
    ) -> None:
        for name, number in (("incubation_epochs", incubation_epochs), ("contenders", contenders)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, not {number!r}.")
        care = SeedCare(max_training_epochs, max_probation_epochs, revert)
        trigger = Plateau(patience, min_delta)
        super().__init__(blueprints, trigger, care, max_seeds=max_seeds, patience=patience)
        self.incubation_epochs = incubation_epochs
        self.contenders = contenders
        self._waiting: list[Pair] = []
        self._inside: dict[str, str] = {}
        self._results: list[tuple[str, str, str, float]] = []
        self._winner: tuple[str, str, str] | None = None

    @property
    def results(self) -> list[tuple[str, str, str, float]]:
        """Slot, blueprint, seed and gain of those that were measured in this tournament."""
        return list(self._results)

    def decide(self, observation: Observation) -> Sequence[Command]:
        """Return at most one command per slot."""
        if not (self._waiting or self._inside or self._winner):
            return super().decide(observation)
        self._note_refusals(observation)
        self._note_silence(observation)
        self.trigger.is_due(observation, True)
        slots = {slot.slot: slot for slot in observation.slots}
        commands = [c for name in list(self._inside) if (c := self._measure(slots[name])) is not None]
        for pair in list(self._waiting):
            if pair in self._refused:
                self._waiting.remove(pair)
            elif slots[pair[0]].stage is SeedStage.DORMANT and pair[0] not in self._inside:
                self._waiting.remove(pair)
                self._inside[pair[0]] = pair[1]
                commands.append(self.germinate(pair))
        if self._winner is not None:
            place = slots[self._winner[0]]
            if place.stage is SeedStage.DORMANT:
                commands.append(self._grow_winner(place))
            elif place.stage in LIVING or place.stage is SeedStage.FOSSILIZED:
                self._winner = None  # somebody else grew there meanwhile
        elif not (self._waiting or self._inside):
            self._winner = self._best(self._results)
        return commands

    def choose(self, observation: Observation, pairs: Sequence[Pair]) -> Pair | None:
        """Open a tournament; return its first contender."""
        if len(pairs) == 1:
            return pairs[0]
        self._results = []
        for slot in dict.fromkeys(slot for slot, _ in pairs):
            self._waiting += [pair for pair in pairs if pair[0] == slot][: self.contenders]
        first = self._waiting.pop(0)
        self._inside[first[0]] = first[1]
        return first

    def _measure(self, slot: SlotObservation) -> Command | None:
        """Note a contender's gain and take it out, when it is time."""
        blueprint = self._inside[slot.slot]
        if slot.stage not in LIVING:  # refused, or culled by somebody else
            del self._inside[slot.slot]
            return None
        if slot.is_paused and not slot.is_stopped:
            return None
        learned = slot.stage is SeedStage.TRAINING and slot.epochs_in_stage >= self.incubation_epochs
        stuck = slot.stage is SeedStage.GERMINATED and slot.epochs_in_stage >= self.care.max_training_epochs
        if not (slot.is_stopped or learned or stuck or slot.stage in CONTRIBUTING):
            return None
        del self._inside[slot.slot]
        if slot.is_stopped or slot.gain is None or not math.isfinite(slot.gain):
            return self.care.cull(slot, "compared: its gain was never measured")
        result = (slot.slot, blueprint, slot.seed_id, slot.gain)
        self._results.append(result)
        here = [other for other in self._results if other[0] == slot.slot]
        cull = self.care.cull(slot, f"compared: it gains {slot.gain:.4g}")
        return replace(cull, keep=self._best(here) == result[:3])

    @staticmethod
    def _best(results: Sequence[tuple[str, str, str, float]]) -> tuple[str, str, str] | None:
        best = max(results, key=lambda result: result[3], default=None)
        return best[:3] if best is not None and best[3] > 0.0 else None

    def _grow_winner(self, slot: SlotObservation) -> Command:
        name, blueprint, seed_id = self._winner or ("", "", "")
        self._winner = None
        self.trigger.spend()
        self._pending.add((name, blueprint))
        return Regerminate(name) if slot.kept_seed == seed_id else Germinate(name, blueprint)
