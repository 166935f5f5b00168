"""Switches that decide which installed packs are loaded, from the environment or given to `PluginRegistry`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Self, final

from kasmina_core.errors import SwitchError

PREFIX: Final = "KASMINA_PLUGINS_"
ENVIRONMENT: Final = {
    name: PREFIX + name.upper() for name in ("allow", "block", "autoload", "prefer", "strict")
}
"""The environment variable of each switch."""

_ENTRY: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(:[a-z][a-z0-9_-]*)?")
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@final
@dataclass(frozen=True, slots=True)
class Switches:
    """Switches for the discovery of packs.

    An entry of ``allow`` and ``block`` is the name of a pack, a distribution, or the id ``pack:name`` of one thing that
    a pack offers. In the environment entries are separated by commas or blanks, and an empty variable counts as unset.

    Attributes:
        allow: ``KASMINA_PLUGINS_ALLOW``. Only these are loaded; ``None`` allows all. Bundled packs are not exempt: the
            entry ``kasmina`` allows them.
        block: ``KASMINA_PLUGINS_BLOCK``. These are not loaded, and their code is not imported; stronger than ``allow``.
        autoload: ``KASMINA_PLUGINS_AUTOLOAD``, 1 or 0. Whether packs are loaded by themselves. If not, only the bundled
            ones are; the others wait for `PluginRegistry.load_pack`.
        prefer: ``KASMINA_PLUGINS_PREFER``. Distributions that win where two claim one pack name. A bundled name cannot
            be won.
        strict: ``KASMINA_PLUGINS_STRICT``, 1 or 0. Whether loading raises if any pack cannot be used.

    Raises:
        SwitchError: If an entry is no name, or a switch is not of its type.

    >>> Switches.from_environment({"KASMINA_PLUGINS_BLOCK": "cnn:norm, some-distribution"}).in_force()
    {'block': ['cnn:norm', 'some-distribution']}
    """

    allow: Collection[str] | None = None
    block: Collection[str] = ()
    autoload: bool = True
    prefer: Collection[str] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("allow", "block", "prefer"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, _entries(name, given, ids=name != "prefer"))
        for name in ("autoload", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise SwitchError(f"{name}={getattr(self, name)!r}: give True or False.")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Return the switches that the environment sets.

        Args:
            environ: Variables to read instead of those of the process.

        Raises:
            SwitchError: If a variable cannot be read; the message names it.
        """
        variables = os.environ if environ is None else environ
        given: dict[str, Any] = {}
        for name, variable in ENVIRONMENT.items():
            text = variables.get(variable, "").strip()
            if not text:
                continue
            if name in ("autoload", "strict"):
                if text.lower() not in (*_YES, *_NO):
                    raise SwitchError(f"{variable}={text!r} is neither yes nor no. Set it to 1 or 0.")
                given[name] = text.lower() in _YES
            else:
                given[name] = _entries(variable, re.split(r"[,\s]+", text.strip(", ")), ids=name != "prefer")
        return cls(**given)

    def in_force(self) -> dict[str, Any]:
        """Return the switches that are set, as plain data."""
        values = {name: getattr(self, name) for name in ENVIRONMENT}
        return {
            name: value if isinstance(value, bool) else sorted(value)
            for name, value in values.items()
            if value != getattr(_DEFAULT, name)
        }

    def blocks(self, pack: str, distribution: str) -> bool:
        """Return whether a whole pack is blocked, by its name or by that of its distribution."""
        return _names(self.block, pack, distribution)

    def allows(self, pack: str, distribution: str) -> bool:
        """Return whether anything of a pack is allowed."""
        return (
            self.allow is None
            or _names(self.allow, pack, distribution)
            or any(entry.startswith(f"{pack}:") for entry in self.allow)
        )

    def withholds(self, full: str, distribution: str) -> bool:
        """Return whether a thing of id ``full`` is left out of a pack that is loaded."""
        pack = full.partition(":")[0]
        if full in self.block:
            return True
        return (
            self.allow is not None and full not in self.allow and not _names(self.allow, pack, distribution)
        )

    def prefers(self, distribution: str) -> bool:
        """Return whether a distribution wins a conflict."""
        return _names(self.prefer, None, distribution)


@lru_cache(maxsize=1024)
def normalized(name: str) -> str:
    """Return a distribution's name in the form that is compared.

    Source: https://packaging.python.org/en/latest/specifications/name-normalization/
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def _names(entries: Collection[str], pack: str | None, distribution: str) -> bool:
    if not entries:
        return False
    same = normalized(distribution)
    return any(entry == pack or (":" not in entry and normalized(entry) == same) for entry in entries)


def _entries(switch: str, given: object, *, ids: bool) -> frozenset[str]:
    kinds = "the name of a pack, a distribution, or an id such as 'cnn:norm'" if ids else "a distribution"
    if isinstance(given, str) or not isinstance(given, Collection):
        raise SwitchError(f"{switch}={given!r}: give a collection of names, such as [{given!r}].")
    for entry in given:
        if not isinstance(entry, str) or not _ENTRY.fullmatch(entry) or (":" in entry and not ids):
            raise SwitchError(f"{switch}: {entry!r} is not {kinds}.")
    return frozenset(given)


_DEFAULT: Final = Switches()
