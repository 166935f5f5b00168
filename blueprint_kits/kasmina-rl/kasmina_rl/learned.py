"""Trained controllers: weights and JSON in one safetensors file, and the policy that decides by them."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, final

import numpy as np
from kasmina_core import (
    CheckpointError,
    Command,
    Continue,
    Germinate,
    KasminaError,
    Observation,
    SlotObservation,
)

from kasmina_rl.actions import Actions
from kasmina_rl.encoding import (
    BLUEPRINT_FIELDS,
    RUN_FIELDS,
    SLOT_FIELDS,
    TIMING_FIELDS,
    VERSION,
    Encoder,
    Numbers,
    flatten,
    timing,
)

FORMAT: Final = "kasmina-rl controller"
"""What a file must say that it is."""

MOST_BYTES: Final = 16_000_000
"""Size of the largest file that is read."""

_CONTEXT: Final = len(RUN_FIELDS) + len(SLOT_FIELDS) + len(TIMING_FIELDS)
_FIELDS: Final = [*RUN_FIELDS, *SLOT_FIELDS, *TIMING_FIELDS, *BLUEPRINT_FIELDS]
SCORES: Final[Mapping[str, int]] = {
    "wait": len(RUN_FIELDS) + 1,
    "germinate": _CONTEXT + len(BLUEPRINT_FIELDS) + 1,
    "advance": _CONTEXT + 1,
    "cull": _CONTEXT + 1,
    "revert": _CONTEXT + 1,
}
"""Weights of a linear controller: those of what an action is about, and one for 1."""


class ControllerError(KasminaError):
    """A controller's file cannot be read, or does not fit; the message says what is wrong."""


