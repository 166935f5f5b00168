"""``python -m benchmarks sizes``: one run that grows against every fixed size, at budgets over a sixteen-fold range."""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.growth.running import run
from benchmarks.sizes.cells import plan, work
from benchmarks.sizes.settings import ARMS, FORMS, REMEDIES, SETTINGS
from benchmarks.sizes.tables import plans, report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sizes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="arms:\n" + "\n".join(f"  {arm.name:<16}{arm.what}" for arm in ARMS.values()),
    )
    form = parser.add_mutually_exclusive_group()
    for name, what in (
        ("short", "one setting, four arms, one seed: under a minute (default)"),
        ("long", "everything: about 95 core-minutes; may go on in pieces with --out"),
        ("tiny", "seconds an arm; its figures mean nothing"),
    ):
        form.add_argument(f"--{name}", action="store_const", const=name, dest="form", help=what)
    parser.set_defaults(form="short")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument(
        "--out", type=Path, help="file of results, a JSON line a run; what it holds is not run again"
    )
    parser.add_argument("--minutes", type=float, help="stop starting runs in time")
    parser.add_argument("--setting", action="append", choices=tuple(SETTINGS), help="one; may be given again")
    parser.add_argument("--arm", action="append", choices=tuple(ARMS), help="one; may be given again")
    parser.add_argument(
        "--remedies", action="store_true", help="the plan changed in one thing each, beside what they need"
    )
    parser.add_argument("--seeds", type=int, help="paired runs of each arm")
    parser.add_argument("--picture", type=Path, help="also write a picture of the ends and their envelope")
    parser.add_argument("--tables", action="store_true", help="run nothing; print the tables of --out")
    parser.add_argument(
        "--plan", action="store_true", help="print what is fixed before the run, and run nothing"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for and print the tables."""
    parser = _parser()
    options = parser.parse_args(arguments)
    form = FORMS[options.form]
    if options.setting:
        form = replace(form, settings=tuple(options.setting))
    if options.remedies:
        form = replace(form, arms=tuple(dict.fromkeys((*form.arms, *REMEDIES))))
    if options.arm:
        form = replace(form, arms=tuple(options.arm))
    if options.seeds is not None:
        form = replace(form, seeds=max(1, options.seeds))
    if options.tables and options.out is None:
        parser.error("--tables needs --out")
    print(plans(form), flush=True)
    wanted = [] if options.tables else plan(form)
    if options.plan:
        print(f"{form.name} form: {len(wanted)} runs")
        return
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    done = run(
        wanted,
        form,
        jobs=options.jobs,
        path=options.out,
        minutes=options.minutes,
        worker=work,  # type: ignore[arg-type]
    )
    import torch

    print(report(form, done))
    if options.picture is not None:
        from benchmarks.sizes.picture import draw

        draw(form, done, options.picture)
        print(f"\npicture: {options.picture}")
    seconds = sum(record["cpu"] for record in done.values())
    print(
        f"\n{form.name} form, {len(done)} runs, {seconds / 60:.1f} core-minutes, "
        f"{(time.monotonic() - started) / 60:.1f} minutes now, {options.jobs} processes; torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
