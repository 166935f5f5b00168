"""Tables: regret against the best fixed size chosen in hindsight, FLOPs to its loss, where the seeds came in, goals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, Final

import numpy as np

from benchmarks.growth.statistics import Interval, bootstrap, paired
from benchmarks.sizes.cells import Done, chosen_rate
from benchmarks.sizes.data import load
from benchmarks.sizes.settings import (
    ARMS,
    DECAY_SHARE,
    FIXED,
    PLAN,
    REMEDIES,
    SAFE,
    SETTINGS,
    TUNING,
    Arm,
    Form,
)
from benchmarks.sizes.training import unit

MOST_WASTED: Final = 0.05
"""Goal: share of the FLOPs that a plan wastes on average."""

LEAST_RUNS: Final = 4
"""Pairs that an interval needs to show that an arm is ahead."""

SHARE_RESAMPLES: Final = 400
"""Bootstrap samples of a share of FLOPs."""

_FIXED_ARMS: Final = frozenset(f"fixed {n}" for n in FIXED)

Losses = dict[str, dict[float, dict[int, float]]]
"""Test losses by arm, budget and seed."""


def losses_of(form: Form, setting: str, done: Done) -> Losses:
    """Return the decayed ends of a setting's runs."""
    found: Losses = {}
    for record in done.values():
        if record["benchmark"] != setting or record["seed"] >= TUNING or "result" not in record:
            continue
        for end in record["result"]["ends"]:
            by_budget = found.setdefault(record["arm"], {})
            by_budget.setdefault(end["budget"], {})[record["seed"]] = end["loss"]
    return {arm: found[arm] for arm in form.arms if arm in found}


def best_fixed(losses: Losses) -> dict[float, str]:
    """Return by budget the fixed size with the lowest mean loss, over the seeds that all of them have."""
    fixed = [f"fixed {n}" for n in FIXED if f"fixed {n}" in losses]
    best = {}
    for budget in sorted({b for arm in fixed for b in losses[arm]}):
        there = [arm for arm in fixed if budget in losses[arm]]
        common = set.intersection(*(set(losses[arm][budget]) for arm in there))
        if common:
            means = {arm: fmean(losses[arm][budget][seed] for seed in common) for arm in there}
            best[budget] = min(means, key=means.__getitem__)
    return best


def envelope(losses: Losses) -> list[tuple[float, float]]:
    """Return budget and mean loss of the best fixed size, by rising budget."""
    return [(b, fmean(losses[arm][b].values())) for b, arm in best_fixed(losses).items()]


def budget_at(curve: Sequence[tuple[float, float]], loss: float) -> float:
    """Return the budget at which a falling curve reaches a loss, linear in the logarithm; NaN outside of it."""
    for (b0, l0), (b1, l1) in pairwise(curve):
        if l0 >= loss >= l1 and l0 > l1:
            share = (l0 - loss) / (l0 - l1)
            return math.exp(math.log(b0) + share * (math.log(b1) - math.log(b0)))
    return math.nan


def regrets(losses: Losses) -> dict[str, dict[float, Interval]]:
    """Return by arm and budget the loss less that of the best fixed size, paired by seed."""
    best = best_fixed(losses)
    return {
        arm: {b: bootstrap(paired(found[b], losses[best[b]][b])) for b in found if b in best}
        for arm, found in losses.items()
    }


def with_fixed(losses: Losses, arm: str) -> Losses:
    """Return an arm and the fixed sizes that are the best at some budget, each with the seeds that all of them have."""
    names = [*dict.fromkeys([*best_fixed(losses).values(), arm])]
    seeds = set.intersection(*(set(by_seed) for name in names for by_seed in losses[name].values()))
    return {
        name: {
            budget: {seed: by_seed[seed] for seed in sorted(seeds)}
            for budget, by_seed in losses[name].items()
            if seeds
        }
        for name in names
    }