@final
@dataclass(frozen=True)
class Controller:
    """What a training ends with: numbers in, one score per action out.

    Two kinds. ``linear`` scores each action by weights for the run, the slot and the blueprint that it is about: it fits
    any number of slots and blueprints. ``mlp`` is a network of tanh layers over all numbers, for the slots and candidates
    that it was trained with.

    Attributes:
        kind: Which.
        weights: The tensors by name: `SCORES` for ``linear``; ``0.weight``, ``0.bias``, ``1.weight``, … for ``mlp``.
        slots: Slots that it was trained with.
        candidates: Blueprints that it was trained with.
        record: How it was trained, plain data.
        draws: Whether it acts as it was trained by drawing by ``softmax(scores)``, and not by taking the best.
    """

    kind: Literal["linear", "mlp"]
    weights: Mapping[str, Numbers]
    slots: int
    candidates: tuple[str, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    draws: bool = False

    def __post_init__(self) -> None:
        shapes = {name: tuple(array.shape) for name, array in self.weights.items()}
        wanted = self._wanted(shapes)
        if shapes != wanted:
            raise ControllerError(
                f"The controller's weights do not fit.\n  expected: {wanted}\n  found:    {shapes}"
            )
        if not all(np.isfinite(array).all() for array in self.weights.values()):
            raise ControllerError("The controller's weights hold NaN or infinity.")

    def _wanted(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        if self.kind == "linear":
            return {name: (size,) for name, size in SCORES.items()}
        layers = len(shapes) // 2
        width = len(RUN_FIELDS) + self.slots * len(SLOT_FIELDS) + len(self.candidates) * len(BLUEPRINT_FIELDS)
        wanted: dict[str, tuple[int, ...]] = {}
        for i in range(layers):
            out = shapes.get(f"{i}.bias", (0,))[0] if i < layers - 1 else self.actions
            wanted |= {f"{i}.weight": (out, width), f"{i}.bias": (out,)}
            width = out
        return wanted

    @property
    def actions(self) -> int:
        """Number of actions of what it was trained with."""
        return 1 + self.slots * (len(self.candidates) + 3)

    def scores(self, encoded: dict[str, Numbers]) -> Numbers:
        """Return the score of each action of an `Encoder`'s numbers.

        Raises:
            ControllerError: If a network was trained with other slots or candidates.
        """
        if self.kind == "linear":
            return linear_scores(self.weights, encoded)
        x = flatten(encoded)
        if x.shape[0] != self.weights["0.weight"].shape[1]:
            raise ControllerError(
                "The controller is a network for other slots or candidates.\n"
                f"  trained with: {self.slots} slots, candidates {', '.join(self.candidates)}\n"
                f"  here:         {len(encoded['slots'])} slots, {len(encoded['candidates'])} candidates"
            )
        last = len(self.weights) // 2 - 1
        for i in range(last + 1):
            x = self.weights[f"{i}.weight"] @ x + self.weights[f"{i}.bias"]
            x = np.tanh(x) if i < last else x
        return x

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; its metadata hold the rest as JSON, and a CRC-32 of all."""
        from safetensors.numpy import save_file

        about = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "slots": self.slots,
            "candidates": list(self.candidates),
            "draws": self.draws,
            "fields": _FIELDS,
            "record": dict(self.record),
        }
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in self.weights.items()}
        text = json.dumps(about)
        save_file(arrays, os.fspath(path), {"controller": text, "crc32": checksum(text, arrays)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Controller:
        """Read what `save` wrote. Nothing in the file is run.

        Raises:
            ControllerError: If there is no such file, or it is foreign, damaged, of another version or too large.

        Warns:
            UserWarning: If it was written without a checksum, so that a bit that turned is not noticed.
        """
        try:
            return cls._load(Path(path))
        except ControllerError:
            raise
        except Exception as error:
            raise ControllerError(
                f"{os.fspath(path)} is no controller that can be read: {type(error).__name__}: {error!s:.300}\n"
                "kasmina-rl export MODEL.zip OUT makes one of a model that stable-baselines3 saved."
            ) from error

    @classmethod
    def _load(cls, path: Path) -> Controller:
        from safetensors.numpy import load

        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ControllerError(f"{path} has {size:,} bytes; a controller has {MOST_BYTES:,} at most.")
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]) if length <= size else {}
        metadata, arrays = header["__metadata__"], load(data)
        about = json.loads(metadata["controller"])
        if metadata.keys() == {"controller"}:
            warnings.warn(f"{path} has no checksum: a bit that turned in it is not noticed.", stacklevel=3)
        elif metadata["crc32"] != checksum(metadata["controller"], arrays):
            raise ControllerError(f"{path} is not as it was written: its bytes have changed since.")
        if about["format"] != FORMAT or about["version"] != VERSION:
            raise ControllerError(
                f"{path} holds another format.\n  expected: {FORMAT}, version {VERSION}\n"
                f"  found:    {about['format']!s:.80}, version {about['version']!s:.20}\n"
                "One of an older version must be trained again; a network can be exported again from its model."
            )
        if about["fields"] != _FIELDS or about["kind"] not in ("linear", "mlp"):
            raise ControllerError(f"{path} was written for other numbers than those of version {VERSION}.")
        slots, candidates = about["slots"], about["candidates"]
        if not (
            isinstance(slots, int) and 0 < slots < 10_000 and all(isinstance(c, str) for c in candidates)
        ):
            raise ControllerError(f"{path} does not say for which slots and candidates it was made.")
        if not isinstance(about["draws"], bool):
            raise ControllerError(f"{path} does not say whether the controller draws.")
        weights = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
        return cls(about["kind"], weights, slots, tuple(candidates), dict(about["record"]), about["draws"])


def checksum(text: str, arrays: Mapping[str, Numbers]) -> str:
    """Return the CRC-32, in hexadecimal, of a controller's text and its weights with their names and shapes."""
    found = zlib.crc32(text.encode())
    for name, array in sorted(arrays.items()):
        found = zlib.crc32(array.tobytes(), zlib.crc32(f"{name}{array.dtype}{array.shape}".encode(), found))
    return f"{found:08x}"


def linear_scores(weights: Mapping[str, Numbers], encoded: Mapping[str, Numbers]) -> Numbers:
    """Return the scores of a linear controller, in the order of `Actions`."""
    run, one = encoded["run"], np.ones(1, np.float32)
    scores = [float(weights["wait"] @ np.concatenate([run, one]))]
    times = np.stack(timing(run, encoded["slots"]), -1)
    for slot, time in zip(encoded["slots"], times, strict=True):
        about = np.concatenate([run, slot, time])
        rows = [np.concatenate([about, candidate, one]) for candidate in encoded["candidates"]]
        scores += [float(weights["germinate"] @ row) for row in rows]
        scores += [float(weights[name] @ np.append(about, 1.0)) for name in ("advance", "cull", "revert")]
    return np.array(scores, np.float32)


def choose(scores: Numbers, mask: Any, dice: np.random.Generator | None) -> int:
    """Return the number of a legal action: the best one's, or one drawn by ``softmax(scores)``.

    Args:
        scores: Of all actions.
        mask: Which are legal, booleans.
        dice: What to draw with; ``None`` takes the best.
    """
    scores = np.where(mask, scores, -np.inf)
    if dice is None:
        return int(scores.argmax())
    odds = np.exp(scores - scores.max())
    return int(dice.choice(len(scores), p=odds / odds.sum()))


@final
class LearnedPolicy:
    """Decides as a trained controller does: one legal action per epoch, the best or drawn.

    Use it for one run: it remembers the losses. ``kasmina grow --policy rl:learned --policy-option path=FILE``.

    Args:
        blueprints: Candidates by topology, or a function of a slot's observation; those that the controller knows are
            grown. A linear controller grows any.
        path: The controller's file; ``None`` for the one that comes with this package.
        sample: Whether to draw by ``softmax(scores)``, or to take the best; ``None`` for what the file says.
        seed: What to draw with.

    Raises:
        ControllerError: If the file cannot be read.
    """

    def __init__(
        self,
        blueprints: Any,
        path: str | os.PathLike[str] | None = None,
        *,
        sample: bool | None = None,
        seed: int = 0,
    ) -> None:
        self.controller = Controller.load(path if path is not None else bundled())
        self._candidates = blueprints
        self.sample = self.controller.draws if sample is None else sample
        self._dice = np.random.default_rng(seed)
        self._encoder: Encoder | None = None
        self._actions: Actions | None = None
        self._saved: dict[str, Any] | None = None

    def decide(self, observation: Observation) -> Sequence[Command]:
        """Return one command, or none."""
        if self._actions is None or self._encoder is None:
            slots, candidates = [slot.slot for slot in observation.slots], self._fitting(observation)
            self._actions, self._encoder = Actions(slots, candidates), Encoder(candidates)
            if self._saved is not None:
                self._encoder.load_state_dict(self._saved)
        self._encoder.note(observation)
        scores = self.controller.scores(self._encoder.encode(observation))
        offered = {slot.slot: self._offered(slot) for slot in observation.slots}
        mask = self._actions.mask(observation).astype(bool)
        for number, command in enumerate(self._actions.commands):
            if isinstance(command, Germinate) and command.blueprint not in offered[command.slot]:
                mask[number] = False
        number = choose(scores, mask, self._dice if self.sample else None)
        command = self._actions.commands[number]
        return () if isinstance(command, Continue) else (command,)

    def _fitting(self, observation: Observation) -> tuple[str, ...]:
        """Return the candidates: the controller's own where they are offered, else, for a linear one, all of them."""
        offered = [name for slot in observation.slots for name in self._offered(slot)]
        known = tuple(name for name in self.controller.candidates if name in offered)
        if known == self.controller.candidates or self.controller.kind == "mlp":
            return self.controller.candidates
        return known or tuple(dict.fromkeys(offered))

    def _offered(self, slot: SlotObservation) -> Sequence[str]:
        if callable(self._candidates):
            return tuple(self._candidates(slot))
        return tuple(self._candidates.get(slot.topology, ()))

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers of the run, as plain data."""
        return {
            "encoder": self._encoder.state_dict() if self._encoder else None,
            "dice": self._dice.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: If it is damaged, or another policy's.
        """
        if not isinstance(state, Mapping) or set(state) != {"encoder", "dice"}:
            raise CheckpointError("The saved state of the policy is no LearnedPolicy's.")
        dice = np.random.default_rng()
        try:
            dice.bit_generator.state = dict(state["dice"])
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"The saved state of the policy is damaged: {error}") from error
        saved = state["encoder"]
        if saved is not None:
            Encoder(()).load_state_dict(saved)
        self._dice, self._saved, self._encoder, self._actions = dice, saved, None, None


def bundled() -> Path:
    """Return the path of the controller that comes with this package."""
    return Path(__file__).with_name("controller.safetensors")
