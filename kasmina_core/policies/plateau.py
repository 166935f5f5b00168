"""Candidates in turn, on plateaus or at fixed times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from kasmina_core.policies.growing import Candidates, GrowingPolicy, Pair, SeedCare
from kasmina_core.policies.memory import remembered
from kasmina_core.policies.protocol import Germinate, Observation
from kasmina_core.policies.triggers import FixedTimes, Plateau, Trigger
from kasmina_core.records import Count


class _InTurnPolicy(GrowingPolicy):
    """Candidates in order, slot by slot; what was tried waits until all others were."""

    def __init__(
        self,
        blueprints: Candidates,
        trigger: Trigger,
        care: SeedCare,
        max_seeds: int | None,
        max_growing: int,
        patience: int = 3,
    ) -> None:
        super().__init__(
            blueprints, trigger, care, max_seeds=max_seeds, max_growing=max_growing, patience=patience
        )
        self._tried: dict[Pair, int] = {}

    def choose(self, observation: Observation, pairs: Sequence[Pair]) -> Pair | None:
        """Return the first of the pairs that were tried least."""
        return min(pairs, key=lambda pair: self._tried.get(pair, 0))

    def germinate(self, pair: Pair) -> Germinate:
        """Return the command that grows a pair, and count it."""
        self._tried[pair] = self._tried.get(pair, 0) + 1
        return super().germinate(pair)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        tried = [[slot, blueprint, times] for (slot, blueprint), times in sorted(self._tried.items())]
        return super().state_dict() | {"tried": tried}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        tried = remembered(state, "tried", list[tuple[str, str, Count]])
        super().load_state_dict(state)
        self._tried = {(slot, blueprint): times for slot, blueprint, times in tried}


@final
class PlateauPolicy(_InTurnPolicy):
    """Germinate when the metric stops improving, fossilise what passes G5, cull what takes too long.

    One seed lives at a time, or up to ``max_growing`` in slots of their own. The metric is on a plateau when its best has
    not improved by ``min_delta`` (relative to the best's size) for ``patience`` epochs. Candidates are tried in order,
    slot by slot; one that was culled in a slot is tried there again only after all others, and one that gate G0 refuses
    never again.

    Args:
        blueprints: Candidates by topology: a mapping, or a function of a slot's observation. Ids or short names.
        patience: Epochs without improvement that make a plateau, at least 1.
        min_delta: Smallest improvement that counts, as a share of the best metric.
        max_training_epochs: Epochs in GERMINATED or TRAINING after which a seed that its gate refuses is culled.
        max_probation_epochs: Epochs in SHADOWING, PROBATIONARY or, once the ramp is done, BLENDING after which a seed
            that its gate refuses is culled.
        max_seeds: Seeds to keep at most; ``None`` for as many as there are slots.
        max_growing: Seeds that grow at the same time, at most. They are germinated together; the next plateau counts from
            when each was kept or culled.
        revert: Whether a cull puts the host back where ``GrowthConfig(keep_snapshot=True)`` kept a snapshot of it.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If ``blueprints`` is neither a mapping to lists nor a function.
        TopologyError: If it maps something that is no topology.
    """

    def __init__(
        self,
        blueprints: Candidates,
        *,
        patience: int = 3,
        min_delta: float = 0.01,
        max_training_epochs: int = 8,
        max_probation_epochs: int = 8,
        max_seeds: int | None = None,
        max_growing: int = 1,
        revert: bool = True,
    ) -> None:
        care = SeedCare(max_training_epochs, max_probation_epochs, revert)
        super().__init__(blueprints, Plateau(patience, min_delta), care, max_seeds, max_growing, patience)


@final
class FixedTimesPolicy(_InTurnPolicy):
    """Germinate at fixed epochs, whatever the metric does.

    If a seed still grows then, or no slot is free, it is done as soon as possible.

    Args:
        epochs: Epochs of the model at which to germinate, up to ``max_growing`` seeds each time.
        blueprints, max_training_epochs, max_probation_epochs, max_seeds, max_growing, revert: As in `PlateauPolicy`,
            errors too.

    Raises:
        ValueError: If ``epochs`` is empty or holds a negative number.
    """

    def __init__(
        self,
        blueprints: Candidates,
        *,
        epochs: Sequence[int],
        max_training_epochs: int = 8,
        max_probation_epochs: int = 8,
        max_seeds: int | None = None,
        max_growing: int = 1,
        revert: bool = True,
    ) -> None:
        care = SeedCare(max_training_epochs, max_probation_epochs, revert)
        super().__init__(blueprints, FixedTimes(epochs), care, max_seeds, max_growing)