def wasted(losses: Losses, arm: str, budget: float) -> tuple[float, bool]:
    """Return the share of the FLOPs that the best fixed size would not have needed for an arm's mean loss.

    The second is true where even the smallest budget does better: it is more than that share, then. An arm that is ahead
    wastes nothing.
    """
    losses = with_fixed(losses, arm)
    best = envelope(losses)
    if budget not in dict(best) or budget not in losses[arm]:
        return math.nan, False
    mean = fmean(losses[arm][budget].values())
    if mean <= dict(best)[budget]:
        return 0.0, False
    reached = budget_at(best, mean)
    return (1.0 - best[0][0] / budget, True) if math.isnan(reached) else (1.0 - reached / budget, False)


def mean_regret(losses: Losses, arm: str) -> Interval:
    """Return the regret over all budgets, with an interval over seeds."""
    losses = with_fixed(losses, arm)
    by_seed = [
        paired(losses[arm][budget], losses[best][budget])
        for budget, best in best_fixed(losses).items()
        if budget in losses[arm]
    ]
    return bootstrap([fmean(seed) for seed in zip(*by_seed, strict=True)])


def regret_table(form: Form, losses: Losses) -> str:
    """Return the regret table of a setting."""
    budgets, found = form.budgets, regrets(losses)
    rows = [
        ["arm", "runs", *(f"x{b:g}" for b in budgets), "mean", "max", "FLOPs wasted: mean", "most"],
    ]
    for arm, by_budget in found.items():
        middles = [by_budget[b].middle for b in budgets if b in by_budget]
        if not middles:
            continue
        shares = [wasted(losses, arm, b) for b in budgets if b in by_budget]
        most, is_more = max(shares)
        more = "> " if any(flag for _, flag in shares) else ""
        rows.append(
            [
                arm,
                str(max(by_budget[b].n for b in by_budget)),
                *(str(by_budget[b]) if b in by_budget else "-" for b in budgets),
                str(mean_regret(losses, arm)),
                f"{max(middles):+.3f}",
                f"{more}{fmean(share for share, _ in shares):.0%}",
                f"{'> ' if is_more else ''}{most:.0%}",
            ]
        )
    return _aligned(rows)


def shares_to_best(losses: Losses, arm: str) -> dict[float, Interval]:
    """Return by budget the share of it with which an arm reaches the mean loss of the best fixed size there.

    Curves of means are resampled seed by seed, the fixed sizes' with the arm's; resamples in which the loss is not reached
    count as infinitely dear. NaN where the arm's curve of all seeds does not reach it.
    """
    losses = with_fixed(losses, arm)
    best = best_fixed(losses)
    seeds = sorted(next(iter(losses[arm].values()), ()))
    if not best or not seeds:
        return {}
    budgets = sorted(losses[arm])
    own = np.array([[losses[arm][b][seed] for b in budgets] for seed in seeds])
    goal = np.array([[losses[name][b][seed] for b, name in best.items()] for seed in seeds])
    drawn = np.random.default_rng(0).integers(0, len(seeds), (SHARE_RESAMPLES, len(seeds)))
    found: dict[float, Interval] = {}
    for place, budget in enumerate(best):

        def share(picked: Any, place: int = place, budget: float = budget) -> float:
            curve = list(zip(budgets, own[picked].mean(0).tolist(), strict=True))
            return budget_at(curve, float(goal[picked, place].mean())) / budget

        again = np.nan_to_num([share(picked) for picked in drawn], nan=math.inf)
        low, high = np.quantile(again, [0.025, 0.975], method="nearest")
        found[budget] = Interval(share(slice(None)), float(low), float(high), len(seeds))
    return found


def flops_table(form: Form, losses: Losses) -> str:
    """Return, for each budget, the share of it with which an arm reaches the loss of the best fixed size there."""
    rows = [["arm", *(f"to the best at x{b:g}" for b in form.budgets)]]
    for arm in losses:
        found = shares_to_best(losses, arm)
        rows.append([arm, *(_share(found.get(b)) for b in form.budgets)])
    return _aligned(rows)


def _share(found: Interval | None) -> str:
    if found is None or math.isnan(found.middle):
        return "-"
    if found.n < 2 or found.low == found.high:
        return f"{found.middle:.2f}"
    high = f"{found.high:.2f}" if math.isfinite(found.high) else "never"
    return f"{found.middle:.2f} [{found.low:.2f}, {high}]"


