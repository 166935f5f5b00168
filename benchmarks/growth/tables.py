"""The tables, from the finished cells."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any, Final

from benchmarks.growth.arms import ALONE, ARMS_OF
from benchmarks.growth.cells import RACES, REMEDIES, TUNING, Cell, Form, chosen_rate
from benchmarks.growth.gate_quality import RULES, decide
from benchmarks.growth.settings import SETTINGS
from benchmarks.growth.statistics import Judged, bootstrap, paired, score, share_interval

Record = Mapping[str, Any]
Runs = dict[int, Record]
"""Results by seed."""

KINDS: Final = ("useful", "null", "harmful", "overfitting")


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return aligned text: the first column to the left, the others to the right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def groups(form: Form, name: str) -> list[tuple[str, str]]:
    """Return the hosts and schedules of a setting that a form runs."""
    return [(host, schedule) for host in SETTINGS[name].hosts[: form.hosts] for schedule in form.schedules]


def runs_of(form: Form, done: Mapping[str, Record], name: str, arm: str, host: str, schedule: str) -> Runs:
    """Return an arm's results at the learning rate that its validation loss chose, by seed."""
    lr = chosen_rate(form, Cell(name, name, arm, host, schedule), done)
    return {
        record["seed"]: record["result"]
        for record in done.values()
        if (record["benchmark"], record["arm"], record["host"], record["schedule"])
        == (name, arm, host, schedule)
        and record["lr"] == lr
        and record["seed"] < TUNING
        and "result" in record
    }


def error_of(done: Mapping[str, Record], name: str, arm: str) -> str:
    """Return why an arm has no results, if that was said."""
    found = [r["error"] for r in done.values() if r["benchmark"] == name and r["arm"] == arm and "error" in r]
    return found[0][:70] if found else "not run"


