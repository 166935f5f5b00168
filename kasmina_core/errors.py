"""What can go wrong, as types: every error of the library derives from `KasminaError`."""

from __future__ import annotations

import difflib
import inspect
import traceback
import warnings
from collections.abc import Iterable
from typing import Final

_NAMED: Final = 40
_NOT_THE_CALLER: Final = {"kasmina_core", "torch", "contextlib"}


class KasminaError(Exception):
    """Base of every error the library raises on purpose."""


class TopologyError(KasminaError, ValueError):
    """A topology that does not exist, or a blueprint for another topology."""


class TransitionError(KasminaError):
    """A stage change, or a command, that the lifecycle does not allow from the present stage."""


class GerminationError(KasminaError):
    """A seed could not be germinated; nothing was changed.

    Attributes:
        result: The G0 `GateResult` that says which check failed, if the gate was reached.
    """

    def __init__(self, message: str, result: object | None = None) -> None:
        super().__init__(message)
        self.result = result


class SeedShapeError(KasminaError, ValueError):
    """A seed returned features of another shape than the host's.

    Attributes:
        host_shape: Shape of the host's features at the slot.
        seed_shape: Shape the seed returned.
    """

    def __init__(self, host_shape: Iterable[int], seed_shape: Iterable[int]) -> None:
        self.host_shape = tuple(host_shape)
        self.seed_shape = tuple(seed_shape)
        super().__init__(
            "A seed must return features of the shape it was given.\n"
            f"  host: {self.host_shape}\n"
            f"  seed: {self.seed_shape}\n"
            "Change the blueprint so that width and length are kept (padding, stride 1, a last projection)."
        )


class HostError(KasminaError):
    """A host whose injection points do not exist, do not fire once, or have another shape than declared."""


class UnknownNameError(KasminaError, KeyError):
    """A slot, blueprint, pack, host or policy that nobody offers; the message suggests near names."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class AmbiguousNameError(UnknownNameError):
    """A short name that more than one pack offers; the message lists the full ids."""


class BlueprintError(KasminaError, ValueError):
    """A blueprint declaration, or an option given to it, that cannot be used."""


class NameConflictError(KasminaError):
    """Two claims to one name; the message names both claimants."""


class PluginError(KasminaError):
    """A plugin pack that could not be loaded or registered; the cause is chained."""


class SwitchError(KasminaError, ValueError):
    """A switch of plugin discovery, in the environment or given as an argument, that cannot be read."""


class CheckpointError(KasminaError):
    """Saved state that is truncated, foreign, newer or does not fit this model; nothing was changed."""


class DistributedError(KasminaError):
    """The processes of a job do not agree, or one of them is missing; this job cannot go on growing.

    Attributes:
        missing: Ranks that did not come, as far as is known.
    """

    def __init__(self, message: str, missing: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class ExportError(KasminaError):
    """A grown model that cannot be turned into a plain module that computes the same."""


class MisuseWarning(UserWarning):
    """A call was forgotten, or an argument cannot work, so that growth stands still; warned once for each."""


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the program that called the library, however deep in the library the reason was found."""
    stack = [frame for frame, _ in traceback.walk_stack(inspect.currentframe())]
    outside = (
        one for one in stack if one.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THE_CALLER
    )
    frame = next(outside, stack[-1])
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, else the first 40 known names, else ``""``.

    >>> did_you_mean("atention", ["attention", "norm"])
    " Did you mean 'attention'?"
    >>> did_you_mean("zzz", ["attention", "norm"])
    ' Known: attention, norm.'
    """
    names = sorted(set(known))
    if near := difflib.get_close_matches(name, names, n=1):
        return f" Did you mean '{near[0]}'?"
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f" Known: {', '.join(names[:_NAMED])}{more}." if names else ""
