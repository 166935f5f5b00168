"""Installed distributions, read by hand where their files are plain, and by importlib_metadata where they are not.

What is read by hand equals what importlib_metadata finds, in the same order: it is a fraction of the work, because
most distributions hold no pack, and of the others only the header of METADATA is needed. Anything unusual is left to
importlib_metadata: other finders, archives and eggs on ``sys.path``, folded headers, text that is not UTF-8.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

import importlib_metadata

_FIND: Final = (
    importlib_metadata.distributions
)  # whoever puts another in its place is asked instead of the folders
_READ: Final = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_SUFFIXES: Final = (".dist-info", ".egg-info")
_SEPARATORS: Final = re.compile(r"[-_.]+")
_PLAIN_FOLDER: Final = re.compile(r"[A-Za-z0-9][^-]*(-.*)?\.dist-info", re.ASCII | re.DOTALL)
_PLAIN_HEADER: Final = re.compile(r"(?:(?!(?i:content-))[!-9;-~]+:[^\n\r]*\n)+(?=\n|\Z)")
_FIELD: Final = re.compile(
    r"^(name|version|requires-dist|requires-python):[ \t]*(.*)$", re.ASCII | re.IGNORECASE | re.MULTILINE
)


@final
@dataclass(frozen=True, slots=True)
class Header:
    """The fields of METADATA that the search for packs needs, as importlib_metadata gives them.

    Attributes:
        name: Name; ``""`` if it has none.
        version: Version; likewise.
        requirements: Each ``Requires-Dist``.
        requires_python: ``Requires-Python``, ``None`` without one.
    """

    name: str
    version: str
    requirements: Sequence[str]
    requires_python: str | None


@final
class Installed:
    """The metadata folders on ``sys.path``, in the order in which importlib_metadata finds them."""

    def __init__(self, folders: Sequence[tuple[str, str]]) -> None:
        self._folders = folders
        self._by_name: dict[str, list[str]] = {}
        for key, path in folders:
            self._by_name.setdefault(key, []).append(path)

    def __iter__(self) -> Iterator[str]:
        return (path for _, path in self._folders)

    @classmethod
    def on_path(cls) -> Installed | None:
        """List the folders on ``sys.path``; ``None`` where importlib_metadata finds something else besides."""
        finders = [finder for finder in sys.meta_path if hasattr(finder, "find_distributions")]
        if importlib_metadata.distributions is not _FIND or len(finders) != 1:
            return None
        if type(finders[0]) is not importlib_metadata.MetadataPathFinder:
            return None
        folders: list[tuple[str, str]] = []
        for root in dict.fromkeys(sys.path):
            if type(root) is not str or os.path.basename(root).lower().endswith(".egg"):
                return None
            try:
                children = os.listdir(root or ".")
            except FileNotFoundError:
                continue
            except (OSError, ValueError):  # an archive, or a folder that cannot be read
                return None
            prefix = os.path.join(root, "")
            groups: dict[str, list[str]] = {}  # importlib_metadata gives those of one name together
            for child in children:
                if child.endswith(_SUFFIXES) or child.lower().endswith(_SUFFIXES):
                    stem = child.lower().rpartition(".")[0].partition("-")[0]
                    groups.setdefault(_normalized(stem), []).append(prefix + child)
            folders += [(key, path) for key, paths in groups.items() for path in paths]
        return cls(folders)

    def named(self, name: str) -> str | None:
        """Return the one folder of a distribution; ``None`` if there are none or several."""
        paths = self._by_name.get(_normalized(name), ())
        return paths[0] if len(paths) == 1 else None

    def version(self, name: str) -> str | None:
        """Return the version of a distribution; ``None`` if importlib_metadata must be asked."""
        path = self.named(name)
        header = read_header(path) if path is not None and is_plain(path) else None
        return header.version or None if header is not None else None


def is_plain(path: str) -> bool:
    """Return whether a folder is a ``*.dist-info`` whose name starts with that of its distribution."""
    return _PLAIN_FOLDER.fullmatch(os.path.basename(path)) is not None


def folder_name(path: str) -> str:
    """Return the normalised name of the distribution of a plain folder, as the folder gives it."""
    return _normalized(os.path.basename(path).partition("-")[0].removesuffix(".dist-info"))


def read_file(path: str, name: str) -> bytes | None:
    """Return a file of a folder, ``None`` if it cannot be read."""
    try:
        descriptor = os.open(f"{path}{os.sep}{name}", _READ)  # a third of the time of open()
    except OSError:
        return None
    try:
        parts = []
        while part := os.read(descriptor, 1 << 13):
            parts.append(part)
        return b"".join(parts)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def read_header(path: str) -> Header | None:
    """Return fields of METADATA in a folder; ``None`` if importlib_metadata must read it.

    Source: https://packaging.python.org/en/latest/specifications/core-metadata/
    """
    try:
        text = (read_file(path, "METADATA") or b"").decode()
    except UnicodeDecodeError:
        return None
    header = _PLAIN_HEADER.match(text)
    if header is None:
        return None
    fields: dict[str, list[str]] = {}
    for field, value in _FIELD.findall(header[0]):
        fields.setdefault(field.lower(), []).append(value)
    if "requires-dist" not in fields and os.path.lexists(f"{path}{os.sep}requires.txt"):
        return None
    name, version, python = (fields.get(f, [None])[0] for f in ("name", "version", "requires-python"))
    return Header(name or "", version or "", fields.get("requires-dist", ()), python)


def read_entry_points(raw: bytes, groups: Sequence[str]) -> list[importlib_metadata.EntryPoint] | None:
    """Return the entry points of some groups in an ``entry_points.txt``; ``None`` if importlib_metadata must read it.

    Source: https://packaging.python.org/en/latest/specifications/entry-points/
    """
    try:
        lines = raw.decode().splitlines()
    except UnicodeDecodeError:
        return None
    found = []
    group = None
    for line in map(str.strip, lines):
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            group = line.strip("[]")
        elif group is not None:
            name, equals, value = line.partition("=")
            if not equals:
                return None
            if group in groups:
                found.append(importlib_metadata.EntryPoint(name.strip(), value.strip(), group))
    return found


def _normalized(name: str) -> str:
    """Return a name in the form that importlib_metadata compares."""
    return _SEPARATORS.sub("_", name).lower()