def _spread(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return "-"
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def race_table(form: Form, done: Mapping[str, Record], name: str, host: str, schedule: str) -> str:
    """Return the final losses of every arm at equal operations."""
    alone = runs_of(form, done, name, ALONE, host, schedule)
    losses_alone = {seed: run["test"] for seed, run in alone.items()}
    rows = []
    for arm in ARMS_OF[name]:
        runs = runs_of(form, done, name, arm, host, schedule)
        if not runs:
            rows.append([arm, error_of(done, name, arm), *[""] * 7])
            continue
        losses = {seed: run["test"] for seed, run in runs.items()}
        differences = paired(losses, losses_alone)
        wins = sum(d < 0 for d in differences)
        lr = chosen_rate(form, Cell(name, name, arm, host, schedule), done)
        rows.append(
            [
                arm,
                f"{lr:g}",
                str(len(runs)),
                _spread([run["test"] for run in runs.values()]),
                f"{fmean(run['metric'] for run in runs.values()):.3f}",
                f"{fmean(run['val'] for run in runs.values()):.3f}",
                f"{median(run['parameters'] for run in runs.values()):.0f}",
                "" if arm == ALONE else str(bootstrap(differences)),
                "" if arm == ALONE else f"{wins}/{len(differences)}",
            ]
        )
    head = ["arm", "lr", "runs", "test loss", SETTINGS[name].unit, "val loss", "parameters"]
    return text_table([*head, "less host alone [95 %]", "wins"], rows)


def time_table(form: Form, done: Mapping[str, Record], name: str, host: str, schedule: str) -> str:
    """Return what it takes to reach the validation loss at which the host alone ends."""
    alone = runs_of(form, done, name, ALONE, host, schedule)
    rows = []
    for arm in ARMS_OF[name]:
        flops, seconds, missed = [], [], 0
        for seed, run in runs_of(form, done, name, arm, host, schedule).items():
            if seed not in alone:
                continue
            target = alone[seed]["val"]
            there, base = reached(run["curve"], target), reached(alone[seed]["curve"], target)
            if there is None or base is None:
                missed += 1
                continue
            flops.append(there[0] / base[0])
            seconds.append(there[1] / max(1e-9, base[1]))
        if flops or missed:
            rows.append(
                [
                    arm,
                    f"{len(flops)}/{len(flops) + missed}",
                    f"{median(flops):.2f}" if flops else "-",
                    f"{median(seconds):.2f}" if seconds else "-",
                ]
            )
    return text_table(["arm", "reached", "FLOPs / host alone", "CPU seconds / host alone"], rows)


def reached(curve: Sequence[Sequence[float]], target: float, over: int = 3) -> tuple[float, float] | None:
    """Return operations and seconds at which the mean of the last ``over`` validation losses reaches a target."""
    for i in range(over - 1, len(curve)):
        if fmean(point[2] for point in curve[i - over + 1 : i + 1]) <= target:
            return curve[i][0], curve[i][1]
    return None


def examined(done: Mapping[str, Record], setting: str | None = None) -> list[Record]:
    """Return every seed that the gates judged."""
    return [
        seed
        for record in done.values()
        if record["benchmark"] == "gates" and "result" in record and setting in (None, record["setting"])
        for seed in record["result"]["seeds"]
    ]


def gate_table(seeds: Sequence[Record]) -> str:
    """Return how many seeds of each kind every rule took."""
    rows = []
    for rule in RULES:
        row = [rule]
        for kind in KINDS:
            of_kind = [decide(rule, seed) for seed in seeds if seed["kind"] == kind]
            taken = sum(d.accepted for d in of_kind)
            low, high = share_interval(taken, len(of_kind))
            row.append(f"{taken}/{len(of_kind)} [{100 * low:.0f}, {100 * high:.0f}] %" if of_kind else "-")
        rows.append(row)
    return text_table(["rule", *(f"{kind} taken" for kind in KINDS)], rows)


WORTH: Final = (-math.inf, 0.0, 0.02, 0.05, math.inf)
"""Bounds of what a seed is worth in the end: loss per test sample, measured when its life is decided."""


def worth_table(seeds: Sequence[Record]) -> str:
    """Return how many of the useful seeds ours kept, by what they were worth once they had trained with the host."""
    decided = [seed for seed in seeds if seed["kind"] == "useful" and seed.get("truth") is not None]
    rows = []
    for low, high in pairwise(WORTH):
        there = [seed for seed in decided if low < seed["truth"] <= high]
        kept = sum(seed["kept"] for seed in there)
        below, above = share_interval(kept, len(there))
        name = (
            f"{low:g} to {high:g}"
            if math.isfinite(low + high)
            else f"above {low:g}"
            if low > 0
            else "0 or less"
        )
        rows.append([name, f"{kept}/{len(there)} [{100 * below:.0f}, {100 * above:.0f}] %" if there else "-"])
    return text_table(["gain on the test samples in the end", "kept"], rows)


def half_bad(seeds: Sequence[Record]) -> list[Record]:
    """Return as many useful as bad seeds, the bad ones in equal parts of each kind."""
    by_kind = {kind: [seed for seed in seeds if seed["kind"] == kind] for kind in KINDS}
    bad = min(len(by_kind[kind]) for kind in KINDS[1:])
    each = min(bad, len(by_kind["useful"]) // 3)
    return by_kind["useful"][: 3 * each] + [seed for kind in KINDS[1:] for seed in by_kind[kind][:each]]


def rule_table(seeds: Sequence[Record]) -> str:
    """Return precision, recall and regret of every rule where half the seeds are bad."""
    pool = half_bad(seeds)
    if not pool:
        return "too few seeds were judged"
    rows = []
    for rule in RULES:
        judged = []
        for seed in pool:
            decision = decide(rule, seed)
            judged.append(Judged(seed["kind"] == "useful", decision.accepted, decision.gain))
        result = score(judged)
        rows.append(
            [
                rule,
                *(f"{v:.2f}" if math.isfinite(v) else "-" for v in (result.precision, result.recall)),
                f"{result.regret:.4f}",
                f"{result.harm:.4f}",
                f"{result.profit:+.4f}",
            ]
        )
    return text_table(["rule", "precision", "recall", "regret", "regret against host alone", "profit"], rows)


def rises(done: Mapping[str, Record], setting: str, host: str) -> dict[str, dict[int, float | None]]:
    """Return the worst rise of the loss by arm and seed."""
    found: dict[str, dict[int, float | None]] = defaultdict(dict)
    for record in done.values():
        if (record["benchmark"], record["setting"], record["host"]) == (
            "transient",
            setting,
            host,
        ) and "result" in record:
            for arm, rise in record["result"]["rises"].items():
                found[arm][record["seed"]] = rise
    return found


def transient_table(found: Mapping[str, Mapping[int, float | None]]) -> str:
    """Return the worst rise of the loss by arm, beside the host's own."""
    floor = {seed: rise for seed, rise in found.get(ALONE, {}).items() if rise is not None}
    rows = []
    for arm, by_seed in found.items():
        there = {seed: rise for seed, rise in by_seed.items() if rise is not None}
        over = paired(there, floor)
        rows.append(
            [
                arm,
                f"{len(there)}/{len(by_seed)}",
                f"{median(there.values()):+.3f}" if there else "-",
                "" if arm == ALONE else str(bootstrap(over, median)),
            ]
        )
    return text_table(["arm", "inserted", "median worst rise", "over the host's own, median [95 %]"], rows)


def trace_table(done: Mapping[str, Record]) -> str:
    """Return how many runs with culled seeds equal those without, bit for bit."""
    rows = []
    kinds: dict[tuple[str, str, str, str], list[Record]] = defaultdict(list)
    for record in done.values():
        if record["benchmark"] == "trace" and "result" in record:
            kinds[record["setting"], record["host"], record["arm"], record["schedule"]].append(
                record["result"]
            )
    for (setting, host, arm, schedule), found in sorted(kinds.items()):
        same = [sum(r["checks"][name] for r in found) for name in found[0]["checks"]]
        rows.append(
            [
                f"{setting}, {host}, {arm}, {schedule}",
                str(len(found)),
                str(sum(r["culled"] for r in found)),
                *map(str, same),
            ]
        )
    checks = ["weights and statistics", "optimiser", "losses", "random numbers"]
    return text_table(["runs", "n", "seeds culled", *(f"same {check}" for check in checks)], rows)


def report(form: Form, done: Mapping[str, Record]) -> str:
    """Return all tables of what is done."""
    parts = []
    for name in RACES:
        for host, schedule in groups(form, name):
            if any(r["benchmark"] == name and r["host"] == host for r in done.values()):
                title = f"{name}, host '{host}', {schedule} learning rate"
                parts += [
                    f"{title}: final losses at equal FLOPs",
                    race_table(form, done, name, host, schedule),
                ]
                parts += [
                    f"{title}: to the host's final validation loss",
                    time_table(form, done, name, host, schedule),
                ]
    for name in ("digits", "chars"):
        if seeds := examined(done, name):
            parts += [f"gates on {name}: seeds taken [95 %]", gate_table(seeds)]
            parts += [f"gates on {name}: useful seeds by what they were worth", worth_table(seeds)]
            parts += [f"gates on {name}: rules where half the seeds are bad", rule_table(seeds)]
        for host in SETTINGS[name].hosts:
            if found := rises(done, name, host):
                parts += [f"transient on {name}, host '{host}'", transient_table(found)]
    if any(record["benchmark"] == "trace" for record in done.values()):
        parts += ["no trace: runs with culled seeds against runs without", trace_table(done)]
    if any(record["benchmark"] == REMEDIES for record in done.values()):
        from benchmarks.growth.remedies import remedy_table

        parts += ["recipes: validation loss less a plain insertion's", remedy_table(done)]
    failed = [f"{record['key']}: {record['error']}" for record in done.values() if "error" in record]
    if failed:
        parts += [f"{len(failed)} cells failed or were not run", "\n".join(sorted(failed)[:12])]
    lines = []
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        lines += [title, "-" * len(title), body, ""]
    return "\n".join(lines)
