"""The benchmark of sizes: what is fixed before it runs, resumable results, and figures from made-up losses."""

from __future__ import annotations

import importlib
import json
import math
import re
from dataclasses import replace

import pytest
import torch

from benchmarks.growth.running import run
from benchmarks.sizes import __main__ as command
from benchmarks.sizes.cells import Cell, plan, work
from benchmarks.sizes.data import LENGTH, Stream, load
from benchmarks.sizes.hosts import ConvHost, ConvSeed
from benchmarks.sizes.settings import ARMS, FORMS, PLAN, REMEDIES, SETTINGS, TUNING
from benchmarks.sizes.tables import (
    against_plan,
    ahead_of_all,
    best_fixed,
    budget_at,
    envelope,
    judged,
    losses_of,
    mean_regret,
    regrets,
    report,
    shares_to_best,
    wasted,
    with_fixed,
)

TINY = replace(FORMS["tiny"], settings=("cnn-12",), arms=("fixed 1", "fixed 2", PLAN))
LONG = FORMS["long"]


def fake(cell: Cell, form, rates=(8e-3,)):
    """The larger the model, the better at large budgets; the plan is always .01 behind the best."""
    size = {"fixed 1": 1.0, "fixed 2": 2.0, "fixed 4": 4.0, "fixed 8": 8.0}
    ends = []
    for budget in form.budgets:
        of = {n: 1 / n + 0.3 * n / budget for n in size.values()}
        loss = of[size[cell.arm]] if cell.arm in size else min(of.values()) + 0.01
        ends.append({"budget": budget, "loss": loss + 0.001 * cell.seed + abs(cell.lr - 8e-3)})
    result = {"ends": ends, "seeds": [[0.1, "last", 900]], "fossils": ["last"], "lost_epochs": 0}
    record = {"key": cell.key, "form": form.name, "wall": 0.0, "cpu": 0.0, "result": result}
    return record | {name: getattr(cell, name) for name in Cell.__dataclass_fields__}


def test_each_sequence_is_seen_once_and_no_split_holds_another_ones():
    text = load()
    rows = [tuple(row.tolist()) for split in text.splits.values() for row in split[:, :-1][:2000]]
    assert len(rows) == len(set(rows))
    stream = Stream(3, 8)
    first, second = stream.at(0)[0], stream.at(1)[0]
    assert first.shape == (8, LENGTH)
    assert not {tuple(r.tolist()) for r in first} & {tuple(r.tolist()) for r in second}
    assert torch.equal(Stream(3, 8).at(1)[0], second)
    with pytest.raises(IndexError, match="nothing is seen twice"):
        stream.at(10**6)


def test_convolutions_along_text_are_causal_and_a_new_seed_is_the_identity():
    host = ConvHost(4, 2)
    tokens = torch.arange(24).view(1, 24)
    changed = tokens.clone()
    changed[0, 12:] += 5
    assert torch.equal(host(tokens)[:, :12], host(changed)[:, :12])
    assert not torch.equal(host(tokens)[:, 12:], host(changed)[:, 12:])
    x = torch.randn(2, 4, 7)
    assert torch.equal(ConvSeed(4, copies=2)(x), x)


def test_the_long_form_tunes_every_arm_from_one_grid_on_other_seeds_and_pairs_the_rest():
    wanted = plan(LONG)
    tuned = [item.cell for item in wanted if not item.is_tuned]
    runs = [item.cell for item in wanted if item.is_tuned]
    assert {(c.benchmark, c.arm) for c in tuned} == {(c.benchmark, c.arm) for c in runs}
    assert {c.lr for c in tuned} == set(LONG.rates)
    assert all(c.seed >= TUNING for c in tuned)
    assert not {c.seed for c in tuned} & {c.seed for c in runs}
    assert len(runs) == LONG.seeds * sum(len(setting.arms or LONG.arms) for setting in SETTINGS.values())
    assert len({c.key for c in tuned}) == len(tuned)


def test_a_file_goes_on_where_it_was_stopped(tmp_path):
    calls = []

    def count(cell, form):
        calls.append(cell.key)
        return fake(cell, form)

    form = replace(LONG, settings=("cnn-12",), arms=("fixed 1", PLAN), seeds=2)
    path = tmp_path / "sizes.jsonl"
    first = run(plan(form)[:5], form, jobs=1, path=path, worker=count)
    whole = run(plan(form), form, jobs=1, path=path, worker=count)
    assert len(calls) == len(set(calls)) == len(whole) == len(path.read_text().splitlines())
    assert first.items() <= whole.items()
    assert all(json.loads(line)["lr"] == 8e-3 for line in path.read_text().splitlines()[-4:])


