"""Cells of the growth benchmarks: planned once, run once, tiny ones of every kind."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from benchmarks.growth.arms import ARMS, ARMS_OF, BAD, OURS, rates_like
from benchmarks.growth.blueprints import HARMFUL, NULL, OVERFITTING, kind_of, registry
from benchmarks.growth.cells import FORMS, TUNING, Cell, Form, plan, run_cell
from benchmarks.growth.goals import goal_table, judge
from benchmarks.growth.growing import RECIPE
from benchmarks.growth.no_trace import compare
from benchmarks.growth.race import race
from benchmarks.growth.remedies import RECIPES
from benchmarks.growth.running import read, run, work
from benchmarks.growth.settings import SETTINGS
from benchmarks.growth.tables import report, runs_of

ROOT = Path(__file__).parents[2]
TINY = FORMS["tiny"]
TUNED = replace(TINY, rates=3, tuning=1, seeds=2, benchmarks=("digits",))


def _fake(cell: Cell, form: Form) -> dict[str, Any]:
    fields = {name: getattr(cell, name) for name in Cell.__dataclass_fields__}
    found = {"val": 1.0 + abs(cell.lr - 3e-3), "test": 1.0}
    return {"key": cell.key, "form": form.name, "wall": 0.0, "torch": "", "result": found, **fields}


@pytest.mark.parametrize("name", sorted(FORMS))
def test_plan_holds_no_cell_twice_and_every_arm(name: str) -> None:
    wanted = plan(FORMS[name])
    keys = [item.cell.key for item in wanted]
    assert len(keys) == len(set(keys))
    for setting, arms in ARMS_OF.items():
        assert {item.cell.arm for item in wanted if item.cell.benchmark == setting} == set(arms)


def test_long_form_judges_two_hundred_harmful_and_null_seeds() -> None:
    form = FORMS["long"]
    for kind in ("harmful", "null"):
        assert form.hosts * form.candidates[kind] + form.text_candidates[kind] >= 200


def test_learning_rate_is_the_one_that_validation_chose_on_seeds_of_its_own() -> None:
    done = run(plan(TUNED), TUNED, jobs=1, worker=_fake, out=io.StringIO())
    final = [r for r in done.values() if r["seed"] < TUNING]
    assert {r["lr"] for r in final} == {3e-3}
    assert {r["seed"] for r in final} == {0, 1}
    assert {r["lr"] for r in done.values() if r["seed"] >= TUNING} == set(SETTINGS["digits"].rates)
    assert runs_of(TUNED, done, "digits", OURS, "batch", "constant").keys() == {0, 1}


def test_arm_that_differs_in_its_pool_alone_takes_the_rate_of_the_other() -> None:
    assert rates_like(OURS + BAD) == OURS
    assert all(rates_like(arm) in ARMS for arm in ARMS)


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    calls: list[str] = []

    def counted(cell: Cell, form: Form) -> dict[str, Any]:
        calls.append(cell.key)
        return _fake(cell, form)

    first = run(plan(TUNED), TUNED, jobs=1, path=path, worker=counted, out=io.StringIO())
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(calls)) == len(first)
    # A run that was stopped while it wrote leaves half a line.
    path.write_text("\n".join([*lines[:-1], lines[-1][:20]]) + "\n", encoding="utf-8")
    calls.clear()
    second = run(plan(TUNED), TUNED, jobs=1, path=path, worker=counted, out=io.StringIO())
    assert calls == [json.loads(lines[-1])["key"]]
    assert second.keys() == first.keys()
    assert read(path, replace(TUNED, name="other")) == {}


def test_no_cell_is_started_that_would_not_be_done_in_time() -> None:
    def slow(cell: Cell, form: Form) -> dict[str, Any]:
        return _fake(cell, form) | {"wall": 3600.0}

    form = replace(TINY, benchmarks=("trace",))
    wanted = plan(form)
    done = run(wanted, form, jobs=1, minutes=30, worker=slow, out=io.StringIO())
    kinds = {(item.cell.benchmark, item.cell.arm) for item in wanted}
    assert len(done) == len(kinds) < len(wanted)


def test_error_of_a_cell_is_a_line_of_the_report_and_is_run_again(tmp_path: Path) -> None:
    cell = Cell("digits", "digits", OURS, "no such norm", "constant", 1e-2)
    record = work(cell, TINY)
    assert "no such norm" in record["error"]
    assert "no such norm" in report(TINY, {cell.key: record})
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert read(path, TINY) == {}


@pytest.mark.parametrize("arm", [arm for arm in ARMS_OF["digits"] if not arm.startswith("LoRA")])
def test_every_arm_spends_the_same_operations(arm: str) -> None:
    setting = replace(SETTINGS["digits"].shortened(0.03), times=(0.2, 0.6))
    found = race(setting, arm, "group", "cosine", 1e-2, seed=1)
    alone = race(setting, "host alone", "group", "cosine", 1e-2, seed=1)
    dearest_step = 20 * alone["flops"] / (setting.intervals * setting.interval)
    assert alone["flops"] <= found["flops"] < alone["flops"] + dearest_step
    assert 0.0 < found["test"] < 10.0


def test_adapters_go_on_once_and_the_host_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapt(host: nn.Module, config: SimpleNamespace) -> nn.Module:
        assert config.target_modules
        host.requires_grad_(False)
        host.head.weight.requires_grad_(True)
        return host

    fake = SimpleNamespace(LoraConfig=SimpleNamespace, get_peft_model=adapt)
    monkeypatch.setitem(sys.modules, "peft", fake)
    setting = SETTINGS["digits"].shortened(0.05)
    recipe = replace(RECIPE, min_delta=0.5)
    found = race(setting, "LoRA (PEFT)", "group", "constant", 1e-2, seed=0, recipe=recipe)
    assert [entry[1:3] for entry in found["log"]] == [("every layer", "kept")]
    assert found["trainable"] < found["parameters"]


@pytest.mark.parametrize("recipe", ["insertion", *RECIPES])
def test_every_recipe_runs_and_is_compared_with_the_insertion(recipe: str) -> None:
    form = replace(TINY, benchmarks=("remedies",), seeds=1)
    wanted = [
        item
        for item in plan(form)
        if item.cell.setting == "digits" and item.cell.arm in ("insertion", recipe)
    ]
    done = run(wanted, form, jobs=1, out=io.StringIO())
    assert not [record["error"] for record in done.values() if "error" in record]
    assert recipe == "insertion" or f"\n{recipe} " in report(form, done)


def test_cell_gives_the_same_figures_again() -> None:
    cell = Cell("digits", "digits", "ours, fixed times", "batch", "constant", 1e-2, 3)
    one, two = run_cell(cell, TINY), run_cell(cell, TINY)
    assert one["log"], "no seed germinated"
    assert [(f, v) for f, _, v in one["curve"]] == [(f, v) for f, _, v in two["curve"]]
    assert (one["test"], one["log"]) == (two["test"], two["log"])


def test_fixed_times_germinate_and_insertions_wait_for_the_plateau() -> None:
    setting = replace(SETTINGS["digits"].shortened(0.03), intervals=20, times=(0.1,))
    log = race(setting, "ours, fixed times", "batch", "constant", 1e-2, seed=0)["log"]
    assert log[0][:3] == (2, "block2", "germinated")


def test_bad_blueprints_are_of_their_kind() -> None:
    names = {entry.id.split(":")[1] for entry in registry().list_all() if entry.id.startswith("bad:")}
    assert {name.removesuffix("-t") for name in names} == {*NULL, *HARMFUL, *OVERFITTING}
    assert kind_of("bad:static-t") == "harmful"
    assert kind_of("cnn:conv_light") == "useful"


@pytest.mark.parametrize("benchmark", ["gates", "transient", "trace"])
def test_other_benchmarks_run(benchmark: str) -> None:
    form = replace(TINY, benchmarks=(benchmark,), candidates={"null": 1, "useful": 1})
    wanted = [item for item in plan(form) if item.cell.setting == "digits"]
    done = run(wanted, form, jobs=1, out=io.StringIO())
    assert not [record["error"] for record in done.values() if "error" in record]
    assert report(form, done)
    assert "not measured" in goal_table(judge(form, done))


def test_a_trace_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = SETTINGS["digits"].shortened(0.03)
    assert all(compare(setting, OURS, "batch", "constant", 0)["checks"].values())
    from benchmarks.growth.growing import LifecycleTraining

    def leaky(self: LifecycleTraining, closure: Any) -> None:
        closure().backward()  # a second gradient, the host's too

    monkeypatch.setattr(LifecycleTraining, "after_backward", leaky)
    found = compare(setting, OURS, "batch", "constant", 0)
    assert not found["checks"]["weights and statistics"]
    assert not found["checks"]["losses"]


def test_command_says_what_it_would_run() -> None:
    said = [
        subprocess.run(
            [sys.executable, "-m", "benchmarks", *words], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
        for words in (["growth", "--long", "--plan"], ["--help"])
    ]
    assert said[0].startswith("long form: ")
    assert "growth --long" in said[1]
