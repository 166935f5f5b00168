"""Containment of foreign code and text: its exceptions end no program, its text controls no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EscapeError(Exception):
    """Foreign code raised something that no ``except Exception`` stops; the message and ``__cause__`` say what."""


@contextmanager
def contained() -> Iterator[None]:
    """Run foreign code so that whatever it raises is an `Exception`; only KeyboardInterrupt, which is the user's, passes.

    An exit, a skip of pytest or a ``BaseException`` of its own becomes an `EscapeError`.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise EscapeError(described(error)) from error


def described(error: BaseException, limit: int = 1000) -> str:
    """Return type and message of what foreign code raised, cleaned; also if its ``__str__`` raises."""
    if isinstance(error, EscapeError):
        return str(error)
    try:
        with contained():
            text = str(error)
    except Exception:
        text = "(its message cannot be read)"
    return cleaned(f"{type(error).__name__}: {text}", limit, lines=True)


def cleaned(text: str, limit: int = 200, *, lines: bool = False) -> str:
    """Return text for a terminal or a log: control and direction characters as escapes, cut to a length.

    Args:
        text: Foreign text.
        limit: Most characters of the result.
        lines: Whether line breaks stay.

    >>> cleaned("scale" + chr(27) + "[2J")
    'scale\\\\x1b[2J'
    """
    if len(text) <= limit and text.isprintable():
        return text
    kept = [
        char if char.isprintable() or (lines and char == "\n") else char.encode("unicode_escape").decode()
        for char in text[: limit + 1]
    ]
    shown = "".join(kept)
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def shown(thing: object, limit: int = 200) -> str:
    """Return the repr of a foreign object, cleaned; an object whose repr raises is named by its type."""
    try:
        with contained():
            return cleaned(repr(thing), limit)
    except Exception as error:
        return cleaned(f"<{type(thing).__name__} whose repr raised {type(error).__name__}>", limit)
