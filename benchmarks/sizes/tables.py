"""Tables: regret against the best fixed size chosen in hindsight, FLOPs to its loss, where the seeds came in, goals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from benchmarks.growth.statistics import Interval, bootstrap, paired
from benchmarks.sizes.cells import Done, chosen_rate
from benchmarks.sizes.data import load
from benchmarks.sizes.settings import ARMS, DECAY_SHARE, FIXED, PLAN, SETTINGS, TUNING, Form
from benchmarks.sizes.training import unit

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


def wasted(losses: Losses, arm: str, budget: float) -> tuple[float, bool]:
    """Return the share of the FLOPs that the best fixed size would not have needed for an arm's mean loss.

    The second is true where even the smallest budget does better: it is more than that share, then.
    """
    mean, best = fmean(losses[arm][budget].values()), envelope(losses)
    if mean <= dict(best).get(budget, -math.inf):
        return 0.0, False
    reached = budget_at(best, mean)
    return (1.0 - best[0][0] / budget, True) if math.isnan(reached) else (1.0 - reached / budget, False)


def regret_table(form: Form, losses: Losses) -> str:
    """Return the regret table of a setting."""
    budgets, found = form.budgets, regrets(losses)
    rows = [["arm", *(f"x{b:g}" for b in budgets), "mean", "max", "most wasted"]]
    for arm, by_budget in found.items():
        middles = [by_budget[b].middle for b in budgets if b in by_budget]
        most, is_more = max(
            (wasted(losses, arm, b) for b in budgets if b in by_budget), default=(math.nan, False)
        )
        rows.append(
            [
                arm,
                *(str(by_budget[b]) if b in by_budget else "-" for b in budgets),
                f"{fmean(middles):+.3f}" if middles else "-",
                f"{max(middles):+.3f}" if middles else "-",
                f"{'> ' if is_more else ''}{most:.0%}",
            ]
        )
    return _aligned(rows)


def flops_table(form: Form, losses: Losses) -> str:
    """Return, for each budget, the share of it with which an arm reaches the loss of the best fixed size there."""
    rows = [["arm", *(f"to the best at x{b:g}" for b in form.budgets)]]
    goals = dict(envelope(losses))
    for arm, found in losses.items():
        curve = [(b, fmean(found[b].values())) for b in sorted(found)]
        shares = [budget_at(curve, goals[b]) / b if b in goals else math.nan for b in form.budgets]
        rows.append([arm, *("-" if math.isnan(s) else f"{s:.2f}" for s in shares)])
    return _aligned(rows)


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
    """Return the goals of one plan, `PLAN`, by setting."""
    rows = [
        [
            "setting",
            "max regret, of the best single size",
            "FLOPs wasted",
            "ahead of every fixed size at",
            "safe",
        ]
    ]
    for setting in form.settings:
        losses = losses_of(form, setting, done)
        found = regrets(losses)
        fixed = [arm for arm in found if arm.startswith("fixed")]
        if PLAN not in found or not fixed:
            continue
        largest = {arm: max(i.middle for i in found[arm].values()) for arm in (PLAN, *fixed)}
        single = min(fixed, key=largest.__getitem__)
        ahead = [
            f"x{b:g}"
            for b in found[PLAN]
            if all(
                b in losses[arm] and bootstrap(paired(losses[PLAN][b], losses[arm][b])).high < 0
                for arm in fixed
            )
        ]
        shares = [wasted(losses, PLAN, b)[0] for b in found[PLAN]]
        price = "-"
        if "safe 1-2-4" in losses:
            common = [b for b in losses[PLAN] if b in losses["safe 1-2-4"]]
            price = ", ".join(
                f"x{b:g} {bootstrap(paired(losses['safe 1-2-4'][b], losses[PLAN][b]))}" for b in common
            )
        rows.append(
            [
                setting,
                f"{largest[PLAN]:+.3f} of {largest[single]:+.3f} ({single})",
                f"{fmean(shares):.0%} on average",
                ", ".join(ahead) or "none",
                price,
            ]
        )
    return _aligned(rows) if len(rows) > 1 else ""


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
            "share of a budget that reaches the loss of the best fixed size there:\n"
            + flops_table(form, losses),
            seeds_table(form, setting, done),
        ]
    errors = [f"{r['key']}: {r['error']}" for r in done.values() if "error" in r]
    goals = goals_table(form, done)
    parts += [f"goals of '{PLAN}'\n{goals}"] if goals else []
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
