"""What became slower between two results of a benchmark: ``python -m benchmarks compare OLD.json NEW.json``.

Both are written by ``--out``. A row is slower if the lower quartile of the new ratio lies above the upper quartile of the
old one, and faster the other way round; a row that stands in one file alone is named. Exit status 1 if a row is slower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Key = tuple[str, str, str]


def read(path: str) -> dict[Key, Sequence[float] | None]:
    """Return the ratio of each row, by part, case and what it is over: median and quartiles.

    Raises:
        SystemExit: If the file is not the result of a benchmark.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        return {(row["part"], row["case"], row["over"]): row["ratio"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} cannot be read as what a benchmark wrote with --out: {error!r}") from error


def compare(old: Mapping[Key, Any], new: Mapping[Key, Any]) -> dict[str, list[str]]:
    """Return lines about the rows, by verdict: slower, faster, gone, new, same.

    >>> row = ("cnn", "1 slot", "bare host")
    >>> compare({row: (1.0, 0.9, 1.1)}, {row: (1.3, 1.2, 1.4)})["slower"]
    ['cnn: 1 slot / bare host: 1.000 (0.900 to 1.100) became 1.300 (1.200 to 1.400)']
    """
    found: dict[str, list[str]] = {name: [] for name in ("slower", "faster", "gone", "new", "same")}
    for key in sorted({*old, *new}):
        part, case, over = key
        name = f"{part}: {case} / {over}"
        before, after = old.get(key), new.get(key)
        if before is None or after is None:
            if before is not after:
                found["gone" if after is None else "new"].append(f"{name}: {_shown(before or after)}")
            continue
        slower, faster = after[1] > before[2], after[2] < before[1]
        verdict = "slower" if slower else "faster" if faster else "same"
        found[verdict].append(f"{name}: {_shown(before)} became {_shown(after)}")
    return found


def _shown(ratio: Sequence[float]) -> str:
    middle, low, high = (f"{value:.3f}" for value in ratio)
    return f"{middle} ({low} to {high})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="the result before")
    parser.add_argument("new", help="the result after")
    options = parser.parse_args(arguments)
    found = compare(read(options.old), read(options.new))
    if not (found["slower"] or found["faster"] or found["same"]):
        raise SystemExit("The two files have no row in common: give results of the same benchmark.")
    for verdict in ("slower", "faster", "gone", "new"):
        for line in found[verdict]:
            print(f"{verdict:<7} {line}")
    print(
        f"{len(found['slower'])} slower beyond the spread, {len(found['faster'])} faster, {len(found['same'])} the same"
    )
    if found["slower"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
