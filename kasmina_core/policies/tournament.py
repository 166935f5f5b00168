"""Candidate seeds compared before one of them is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

from kasmina_core.lifecycle import CONTRIBUTING, LIVING, SeedStage
from kasmina_core.policies.growing import Candidates, GrowingPolicy, Pair, SeedCare
from kasmina_core.policies.memory import remembered
from kasmina_core.policies.protocol import (
    Command,
    Cull,
    Germinate,
    Observation,
    Regerminate,
    SlotObservation,
)
from kasmina_core.policies.triggers import Plateau


@final
class TournamentPolicy(GrowingPolicy):
    """Lets candidates learn apart, one after another in each slot, and grows the one that gains most.

    A plateau opens a tournament. In every free slot the candidates are incubated in turn, each for
    ``incubation_epochs`` in TRAINING, and culled from there, or from BLENDING before alpha moves, so that none leaves a
    trace in the host; slots work side by side. The best of each slot is put aside with its weights. When all were seen,
    the one with the largest gain above 0 goes on with the weights it had, or anew where they were lost (`save_checkpoint`
    saves them, a copy of the model has none). The gates then decide on it as on any seed. A slot is free again after its embargo, so with
    ``n`` candidates a slot a tournament takes about ``n * (incubation_epochs + embargo_epochs + 3)`` epochs.

    Args:
        blueprints: Candidates by topology: a mapping, or a function of a slot's observation. Ids or short names.
        incubation_epochs: Epochs in TRAINING before a candidate is measured, at least 1; its gain is only measured
            once G2's dwell is over.
        contenders: Candidates a slot at most, the first ones; ``None`` for all.
        patience: Epochs without improvement that make a plateau, as in `PlateauPolicy`.
        min_delta: Smallest improvement that counts, as in `PlateauPolicy`.
        max_training_epochs: As in `PlateauPolicy`, for the winner.
        max_probation_epochs: As in `PlateauPolicy`, for the winner.
        max_seeds: As in `PlateauPolicy`.
        revert: As in `PlateauPolicy`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If ``blueprints`` is neither a mapping to lists nor a function.
        TopologyError: If it maps something that is no topology.
    """

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
        """Return at most one command a slot."""
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
        keep = self._best(here) == result[:3]
        command = self.care.cull(slot, f"compared: it gains {slot.gain:.4g}")
        return Cull(command.slot, command.reason, command.revert, keep=keep)

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

    def state_dict(self) -> dict[str, Any]:
        """Return what the policy remembers, as plain data."""
        return super().state_dict() | {
            "waiting": [list(pair) for pair in self._waiting],
            "inside": dict(sorted(self._inside.items())),
            "results": [list(result) for result in self._results],
            "winner": list(self._winner) if self._winner is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        waiting = remembered(state, "waiting", list[tuple[str, str]])
        inside = remembered(state, "inside", dict[str, str])
        results = remembered(state, "results", list[tuple[str, str, str, float]])
        winner = remembered(state, "winner", tuple[str, str, str] | None)
        super().load_state_dict(state)
        self._waiting, self._inside, self._results, self._winner = waiting, inside, results, winner
