"""Dataclasses as plain data and back, checked against their type hints."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Final,
    Literal,
    Self,
    Union,
    final,
    get_args,
    get_origin,
    get_type_hints,
)

from kasmina_core.errors import CheckpointError

_LARGEST_WHOLE: Final = 1 << 63
_WORDS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LISTS: Final = (list, tuple, deque, set, Sequence)
_KINDS: Final = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


@final
class Mark(Enum):
    """How a field is written, where its type does not say it: ``Annotated[GateLevel, Mark.BY_NAME]``."""

    BY_NAME = "an Enum by the name of its member instead of its value"
    LATER = "earlier versions did not write it: the default stands in"
    UNWRITTEN = "not written; reading leaves the default"


@final
@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number: ``Annotated[float, Range(0.0, 1.0)]``; NaN and infinity are in no range.

    Attributes:
        least: Smallest value.
        most: Largest value.
        above: What the value must be above.
        below: What the value must be below.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = {"of at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))


Count = Annotated[int, Range(0)]
"""A number of times."""


class Record:
    """Base of dataclasses that are written to files.

    Fields hold text, numbers, booleans, Enums, other records, and lists, tuples and mappings of these; any of them may
    be ``None`` where the hint says so. What is hinted ``Any`` is written as it is.

    Attributes:
        derived: Names of properties that are written too, for people, and ignored when read.
    """

    __slots__ = ()

    derived: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``torch.load(weights_only=True)`` and JSON accept."""
        written = {name: _plain(getattr(self, name)) for name in self.derived}
        kind: Any = type(self)
        for name, (hint, marks) in _hints(kind).items():
            value = getattr(self, name)
            if Mark.BY_NAME in marks and value is not None:
                written[name] = value.name
            elif hint is Any or Any in get_args(hint):
                written[name] = dict(value) if isinstance(value, Mapping) else value
            elif Mark.UNWRITTEN not in marks:
                written[name] = _plain(value)
        return written

    @classmethod
    def from_dict(cls, data: Any, what: str = "") -> Self:
        """Rebuild from `to_dict`.

        Args:
            data: What was saved.
            what: What it is, for messages.

        Raises:
            CheckpointError: If a field is missing, unknown, of another type or out of range.
        """
        made: Self = read(cls, data, what or f"The saved {cls.__name__}")
        return made


def read(hint: Any, data: Any, what: str, where: str = "") -> Any:
    """Return plain data as its type hint says.

    Args:
        hint: A type, such as ``list[tuple[str, float]]``; see `Record`.
        data: What was saved.
        what: What it is, for messages.
        where: Name of the part of it, for messages.

    Raises:
        CheckpointError: If it is something else; the message has what was expected and what was found.
    """
    try:
        return _read(hint, data, where)
    except CheckpointError as error:
        raise CheckpointError(f"{what} cannot be read: {error}") from error


def is_plain(value: object) -> bool:
    """Whether a value is made of ``None``, booleans, numbers, text, lists, tuples and mappings by text alone."""
    # Exact types: a subclass (an Enum, a numpy scalar) is written as its class, which a safe load refuses.
    if type(value) is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple | deque):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


@cache
def _hints(record: type) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the type of each field of a record, with its marks."""
    hints = get_type_hints(record, include_extras=True)
    return {f.name: _apart(hints[f.name]) for f in fields(record)}


def _apart(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _read(hint: Any, value: Any, where: str, marks: tuple[Any, ...] = ()) -> Any:
    hint, own = _apart(hint)
    marks += own
    kind, inside = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        (only,) = (one for one in inside if one is not NoneType)
        return None if value is None else _read(only, value, where, marks)
    if kind is Any:
        return value
    if kind in _KINDS:
        return _basic(kind, next((mark for mark in marks if isinstance(mark, Range)), None), value, where)
    if kind is Literal:
        if type(value) is str and value in inside:
            return value
        raise _misfit(where, f"one of {', '.join(inside)}", value)
    if kind in _LISTS:
        return _list(kind, inside, value, where)
    if kind in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _misfit(where, "a mapping by text", value)
        return {key: _read(inside[1], item, f"{where}[{key!r:.40}]") for key, item in value.items()}
    if issubclass(kind, Enum):
        members = {m.name if Mark.BY_NAME in marks else m.value: m for m in kind}
        if type(value) in (int, str) and value in members:
            return members[value]
        raise _misfit(where, f"a {kind.__name__} ({', '.join(map(str, members))})", value)
    if issubclass(kind, Record):
        return _record(kind, value, where)
    if not isinstance(value, kind):
        raise _misfit(where, f"a {kind.__name__}", value)
    return value


def _basic(kind: Any, bounds: Range | None, value: Any, where: str) -> Any:
    found = _WORDS.get(value, value) if kind is float and isinstance(value, str) else value
    wanted = (int, float) if kind is float else kind
    if isinstance(found, wanted) and (kind is bool or not isinstance(found, bool)):
        is_whole = isinstance(found, int)
        if (not is_whole or abs(found) < _LARGEST_WHOLE) and (bounds is None or found in bounds):
            return kind(found)
    raise _misfit(where, f"{_KINDS[kind]} {bounds or ''}".strip(), value)


def _list(kind: Any, inside: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _misfit(where, "a list", value)
    is_row = kind is tuple and inside[-1] is not ...
    if is_row and len(value) != len(inside):
        raise _misfit(where, f"a list of {len(inside)}", value)
    hints = inside if is_row else inside[:1] * len(value)
    items = (
        _read(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )
    return tuple(items) if kind is Sequence else kind(items)


def demand_fields(data: Mapping[Any, Any], needed: Iterable[str], known: Container[str], what: str) -> None:
    """Demand that a mapping has the fields that are needed, and none that are not known.

    Raises:
        CheckpointError: If it has others; the message names both kinds.
    """
    missing = [name for name in needed if name not in data]
    unknown = [str(name) for name in data if name not in known]
    if missing or unknown:
        raise CheckpointError(
            f"{what} has other fields than this version of kasmina.\n"
            f"  missing: {', '.join(sorted(missing)) or 'none'}\n"
            f"  unknown: {', '.join(sorted(unknown)) or 'none':.200}"
        )


def _record(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise _misfit(where, "a mapping", data)
    hints = {name: one for name, one in _hints(kind).items() if Mark.UNWRITTEN not in one[1]}
    needed = [name for name, (_, marks) in hints.items() if Mark.LATER not in marks]
    demand_fields(data, needed, {*hints, *kind.derived}, where or "it")
    prefix = f"{where}." if where else ""
    values = {
        name: _read(hint, data[name], prefix + name, marks)
        for name, (hint, marks) in hints.items()
        if name in data
    }
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}" if where else str(error)) from error


def _misfit(where: str, expected: str, found: Any) -> CheckpointError:
    try:
        shown = f"{found!r:.200}"
    except ValueError:  # a number of thousands of digits
        shown = f"a {type(found).__name__} too long to print"
    return CheckpointError(f"{where or 'it'} must be {expected}, not {shown}.")
