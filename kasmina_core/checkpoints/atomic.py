"""Files written whole or not at all: beside their place, flushed, then renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield where to write a file that takes the place of ``target`` when the block ends well.

    Raises:
        OSError: If it cannot be written; what was there stays, and nothing else is left.
    """
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.writing")
    try:
        yield beside
        flush(beside)
        os.replace(beside, target)
        flush(target.parent)
    finally:
        with suppress(OSError):
            beside.unlink()


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a whole file or leave the previous one.

    Args:
        path: The file; its folder must exist.
        content: Text (written as UTF-8) or bytes.

    Raises:
        OSError: If it cannot be written; no temporary file is left.
    """
    with replacing(Path(path)) as beside:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere a folder cannot be opened
    # Windows flushes no handle that is read-only.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
