"""`kasmina grow` as somebody meets it at the command line."""

from __future__ import annotations

import csv
import errno
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from kasmina_core.checkpoints import atomic
from kasmina_core.checkpoints.atomic import write_atomically
from kasmina_core.cli import main
from kasmina_core.experiments import record as recording
from kasmina_core.experiments import report
from kasmina_core.experiments.record import EpochRecord
from kasmina_core.telemetry import CallableSink, JsonLinesSink

SHORT = ("--epochs", "3", "--batch-size", "64")


def _grow(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["grow", *arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run in which a seed lives from germination to its fossil or its end."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    result = _grow(
        "--out",
        str(folder),
        "--epochs",
        "60",
        "--batch-size",
        "64",
        "--lr",
        "0.01",
        "--blueprint",
        "conv_heavy",
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_json_is_the_record_and_nothing_else(run: tuple[Path, dict[str, Any]]) -> None:
    folder, record = run
    assert record == json.loads((folder / "run.json").read_text())
    assert [arm["name"] for arm in record["arms"]] == ["grown", "host alone"]
    assert len(record["epochs"]) == 60
    assert not record["interrupted"]


@pytest.mark.parametrize(
    ("policy", "option"),
    [
        ("fixed-times", "epochs=[1]"),
        ("budget", "parameters=300"),
        ("bandit", "patience=1"),
        ("tournament", "patience=1"),
    ],
)
def test_each_bundled_policy_germinates_what_it_likes(tmp_path: Path, policy: str, option: str) -> None:
    patience = () if policy == "fixed-times" else ("--policy-option", "patience=1")
    wanted = (
        "--policy",
        policy,
        "--policy-option",
        option,
        *patience,
        "--policy-option",
        "max_training_epochs=4",
    )
    result = _grow(
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "2",
        "--batch-size",
        "512",
        "--json",
        *wanted,
        *(() if policy == "fixed-times" else ("--policy-option", "min_delta=1e9")),
    )
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert len(record["seeds"]) == 1
    assert record["config"]["policy_options"]["max_training_epochs"] == 4


@pytest.mark.parametrize("proof", ["probation", "training"])
def test_the_proof_is_asked_for_where_the_user_wants_it(tmp_path: Path, proof: str) -> None:
    options = ("--policy-option", "patience=1", "--policy-option", "min_delta=1e9", "--proof", proof)
    result = _grow("--out", str(tmp_path / "run"), "--epochs", "6", "--batch-size", "256", *options, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["config"]["proof"] == proof
    events = JsonLinesSink.read(tmp_path / "run" / "events.jsonl")
    asked = [
        event["checks"] for event in events if event["type"] == "gate_evaluated" and event["gate"] == "G2"
    ]
    names = {check["name"] for checks in asked for check in checks}
    assert "gain at alpha 1 in standard errors" in names
    assert ("gain in standard errors" in names) == (proof == "training")


def test_both_arms_spend_the_same_training_flops(run: tuple[Path, dict[str, Any]]) -> None:
    grown, alone = run[1]["arms"]
    one_batch = alone["flops"] / (alone["epochs"] * 16)
    assert grown["flops"] <= alone["flops"] <= grown["flops"] + 2 * one_batch
    assert alone["epochs"] > grown["epochs"]  # what growth cost, the host alone may train on


def test_a_run_keeps_everything_one_needs_to_look_at_it(run: tuple[Path, dict[str, Any]]) -> None:
    folder, record = run
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "events.jsonl",
        "metrics.csv",
        "model.pt",
        "report.html",
        "report.png",
        "run.json",
    ]
    with (folder / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(record["epochs"]) + len(record["baseline"])
    state = torch.load(folder / "model.pt", weights_only=True)
    assert "blocks.0.conv.weight" in state


def test_json_is_nothing_else_beside_a_sink_that_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = {"loud": lambda config: CallableSink(lambda event: print("loud:", event.type.value))}
    monkeypatch.setattr("kasmina_core.packs.discovery.BUNDLED_SINKS", loud)
    short = ("--epochs", "1", "--batch-size", "512", "--sink", "loud", "--json")
    result = _grow("--out", str(tmp_path / "run"), *short)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["arms"]
    assert "loud: epoch_ended" in result.stderr


def test_the_files_grow_while_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = tmp_path / "run", []

    def look(display: object, record: EpochRecord) -> None:
        with (folder / "metrics.csv").open() as file:
            lines = [(row["arm"], row["epoch"]) for row in csv.DictReader(file)]
        deadline = time.monotonic() + 30
        while not any(
            e["type"] == "epoch_ended" and e["epoch"] == record.epoch
            for e in JsonLinesSink.read(folder / "events.jsonl")
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        seen.append(lines)

    monkeypatch.setattr("kasmina_core.experiments.display.RunDisplay.epoch", look)
    result = _grow("--out", str(folder), *SHORT, "--policy", "none", "--json")
    assert result.exit_code == 0, result.output
    assert seen == [[("grown", str(n)) for n in range(1, upto + 1)] for upto in (1, 2, 3)]
    with (folder / "metrics.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)][:4] == ["grown"] * 3 + ["host alone"]


def test_events_tell_the_settings_and_each_epoch_as_the_record_does(run: tuple[Path, dict[str, Any]]) -> None:
    folder, record = run
    events = list(JsonLinesSink.read(folder / "events.jsonl"))
    (started,) = [event for event in events if event["type"] == "run_started"]
    assert started["settings"] == record["config"] | {"host": record["host"]}
    ended = [event for event in events if event["type"] == "epoch_ended"]
    assert [event["metric"] for event in ended] == [epoch["val_loss"] for epoch in record["epochs"]]
    spent = [0.0, *(epoch["flops"] for epoch in record["epochs"])]
    assert all(
        before < e["flops"] <= after for before, e, after in zip(spent[:-1], ended, spent[1:], strict=True)
    )
    assert {slot["blueprint"] for e in ended for slot in e["slots"]} > {""}


def test_the_command_writes_to_tensorboard_in_the_folder_of_the_run(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    result = _grow("--out", str(folder), *SHORT, "--sink", "tensorboard", "--json")
    assert result.exit_code == 0, result.output
    read = accumulators.EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    written = [(e.step, e.value) for e in read.Scalars("growth/model/metric")]
    expected = [(e["epoch"], e["val_loss"]) for e in json.loads(result.stdout)["epochs"]]
    assert [step for step, _ in written] == [step for step, _ in expected]
    assert [value for _, value in written] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("tensorboard", "torch.utils.tensorboard"),
        ("wandb", "wandb"),
        ("mlflow", "mlflow"),
        ("trackio", "trackio"),
    ],
)
def test_a_sink_whose_package_is_missing_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = _grow("--out", str(tmp_path / "run"), *SHORT, "--sink", name)
    assert result.exit_code == 2, result.output
    assert f"--sink {name}: " in result.stderr
    assert f"pip install {name}" in result.stderr
    assert not (tmp_path / "run").exists()


def test_every_seed_is_told_with_its_end_and_its_reason(run: tuple[Path, dict[str, Any]]) -> None:
    folder, record = run
    events = list(JsonLinesSink.read(folder / "events.jsonl"))
    born = [event["seed_id"] for event in events if event["type"] == "seed_germinated"]
    assert born
    assert [seed["seed_id"] for seed in record["seeds"]] == born
    for seed in record["seeds"]:
        ends = [
            e
            for e in events
            if e["type"] in ("seed_culled", "seed_fossilized") and e["seed_id"] == seed["seed_id"]
        ]
        assert len(ends) == (seed["outcome"] != "unfinished")
        assert seed["stages"][0] == ["GERMINATED", seed["germinated_epoch"]]
        if ends:
            assert seed["reason"]
            assert ends[0]["epoch"] == seed["ended_epoch"]
        if seed["gain"] is not None:
            assert seed["gain_low"] <= seed["gain"] <= seed["gain_high"]
    assert any(seed["outcome"] == "fossilized" for seed in record["seeds"])


def test_parameters_follow_the_seeds(run: tuple[Path, dict[str, Any]]) -> None:
    record = run[1]
    alive = {"fossilized", "unfinished"}
    added = sum(seed["parameters"] for seed in record["seeds"] if seed["outcome"] in alive)
    grown, alone = record["arms"]
    assert grown["parameters"] == alone["parameters"] + added


def test_a_seed_gives_the_same_run_bit_for_bit(tmp_path: Path) -> None:
    def figures(out: str, seed: str) -> list[Any]:
        result = _grow("--out", str(tmp_path / out), *SHORT, "--seed", seed, "--json")
        record = json.loads(result.stdout)
        return [[epoch["train_loss"], epoch["val_loss"]] for epoch in record["epochs"] + record["baseline"]]

    first = figures("a", "7")
    assert figures("b", "7") == first
    assert figures("c", "8") != first


def test_the_global_random_numbers_are_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    assert _grow("--out", str(tmp_path / "a"), *SHORT, "--json").exit_code == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_straight_through_incubation_grows_too(tmp_path: Path) -> None:
    result = _grow(
        "--out",
        str(tmp_path / "a"),
        "--epochs",
        "30",
        "--batch-size",
        "64",
        "--lr",
        "0.01",
        "--incubation",
        "straight-through",
        "--blueprint",
        "conv_light",
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["seeds"]


def test_chars_trains_a_language_model(tmp_path: Path) -> None:
    result = _grow("--task", "chars", "--out", str(tmp_path / "a"), "--epochs", "1", "--batch-size", "128")
    assert result.exit_code == 0, result.stderr
    assert "bits per character" in result.stdout
    assert (tmp_path / "a" / "report.html").exists()


def test_a_host_for_vectors_learns_the_pixels_of_images(tmp_path: Path) -> None:
    result = _grow(
        *("--host", "vector:mlp", "--host-option", "width=8", "--out", str(tmp_path / "a"), "--epochs", "5"),
        *("--policy", "fixed-times", "--policy-option", "epochs=[1]", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    (seed,) = json.loads(result.stdout)["seeds"]
    assert (seed["slot"], seed["blueprint"]) == ("layer1", "vector:mlp")


def test_without_a_terminal_there_are_no_escape_codes(tmp_path: Path) -> None:
    result = _grow("--out", str(tmp_path / "a"), *SHORT)
    assert "\x1b" not in result.stdout + result.stderr
    assert "epoch" in result.stderr
    assert "host alone" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--task", "digit"), "Did you mean 'digits'?"),
        (("--task", "cifar10"), "torchvision"),
        (("--host", "cnn:cn"), "cnn:cnn"),
        (
            ("--host", "transformer:transformer"),
            "does not fit task 'digits'.\n  host: transformer\n  task: cnn or vector",
        ),
        (("--host-option", "base_chanels=4"), "Did you mean 'base_channels'?"),
        (("--host-option", "base_channels=0"), "0"),
        (("--host-option", "nonsense"), "NAME=VALUE"),
        (("--slots", "block9"), "block9"),
        (("--blueprint", "atention"), "Did you mean"),
        (("--blueprint", "lora"), "fits no slot"),
        (("--blueprint", "bottleneck", "--host-option", "base_channels=1"), "2 channels or more"),
        (("--policy", "platau"), "Did you mean 'plateau'?"),
        (("--policy", "budget"), "needs a budget"),
        (("--policy", "none", "--policy-option", "patience=2"), "options: none"),
        (("--policy-option", "patience=0"), "patience must be at least 1, not 0"),
        (("--policy-option", "pateince=5"), "Did you mean 'patience'?"),
        (("--policy-option", "patience=abc"), "given:  patience=abc\n  wanted: a whole number"),
        (("--policy-option", "patience=2.5"), "given:  patience=2.5\n  wanted: a whole number"),
        (("--policy-option", "revert=no"), "given:  revert=no\n  wanted: true or false"),
        (("--policy-option", "max_seeds=[1]"), "given:  max_seeds=[1]\n  wanted: a whole number, or null"),
        (
            ("--policy", "fixed-times", "--policy-option", "epochs=5"),
            "given:  epochs=5\n  wanted: a list of whole numbers, such as [3,8]",
        ),
        (
            ("--policy", "fixed-times", "--policy-option", "epochs=3,8"),
            "given:  epochs=3,8\n  wanted: a list of whole numbers, such as [3,8]",
        ),
        (("--policy-option", "nonsense"), "--policy-option 'nonsense' must read NAME=VALUE"),
        (("--incubation", "none"), "counterfactual"),
        (("--epochs", "0"), "epochs"),
        (("--lr", "-1"), "lr"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    if arguments == ("--task", "cifar10") and _has_torchvision():
        said = "cifar"
    folder = tmp_path / "run"
    result = _grow("--out", str(folder), *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not folder.exists()


def _has_torchvision() -> bool:
    try:
        import torchvision  # noqa: F401
    except Exception:  # it may be installed and not fit this torch
        return False
    return True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    result = _grow("--device", "cuda", "--out", str(tmp_path / "a"))
    assert result.exit_code == 2
    assert "no CUDA device" in result.stderr


def test_a_folder_that_holds_something_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    result = _grow("--out", str(tmp_path), *SHORT)
    assert result.exit_code == 2
    assert "new or empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_with_what_there_is(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "kasmina_core", "grow", "--epochs", "100000", "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "stopped before its end" in stdout
    record = json.loads((folder / "run.json").read_text())
    assert record["interrupted"]
    assert record["epochs"]
    assert {"report.html", "report.png", "metrics.csv", "model.pt"} <= {
        path.name for path in folder.iterdir()
    }


def test_the_help_shows_how_a_list_is_given() -> None:
    assert "'epochs=[3,8]'" in " ".join(_grow("--help").stdout.split())


@pytest.mark.parametrize("wrong", ["zzz=1", None])
def test_the_options_of_a_policy_are_listed_once(tmp_path: Path, wrong: str | None) -> None:
    option = ("--policy-option", wrong) if wrong else ()
    result = _grow("--out", str(tmp_path / "run"), "--policy", "fixed-times", *option)
    assert result.exit_code == 2
    assert result.stderr.count("max_training_epochs") == 1


def _full(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the disk be full for files of these names, and only for them."""

    def write(path: Path, content: str | bytes) -> None:
        if path.name in names:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_atomically(path, content)

    for module in (report, recording, atomic):  # both imported before, so that each gets its own back
        monkeypatch.setattr(module, "write_atomically", write)


@pytest.mark.parametrize(
    ("names", "there"),
    [
        (["report.png", "model.pt"], ["metrics.csv", "run.json"]),
        (["run.json"], ["metrics.csv", "model.pt"]),
    ],
)
@pytest.mark.parametrize("how", [(), ("--json",)])
def test_a_full_disk_takes_files_and_not_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], there: list[str], how: tuple[str, ...]
) -> None:
    _full(monkeypatch, *names)
    folder = tmp_path / "run"
    there = sorted([*there, "checkpoint", "config.json", "events.jsonl", "host-alone.pt"])
    result = _grow("--out", str(folder), "--epochs", "1", "--batch-size", "512", *how)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert f"Not every file could be written to {folder}: No space left on device." in result.stderr
    assert f"  there: {', '.join(there)}" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == there
    if how:
        assert json.loads(result.stdout)["arms"]
    else:
        assert "host alone" in result.stdout
        assert "open report.html" not in result.stdout
    monkeypatch.undo()  # there is room again: the run goes on and writes them
    assert _grow("--resume", str(folder)).exit_code == 0
    assert {"run.json", "model.pt", "report.html"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "checkpoint").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "never was on a plateau, which takes 3 epochs in a row without an improvement by 1 %"),
        (("--policy", "none"), "The policy, NoGrowthPolicy, grows nothing."),
        (
            ("--policy", "fixed-times", "--policy-option", "epochs=[9]"),
            "The first time for one is epoch 9, and the run had 3.",
        ),
    ],
)
def test_a_run_without_seeds_says_why_and_over_what_its_figures_are_means(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    result = _grow("--out", str(tmp_path / "run"), *SHORT, *arguments, "--json")
    record = json.loads(result.stdout)
    assert "Test figures are means over the models of the last 3 epochs." in record["notes"]
    assert record["verdict"].startswith("No seed germinated in 3 epochs. ")
    assert said in record["verdict"]
    assert record["verdict"] in html.unescape((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))


def test_a_run_with_seeds_says_what_became_of_them(run: tuple[Path, dict[str, Any]]) -> None:
    record = run[1]
    kept = sum(seed["outcome"] == "fossilized" for seed in record["seeds"])
    assert record["verdict"].startswith(f"Of {len(record['seeds'])} seed")
    assert f" {kept} stayed" in record["verdict"]
    assert "Test figures are means over the models of the last 5 epochs." in record["notes"]


def test_a_closed_pipe_takes_the_words_and_not_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise SystemExit(1)  # what rich makes of a broken pipe

    monkeypatch.setattr("kasmina_core.experiments.display.print_final", closed)
    result = _grow("--out", str(tmp_path / "run"), "--epochs", "1", "--batch-size", "512")
    assert result.exit_code == 1
    assert {"run.json", "model.pt", "report.html"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_the_documented_way_to_load_model_pt_gives_the_grown_model(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    code = re.search(r"<!-- file: after_grow.py -->\n```py\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert code is not None
    shutil.copytree(run[0], tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code.group(1), "after_grow.py", "exec"), names)
    stages = {slot["name"]: slot["stage"] for slot in run[1]["epochs"][-1]["slots"]}
    assert {name: slot.stage.name for name, slot in names["model"].slots.items()} == stages
    assert "FOSSILIZED" in stages.values()


def test_a_plan_goes_on_behind_its_fossils_and_the_files_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "run", []

    def look(display: object, record: EpochRecord) -> None:
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        shown = {name for name in rows[-1] if name.endswith(".stage") and rows[-1][name]}
        seen.append(
            (
                len(rows),
                record.epoch,
                shown == {f"{slot.name}.stage" for slot in record.slots},
                None in rows[-1],
            )
        )

    monkeypatch.setattr("kasmina_core.experiments.display.RunDisplay.epoch", look)
    options = ("--policy", "plan", "--blueprint", "block", "--policy-option", "at=[3,5]")
    result = _grow("--out", str(folder), "--epochs", "8", "--batch-size", "256", *options, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["config"]["nested_slots"] == 3
    assert {"block2", "block2__2"} <= {seed["slot"] for seed in record["seeds"]}
    assert seen == [(epoch, epoch, True, False) for epoch in range(1, 9)]


def test_a_plan_is_compared_with_the_sizes_that_it_went_through(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "run"), "--epochs", "9", "--batch-size", "256")
    result = _grow(*out, "--policy", "plan", "--policy-option", "at=[2,6]", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    waves = [
        sum(seed["parameters"] for seed in record["seeds"] if seed["germinated_epoch"] == born)
        for born in (3, 7)
    ]
    kept = [seed for seed in record["seeds"] if seed["outcome"] == "fossilized"]
    assert {seed["blueprint"] for seed in record["seeds"]} == {"cnn:block"}
    assert {seed["germinated_epoch"] for seed in kept} == {3}  # the second wave is on trial at the end
    grown, alone, size = record["arms"]
    assert size["parameters"] == alone["parameters"] + waves[0]
    assert grown["parameters"] == size["parameters"] + waves[1]
    assert size["flops"] == pytest.approx(grown["flops"], rel=0.1)
    epochs = record["sizes"][size["name"]]
    assert epochs[-1]["flops"] == size["flops"]
    assert {epoch["parameters"] for epoch in epochs} == {size["parameters"]}
    assert [one["name"] for one in record["regrets"]] == ["grown", "host alone", size["name"]]
    for behind in zip(*(one["behind"] for one in record["regrets"][1:]), strict=True):
        assert min(value for value in behind if value is not None) == 0.0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Fixed sizes beside the grown run" in page
    assert "known only afterwards" in page


def test_fixed_sizes_are_the_users_choice(tmp_path: Path) -> None:
    short = ("--epochs", "4", "--batch-size", "512", "--policy", "plan", "--policy-option", "at=[9]")
    for name, flags, asked in (("without", ("--no-sizes",), False), ("with", (), True)):
        result = _grow("--out", str(tmp_path / name), *short, *flags, "--json")
        assert result.exit_code == 0, result.stderr
        record = json.loads(result.stdout)
        assert record["config"]["sizes"] is asked
        assert any("only fixed size" in note for note in record["notes"]) is asked
        assert not record["regrets"]
