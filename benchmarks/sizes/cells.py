"""Cells of the benchmark: planned once, run once, results as lines of a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, final

from benchmarks.growth.running import record_of
from benchmarks.sizes.settings import ARMS, SETTINGS, TUNING, Form, is_run
from benchmarks.sizes.training import run_arm

Done = Mapping[str, Mapping[str, Any]]
"""Finished cells by key."""


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One run of an arm; ``benchmark`` is the setting's name."""

    benchmark: str
    arm: str
    seed: int
    lr: float = 0.0

    @property
    def key(self) -> str:
        """Name of the cell in the file."""
        return f"{self.benchmark}/{self.arm}/{self.seed}/{self.lr:g}"


@final
@dataclass(frozen=True, slots=True)
class Wanted:
    """A cell to run, its learning rate perhaps still to be chosen."""

    cell: Cell
    is_tuned: bool = False

    def ready(self, form: Form, done: Done) -> Cell | None:
        """Return the cell with its learning rate, or ``None`` while the cells that choose it are not done."""
        if not self.is_tuned:
            return self.cell
        lr = chosen_rate(form, self.cell.benchmark, self.cell.arm, done)
        return None if lr is None else replace(self.cell, lr=lr)


def tuning_cells(form: Form, setting: str, arm: str) -> list[Cell]:
    """Return the cells that choose an arm's learning rate; another arm's where it takes that one's."""
    if len(form.rates) == 1:
        return []
    arm = ARMS[arm].rate_of or arm
    return [Cell(setting, arm, TUNING + seed, lr) for seed in range(form.tuning) for lr in form.rates]


def chosen_rate(form: Form, setting: str, arm: str, done: Done) -> float | None:
    """Return the rate with the lowest mean validation loss over tuning seeds and budgets; ``None`` while some are missing."""
    found: dict[float, list[float]] = {lr: [] for lr in form.rates}
    for cell in tuning_cells(form, setting, arm):
        record = done.get(cell.key)
        if record is None:
            return None
        losses = [end["loss"] for end in record.get("result", {}).get("ends", [])] or [math.inf]
        found[cell.lr].append(fmean(loss if math.isfinite(loss) else math.inf for loss in losses))
    return min(found, key=lambda lr: (fmean(found[lr] or [0.0]), lr))


def plan(form: Form) -> list[Wanted]:
    """Return every cell of a form: rates first, then seed by seed all arms, so that pairs are whole early."""
    places = [
        (setting, arm)
        for setting in form.settings
        for arm in form.arms
        if is_run(SETTINGS[setting], ARMS[arm])
    ]
    tuning = [Wanted(cell) for cell in dict.fromkeys(c for p in places for c in tuning_cells(form, *p))]
    runs = [
        Wanted(Cell(setting, arm, seed), is_tuned=True)
        for seed in range(form.seeds)
        for setting, arm in places
    ]
    return tuning + runs


def run_cell(cell: Cell, form: Form) -> dict[str, Any]:
    """Run a cell."""
    is_tuning = cell.seed >= TUNING
    budgets = [b for b in form.budgets if not is_tuning or b <= form.tuned_to]
    return run_arm(SETTINGS[cell.benchmark], ARMS[cell.arm], cell.seed, cell.lr, budgets, form.tokens)


def work(cell: Cell, form: Form) -> dict[str, Any]:
    """Run one cell of this benchmark; see `record_of`."""
    return record_of(cell, form, run_cell)
