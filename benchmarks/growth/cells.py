"""The cells of a form: what is run, in which order, and where a learning rate comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import fmean
from types import MappingProxyType
from typing import Any, Final, final

from benchmarks.growth.arms import ALONE, ARMS, ARMS_OF, BAD, NAIVE, OURS, rates_like
from benchmarks.growth.settings import SETTINGS

TUNING: Final = 1000
"""Seeds from here on choose learning rates, by validation loss, and are in no table."""

CANDIDATES: Final = 5
"""Seeds that a cell of the gates examines, in one host."""

RACES: Final = ("digits", "chars", "mlp")
OTHERS: Final = ("gates", "transient", "trace")
BENCHMARKS: Final = (*RACES, *OTHERS)
REMEDIES: Final = "remedies"
"""Recipes that were tried: run when asked for."""


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One piece of work, done in one process; equal cells give equal results.

    Attributes:
        benchmark: One of `BENCHMARKS`, or `REMEDIES`.
        setting: Name of the setting.
        arm: Name of the arm; of the gates, the kind of seed; of the remedies, the recipe.
        host: Name of the host.
        schedule: Of the learning rate.
        lr: Learning rate; 0 where there is nothing to choose.
        seed: Number of the run; of the gates, of the first candidate.
    """

    benchmark: str
    setting: str
    arm: str
    host: str
    schedule: str = ""
    lr: float = 0.0
    seed: int = 0

    @property
    def key(self) -> str:
        """Text that no other cell has."""
        return "|".join(str(value) for value in asdict(self).values())


@final
@dataclass(frozen=True, slots=True)
class Form:
    """How much is run.

    Attributes:
        name: ``fast``, ``long`` or ``tiny``.
        share: Budget of a run over that of its setting.
        seeds: Runs an arm.
        tuning: Seeds that choose the learning rate.
        rates: How many of the setting's rates there are to choose from, counted from the middle.
        hosts: Hosts a setting at most.
        schedules: Of the learning rate.
        benchmarks: What is run.
        candidates: Seeds that the gates judge, by kind; in the main setting, a host.
        text_candidates: The same for characters.
        plateau: Intervals of training of a host that seeds are tried in.
        transients: Seeds of the transients, a host.
        traces: Seeds of the traces, a host and incubation.
    """

    name: str
    share: float
    seeds: int
    tuning: int
    rates: int
    hosts: int
    schedules: tuple[str, ...]
    candidates: Mapping[str, int]
    text_candidates: Mapping[str, int]
    plateau: int
    transients: int
    traces: int
    benchmarks: tuple[str, ...] = BENCHMARKS


FORMS: Final[Mapping[str, Form]] = MappingProxyType(
    {
        "long": Form(
            name="long",
            share=1.0,
            seeds=8,
            tuning=2,
            rates=3,
            hosts=2,
            schedules=("constant", "cosine"),
            candidates={"useful": 50, "null": 90, "harmful": 90, "overfitting": 25},
            text_candidates={"useful": 20, "null": 20, "harmful": 20, "overfitting": 10},
            plateau=100,
            transients=12,
            traces=7,
        ),
        "fast": Form(
            name="fast",
            share=0.5,
            seeds=3,
            tuning=1,
            rates=1,
            hosts=1,
            schedules=("constant",),
            candidates={"useful": 10, "null": 15, "harmful": 15, "overfitting": 5},
            text_candidates={},
            plateau=60,
            transients=3,
            traces=1,
        ),
        "tiny": Form(
            name="tiny",
            share=0.03,
            seeds=2,
            tuning=1,
            rates=1,
            hosts=1,
            schedules=("constant",),
            candidates={"useful": 1, "null": 1, "harmful": 1, "overfitting": 1},
            text_candidates={},
            plateau=2,
            transients=1,
            traces=1,
        ),
    }
)


def rates_of(form: Form, setting: str) -> tuple[float, ...]:
    """Return the learning rates that every arm may choose from."""
    rates = SETTINGS[setting].rates
    middle = len(rates) // 2
    return rates if form.rates >= len(rates) else rates[middle : middle + form.rates]


@final
@dataclass(frozen=True, slots=True)
class Wanted:
    """A cell to run, its learning rate perhaps still to be chosen."""

    cell: Cell
    is_tuned: bool = False

    def ready(self, form: Form, done: Mapping[str, Mapping[str, Any]]) -> Cell | None:
        """Return the cell with its learning rate, or ``None`` while the cells that choose it are not done."""
        if not self.is_tuned:
            return self.cell
        lr = chosen_rate(form, self.cell, done)
        return None if lr is None else replace(self.cell, lr=lr)


def tuning_cells(form: Form, cell: Cell) -> list[Cell]:
    """Return the cells that choose a cell's learning rate."""
    arm = rates_like(cell.arm)
    return [
        replace(cell, arm=arm, lr=lr, seed=TUNING + seed)
        for lr in rates_of(form, cell.setting)
        for seed in range(form.tuning)
    ]


