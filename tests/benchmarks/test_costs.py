"""The benchmarks of costs run, and what they compare computes the same; what they measure is for people to read."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
GOALS = {1.0, 1.01, 1.02, 1.05, 1.1}

if str(ROOT) not in sys.path:  # benchmarks are no part of what is installed
    sys.path.append(str(ROOT))

from benchmarks.timing import Clock, Row, as_markdown, as_text, peak_bytes, quartiles  # noqa: E402
from benchmarks.workloads import SIZES, Workload, seeds_of  # noqa: E402
from kasmina_core import SeedStage  # noqa: E402

CPU = torch.device("cpu")
hosts = pytest.mark.parametrize("kind", ["cnn", "transformer"])


def run(module: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    importlib.import_module(f"benchmarks.{module}").main(["--fast", "--json", *arguments.split()])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(
    ("module", "arguments", "cases"),
    [
        (
            "costs",
            "--modes eager,memory --hosts cnn",
            {"1 slot, dormant", "1 seed in BLENDING", "1 seed in FOSSILIZED"},
        ),
        ("handover", "", {"germination and cull, optimiser tied"}),
        ("slots", "", {"observe(), 20 slots", "step_epoch(), 5 seeds"}),
        ("checkpoints", "", {"save_checkpoint", "load_checkpoint"}),
        ("processes", "", {"germination and its step", "cull and its step"}),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_a_benchmark_gives_every_ratio(
    module: str, arguments: str, cases: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if module == "processes" and not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    result = run(module, arguments, capsys)
    rows = [Row(**{k: v for k, v in row.items() if k != "verdict"}) for row in result["rows"]]
    assert cases <= {row.case for row in rows}
    assert all(row.ratio is not None and min(row.ratio) > 0 for row in rows)
    assert {row.goal for row in rows} <= {None, *GOALS}
    assert result["machine"]["device"] == "CPU"
    assert f"benchmarks.{module}" in result["command"]


@hosts
@pytest.mark.parametrize("stage", [SeedStage.BLENDING, SeedStage.FOSSILIZED], ids=lambda s: s.name)
def test_seeds_by_hand_compute_what_the_grown_model_does(kind: str, stage: SeedStage) -> None:
    work = Workload(kind, SIZES["tiny"], CPU)
    model = work.grown(3, stage)
    for parameter in model.seed_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    twin = work.by_hand(seeds_of(model), stage)
    losses = [work.loss(model), work.loss(twin)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    host = dict(twin.named_parameters())
    for name, parameter in model.host.named_parameters():
        assert torch.equal(parameter.grad, host[name].grad), name
    for seed, written in zip(seeds_of(model), twin.seeds.values(), strict=True):
        for ours, theirs in zip(seed.parameters(), written.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)


@hosts
def test_the_places_of_slots_are_spread_over_the_host(kind: str) -> None:
    work = Workload(kind, SIZES["tiny"], CPU)
    assert [work.places(n) for n in (1, 3, 12)] == [[11], [3, 7, 11], list(range(12))]
    assert len(work.model(3).slots) == 3


def test_a_row_is_judged_by_its_median_and_its_lower_quartile() -> None:
    def verdict(*ratio: float) -> str:
        return Row("part", "case", "over", ratio, 1.02).verdict  # type: ignore[arg-type]

    assert verdict(1.01, 0.99, 1.2) == "yes"
    assert verdict(1.04, 1.01, 1.2) == "within the spread"
    assert verdict(1.04, 1.03, 1.2) == "no"
    assert Row("part", "case", "over", None, 1.02).verdict == "not measured"


def test_the_spread_is_that_of_the_ratios_of_neighbours() -> None:
    clock = Clock(CPU, rounds=5)
    durations = iter([1.0, 2.0, 3.0] * 3 * 5)  # two denominators, then the numerator
    clock.seconds = lambda step: (step(), next(durations))[1]  # type: ignore[method-assign,assignment]
    ratio, sums = clock.compare(lambda: None, [lambda: None, lambda: None])
    assert ratio == (1.0, 1.0, 1.0)
    assert sums == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_a_clock_without_budget_measures_nothing_and_says_so() -> None:
    row = Clock(CPU, 2, budget=-1.0).row("part", "case", "over", lambda: 1 / 0, [lambda: 1 / 0], 1.0)
    assert row.ratio is None
    assert row.verdict == "not measured"


def test_peak_memory_is_that_of_the_largest_moment() -> None:
    def build() -> Any:
        held = torch.zeros(1000)

        def step() -> None:
            a = torch.zeros(5000)
            del a
            b = torch.zeros(3000)
            del b
            held.add_(1)

        return step

    assert 4 * 6000 <= peak_bytes(CPU, build) <= 4 * 6500


def test_tables_say_what_was_measured_and_whether_the_goal_is_met() -> None:
    rows = [
        {
            "part": "cnn",
            "case": "3 slots",
            "over": "bare",
            "ratio": [1.004, 0.99, 1.01],
            "goal": 1.01,
            "unit": "9 ms",
        },
        {"part": "cnn", "case": "12 slots", "over": "bare", "ratio": None, "goal": None, "unit": ""},
    ]
    result = {
        "command": "python -m benchmarks.x",
        "machine": {"device": "CPU", "cores": 2, "processor": "p", "threads": 1, "python": "3", "torch": "2"},
        "rounds": 3,
        "rows": [row | {"note": "", "verdict": "yes"} for row in rows],
    }
    assert "| 3 slots | bare | 1.004 (0.990 to 1.010) | 1.01 | yes | 9 ms |" in as_markdown(result)
    assert "3 slots / bare" in as_text(result)
    assert "| 12 slots | bare | - |" in as_markdown(result)


def test_ways_to_share_a_counterfactual_pass_spend_equal_flops(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("benchmarks.joint").main(["--fast", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert list(rows)[:2] == ["a pass each", "one pass for all"]
    assert all(0.97 < row["flops"] < 1.05 for row in rows.values())
    assert rows["one pass for all"]["steps"] > rows["a pass each"]["steps"]
