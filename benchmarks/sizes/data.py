"""The source of Python's standard library as a stream of sequences, each of which is seen once."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor

LENGTH: Final = 64
"""Bytes of a sequence, as in the task ``code``."""

VOCABULARY: Final = 128
"""Bytes below 128 are themselves; the others, .02 % of all, are the last one."""

HELD_OUT: Final = {"gate": 128, "val": 1024, "test": 2048}
"""Sequences of each split that nothing is trained on, from files of its own."""

_LEFT_OUT: Final = ("test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "ensurepip")


@final
@dataclass(frozen=True, slots=True)
class Text:
    """Sequences ``(n, LENGTH + 1)`` of each split, and the SHA-256 of the files they are from."""

    splits: dict[str, Tensor]
    digest: str
    files: int


@cache
def load() -> Text:
    """Read the standard library: whole files to one split, a sequence that stands twice taken once.

    Raises:
        FileNotFoundError: If this Python lacks its source.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path
        for path in folder.rglob("*.py")
        if not set(path.relative_to(folder).parts) & {*_LEFT_OUT} and path.stat().st_size > LENGTH
    )
    if len(paths) < 200:
        raise FileNotFoundError(
            f"{folder} holds {len(paths)} source files of the standard library; 200 are needed."
        )
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    sources = [paths[place].read_bytes() for place in order]
    seen: set[bytes] = set()
    rows: dict[str, list[bytes]] = {name: [] for name in (*HELD_OUT, "train")}
    for source in sources:
        split = next((name for name, n in HELD_OUT.items() if len(rows[name]) < n), "train")
        for start in range(0, len(source) - LENGTH, LENGTH):
            row = source[start : start + LENGTH + 1]
            if row not in seen:
                seen.add(row)
                rows[split].append(row)
    splits = {}
    for name, found in rows.items():
        kept = found[: HELD_OUT.get(name)]
        values = torch.frombuffer(bytearray(b"".join(kept)), dtype=torch.uint8).view(len(kept), LENGTH + 1)
        splits[name] = values.long().clamp(max=VOCABULARY - 1)
    return Text(splits, hashlib.sha256(b"".join(sources)).hexdigest()[:16], len(sources))


@final
class Stream:
    """Training sequences in an order that depends on the seed alone; every position is read once on a path.

    Args:
        seed: Decides the order.
        batch: Sequences per batch.
    """

    def __init__(self, seed: int, batch: int) -> None:
        self._rows = load().splits["train"]
        self._order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(seed))
        self._batch = batch

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and the next bytes of a step, from 0.

        Raises:
            IndexError: If the text is at its end.
        """
        picked = self._order[step * self._batch : (step + 1) * self._batch]
        if len(picked) < self._batch:
            raise IndexError(
                f"The text ends after {len(self._order) // self._batch} steps: nothing is seen twice."
            )
        rows = self._rows[picked]
        return rows[:, :-1], rows[:, 1:]
