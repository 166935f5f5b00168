"""State of policies as plain data, read back by type hints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from kasmina_core.errors import CheckpointError
from kasmina_core.records import read

_WHAT: Final = "The saved state of the policy"


class Remembering:
    """Base of objects with a state to save.

    Attributes:
        remembers: Names of what is saved, each with its hint as in `kasmina_core.records.read`; ``gains`` is saved
            from the attribute ``_gains``. A subclass adds its own to those of its base.
    """

    remembers: ClassVar[dict[str, Any]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {name: _plain(getattr(self, f"_{name}")) for name in self.remembers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: If it is damaged, or another policy's; nothing has changed then.
        """
        vars(self).update(self.read_state(state))

    def read_state(self, state: Any) -> dict[str, Any]:
        """Return the attributes that a saved state describes, without changing any.

        Raises:
            CheckpointError: If something is missing or of another type.
        """
        return {f"_{name}": remembered(state, name, hint) for name, hint in self.remembers.items()}


def remembered(state: Any, name: str, hint: Any) -> Any:
    """Return one entry of a saved state, read by its hint.

    Raises:
        CheckpointError: If it is missing or of another type.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{_WHAT} must be a mapping, not {state!r:.80}.")
    if name not in state:
        raise CheckpointError(
            f"{_WHAT} lacks '{name}'; was it another policy's?\n"
            f"  it has: {', '.join(sorted(map(str, state))) or 'nothing':.200}"
        )
    return read(hint, state[name], _WHAT, name)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in sorted(value.items())}
    if isinstance(value, (set, list, tuple)):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set) else value)]
    return value
