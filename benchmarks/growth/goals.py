"""The goals: met, missed or not measured, each with its figure and interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Final, final

from benchmarks.growth.arms import ALONE, BAD, NAIVE, OURS
from benchmarks.growth.cells import Form
from benchmarks.growth.gate_quality import decide
from benchmarks.growth.settings import SETTINGS
from benchmarks.growth.statistics import bootstrap, paired, share_interval
from benchmarks.growth.tables import examined, groups, rises, runs_of, text_table

Record = Mapping[str, Any]

FLOOR: Final = 0.02
"""How much the median transient may exceed the host's own noise."""


@final
@dataclass(frozen=True, slots=True)
class Goal:
    """A goal and what was found.

    Attributes:
        text: The goal.
        met: ``None`` if it was not measured.
        found: Figure and interval.
    """

    text: str
    met: bool | None
    found: str

    @property
    def verdict(self) -> str:
        """``met``, ``missed`` or ``not measured``."""
        return "not measured" if self.met is None else "met" if self.met else "missed"


def _differences(form: Form, done: Mapping[str, Record], name: str, ours: str, other: str) -> list[float]:
    """Return test loss of ours less the other's, of all pairs of runs."""
    found: list[float] = []
    for host, schedule in groups(form, name):
        losses = [
            {seed: run["test"] for seed, run in runs_of(form, done, name, arm, host, schedule).items()}
            for arm in (ours, other)
        ]
        found += paired(*losses)
    return found


def _beats_alone(form: Form, done: Mapping[str, Record], name: str) -> Goal:
    found = _differences(form, done, name, OURS, ALONE)
    wins = sum(d < 0 for d in found)
    low, high = share_interval(wins, len(found))
    text = f"{wins}/{len(found)} [{100 * low:.0f}, {100 * high:.0f}] %, difference {bootstrap(found)}"
    return Goal(
        f"{name}: beats the host alone in 95 % of paired runs",
        wins >= 0.95 * len(found) if found else None,
        text if found else "",
    )


def best_naive(form: Form, done: Mapping[str, Record], name: str, pool: str = "") -> str | None:
    """Return the naive arm with the lowest mean test loss over hosts and schedules."""
    means = {}
    for arm in NAIVE:
        runs = [
            run["test"]
            for host, schedule in groups(form, name)
            for run in runs_of(form, done, name, arm + pool, host, schedule).values()
        ]
        if runs:
            means[arm + pool] = fmean(runs)
    return min(means, key=lambda arm: means[arm]) if means else None


def _against_naive(form: Form, done: Mapping[str, Record], name: str, pool: str) -> Goal:
    text = (
        f"{name}: ahead of the best naive insertion where half the blueprints are bad"
        if pool
        else f"{name}: not worse than the best naive insertion"
    )
    best = best_naive(form, done, name, pool)
    found = _differences(form, done, name, OURS + pool, best) if best is not None else []
    if len(found) < 2:
        return Goal(text, None, "")
    interval = bootstrap(found)
    met = interval.high < 0 if pool else interval.low <= 0
    return Goal(text, met, f"less '{best}': {interval}, {len(found)} pairs")


def _transient(form: Form, done: Mapping[str, Record]) -> list[Goal]:
    goals = []
    for name in ("digits", "chars"):
        for host in SETTINGS[name].hosts[: form.hosts]:
            found = rises(done, name, host)
            floor = {seed: rise for seed, rise in found.get(ALONE, {}).items() if rise is not None}
            ours = {seed: rise for seed, rise in found.get(OURS, {}).items() if rise is not None}
            over = paired(ours, floor)
            goals.append(
                Goal(
                    f"{name}, {host}: median transient within the host's noise + {FLOOR}",
                    bootstrap(over, median).middle <= FLOOR if over else None,
                    f"over the noise {bootstrap(over, median)}, {len(over)} runs" if over else "",
                )
            )
    return goals


def _share_taken(done: Mapping[str, Record], kind: str, text: str, low: float, high: float) -> Goal:
    seeds = [seed for seed in examined(done) if seed["kind"] == kind]
    taken = sum(decide("ours, to the end", seed).accepted for seed in seeds)
    if not seeds:
        return Goal(text, None, "")
    below, above = share_interval(taken, len(seeds))
    share = taken / len(seeds)
    return Goal(text, low <= share <= high, f"{taken}/{len(seeds)} [{100 * below:.1f}, {100 * above:.1f}] %")


def judge(form: Form, done: Mapping[str, Record]) -> list[Goal]:
    """Return every goal with what the finished cells say of it."""
    goals = [_beats_alone(form, done, name) for name in ("digits", "chars")]
    for pool in ("", BAD):
        goals += [_against_naive(form, done, name, pool) for name in ("digits", "chars")]
    goals += _transient(form, done)
    goals.append(_share_taken(done, "harmful", "harmful seeds kept: none", 0.0, 0.0))
    goals.append(_share_taken(done, "null", "null seeds kept: 5 % at most", 0.0, 0.05))
    goals.append(_share_taken(done, "useful", "useful seeds kept: 80 % at least", 0.8, 1.0))
    traces = [r["result"] for r in done.values() if r["benchmark"] == "trace" and "result" in r]
    same = sum(all(trace["checks"].values()) for trace in traces)
    goals.append(
        Goal(
            "every run with culled seeds is bit-identical",
            same == len(traces) if traces else None,
            f"{same}/{len(traces)} runs, {sum(trace['culled'] for trace in traces)} seeds" if traces else "",
        )
    )
    return goals


def goal_table(goals: list[Goal]) -> str:
    """Return the goals as aligned text."""
    return text_table(["goal", "verdict", "found"], [[g.text, g.verdict, g.found] for g in goals])
