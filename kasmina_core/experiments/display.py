"""Progress and final figures of a run, in the terminal."""

from __future__ import annotations

import math
import textwrap
from collections import deque
from collections.abc import Container, Iterator, Sequence
from itertools import zip_longest
from typing import Final, Self, final

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from kasmina_core.experiments import wording
from kasmina_core.experiments.record import EpochRecord, EpochSlot, RunRecord
from kasmina_core.experiments.wording import STAGES, TextTable, clean

PLAIN_LINES: Final = 100
"""Most lines about epochs that a run prints without a terminal; changes of stage come on top."""

SHOWN_EPOCHS: Final = 5
"""Epochs that the live table shows."""

SHOWN_DORMANT: Final = 8
"""Largest number of slots at which the live table shows dormant ones too."""

HARM: Final = "red"
"""Style of what became worse."""

INDENT: Final = 2
"""Columns by which the lines that continue an epoch are indented."""

WHY_WIDTH: Final = 24
"""Columns a seed's reason needs; if the table leaves fewer, the seeds are printed as a list."""


@final
class RunDisplay:
    """Progress of a run on standard error: a live table on a terminal, else plain lines without escape codes.

    Args:
        total_epochs: Epochs of the grown arm.
        enabled: True for the live table, False for plain lines; ``None`` asks whether the console is a terminal.
        quiet: Plain lines even on a terminal, for a run whose standard output is read by a program.
        console: Where to write; by default standard error.
        metric_name: Name of the metric of the epochs.

    >>> import io
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
        self._told_fossils: set[str] = set()
        self._told_parameters: int | None = None
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("to go", style="dim"),
            console=self._console,
        )
        self._task = self._progress.add_task("", total=None)
        self._live = (
            Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            if self.is_live
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, text: str, total: float | None = None) -> None:
        """Show what comes next and start its progress at 0.

        Args:
            text: What is being done.
            total: How much there is to do, in any unit; ``None`` if unknown.
        """
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(clean(text), total=total)
        if self._live is None:
            self._line(clean(text))

    def advance(self, amount: float = 1.0) -> None:
        """Move the progress of the phase on by ``amount`` of its total."""
        (task,) = self._progress.tasks
        shown = self._quarters()
        self._progress.advance(self._task, amount)
        if self._live is None and self._quarters() > shown:
            self._line(f"{task.description}: {25 * self._quarters()} %")

    def _quarters(self) -> int:
        (task,) = self._progress.tasks
        return min(4, int(4 * task.completed / task.total)) if task.total else 0

    def epoch(self, record: EpochRecord) -> None:
        """Show an epoch of the grown arm; the progress of the phase becomes its number."""
        stages = {slot.name: slot.stage for slot in record.slots}
        previous = {slot.name: slot.stage for slot in self._epochs[-1].slots} if self._epochs else stages
        self._epochs.append(record)
        self._progress.update(self._task, completed=record.epoch)
        if record.gate:
            self._gate = clean(record.gate)
        if self._live is not None:
            return
        is_due = record.epoch % self._every == 0 or record.epoch in (1, self._total_epochs)
        if is_due or stages != previous:
            parts = epoch_parts(record, self._total_epochs, self._metric_name, self._told_fossils)
            if record.parameters == self._told_parameters:
                del parts[4]
            self._told_parameters = record.parameters
            self._told_fossils |= {slot.name for slot in record.slots if slot.stage == "FOSSILIZED"}
            self._line(folded(parts, self._console.width))

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress]
        if self._epochs:
            parts.append(self._epoch_table())
            if self._epochs[-1].slots:
                parts.append(self._slot_table(self._epochs[-1]))
        if self._gate:
            parts.append(Text(f"last gate  {self._gate}", style="italic"))
        return Group(*parts)

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
                Text(slot.stage.lower(), style=STAGES[slot.stage].style if slot.stage in STAGES else ""),
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


def epoch_parts(
    record: EpochRecord, total_epochs: int, metric_name: str, told: Container[str] = ()
) -> list[str]:
    """Return an epoch as text: losses, metric, parameters, slots with a seed, the gate's verdict.

    Args:
        record: The epoch.
        total_epochs: Epochs of the run.
        metric_name: Name of the metric.
        told: Slots whose fossil was shown before; it is left out.
    """
    width = len(str(total_epochs))
    parts = [
        f"epoch {record.epoch:>{width}}/{total_epochs}",
        f"train loss {wording.loss(record.train_loss)}",
        f"val loss {wording.loss(record.val_loss)}",
        f"{clean(metric_name)} {wording.metric(record.val_metric, metric_name)}",
        f"parameters {wording.count(record.parameters)}",
    ]
    for slot in record.slots:
        if slot.stage == "DORMANT" or (slot.stage == "FOSSILIZED" and slot.name in told):
            continue
        words = [slot.name, slot.stage.lower(), slot.blueprint]
        if slot.blueprint and slot.stage != "FOSSILIZED":
            words.append(f"alpha {slot.alpha:.2f}")
        if slot.gain is not None:
            words.append(f"gain {_gain(slot)}")
        parts.append(" ".join(clean(word) for word in words if word))
    if record.gate:
        parts.append(f"gate {clean(record.gate)}")
    return parts


def folded(parts: Sequence[str], width: int) -> str:
    """Join parts to lines of at most ``width`` cells; what follows the first is indented.

    >>> print(folded(["epoch 1", "loss 0.5", "gate G2 waiting"], 20))
    epoch 1 | loss 0.5
      gate G2 waiting
    """
    indent = " " * INDENT
    lines = [parts[0]]
    for part in parts[1:]:
        if cell_len(lines[-1]) + 3 + cell_len(part) <= width:
            lines[-1] += f" | {part}"
        else:
            lines += textwrap.wrap(part, width, initial_indent=indent, subsequent_indent=2 * indent)
    # A wide character takes two cells.
    return "\n".join(
        line if cell_len(line) <= width else f"{set_cell_size(line, width - 1)}…" for line in lines
    )


def print_final(record: RunRecord, console: Console | None = None) -> None:
    """Print the comparison, the regrets, the seeds, the summary and the notes of a run.

    Args:
        record: The run.
        console: Where to print; by default standard output.
    """
    console = console if console is not None else Console()
    parts: list[RenderableType] = []
    if record.arms:
        parts.append(_turned(wording.arms_table(record), console.width))
    if record.regrets:
        parts.append(_turned(wording.regret_table(record), console.width))
        parts.append(Text(f"{wording.regret(record)}\n"))
    if record.seeds:
        parts += [*_seeds(record, console.width), Text(f"{wording.about_gains(record)}\n", style="dim")]
    parts.append(Text(wording.summary(record), style=HARM if wording.is_worse(record) else ""))
    if record.verdict:
        parts.append(Text(f"Growth: {clean(wording.growth(record))}"))
    parts += [Text(clean(sentence), style=HARM) for sentence in wording.harms(record)]
    for part in (*parts, *(Text(f"Note: {clean(note)}") for note in record.notes)):
        console.print(part)


def print_table(table: TextTable, console: Console) -> None:
    """Print a table, its rows as columns if it is too wide."""
    console.print(_turned(table, console.width))


def _turned(table: TextTable, width: int) -> Table:
    columns = list(zip(table.header, *table.rows, strict=True))
    if sum(max(map(cell_len, column)) + 2 for column in columns) > width:
        header, *rows = columns
        table = TextTable(table.title, header, tuple(rows), numeric=frozenset(range(1, len(header))))
    return _rich_table(table)


def _seeds(record: RunRecord, width: int) -> Iterator[RenderableType]:
    """Yield the seeds as a table if that is narrow enough, else as a list."""
    table = wording.seeds_table(record)
    *figures, _ = zip(table.header, *table.rows, strict=True)  # columns; the last is the reason
    if sum(max(map(cell_len, column)) + 2 for column in figures) + WHY_WIDTH <= width:
        yield _rich_table(table, len(figures), [HARM if seed.does_harm else "" for seed in record.seeds])
        return
    yield Text(table.title, style="bold")
    for life, row in zip(record.seeds, table.rows, strict=True):
        seed, slot, blueprint, outcome, epochs, parameters, at_gate, contribution, why = row
        yield Text(clean(f"{seed}: {outcome}"), style="bold")
        yield Text(f"  {clean(blueprint)} in {clean(slot)}, epochs {epochs}, {parameters} parameters")
        if at_gate:
            yield Text(f"  gain at its gate {at_gate}")
        yield Text(f"  contribution {contribution}", style=HARM if life.does_harm else "")
        if why:
            yield Padding(Text(clean(why)), (0, 0, 0, 2))
    yield Text()


def _rich_table(source: TextTable, prose: int | None = None, styles: Sequence[str] = ()) -> Table:
    """Return the table; only the column ``prose`` may wrap. ``styles`` are those of its rows."""
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
    for row, style in zip_longest(source.rows, styles, fillvalue=""):
        table.add_row(*(Text(clean(cell)) for cell in row), style=style)
    table.add_row()
    return table


def _gain(slot: EpochSlot) -> str:
    return "" if slot.gain is None else f"{slot.gain:+.4f}"
