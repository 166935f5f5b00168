"""Migrations of older formats: each step is one function from one version to a later one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from kasmina_core.errors import CheckpointError
from kasmina_core.growth.plain_data import FORMAT_VERSION

Data = Mapping[str, Any]


def upgraded(kind: str, data: Any, what: str) -> Data:
    """Return data of any version that can be read as the present version has it.

    Args:
        kind: ``"checkpoint"``, ``"distributed"``, ``"seeds"``, ``"growth"`` or ``"trainer"``.
        data: What was read; parsed, with its marks.
        what: What it is, for messages.

    Raises:
        CheckpointError: If it is newer, or no version of it is known.
    """
    version = data.get("version") if isinstance(data, Mapping) else None
    while type(version) is int and (step := _STEPS.get((kind, version))) is not None:
        data = step(data)
        version = data["version"]
    if type(version) is int and version == FORMAT_VERSION:
        return data  # type: ignore[no-any-return]  # a mapping, or it would have no version
    known = [str(old) for name, old in _STEPS if name == kind]
    writer = data.get("kasmina") if isinstance(data, Mapping) else None
    raise CheckpointError(
        f"{what} has another version.\n"
        f"  saved:    {version!r:.40}{f', by kasmina {writer!r:.40}' if writer is not None else ''}\n"
        f"  readable: {', '.join([*known, str(FORMAT_VERSION)])}\n"
        "Update kasmina, or load it with the one that wrote it."
    )


def part(data: Any, name: str, kind: type[Any], what: str) -> Any:
    """Return an entry of what was read; a CheckpointError with its value if it is of another type."""
    value = data.get(name) if isinstance(data, Mapping) else None
    if not isinstance(value, kind):
        raise CheckpointError(f"{what} is damaged: {name} cannot be {value!r:.80}.")
    return value


def _only_the_number(data: Data) -> Data:
    return {**data, "version": 3}


def _distributed_1(data: Data) -> Data:
    """Version 1 held the model, the optimisers and ``extra`` alone."""
    nothing: dict[str, Any] = {name: {} for name in ("kept_seeds", "snapshots")}
    return nothing | {"schedulers": [], "extra": None} | {**data, "version": 3, "files": None, "ranks": []}


def _trainer_1(data: Data) -> Data:
    """Version 1 lacked seeds put aside, what is kept for a revert, and random numbers."""
    lacking: dict[str, Any] = {
        name: {} for name in ("kept_seeds", "snapshots", "rng", "generators", "tensors")
    }
    return lacking | {**data, "version": 3, "events": data.get("sequence")}


_STEPS: Final[Mapping[tuple[str, int], Callable[[Data], Data]]] = {
    ("checkpoint", 1): _only_the_number,
    ("distributed", 1): _distributed_1,
    ("growth", 1): _only_the_number,
    ("seeds", 1): _only_the_number,
    ("trainer", 1): _trainer_1,
}
"""By kind and version. Slots' records and a ``state_dict`` are of version 3 since the first release."""