def against_plan(form: Form, done: Done, arms: Sequence[str]) -> str:
    """Return, by setting and budget, an arm's loss less the plan's, paired by seed."""
    rows = [["setting", "arm", "runs", *(f"x{b:g}" for b in form.budgets)]]
    for setting in form.settings:
        losses = losses_of(form, setting, done)
        for arm in arms:
            if arm in losses and PLAN in losses:
                found = {
                    b: bootstrap(paired(losses[arm][b], losses[PLAN][b]))
                    for b in losses[arm]
                    if b in losses[PLAN]
                }
                runs = str(max((interval.n for interval in found.values()), default=0))
                rows.append(
                    [setting, arm, runs, *(str(found[b]) if b in found else "-" for b in form.budgets)]
                )
    return _aligned(rows) if len(rows) > 1 else ""


def seeds_table(form: Form, setting: str, done: Done) -> str:
    """Return where seeds came in, of the first seed's run, and how many runs ended with how many fossils."""
    rows = [["arm", "seeds came in at (first run)", "fossils, by run", "reverted runs"]]
    for arm in form.arms:
        runs = [
            r["result"]
            for r in done.values()
            if r["benchmark"] == setting and r["arm"] == arm and r["seed"] < TUNING and "result" in r
        ]
        if runs and ARMS[arm].grows:
            born = ", ".join(f"x{flops:.3g} ({count:,} parameters)" for flops, _, count in runs[0]["seeds"])
            kept = ", ".join(str(len(run["fossils"])) for run in runs)
            rows.append([arm, born or "none", kept, str(sum(run["lost_epochs"] > 0 for run in runs))])
    return _aligned(rows) if len(rows) > 1 else ""


def goals_table(form: Form, done: Done) -> str:
    """Return the goals of each plan by setting, of a plan that was chosen on a seed without that seed."""
    rows = [
        [
            "setting",
            "plan",
            "seeds",
            "mean regret",
            "max regret",
            "best single size",
            "a third at most",
            "FLOPs wasted",
            "5 % at most",
            "ahead of every fixed size at",
        ]
    ]
    for setting in form.settings:
        every = losses_of(form, setting, done)
        for plan in every:
            if not is_judged(ARMS[plan]):
                continue
            losses = judged(every, plan)
            found = regrets(losses)
            fixed = [name for name in found if name in _FIXED_ARMS]
            if not fixed or plan not in found:
                continue
            largest = {name: max(found[name].items(), key=lambda item: item[1].middle) for name in found}
            single = min(fixed, key=lambda name: largest[name][1].middle)
            (at, most), (single_at, least) = largest[plan], largest[single]
            share = fmean(wasted(losses, plan, b)[0] for b in found[plan])
            seeds = sorted({seed for by_seed in losses[plan].values() for seed in by_seed})
            rows.append(
                [
                    setting,
                    plan,
                    f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0]),
                    str(mean_regret(losses, plan)),
                    f"{most} at x{at:g}",
                    f"{least} at x{single_at:g} ({single})",
                    "met" if most.middle <= least.middle / 3 else "missed",
                    f"{share:.0%}",
                    "met" if share <= MOST_WASTED else "missed",
                    ", ".join(f"x{b:g} {found[plan][b]}" for b in ahead_of_all(losses, plan)) or "none",
                ]
            )
    return _aligned(rows) if len(rows) > 1 else ""


def is_judged(arm: Arm) -> bool:
    """Return whether goals are asked of an arm: a plan, or a remedy of which it is known what it was chosen on."""
    return arm.grows and (not arm.remedy or arm.chosen_on is not None)


def judged(losses: Losses, plan: str) -> Losses:
    """Return a plan and every fixed size on the seeds that all of them have, without the one the plan was chosen on."""
    names = [name for name in losses if name in _FIXED_ARMS or name == plan]
    seeds = set.intersection(*(set(by_seed) for name in names for by_seed in losses[name].values()))
    seeds -= {ARMS[plan].chosen_on}
    return {
        name: {b: {s: by_seed[s] for s in sorted(seeds)} for b, by_seed in losses[name].items()}
        for name in names
        if seeds
    }


