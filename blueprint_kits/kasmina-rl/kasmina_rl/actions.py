"""Actions of the environment: a table of commands, and the mask that says which are legal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, final

import numpy as np
from kasmina_core import (
    Advance,
    Command,
    Continue,
    Cull,
    Germinate,
    Observation,
    Pause,
    Resume,
    SetAlpha,
    SlotObservation,
    default_registry,
    legal_commands,
)
from numpy.typing import NDArray

ALPHAS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Blend weights of the actions that set one."""

Kinds = Literal["basic", "full"]


@final
class Actions:
    """The commands of a controller, by number: 0 waits, then slot by slot.

    Of each slot: germinate candidate 0, 1, …; advance; cull; cull and revert the host. ``full`` adds each of `ALPHAS`,
    pause and resume.

    Args:
        slots: Names of the slots.
        candidates: Blueprints that may be grown.
        kinds: Which actions there are.
    """

    def __init__(self, slots: Sequence[str], candidates: Sequence[str], kinds: Kinds = "basic") -> None:
        if kinds not in ("basic", "full"):
            raise ValueError(f"actions must be 'basic' or 'full', not {kinds!r}.")
        self.slots, self.candidates, self.kinds = tuple(slots), tuple(candidates), kinds
        self.of_slot = [self._of_slot(slot) for slot in self.slots]
        self.commands: list[Command] = [Continue(), *(c for table in self.of_slot for c in table)]
        self._numbers = {_key(command): number for number, command in enumerate(self.commands)}

    def _of_slot(self, slot: str) -> list[Command]:
        why = "the controller's choice"
        basic = [
            *(Germinate(slot, name) for name in self.candidates),
            Advance(slot),
            Cull(slot, why),
            Cull(slot, why, revert=True),
        ]
        if self.kinds == "basic":
            return basic
        return [*basic, *(SetAlpha(slot, alpha) for alpha in ALPHAS), Pause(slot), Resume(slot)]

    def mask(self, seen: Observation) -> NDArray[np.int8]:
        """Return 1 for each command that would be carried out, and 0 for each that would be refused."""
        legal = {_key(c) for c in legal_commands(seen, self.fitting, alphas=ALPHAS)}
        return np.array([_key(command) in legal for command in self.commands], np.int8)

    def number(self, command: Command) -> int:
        """Return the action of a command; 0, which waits, if there is none for it."""
        return self._numbers.get(_key(command), 0)

    def fitting(self, slot: SlotObservation) -> list[str]:
        """Return the candidates that fit a slot."""
        specs = [(name, default_registry().blueprints.get(name).spec) for name in self.candidates]
        return [n for n, s in specs if s.topology is slot.topology and s.refusal(slot.dim) is None]


def _key(command: Command) -> tuple[object, ...]:
    match command:
        case Germinate(slot, blueprint):
            return "germinate", slot, blueprint
        case Cull(slot, _, revert):
            return "cull", slot, revert
        case SetAlpha(slot, alpha):
            return "alpha", slot, alpha
        case Continue():
            return ("wait",)
        case _:
            return type(command), command.slot
