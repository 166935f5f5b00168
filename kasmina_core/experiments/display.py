"""Display of a run in the terminal: its progress and its final figures."""

from __future__ import annotations

import io
import math
import os
import time
from collections import deque
from types import TracebackType
from typing import Final, Self, final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kasmina_core.experiments import wording
from kasmina_core.experiments.record import EpochRecord, EpochSlot, RunRecord
from kasmina_core.experiments.wording import TextTable, clean

PLAIN_LINES: Final = 100
"""Lines about epochs that a run prints at most where there is no terminal, besides changes of stage."""

SHOWN_EPOCHS: Final = 5
"""Epochs that the live table shows."""

SHOWN_DORMANT: Final = 8
"""Slots up to which the live table shows the dormant ones too."""

WHY_WIDTH: Final = 24
"""Columns a seed's reason needs; where the table has not as many left, the seeds are listed."""

_STYLES: Final = {
    "DORMANT": "dim",
    "GERMINATED": "yellow",
    "TRAINING": "cyan",
    "BLENDING": "blue",
    "SHADOWING": "magenta",
    "PROBATIONARY": "bright_magenta",
    "FOSSILIZED": "bold green",
    "CULLED": "red",
    "EMBARGOED": "dim red",
    "RESETTING": "dim red",
}


@final
class RunDisplay:
    """Progress of a run on standard error: a live table on a terminal, else plain lines without escape codes.

    Args:
        total_epochs: Epochs of the grown arm.
        enabled: True for the live table, False for plain lines; ``None`` asks whether the console is a terminal.
        quiet: Plain lines even on a terminal, for a run whose standard output is read by a program.
        console: Where to write; by default standard error.
        metric_name: Name of the metric of the epochs.

    >>> with RunDisplay(2, enabled=False, console=Console(file=io.StringIO())) as display:
    ...     display.phase("growing", 2)
    ...     display.epoch(EpochRecord(1, 0.9, 0.8, 0.5, 338, 1e6))
    """

    def __init__(
        self,
        total_epochs: int,
        *,
        enabled: bool | None = None,
        quiet: bool = False,
        console: Console | None = None,
        metric_name: str = "metric",
    ) -> None:
        self._console = console if console is not None else Console(stderr=True)
        if enabled is None:
            enabled = self._console.is_terminal and not self._console.is_dumb_terminal
        self.is_live = enabled and not quiet
        self._metric_name = metric_name
        self._total_epochs = total_epochs
        self._every = max(1, math.ceil(total_epochs / PLAIN_LINES))
        self._epochs: deque[EpochRecord] = deque(maxlen=SHOWN_EPOCHS)
        self._gate = ""
        self._text = ""
        self._total: float | None = None
        self._done = 0.0
        self._told_quarters = 0
        self._started = time.monotonic()
        self._live = (
            Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            if self.is_live
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, text: str, total: float | None = None) -> None:
        """Say what comes next and start its progress at 0.

        Args:
            text: What is being done.
            total: How much there is to do, in any unit; ``None`` if unknown.
        """
        self._text, self._total, self._done, self._told_quarters = clean(text), total, 0.0, 0
        self._started = time.monotonic()
        if self._live is None:
            self._line(self._text)

    def advance(self, amount: float = 1.0) -> None:
        """Move the progress of the phase on by ``amount`` of its total."""
        self._done += amount
        if self._live is None and self._total:
            quarters = min(4, int(4 * self._done / self._total))
            if quarters > self._told_quarters:
                self._told_quarters = quarters
                self._line(f"{self._text}: {25 * quarters} %")

    def epoch(self, record: EpochRecord) -> None:
        """Show an epoch of the grown arm; the progress of the phase becomes its number."""
        stages = {slot.name: slot.stage for slot in record.slots}
        previous = {slot.name: slot.stage for slot in self._epochs[-1].slots} if self._epochs else stages
        self._epochs.append(record)
        self._done = float(record.epoch)
        if record.gate:
            self._gate = clean(record.gate)
        if self._live is not None:
            return
        is_due = record.epoch % self._every == 0 or record.epoch in (1, self._total_epochs)
        if is_due or stages != previous:
            self._line(plain_line(record, self._total_epochs, self._metric_name))

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress()]
        if self._epochs:
            parts.append(self._epoch_table())
            if self._epochs[-1].slots:
                parts.append(self._slot_table(self._epochs[-1]))
        if self._gate:
            parts.append(Text(f"last gate  {self._gate}", style="italic"))
        return Group(*parts)

    def _progress(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        seconds = time.monotonic() - self._started
        share = min(1.0, self._done / self._total) if self._total else None
        cells: list[RenderableType] = [Text(self._text, style="bold")]
        if share is not None:
            cells += [ProgressBar(total=1.0, completed=share, width=24), Text(f"{share:4.0%}")]
        cells.append(Text(_clock(seconds), style="dim"))
        if share:
            cells.append(Text(f"{_clock(seconds / share - seconds)} to go", style="dim"))
        grid.add_row(*cells)
        return grid

    def _epoch_table(self) -> Table:
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for name in ("epoch", "train loss", "val loss", self._metric_name, "parameters"):
            table.add_column(name, justify="right", no_wrap=True)
        for record in self._epochs:
            table.add_row(
                f"{record.epoch}/{self._total_epochs}",
                wording.loss(record.train_loss),
                wording.loss(record.val_loss),
                wording.metric(record.val_metric, self._metric_name),
                wording.count(record.parameters),
                style="bold" if record is self._epochs[-1] else "dim",
            )
        return table

    def _slot_table(self, record: EpochRecord) -> Table:
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for name in ("slot", "stage", "blueprint", "alpha", "gain"):
            table.add_column(name, no_wrap=True, justify="right" if name == "gain" else "left")
        slots = [
            slot for slot in record.slots if slot.stage != "DORMANT" or len(record.slots) <= SHOWN_DORMANT
        ]
        for slot in slots:
            alpha = Text(f"{self._bar(slot.alpha)} {slot.alpha:.2f}") if slot.blueprint else Text("")
            table.add_row(
                Text(clean(slot.name)),
                Text(slot.stage.lower(), style=_STYLES.get(slot.stage, "")),
                Text(clean(slot.blueprint)),
                alpha,
                Text(_gain(slot)),
            )
        if hidden := len(record.slots) - len(slots):
            table.add_row(Text(f"and {hidden} dormant", style="dim"))
        return table

    def _bar(self, alpha: float) -> str:
        full, empty = "#-" if self._console.options.ascii_only else "█░"
        cells = round(10 * min(1.0, max(0.0, alpha)))
        return full * cells + empty * (10 - cells)


def plain_line(record: EpochRecord, total_epochs: int, metric_name: str) -> str:
    """Return one epoch as one line: losses, metric, parameters, slots that are not dormant, the gate's verdict."""
    width = len(str(total_epochs))
    parts = [
        f"epoch {record.epoch:>{width}}/{total_epochs}",
        f"train loss {wording.loss(record.train_loss)}",
        f"val loss {wording.loss(record.val_loss)}",
        f"{clean(metric_name)} {wording.metric(record.val_metric, metric_name)}",
        f"parameters {wording.count(record.parameters)}",
    ]
    for slot in record.slots:
        if slot.stage == "DORMANT":
            continue
        words = [slot.name, slot.stage.lower(), slot.blueprint]
        if slot.blueprint:
            words.append(f"alpha {slot.alpha:.2f}")
        if slot.gain is not None:
            words.append(f"gain {_gain(slot)}")
        parts.append(" ".join(clean(word) for word in words if word))
    if record.gate:
        parts.append(f"gate {clean(record.gate)}")
    return " | ".join(parts)


def final_tables(record: RunRecord) -> list[RenderableType]:
    """Return what is shown at the end of a run: the comparison, the seeds, the summary and the notes."""
    parts: list[RenderableType] = []
    if record.arms:
        parts.append(_Arms(record))
    if record.seeds:
        parts += [_Seeds(record), Text(f"{wording.CONTRIBUTION}\n", style="dim")]
    parts.append(Text(wording.summary(record)))
    parts += [Text(f"Note: {clean(note)}") for note in record.notes]
    return parts


def final_text(record: RunRecord, width: int = 120) -> str:
    """Return `final_tables` as text without escape codes, ``width`` columns wide."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False)
    for part in final_tables(record):
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def print_final(record: RunRecord, console: Console | None = None) -> None:
    """Print `final_tables`.

    Args:
        record: The run.
        console: Where to print; by default standard output.
    """
    console = console if console is not None else Console()
    for part in final_tables(record):
        console.print(part)


def print_files(folder: str | os.PathLike[str], console: Console | None = None) -> None:
    """Print where the files of a run are.

    Args:
        folder: Folder of its files.
        console: Where to print; by default standard output.
    """
    console = console if console is not None else Console()
    console.print(Text(f"\nFiles: {os.fspath(folder)} (open report.html)"), soft_wrap=True)


@final
class _Arms:
    """The comparison, an arm a row where the console is wide enough, else an arm a column."""

    def __init__(self, record: RunRecord) -> None:
        self._record = record

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = wording.arms_table(self._record)
        columns = list(zip(table.header, *table.rows, strict=True))
        if sum(max(map(cell_len, column)) + 2 for column in columns) > options.max_width:
            header, *rows = columns
            table = TextTable(table.title, header, tuple(rows), numeric=frozenset(range(1, len(header))))
        yield _rich_table(table)


@final
class _Seeds:
    """The seeds as a table where the console is wide enough, else as a list."""

    def __init__(self, record: RunRecord) -> None:
        self._record = record

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = wording.seeds_table(self._record)
        *figures, _ = zip(table.header, *table.rows, strict=True)  # columns; the last is the reason
        needed = sum(max(map(cell_len, column)) + 2 for column in figures) + WHY_WIDTH
        if needed <= options.max_width:
            yield _rich_table(table, prose=len(figures))
            return
        yield Text(table.title, style="bold")
        for seed, slot, blueprint, outcome, epochs, parameters, contribution, why in table.rows:
            yield Text(clean(f"{seed}: {outcome}"), style="bold")
            yield Text(f"  {clean(blueprint)} in {clean(slot)}, epochs {epochs}, {parameters} parameters")
            yield Text(f"  contribution {contribution}")
            if why:
                yield Padding(Text(clean(why)), (0, 0, 0, 2))
        yield Text()


def _rich_table(source: TextTable, prose: int | None = None) -> Table:
    """Return the table; only the column ``prose`` may wrap."""
    table = Table(
        title=source.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0)
    )
    for i, name in enumerate(source.header):
        table.add_column(
            Text(name),
            justify="right" if i in source.numeric else "left",
            no_wrap=i != prose,
            min_width=WHY_WIDTH if i == prose else None,
            header_style="dim",
        )
    for row in source.rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    table.add_row()
    return table


def _gain(slot: EpochSlot) -> str:
    return "" if slot.gain is None else f"{slot.gain:+.4f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