def test_regret_is_taken_against_the_best_fixed_size_at_each_budget():
    form = replace(LONG, settings=("cnn-12",), arms=("fixed 1", "fixed 2", "fixed 4", PLAN), rates=(8e-3,))
    done = run(plan(form), form, jobs=1, worker=fake)
    losses = losses_of(form, "cnn-12", done)
    assert list(best_fixed(losses).values()) == ["fixed 1", "fixed 1", "fixed 2", "fixed 2", "fixed 4"]
    found = regrets(losses)[PLAN]
    assert all(abs(interval.middle - 0.01) < 1e-9 and interval.n == 8 for interval in found.values())
    share, is_more = wasted(losses, PLAN, 1.0)
    assert budget_at(envelope(losses), sum(losses[PLAN][1.0].values()) / 8) == pytest.approx(1.0 - share)
    assert (0.0 < share < 0.1, is_more) == (True, False)
    assert wasted(losses, "fixed 4", 0.25) == (0.0, True)
    assert mean_regret(losses, PLAN).middle == pytest.approx(0.01)
    text = report(form, done)
    assert "best fixed size in hindsight: x0.25 fixed 1" in text
    assert re.search(
        r"cnn-12 +plan 1-2-4 +0 to 7 +\+0\.010 \[.+\] +\+0\.010 \[.+\] at x[0-9.]+ +\+0\.525 \[.+\] at x4 \(fixed 1\) +met +2% +met +none$",
        text,
        re.MULTILINE,
    )


def test_an_arm_with_fewer_runs_is_compared_on_the_runs_that_all_have():
    losses = {
        "fixed 1": {1.0: {0: 2.0, 1: 9.0}, 2.0: {0: 1.5, 1: 8.0}},
        "fixed 2": {1.0: {0: 2.4, 1: 9.9}, 2.0: {0: 1.0, 1: 7.0}},
        PLAN: {1.0: {0: 2.0}, 2.0: {0: 1.25}},
    }
    assert with_fixed(losses, PLAN)["fixed 1"] == {1.0: {0: 2.0}, 2.0: {0: 1.5}}
    assert wasted(losses, PLAN, 1.0) == (0.0, False)
    assert wasted(losses, PLAN, 2.0)[0] == pytest.approx(1 - 2**-0.25)
    assert mean_regret(losses, PLAN).middle == pytest.approx(0.125)


def test_a_plan_that_was_chosen_on_a_seed_is_judged_on_the_others_that_all_sizes_have():
    by_seed = {seed: 1.0 + seed for seed in range(4)}
    losses = {
        "fixed 1": {1.0: by_seed},
        "fixed 2": {1.0: {seed: by_seed[seed] for seed in (0, 1, 2)}},
        PLAN: {1.0: by_seed},
        "later 1-2-4": {1.0: by_seed},
    }
    assert ARMS["later 1-2-4"].chosen_on == 0
    found = judged(losses, "later 1-2-4")
    assert {arm: set(by[1.0]) for arm, by in found.items()} == {
        "fixed 1": {1, 2},
        "fixed 2": {1, 2},
        "later 1-2-4": {1, 2},
    }
    assert set(judged(losses, PLAN)[PLAN][1.0]) == {0, 1, 2}


def test_a_share_of_flops_is_that_of_the_means_and_its_interval_that_of_resampled_runs():
    fixed = {1.0: {0: 3.0, 1: 3.2}, 4.0: {0: 2.0, 1: 2.2}}
    ahead = {1.0: {0: 3.0, 1: 3.2}, 4.0: {0: 1.0, 1: 1.2}}
    behind = {1.0: {0: 3.0, 1: 3.2}, 4.0: {0: 2.5, 1: 2.2}}
    losses = {"fixed 1": fixed, PLAN: ahead, "plan 1-2": behind}
    found = shares_to_best(losses, PLAN)
    assert found[4.0].middle == pytest.approx(0.5)  # half of the way down is half of the logarithm
    assert found[4.0].low == pytest.approx(found[4.0].high)  # both runs say the same
    assert math.isnan(shares_to_best(losses, "plan 1-2")[4.0].middle)
    assert ahead_of_all(losses, PLAN) == []  # two runs show nothing
    four = {arm: {b: s | {2: s[0], 3: s[1]} for b, s in by.items()} for arm, by in losses.items()}
    assert ahead_of_all(four, PLAN) == [4.0]
    assert ahead_of_all(four, "plan 1-2") == []


