"""Count of the graphs that torch.compile made: a warning before a seed's life needs more than it allows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Final, final

from kasmina_core.errors import warn_caller
from kasmina_core.growth import slot as growth
from kasmina_core.lifecycle import SeedStage, is_active_stage
from kasmina_core.slots.slot import SeedSlot

_COMBINATIONS_OF_A_LIFE: Final = 4
"""New ones that a seed brings: straight-through, measured, blend, seed."""

_GRAPHS_OF_A_MEASUREMENT: Final = 2
"""With the seed and without it."""

_DYNAMO: Final = "torch._dynamo"
_TYPE_OF_A_SLOT: Final = str(growth.SeedSlot)
"""What the guards of a frame name if it looks at a slot, whoever's function the frame is."""


class RecompileLimitWarning(UserWarning):
    """The next graphs of a compiled model would exceed torch's recompile limit."""


@final
class GraphForesight:
    """Compares, where a seed changes how its slot computes, the graphs made so far with torch's limit.

    A combination of forward modes that the model had before needs no new graph. For a new one as many are expected as
    were made at most for one so far (one in training, one in evaluation, …).
    """

    def __init__(self) -> None:
        self._known: set[frozenset[tuple[str, str, str]]] = {frozenset()}
        self._made = 0
        self._most = 1
        self._has_warned = False

    def look(self, slots: Iterable[SeedSlot], measured: SeedSlot | None = None) -> None:
        """Warn, once, if the graphs for the slots' present modes may not be allowed any more.

        It costs nothing where nobody compiles, and reads torch's cache where a combination of modes is new.

        Args:
            slots: The slots of the model.
            measured: The slot whose seed is about to be measured, which is a mode of its own.
        """
        if self._has_warned or _DYNAMO not in sys.modules:
            return
        slots = list(slots)
        modes = frozenset(mode for slot in slots if (mode := _mode(slot, measured)) is not None)
        if modes in self._known:
            return
        made = graphs_made()
        if made == 0:
            self._known, self._made = {modes}, 0
            return
        self._most = max(self._most, made - self._made)
        each = self._most if measured is None else _GRAPHS_OF_A_MEASUREMENT
        self._known.add(modes)
        self._made = made
        from torch._dynamo import config

        limit = min(config.recompile_limit, config.accumulated_recompile_limit)
        if made + each <= limit:
            return
        self._has_warned = True
        growing = sum(slot.stage is not SeedStage.FOSSILIZED for slot in slots)
        enough = made + self._most * _COMBINATIONS_OF_A_LIFE * max(1, growing)
        settings = f"torch._dynamo.config.recompile_limit = {enough}"
        if enough > config.accumulated_recompile_limit:
            settings += f"\ntorch._dynamo.config.accumulated_recompile_limit = {enough}"
        warn_caller(
            "torch.compile may refuse the next graph of this model.\n"
            f"  graphs made:     {made}\n"
            f"  expected next:   {each}\n"
            f"  recompile_limit: {limit}\n"
            "Beyond the limit the model runs uncompiled from then on, or raises under fullgraph=True. "
            f"Before its next forward:\n{settings}",
            RecompileLimitWarning,
        )


def graphs_made() -> int:
    """Return how many graphs torch holds for the frame that has most of those in which a slot runs; 0 if unknown."""
    if _DYNAMO not in sys.modules:
        return 0
    try:
        from torch._dynamo.convert_frame import input_codes
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        codes = [code for reference in input_codes.seen if (code := reference()) is not None]
    except (ImportError, AttributeError):  # no public name gives these: another torch may not have them
        return 0
    return max((_graphs_with_slots(_debug_get_cache_entry_list(code)) for code in codes), default=0)


def _graphs_with_slots(entries: Sequence[object]) -> int:
    if entries and _TYPE_OF_A_SLOT in str(getattr(entries[-1], "guard_manager", "")):
        return len(entries)
    return 0


def _mode(slot: SeedSlot, measured: SeedSlot | None) -> tuple[str, str, str] | None:
    """What tells the slot's graphs in training from others; ``None`` where it passes features on."""
    state = slot.state
    if state is None or not is_active_stage(state.stage):
        return None
    if slot is measured:
        return slot.name, "measured", state.blueprint_id
    stage = SeedStage.TRAINING if slot.is_apart else state.stage
    if stage not in (SeedStage.TRAINING, SeedStage.BLENDING):
        stage = SeedStage.SHADOWING  # the seed's output alone, as in every later stage
    return slot.name, stage.name, state.blueprint_id
