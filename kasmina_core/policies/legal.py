"""Legal commands: what a model carries out now, from its observation alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kasmina_core.lifecycle import LIVING, REVERTIBLE, SeedStage, is_failure_stage
from kasmina_core.policies.growing import Candidates, candidates_by_slot
from kasmina_core.policies.protocol import (
    Advance,
    Command,
    Continue,
    Cull,
    Germinate,
    Observation,
    Pause,
    Regerminate,
    Resume,
    SetAlpha,
    SlotObservation,
)

ASKED = "asked to"
"""Reason of the culls that `legal_commands` lists."""


def legal_commands(
    observation: Observation, candidates: Candidates, *, alphas: Sequence[float] = (), straight: bool = False
) -> tuple[Command, ...]:
    """Return the commands that a model would carry out now, in a fixed order: `Continue`, then slot by slot.

    Each holds for the observed model: carrying one out changes what is legal. The model refuses every other command of
    these kinds on these slots, but for another reason of a cull, and ``keep``, which are as good. One that is listed is
    carried out, with two limits that an observation cannot know:

    - An `Advance` is listed too if only a measurement could tell (`SlotObservation.can_advance` is ``None``). The gate
      then decides. After ``step_epoch`` with the thresholds that the library offers that does not happen.
    - A `Germinate` is listed if the slot is dormant. Gate G0 refuses a blueprint that does not fit: list candidates that
      do, as ``kasmina grow`` and the bundled policies' candidates do.

    Args:
        observation: What `MorphogeneticModel.observe` returned.
        candidates: Blueprints by topology, or a function of a slot's observation.
        alphas: Blend weights in [0, 1] to list for `SetAlpha`.
        straight: Whether to list each `Germinate` with ``straight=True`` too, where the host's trend is known.
    """
    blueprints = candidates_by_slot(candidates)
    ways = (False, True) if straight and observation.can_go_straight else (False,)
    of_slots = [
        command for slot in observation.slots for command in _of_slot(slot, blueprints(slot), alphas, ways)
    ]
    return (Continue(), *of_slots)


def _of_slot(
    slot: SlotObservation, blueprints: Sequence[str], alphas: Sequence[float], ways: Sequence[bool]
) -> Iterator[Command]:
    name, is_living = slot.slot, slot.stage in LIVING
    if slot.stage is SeedStage.DORMANT:
        yield from (Germinate(name, one, straight=way) for one in blueprints for way in ways)
        if slot.kept_seed:
            yield Regerminate(name)
    if (is_living or is_failure_stage(slot.stage)) and slot.can_advance is not False:
        yield Advance(name)
    if is_living:
        yield Cull(name, ASKED)
        if slot.can_revert or slot.stage not in REVERTIBLE:
            yield Cull(name, ASKED, revert=True)
        if slot.stage is SeedStage.BLENDING:
            yield from (SetAlpha(name, alpha) for alpha in alphas)
        yield Resume(name) if slot.is_paused else Pause(name)
