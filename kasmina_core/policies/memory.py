"""What policies remember, read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kasmina_core.errors import CheckpointError
from kasmina_core.records import read

_WHAT: Final = "The saved state of the policy"


def remembered(state: Any, name: str, hint: Any) -> Any:
    """Return one of the things that a policy saved.

    Args:
        state: What was saved.
        name: Of the thing.
        hint: What it is, such as ``list[tuple[str, float]]``; see `kasmina_core.records.read`.

    Raises:
        CheckpointError: If it is missing, or is something else.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{_WHAT} must be a mapping, not {state!r:.80}.")
    if name not in state:
        raise CheckpointError(
            f"{_WHAT} lacks '{name}'; was it another policy's?\n"
            f"  it has: {', '.join(sorted(map(str, state))) or 'nothing':.200}"
        )
    return read(hint, state[name], _WHAT, name)
