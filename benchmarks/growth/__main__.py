"""``python -m benchmarks growth``: what growth is worth, at equal training FLOPs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.growth.arms import ARMS
from benchmarks.growth.cells import BENCHMARKS, FORMS, REMEDIES, plan
from benchmarks.growth.goals import goal_table, judge
from benchmarks.growth.running import run
from benchmarks.growth.tables import report

FAST_MINUTES = 4.5
"""What the fast form may take unless told otherwise."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="arms:\n" + "\n".join(f"  {arm.name:<30}{arm.what}" for arm in ARMS.values()),
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--fast", action="store_const", const="fast", dest="form", help="a few minutes (default)"
    )
    form.add_argument(
        "--long", action="store_const", const="long", dest="form", help="about 220 core-minutes"
    )
    form.add_argument(
        "--tiny", action="store_const", const="tiny", dest="form", help="seconds; its figures mean nothing"
    )
    parser.set_defaults(form="fast")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="processes, one thread each (default: all cores)",
    )
    parser.add_argument(
        "--out", type=Path, help="file of results, a JSON line a cell; what it holds is not run again"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"stop starting cells in time (default: {FAST_MINUTES} for the fast form)",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=(*BENCHMARKS, REMEDIES),
        help=f"one benchmark; may be given again. '{REMEDIES}' tries recipes, and runs only when it is asked for",
    )
    parser.add_argument("--arm", action="append", choices=sorted(ARMS), help="one arm; may be given again")
    parser.add_argument("--seeds", type=int, help="runs an arm")
    parser.add_argument("--tables", action="store_true", help="run nothing; print the tables of --out")
    parser.add_argument("--plan", action="store_true", help="say how many cells there are, and run nothing")
    parser.add_argument("--json", action="store_true", help="print goals and results as JSON")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for and print the tables."""
    parser = _parser()
    options = parser.parse_args(arguments)
    form = FORMS[options.form]
    if options.only:
        form = replace(form, benchmarks=tuple(options.only))
    if options.seeds is not None:
        form = replace(form, seeds=max(1, options.seeds))
    wanted = plan(form)
    if options.arm:
        wanted = [item for item in wanted if item.cell.arm in options.arm or item.cell.arm not in ARMS]
    if options.plan:
        counts = Counter(item.cell.benchmark for item in wanted)
        print(f"{form.name} form: {sum(counts.values())} cells: {dict(counts)}")
        return
    if options.tables:
        if options.out is None:
            parser.error("--tables needs --out")
        wanted = []
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    minutes = options.minutes
    if minutes is None and form.name == "fast":
        minutes = FAST_MINUTES
    started = time.monotonic()
    done = run(wanted, form, jobs=options.jobs, path=options.out, minutes=minutes)
    goals = judge(form, done)
    if options.json:
        json.dump(
            {"form": form.name, "goals": [asdict(goal) for goal in goals], "cells": list(done.values())},
            sys.stdout,
        )
        print()
        return
    import torch

    print(report(form, done))
    print("goals\n-----")
    print(goal_table(goals))
    seconds = sum(record["wall"] for record in done.values())
    print(
        f"\n{form.name} form, {len(done)} cells, {seconds / 60:.1f} core-minutes, "
        f"{(time.monotonic() - started) / 60:.1f} minutes now, {options.jobs} processes; torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
