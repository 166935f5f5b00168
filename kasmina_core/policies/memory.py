"""What policies remember, read back with every doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kasmina_core.errors import CheckpointError

_WORDS = {int: "a whole number of at least 0", float: "a number", str: "text"}


def remembered(state: Any, name: str) -> Any:
    """Return one of the things that a policy saved.

    Raises:
        CheckpointError: If it is not there.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"The saved state of the policy must be a mapping, not {state!r:.80}.")
    if name not in state:
        raise CheckpointError(
            f"The saved state of the policy lacks '{name}'; was it another policy's?\n"
            f"  it has: {', '.join(sorted(map(str, state))) or 'nothing':.200}"
        )
    return state[name]


def value(state: Any, name: str, kind: type) -> Any:
    """Return a saved value.

    Args:
        state: What was saved.
        name: Of the value.
        kind: ``str``, ``float``, or ``int`` for a number of times.

    Raises:
        CheckpointError: If it is of another kind.
    """
    return _of_kind(kind, remembered(state, name), name)


def values(state: Any, name: str, kind: type) -> list[Any]:
    """Return a saved list; see `rows`.

    Raises:
        CheckpointError: If it is another.
    """
    return [_of_kind(kind, one, name) for one in _list(state, name)]


def rows(state: Any, name: str, *kinds: type) -> list[tuple[Any, ...]]:
    """Return a saved list of rows.

    Args:
        state: What was saved.
        name: Of the list.
        kinds: What a row holds: ``str``, ``float``, or ``int`` for a number of times.

    Raises:
        CheckpointError: If it is another.
    """
    return [row(kinds, one, name) for one in _list(state, name)]


def _list(state: Any, name: str) -> Sequence[Any]:
    found = remembered(state, name)
    if not isinstance(found, (list, tuple)):
        raise _wrong(name, "a list", found)
    return found


def row(kinds: tuple[type, ...], found: Any, name: str) -> tuple[Any, ...]:
    """Return one row of `rows`."""
    if not isinstance(found, (list, tuple)) or len(found) != len(kinds):
        raise _wrong(name, f"rows of {len(kinds)}", found)
    return tuple(_of_kind(kind, value, name) for kind, value in zip(kinds, found, strict=True))


def table(state: Any, name: str) -> Mapping[str, Any]:
    """Return a saved mapping by text.

    Raises:
        CheckpointError: If it is another.
    """
    found = remembered(state, name)
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise _wrong(name, "a mapping by text", found)
    return found


def _of_kind(kind: type, found: Any, name: str) -> Any:
    kinds = (int, float) if kind is float else (kind,)
    fits = isinstance(found, kinds) and not isinstance(found, bool)
    if not fits or (kind is int and found < 0) or (isinstance(found, int) and found.bit_length() > 64):
        raise _wrong(name, _WORDS[kind], found)
    return kind(found)


def _wrong(name: str, wanted: str, found: Any) -> CheckpointError:
    return CheckpointError(
        f"The saved state of the policy is damaged or another policy's: '{name}' must be or hold {wanted}, "
        f"not {found!r:.80}."
    )