def ahead_of_all(losses: Losses, plan: str) -> list[float]:
    """Return the budgets at which a plan is ahead of every fixed size, with intervals that exclude 0.

    Intervals of fewer than `LEAST_RUNS` pairs say nothing.
    """
    fixed = [losses[arm] for arm in losses if arm in _FIXED_ARMS]

    def is_ahead(budget: float) -> bool:
        gaps = [bootstrap(paired(losses[plan][budget], one.get(budget, {}))) for one in fixed]
        return bool(gaps) and all(gap.n >= LEAST_RUNS and gap.high < 0 for gap in gaps)

    return [budget for budget in losses[plan] if is_ahead(budget)]


def plans(form: Form) -> str:
    """Return what is fixed before the run: data, budgets, arms and rates."""
    text = load()
    rows = [["setting", "budget 1, FLOPs", "four blocks", "sequences per batch"]]
    for name in form.settings:
        flops, parameters = unit(SETTINGS[name], form.tokens)
        rows.append([name, f"{flops:.3g}", f"{parameters:,} parameters", str(SETTINGS[name].batch)])
    arms = _aligned([["arm", "what it does"], *([arm, ARMS[arm].what] for arm in form.arms)])
    return (
        f"{text.files} files of the standard library, SHA-256 begins with {text.digest}; "
        f"{len(text.splits['train']):,} training sequences, each seen once on a path.\n"
        f"Budgets {', '.join(f'x{b:g}' for b in form.budgets)}; rates fall over the last {DECAY_SHARE:.0%} of each, on a "
        f"copy; {form.tokens:g} bytes per parameter of four blocks make x1. Rates {', '.join(f'{r:g}' for r in form.rates)}, "
        f"{form.tuning} tuning seeds up to x{form.tuned_to:g}; {form.seeds} paired seeds.\n\n"
        f"{_aligned(rows)}\n\n{arms}\n"
    )


def report(form: Form, done: Done) -> str:
    """Return all tables."""
    parts = []
    for setting in form.settings:
        losses = losses_of(form, setting, done)
        if not losses:
            continue
        best = ", ".join(f"x{b:g} {arm}" for b, arm in best_fixed(losses).items())
        rates = {arm: chosen_rate(form, setting, arm, done) for arm in losses}
        parts += [
            f"{setting}\n{'-' * len(setting)}",
            f"best fixed size in hindsight: {best or '-'}",
            f"rates: {', '.join(f'{arm} {rate:g}' for arm, rate in rates.items() if rate is not None)}",
            "loss less that of the best fixed size, nats a byte:\n" + regret_table(form, losses),
            "share of a budget that reaches the loss of the best fixed size there (never: not in 2.5 % of resamples):\n"
            + flops_table(form, losses),
            seeds_table(form, setting, done),
        ]
    errors = [f"{r['key']}: {r['error']}" for r in done.values() if "error" in r]
    for title, table in (
        (f"price of safety: loss less that of '{PLAN}'", against_plan(form, done, SAFE)),
        (f"remedies: loss less that of '{PLAN}'", against_plan(form, done, REMEDIES)),
        ("goals of the plans, each on seeds that it was not chosen on", goals_table(form, done)),
    ):
        parts += [f"{title}\n{'-' * len(title)}", table] if table else []
    parts += [f"{len(errors)} cells failed:\n" + "\n".join(errors[:5])] if errors else []
    return "\n\n".join(part for part in parts if part)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def seeds_of(done: Mapping[str, Mapping[str, Any]], setting: str, arm: str) -> list[float]:
    """Return the budgets at which seeds came in, of the first run of an arm."""
    runs = [
        r
        for r in done.values()
        if r["benchmark"] == setting and r["arm"] == arm and r["seed"] < TUNING and "result" in r
    ]
    return [flops for flops, _, _ in min(runs, key=lambda r: r["seed"])["result"]["seeds"]] if runs else []
