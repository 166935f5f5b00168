"""Running cells in several processes, each result a line of a file, none of them twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final, TextIO

from benchmarks.growth.cells import Cell, Form, Wanted, run_cell

Records = dict[str, dict[str, Any]]
"""Finished cells by key."""

GUESS: Final = 20.0
"""Seconds that a kind of cell is thought to take before one was run."""

_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def read(path: Path | None, form: Form) -> Records:
    """Return the finished cells of a form from a file; what a stopped run left half written is passed over."""
    found: Records = {}
    if path is None or not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and record.get("form") == form.name and "error" not in record:
            found[record["key"]] = record
    return found


def work(cell: Cell, form: Form) -> dict[str, Any]:
    """Run one cell of this benchmark; see `record_of`."""
    return record_of(cell, form, run_cell)


def record_of(cell: Any, form: Any, run_cell: Callable[[Any, Any], dict[str, Any]]) -> dict[str, Any]:
    """Run a cell of any benchmark on one thread by ``run_cell``; an error is a result too."""
    import warnings

    import torch

    torch.set_num_threads(1)
    started, cpu = time.perf_counter(), time.process_time()
    record: dict[str, Any] = {"key": cell.key, "form": form.name}
    record |= {name: getattr(cell, name) for name in type(cell).__dataclass_fields__}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record["result"] = run_cell(cell, form)
    except ImportError as error:
        record["error"] = f"not run: {error.name or error} is not installed"
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
        record["traceback"] = traceback.format_exc(limit=-4)
    record["wall"], record["cpu"] = time.perf_counter() - started, time.process_time() - cpu
    record["torch"] = torch.__version__
    return record


class _Progress:
    """A line that says how far a run is."""

    def __init__(self, total: int, out: TextIO) -> None:
        self.total, self.out, self.started, self.done, self.failed = total, out, time.monotonic(), 0, 0
        self._shown = 0.0

    def show(self, record: dict[str, Any], *, last: bool = False) -> None:
        self.done += 1
        self.failed += "error" in record
        now = time.monotonic()
        tty = self.out.isatty()
        if not (last or now - self._shown > (0.2 if tty else 20.0)):
            return
        self._shown = now
        text = f"{self.done}/{self.total} cells, {now - self.started:.0f} s, last: {record['key']}"
        text += f", {self.failed} failed" if self.failed else ""
        print(f"\r{text[:110]:<110}" if tty else text, end="" if tty else "\n", file=self.out, flush=True)


def run(
    wanted: Iterable[Wanted],
    form: Form,
    *,
    jobs: int,
    path: Path | None = None,
    minutes: float | None = None,
    out: TextIO = sys.stderr,
    worker: Callable[[Cell, Form], dict[str, Any]] = work,
) -> Records:
    """Run the cells that are not done yet, the first ones first, and return all that are done.

    Args:
        wanted: The cells, the most important first; one whose learning rate is not known yet waits for it.
        form: How much is run.
        jobs: Processes; 1 runs them in this one.
        path: File with a line a cell; those in it are not run again. ``None`` keeps nothing.
        minutes: No cell is started that would probably not be done by then.
        out: Where progress is shown.
        worker: Does a cell's work.
    """
    done = read(path, form)
    left = [item for item in wanted if not (not item.is_tuned and item.cell.key in done)]
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    progress = _Progress(len(left), out)
    durations: dict[tuple[str, str], float] = {}
    file = path.open("a", encoding="utf-8") if path is not None else None

    def finish(record: dict[str, Any]) -> None:
        done[record["key"]] = record
        kind = (record["benchmark"], record["arm"])
        durations[kind] = max(durations.get(kind, 0.0), record["wall"])
        if file is not None:
            file.write(json.dumps(record) + "\n")
            file.flush()
        progress.show(record)

    def next_cell() -> Cell | None:
        for place, item in enumerate(left):
            cell = item.ready(form, done)
            if cell is None:
                continue
            if cell.key in done:
                left.pop(place)
                return next_cell()
            usual = durations.get((cell.benchmark, cell.arm), GUESS)
            if time.monotonic() + 1.1 * usual > deadline:
                continue
            left.pop(place)
            return cell
        return None

    try:
        if jobs <= 1:
            while (cell := next_cell()) is not None:
                finish(worker(cell, form))
        else:
            _run_parallel(next_cell, finish, form, jobs, worker, deadline)
    except KeyboardInterrupt:
        print("\nstopped; the tables show what is done", file=out)
    finally:
        if file is not None:
            file.close()
        if out.isatty():
            print(file=out)
    return done


def _run_parallel(
    next_cell: Callable[[], Cell | None],
    finish: Callable[[dict[str, Any]], None],
    form: Form,
    jobs: int,
    worker: Callable[[Cell, Form], dict[str, Any]],
    deadline: float,
) -> None:
    for name in _THREADS:  # the processes take them over; more threads than cores are slower
        os.environ.setdefault(name, "1")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context)
    running: dict[Future[dict[str, Any]], Cell] = {}
    try:
        while True:
            while len(running) < jobs and (cell := next_cell()) is not None:
                running[pool.submit(worker, cell, form)] = cell
            if not running:
                return
            limit = max(1.0, deadline - time.monotonic() + 5.0) if deadline < float("inf") else None
            finished, _ = wait(running, timeout=limit, return_when=FIRST_COMPLETED)
            if not finished:  # out of time: what still runs is given up
                return
            for future in finished:
                cell = running.pop(future)
                try:
                    finish(future.result())
                except BrokenProcessPool as error:
                    raise RuntimeError(
                        f"A process died, perhaps of lack of memory, near {cell.key}."
                    ) from error
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