def chosen_rate(form: Form, cell: Cell, done: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the rate with the lowest mean validation loss on the tuning seeds; ``None`` while some are missing."""
    rates = rates_of(form, cell.setting)
    if len(rates) == 1:
        return rates[0]
    found: dict[float, list[float]] = {}
    for tuning in tuning_cells(form, cell):
        record = done.get(tuning.key)
        if record is None:
            return None
        loss = record.get("result", {}).get("val", math.inf)
        found.setdefault(tuning.lr, []).append(loss if math.isfinite(loss) else math.inf)
    return min(found, key=lambda lr: (fmean(found[lr]), lr))


_RANK: Final = {ALONE: 0, OURS: 0, NAIVE[1]: 1, NAIVE[0]: 1, OURS + BAD: 2, NAIVE[1] + BAD: 2}


def plan(form: Form) -> list[Wanted]:
    """Return every cell of a form, the most important first, seeds in turn."""
    ranked: list[tuple[tuple[float, ...], Wanted]] = []
    ranked += _races(form)
    ranked += [((number, 1.0), Wanted(cell)) for number, cell in _gates(form)]
    for name in ("digits", "chars"):
        for place, host in enumerate(SETTINGS[name].hosts[: form.hosts]):
            ranked += [
                (
                    (seed, 1.5 + place),
                    Wanted(Cell("transient", name, "all arms", host, "constant", seed=seed)),
                )
                for seed in range(form.transients if name == "digits" else form.transients // 3)
            ]
            for arm in (OURS, "straight-through"):
                for schedule in form.schedules:
                    ranked += [
                        ((seed, 0.5), Wanted(Cell("trace", name, arm, host, schedule, seed=seed)))
                        for seed in range(form.traces)
                    ]
    if REMEDIES in form.benchmarks:
        ranked += _remedies(form)
    wanted: dict[str, Wanted] = {}
    for _, item in sorted(ranked, key=lambda pair: pair[0]):
        if item.cell.benchmark in form.benchmarks:
            wanted.setdefault(item.cell.key, item)
    return list(wanted.values())


def _races(form: Form) -> Iterator[tuple[tuple[float, ...], Wanted]]:
    for name in RACES:
        for place, host in enumerate(SETTINGS[name].hosts[: form.hosts]):
            for turn, schedule in enumerate(form.schedules):
                for arm in ARMS_OF[name]:
                    base = Cell(name, name, arm, host, schedule)
                    rank = _RANK.get(arm, 3) + 0.5 * place + 0.25 * turn
                    if form.rates > 1:
                        for cell in tuning_cells(form, base):
                            yield (cell.seed - TUNING - 1, rank), Wanted(cell)
                    for seed in range(form.seeds):
                        yield (seed, rank), Wanted(replace(base, seed=seed), is_tuned=True)


def _remedies(form: Form) -> Iterator[tuple[tuple[float, ...], Wanted]]:
    from benchmarks.growth.remedies import RECIPES

    for name in ("digits", "chars"):
        hosts, turns = SETTINGS[name].hosts[: form.hosts], 1 if name == "digits" else 2
        for host, schedule in product(hosts, form.schedules[:turns]):
            for recipe in (*NAIVE[:2], *RECIPES):
                for seed in range(form.seeds):
                    cell = Cell(REMEDIES, name, recipe, host, schedule, seed=TUNING + seed)
                    yield (seed, 0.0), Wanted(cell)


def _gates(form: Form) -> Iterator[tuple[float, Cell]]:
    for name, counts in (("digits", form.candidates), ("chars", form.text_candidates)):
        for host in SETTINGS[name].hosts[: form.hosts]:
            for kind, count in counts.items():
                cells = range(0, count, CANDIDATES)
                for place, first in enumerate(cells):
                    yield form.seeds * place / len(cells), Cell("gates", name, kind, host, seed=first)


def run_cell(cell: Cell, form: Form) -> dict[str, Any]:
    """Do a cell's work and return what was found, as plain data."""
    setting = SETTINGS[cell.setting].shortened(form.share)
    match cell.benchmark:
        case "gates":
            from benchmarks.growth.gate_quality import examine

            counts = form.candidates if cell.setting == "digits" else form.text_candidates
            numbers = range(cell.seed, min(cell.seed + CANDIDATES, counts[cell.arm]))
            return {"seeds": [examine(setting, cell.host, cell.arm, n, form.plateau) for n in numbers]}
        case "transient":
            from benchmarks.growth.transient import rises

            return rises(setting, cell.host, cell.seed, form.plateau)
        case "remedies":
            from benchmarks.growth.remedies import case

            return case(setting, cell.arm, cell.host, cell.schedule, cell.seed)
        case "trace":
            from benchmarks.growth.no_trace import compare

            return compare(setting, cell.arm, cell.host, cell.schedule, cell.seed)
        case _:
            from benchmarks.growth.race import race

            return race(setting, cell.arm, cell.host, cell.schedule, cell.lr, cell.seed)


def known_arms(names: Iterable[str]) -> list[str]:
    """Return the names that are no arm."""
    return [name for name in names if name not in ARMS]
