"""Thompson sampling over slots and blueprints."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import ClassVar, final

from kasmina_core.lifecycle import LIVING, SeedStage
from kasmina_core.policies.growing import Candidates, GrowingPolicy, Pair, SeedCare
from kasmina_core.policies.protocol import Observation
from kasmina_core.policies.triggers import Plateau
from kasmina_core.records import Count


@final
class BanditPolicy(GrowingPolicy):
    """Germinate, on plateaus, the (slot, blueprint) arm with the largest Thompson sample.

    The reward of a seed is its last measured gain if it was kept, and the smaller of that and 0 if it was culled. An
    arm's mean is taken to be normal around ``(n m + p) / (n + 1)`` with variance ``s² / (n + 1)``: ``m`` is the mean of
    its own ``n`` rewards, ``p`` that of its blueprint in all slots, shrunk to that of all by one observation, and
    ``s`` the spread of all rewards. The arm with the largest draw is grown.

    Draws depend only on ``seed`` and the number of germinations, so all processes draw the same, and a loaded policy
    continues like the saved one.

    Args:
        seed: Decides the draws.
        blueprints, patience, min_delta, max_training_epochs, max_probation_epochs, max_seeds, revert: As in
            `PlateauPolicy`, errors too.

    Source: Thompson 1933; Russo et al. 2018, A Tutorial on Thompson Sampling, https://arxiv.org/abs/1707.02038
    """

    remembers: ClassVar = GrowingPolicy.remembers | {
        "draws": Count,
        "rewards": list[tuple[str, str, float]],
        "growing": dict[str, tuple[str, str, float]],
    }

    def __init__(
        self,
        blueprints: Candidates,
        *,
        seed: int = 0,
        patience: int = 3,
        min_delta: float = 0.01,
        max_training_epochs: int = 8,
        max_probation_epochs: int = 8,
        max_seeds: int | None = None,
        revert: bool = True,
    ) -> None:
        care = SeedCare(max_training_epochs, max_probation_epochs, revert)
        trigger = Plateau(patience, min_delta)
        super().__init__(blueprints, trigger, care, max_seeds=max_seeds, patience=patience)
        self.seed = seed
        self._draws = 0
        self._rewards: list[tuple[str, str, float]] = []
        self._growing: dict[str, tuple[str, str, float]] = {}

    def choose(self, observation: Observation, pairs: Sequence[Pair]) -> Pair | None:
        """Return the pair with the largest draw."""
        self._draws += 1
        digest = hashlib.sha256(f"{self.seed}:{self._draws}".encode()).digest()
        source = random.Random(int.from_bytes(digest[:8], "big"))
        rewards = [reward for _, _, reward in self._rewards]
        everything = fmean(rewards) if rewards else 0.0
        spread = pstdev(rewards) if len(rewards) > 1 else 0.0
        spread = spread or max(map(abs, rewards), default=0.0) or 1.0
        draws = {}
        for slot, blueprint in sorted(pairs):
            of_blueprint = [reward for _, b, reward in self._rewards if b == blueprint]
            of_arm = [reward for s, b, reward in self._rewards if (s, b) == (slot, blueprint)]
            prior = (sum(of_blueprint) + everything) / (len(of_blueprint) + 1)
            weight = len(of_arm) + 1
            draws[slot, blueprint] = source.gauss((sum(of_arm) + prior) / weight, spread / math.sqrt(weight))
        return max(draws, key=draws.__getitem__)

    def learn(self, observation: Observation) -> None:
        """Record the gains of living seeds, and the rewards of those that were kept or culled."""
        seen = {slot.slot: slot for slot in observation.slots}
        for name, (seed_id, blueprint, gain) in list(self._growing.items()):
            slot = seen.get(name)
            if slot is None:  # of another model
                del self._growing[name]
                continue
            if slot.seed_id == seed_id and slot.stage in LIVING:
                continue
            kept = slot.seed_id == seed_id and slot.stage is SeedStage.FOSSILIZED
            self._rewards.append((name, blueprint, gain if kept else min(gain, 0.0)))
            del self._growing[name]
        for slot in observation.slots:
            if slot.stage in LIVING:
                before = self._growing.get(slot.slot, ("", "", 0.0))[2]
                gain = slot.gain if slot.gain is not None and math.isfinite(slot.gain) else before
                self._growing[slot.slot] = (slot.seed_id, slot.blueprint, gain)
