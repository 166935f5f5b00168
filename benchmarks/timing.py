"""How the benchmarks take time and memory, and how they print what they found."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

Step = Callable[[], object]
Spread = tuple[float, float, float]
"""Median, lower and upper quartile."""

REPEATS = 3


def quartiles(values: Sequence[float]) -> Spread:
    """Return median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One measured ratio.

    Attributes:
        part: What the row belongs to: a table of its own.
        case: What was measured.
        over: What it is compared with.
        ratio: The spread over the rounds; ``None`` if it was not measured.
        goal: Largest ratio that is good enough.
        unit: What one measurement of ``over`` takes, with its unit.
        note: Anything else to know.
    """

    part: str
    case: str
    over: str
    ratio: Spread | None
    goal: float | None = None
    unit: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the goal is met: by the median, by the lower quartile alone, or not."""
        if self.ratio is None:
            return "not measured"
        if self.goal is None:
            return ""
        middle, low, _ = self.ratio
        return "yes" if middle <= self.goal else "within the spread" if low <= self.goal else "no"


@final
class Clock:
    """Times steps on a device, in rounds whose steps take turns.

    On the CPU it is the time this process computes, which other processes disturb less than the wall clock's; on CUDA it
    is the wall clock's, from one synchronisation to the next.

    Args:
        device: Where the steps run; a CUDA device is waited for before and after each measurement.
        rounds: Ratios taken; each is of the fastest of three turns.
        budget: Seconds after which no new comparison is begun.
        waits: Whether steps wait for something else (a disk, a process): it is the wall clock's time then.
        thread: Whether only what the calling thread computes counts, and nothing that runs beside it.
    """

    def __init__(
        self,
        device: torch.device,
        rounds: int,
        budget: float = float("inf"),
        waits: bool = False,
        thread: bool = False,
    ) -> None:
        self.device, self.rounds = device, max(2, rounds)
        self._end = time.monotonic() + budget
        # One launch is too short to be timed from the host, so that a turn on CUDA is several steps.
        self._steps = 3 if device.type == "cuda" and not waits else 1
        is_wall = device.type == "cuda" or waits
        self._now = time.thread_time if thread else time.perf_counter if is_wall else time.process_time

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() > self._end

    def seconds(self, step: Step) -> float:
        """Return the mean duration of a step, in one turn."""
        self._wait()
        start = self._now()
        for _ in range(self._steps):
            step()
        self._wait()
        return (self._now() - start) / self._steps

    def compare(self, numerator: Step, denominators: Sequence[Step]) -> tuple[Spread, Spread]:
        """Return the ratio of a step to the sum of others, and that sum in seconds; one value of each a round."""
        steps = [*denominators, numerator]
        for step in steps:
            step()
            step()
        ratios, sums = [], []
        for _ in range(self.rounds):
            best = [float("inf")] * len(steps)
            for _ in range(REPEATS):
                best = [min(b, self.seconds(step)) for b, step in zip(best, steps, strict=True)]
            sums.append(sum(best[:-1]))
            ratios.append(best[-1] / sums[-1])
        return quartiles(ratios), quartiles(sums)

    def row(
        self,
        part: str,
        case: str,
        over: str,
        numerator: Step,
        denominators: Sequence[Step],
        goal: float | None = None,
        note: str = "",
    ) -> Row:
        """Compare, and return the row; one without a ratio when the budget is spent."""
        if self.is_over:
            return Row(part, case, over, None, goal)
        progress(f"{part}: {case}")
        ratio, sums = self.compare(numerator, denominators)
        return Row(part, case, over, ratio, goal, f"{sums[0] * 1e3:.3g} ms", note)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_bytes(device: torch.device, build: Callable[[], Step]) -> int:
    """Return the most bytes that what ``build`` makes takes while its step runs, what stays in between included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        step = build()
        step()
        step()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    made: list[Step] = []

    def all_of_it() -> None:
        made.append(build())
        for _ in range(3):
            made[0]()

    return peak_allocated(all_of_it)


def peak_allocated(run: Step) -> int:
    """Return the most bytes on the CPU that a call holds beside what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    live = peak = 0
    # The profiler notes each allocation of torch's CPU allocator, inside of operators too, as an event of its own.
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def progress(text: str) -> None:
    """Show what is being measured, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def arguments_of(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the steps run")
    parser.add_argument("--rounds", type=int, default=rounds, help="ratios taken (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds to begin comparisons in")
    parser.add_argument("--fast", action="store_true", help="as little as possible: does it run?")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument("--out", help="also write the JSON here and, beside it, the tables as Markdown")
    return parser


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device that was asked for: one thread on the CPU, products in TF32 on CUDA.

    Raises:
        SystemExit: If there is no CUDA device.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here; use --device cpu.")
    if options.device == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", torch.cuda.current_device())


def command_line(module: str, arguments: Sequence[str] | None) -> str:
    """Return the command that repeats this run."""
    return " ".join(["python -m", module, *(sys.argv[1:] if arguments is None else arguments)])


def report(
    command: str, device: torch.device, options: argparse.Namespace, rows: Iterable[Row], **more: object
) -> None:
    """Print the rows as they were asked for; what is there by then is also written where asked, row by row."""
    result: dict[str, Any] = {
        "command": command,
        "machine": machine(device),
        "rounds": options.rounds,
        **more,
        "rows": [],
    }
    for row in rows:
        result["rows"].append(asdict(row) | {"verdict": row.verdict})
        if options.out:
            out = Path(options.out)
            out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            out.with_suffix(".md").write_text(as_markdown(result), encoding="utf-8")
    progress("")
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(as_markdown(result) if options.markdown else as_text(result))


def as_markdown(result: Mapping[str, Any]) -> str:
    """Return a result as tables: the command and the machine, then one table a part."""
    lines = [f"`{result['command']}`: {_circumstances(result)}.", ""]
    for part, rows in _parts(result["rows"]).items():
        lines += [
            f"**{part}**",
            "",
            "| case | over | ratio (quartiles) | goal | met | of |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            note = f"; {row['note']}" if row["note"] else ""
            goal = f"{row['goal']:g}" if row["goal"] is not None else ""
            lines.append(
                f"| {row['case']} | {row['over']} | {_spread(row['ratio'])} | {goal} | {row['verdict']} | "
                f"{row['unit']}{note} |"
            )
        lines.append("")
    return "\n".join(lines)


def as_text(result: Mapping[str, Any]) -> str:
    """Return a result as aligned text."""
    lines = [f"{result['command']}: {_circumstances(result)}"]
    for part, rows in _parts(result["rows"]).items():
        lines += ["", part]
        for row in rows:
            goal = f"goal {row['goal']:g}: {row['verdict']}" if row["goal"] is not None else row["verdict"]
            of = f"{row['case']} / {row['over']}"
            lines.append(
                f"  {of:<70} {_spread(row['ratio']):<24} {row['unit']:<12} {goal:<28} {row['note']}".rstrip()
            )
    return "\n".join(lines)


def _circumstances(result: Mapping[str, Any]) -> str:
    m = result["machine"]
    return (
        f"{m['device']}, {m['cores']} {m['processor']} cores, {m['threads']} threads, Python {m['python']}, "
        f"torch {m['torch']}, {result['rounds']} rounds"
    )


def _parts(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row["part"], []).append(row)
    return parts


def _spread(ratio: Sequence[float] | None) -> str:
    if ratio is None:
        return "-"
    middle, low, high = (f"{value:.3f}" for value in ratio)
    return f"{middle} ({low} to {high})"