def test_the_long_form_leaves_remedies_out_and_they_take_the_rate_of_another_arm():
    assert REMEDIES
    assert not set(REMEDIES) & set(LONG.arms)
    form = replace(LONG, settings=("cnn-12", "transformer-16"), arms=("later 1-2", "in front"), seeds=1)
    cells = [item.cell for item in plan(form) if not item.is_tuned]
    assert {c.arm for c in cells if c.benchmark == "transformer-16"} == {"fixed 1"}
    assert {c.arm for c in cells if c.benchmark == "cnn-12"} == {"fixed 1", PLAN}
    assert not any(i.cell.arm == "in front" and i.cell.benchmark != "cnn-12" for i in plan(form))


def test_remedies_and_the_price_of_safety_are_differences_from_the_plan():
    form = replace(LONG, settings=("cnn-12",))
    done = {}
    for seed in (0, 1):
        for arm, more in ((PLAN, 0.0), ("fresh moments", -0.02), ("safe 1-2-4", 0.01 + 0.01 * seed)):
            record = fake(Cell("cnn-12", PLAN, seed, 8e-3), form) | {"arm": arm, "key": f"{arm}/{seed}"}
            ends = [{"budget": e["budget"], "loss": e["loss"] + more} for e in record["result"]["ends"]]
            done[record["key"]] = record | {"result": record["result"] | {"ends": ends}}
    everything = replace(form, arms=tuple(ARMS))
    remedies = against_plan(everything, done, REMEDIES).splitlines()
    assert remedies[1].startswith("cnn-12   fresh moments  2     -0.020 [-0.020, -0.020]")
    assert len(remedies) == 2
    assert "+0.015 [+0.010, +0.020]" in against_plan(form, done, ("safe 1-2-4", "plateau"))
    assert against_plan(form, done, REMEDIES) == ""  # this form leaves them out


def test_a_curve_is_read_in_the_logarithm_of_the_budget_and_not_beyond_its_ends():
    curve = [(1.0, 3.0), (4.0, 2.0)]
    assert budget_at(curve, 2.5) == pytest.approx(2.0)
    assert math.isnan(budget_at(curve, 1.9))


def test_what_runs_without_a_name_is_a_benchmark_with_options_that_it_takes(capsys):
    from benchmarks.__main__ import DEFAULT, NAMES

    for name, given in DEFAULT:
        importlib.import_module(NAMES[name][0]).main([*given, "--plan"])
        assert "form: " in capsys.readouterr().out


def test_a_tiny_run_of_every_kind_ends_at_its_budgets_and_is_the_same_again(tmp_path, capsys):
    cells = [Cell("cnn-12", arm, 0, 8e-3) for arm in (PLAN, "plan, no end", "safe 1-2-4", "plateau")]
    found = {cell.arm: work(cell, TINY) for cell in cells}
    for record in found.values():
        assert "error" not in record, record["error"]
        assert [end["budget"] for end in record["result"]["ends"]] == [0.5, 1.0]
    # The gate of the safe arms costs more than a tiny budget has.
    assert all(abs(e["flops"] / e["budget"] - 1) < 0.25 for e in found[PLAN]["result"]["ends"])
    assert found[PLAN]["result"]["seeds"]
    assert work(cells[0], TINY)["result"] == found[PLAN]["result"]
    for arm in REMEDIES:
        changed = work(Cell("cnn-12", arm, 0, 8e-3), TINY)
        assert "error" not in changed, changed["error"]
        is_same = changed["result"]["ends"] == found[PLAN]["result"]["ends"]
        assert is_same == (arm == "last size's rate")  # at one rate, as here
    out, picture = tmp_path / "tiny.jsonl", tmp_path / "tiny.png"
    arguments = ["--tiny", "--jobs", "1", "--setting", "cnn-12", "--arm", "fixed 1", "--arm", PLAN]
    command.main([*arguments, "--out", str(out), "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "loss less that of the best fixed size" in capsys.readouterr().out
    command.main([*arguments, "--out", str(out), "--tables"])
    assert "fixed 1" in capsys.readouterr().out
