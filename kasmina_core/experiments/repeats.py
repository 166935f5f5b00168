"""Several runs with different seeds: their spread as plain data, a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, ClassVar, final

from rich.console import Console
from rich.text import Text

from kasmina_core.errors import KasminaError
from kasmina_core.experiments import wording
from kasmina_core.experiments.display import print_table
from kasmina_core.experiments.record import GROWN, HOST_ALONE, RunRecord
from kasmina_core.experiments.report import blank_figure, figure_png
from kasmina_core.experiments.wording import TextTable, clean
from kasmina_core.records import Record
from kasmina_core.telemetry.sinks import for_json


@final
@dataclass(frozen=True, slots=True)
class RepeatedRun(Record):
    """One run of several.

    Attributes:
        seed: Its seed.
        grown_loss: Test loss of the grown model, in nats.
        alone_loss: That of the host alone.
        grown_metric: The task's metric of the grown model on the test samples.
        alone_metric: That of the host alone.
        germinated: Seeds that germinated.
        kept: Seeds that became part of the model.
        parameters: Trainable parameters of the grown model.
    """

    seed: int
    grown_loss: float
    alone_loss: float
    grown_metric: float
    alone_metric: float
    germinated: int
    kept: int
    parameters: int

    @property
    def saved(self) -> float:
        """Test loss of the host alone minus that of the grown model: above 0 growth was of use."""
        return self.alone_loss - self.grown_loss


@final
@dataclass(frozen=True, slots=True)
class Spread(Record):
    """Spread of a figure over runs; ``deviation`` is the standard deviation of a run, not of the mean."""

    mean: float
    deviation: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least two numbers."""
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan, math.nan, math.nan)
        return cls(fmean(values), stdev(values), min(values), max(values))


@final
@dataclass(frozen=True, slots=True)
class Repeats(Record):
    """Runs that differ by their seed alone.

    Attributes:
        task: Name of the task.
        host: Name of the host.
        metric_name: Unit of the metric.
        runs: The runs, by seed.
        saved: Spread of `RepeatedRun.saved`.
    """

    derived: ClassVar = ("sentence",)

    task: str
    host: str
    metric_name: str
    runs: tuple[RepeatedRun, ...]
    saved: Spread

    @classmethod
    def of(cls, records: Sequence[RunRecord]) -> Repeats:
        """Take the final figures of at least two runs.

        Raises:
            KasminaError: If a run has no figures of both arms.
        """
        runs = []
        for record in records:
            grown, alone = record.arm(GROWN), record.arm(HOST_ALONE)
            if grown is None or alone is None:
                raise KasminaError(
                    f"The run with seed {record.config.get('seed')} was not measured to its end."
                )
            runs.append(
                RepeatedRun(
                    seed=int(record.config["seed"]),
                    grown_loss=grown.test_loss,
                    alone_loss=alone.test_loss,
                    grown_metric=grown.test_metric,
                    alone_metric=alone.test_metric,
                    germinated=len(record.seeds),
                    kept=sum(seed.outcome == "fossilized" for seed in record.seeds),
                    parameters=grown.parameters,
                )
            )
        first = records[0]
        spread = Spread.of([run.saved for run in runs])
        return cls(first.task, first.host, first.metric_name, tuple(runs), spread)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for strict JSON; NaN and infinities are ``NaN``, ``Infinity`` and ``-Infinity``."""
        return dict(for_json(Record.to_dict(self)))

    @property
    def sentence(self) -> str:
        """What the runs show together, in one sentence."""
        better = sum(run.saved > 0 for run in self.runs)
        spread = self.saved
        return (
            f"Over {len(self.runs)} seeds, at equal training FLOPs, the grown model's test loss was lower than that of the "
            f"host alone in {better}: by {spread.mean:+.4f} in the mean, with a standard deviation of {spread.deviation:.4f}, "
            f"from {spread.least:+.4f} to {spread.most:+.4f}."
        )


def repeats_table(found: Repeats) -> TextTable:
    """Return one row per run, and the spread."""
    header = (
        "seed",
        "grown",
        "host alone",
        "saved",
        f"{found.metric_name} grown",
        "alone",
        "kept",
        "parameters",
    )
    rows: list[tuple[str, ...]] = [
        (
            str(run.seed),
            wording.loss(run.grown_loss),
            wording.loss(run.alone_loss),
            f"{run.saved:+.4f}",
            wording.metric(run.grown_metric, found.metric_name),
            wording.metric(run.alone_metric, found.metric_name),
            f"{run.kept} of {run.germinated}",
            wording.count(run.parameters),
        )
        for run in found.runs
    ]
    grown, alone = (
        Spread.of([getattr(run, name) for run in found.runs]) for name in ("grown_loss", "alone_loss")
    )
    for what, name in (("mean", "mean"), ("sd", "deviation"), ("least", "least"), ("most", "most")):
        sign = "" if name == "deviation" else "+"
        figures = [wording.loss(getattr(spread, name)) for spread in (grown, alone)]
        rows.append((what, *figures, f"{getattr(found.saved, name):{sign}.4f}", "", "", "", ""))
    return TextTable("Test loss over seeds", header, tuple(rows), frozenset(range(1, 8)))


def print_repeats(found: Repeats, console: Console | None = None) -> None:
    """Print the table and the sentence; by default to standard output."""
    console = console if console is not None else Console()
    print_table(repeats_table(found), console)
    console.print(Text(found.sentence))


def repeats_png(found: Repeats) -> bytes:
    """Draw each run's test loss, of the host alone and grown, joined by a line.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = blank_figure((7, 4.6))
    axes = figure.subplots()
    for run in found.runs:
        better = run.saved > 0
        axes.plot(
            [0, 1],
            [run.alone_loss, run.grown_loss],
            color="#1b9e77" if better else "#d1495b",
            linestyle="-" if better else "--",
            marker="o",
            linewidth=1.4,
        )
        axes.annotate(f"seed {run.seed}", (1, run.grown_loss), (6, 0), textcoords="offset points", fontsize=7)
    for x, name in ((0, "alone_loss"), (1, "grown_loss")):
        mean = fmean(getattr(run, name) for run in found.runs)
        axes.plot([x - 0.08, x + 0.08], [mean, mean], color="#222222", linewidth=2.5)
    axes.set_xlim(-0.35, 1.45)
    axes.set_xticks([0, 1], ["host alone", "grown"])
    axes.set_ylabel("test loss (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    title = clean(f"{found.task} · {found.host}: {len(found.runs)} seeds").replace("$", r"\$")
    axes.set_title(
        f"{title}\nfull green: grown is better; broken red: worse; bar: mean", loc="left", fontsize=10
    )
    return figure_png(figure)
