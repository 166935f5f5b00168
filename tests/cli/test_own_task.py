"""`kasmina grow` on a task and a host of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from kasmina_core import KasminaError, PluginRegistry, Task, TaskError, UnknownNameError, hookimpl
from kasmina_core.cli import main
from kasmina_core.experiments.example_task import rings
from kasmina_core.experiments.tasks import load_task

MINE = """
import torch
from torch import nn
from kasmina_core import Task

def splits(n=40):
    x = torch.arange(4.0 * n).view(4 * n, 1) / n
    return dict(zip(("train", "gate", "val", "test"), zip(x.chunk(4), x.sin().chunk(4))))

def squares(output, target):
    return (output - target).square().mean(1)

def curve():
    return Task("curve", "other", splits(), sample_loss=squares, epochs=2, host=Net, slots=("layers.*",))

def short(seed):
    return Task("short", "other", {k: v for k, v in splits().items() if k != "gate"}, sample_loss=squares)

def leaky():
    parts = splits()
    parts["test"] = tuple(torch.cat([a, b[:3]]) for a, b in zip(parts["test"], parts["train"]))
    return Task("leaky", "other", parts, sample_loss=squares, host=Net)

def averaged():
    return Task("averaged", "other", splits(), sample_loss=lambda o, t: (o - t).square().mean(), host=Net, slots="layers.*")

def classes():
    parts = {k: (x, (x[:, 0] > 1).long()) for k, (x, y) in splits().items()}
    return Task("classes", "classification", parts, n_classes=2, host=Net)

def broken():
    raise RuntimeError("no such disk")

class Net(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file of tasks and hosts."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    return tmp_path


def _grow(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["grow", "--batch-size", "20", *arguments])


def test_a_file_gives_the_task_and_its_host(folder: Path) -> None:
    result = _grow("--task", "mine.py:curve", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["task"], record["host"], record["metric_name"]) == ("curve", "Net", "loss")
    assert [slot["name"] for slot in record["epochs"][0]["slots"]] == ["layers_0", "layers_1"]
    assert len(record["epochs"]) == 2
    assert [path.name[:6] for path in (folder / "runs").iterdir()] == ["curve-"]


def test_a_host_of_ones_own_takes_the_place_of_the_tasks(folder: Path) -> None:
    options = ("--host", "mine.py:Net", "--host-option", "width=7", "--slots", "layers.1", "--json")
    result = _grow("--task", "mine.py:curve", *options)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["host"] == "mine.py:Net"
    assert record["arms"][1]["parameters"] == 14 + 56 + 8


def test_a_module_gives_a_task_that_grows_a_seed(tmp_path: Path) -> None:
    options = ("--policy", "fixed-times", "--policy-option", "epochs=[1]", "--epochs", "3", "--json")
    task = "kasmina_core.experiments.example_task:rings"
    result = _grow("--task", task, *options, "--out", str(tmp_path / "a"))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["seeds"]


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("mine.py:short", (), ["missing: gate"]),
        ("mine.py:leaky", (), ["train and test: 3", "train[0] equals test[40]"]),
        ("mine.py:averaged", (), ["one number per sample", "(2,)", "()"]),
        ("mine.py:classes", ("--slots", "layers.*"), ["expected: (2, 2)", "output:  (2, 1)"]),
        ("mine.py:broken", (), ["RuntimeError: no such disk"]),
        ("mine.py:curve", ("--host", "mine.py:Net"), ["--slots 'layers'", "layers.0"]),
        ("mine.py:curve", ("--host", "mine.py:Nett"), ["Did you mean 'Net'?"]),
        ("mine.py:curve", ("--host", "mine.py:splits"), ["must be a torch.nn.Module, not dict"]),
        ("digits", ("--host", "mine.py:Net", "--slots", "head"), ["its forward raised", "(2, 1, 8, 8)"]),
        ("mine.py:curv", (), ["Did you mean 'curve'?"]),
        ("mine.py:Net", (), ["must be a Task, or return one, not Net"]),
        ("theirs.py:curve", (), ["there is no file"]),
        ("mines:curve", (), ["mines"]),
    ],
)
def test_what_does_not_fit_ends_before_the_first_epoch(
    folder: Path, task: str, options: tuple[str, ...], words: list[str]
) -> None:
    result = _grow("--task", task, *options)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "epoch 1/" not in result.output
    for word in words:
        assert word in result.stderr
    assert not (folder / "runs").exists()


def test_the_file_that_the_command_writes_grows(folder: Path) -> None:
    written = CliRunner().invoke(main, ["new", "task", "my-rings"])
    assert written.exit_code == 0, written.output
    assert "kasmina grow --task my_rings.py:my_rings" in written.output
    assert load_task("my_rings.py:my_rings").name == "my-rings"
    again = CliRunner().invoke(main, ["new", "task", "my-rings"])
    assert again.exit_code == 2
    assert "is there already" in again.output


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torch", "would hide a module"),
        ("random", "would hide a module"),
        ("sys", "would hide a module"),
        ("nn", "the file uses 'nn' itself"),
        ("net", "the file uses 'net' itself"),
        ("zip", "the file uses 'zip' itself"),
    ],
)
def test_a_task_whose_name_would_hide_what_it_needs_is_not_written(
    folder: Path, name: str, said: str
) -> None:
    refused = CliRunner().invoke(main, ["new", "task", name])
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert not (folder / f"{name}.py").exists()


@pytest.mark.parametrize("name", ["rings", "x", "seed"])
def test_a_task_may_have_a_name_that_hides_nothing(folder: Path, name: str) -> None:
    assert CliRunner().invoke(main, ["new", "task", name]).exit_code == 0
    load_task(f"{name}.py:{name}").check()


def test_a_pack_offers_tasks_that_are_called_with_the_seed() -> None:
    class Pack:
        @hookimpl
        def kasmina_tasks(self) -> dict[str, Any]:
            return {"rings": rings, "none": lambda: None}

    registry = PluginRegistry()
    assert registry.register_pack("mine", Pack()).tasks == ("mine:none", "mine:rings")
    task = load_task("mine:rings", 3, offered=registry.tasks())
    assert task.name == "mine:rings"
    assert torch.equal(task.train.inputs, rings(3).train.inputs)
    assert load_task("rings", offered=registry.tasks()).n_classes == 2
    with pytest.raises(TaskError, match="not NoneType"):
        load_task("mine:none", offered=registry.tasks())
    with pytest.raises(UnknownNameError, match="rings"):
        load_task("mine:ringz", offered=registry.tasks())
    registry.unregister_pack("mine")
    with pytest.raises(KasminaError):
        load_task("mine:rings", offered=registry.tasks())


def _changed(**parts: Any) -> Task:
    split = (torch.rand(5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1]))
    names = ("train", "gate", "val", "test")
    splits = {name: (split[0] + i, split[1]) for i, name in enumerate(names)} | parts
    return Task("t", "classification", splits, n_classes=3)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"gate": (torch.rand(5, 3), torch.zeros(5).long())}, r"gate(.|\n)*\(2,\)(.|\n)*\(3,\)"),
        ({"val": (torch.rand(5, 2), torch.zeros(4).long())}, r"val(.|\n)*targets \(5(.|\n)*\(4,\)"),
        ({"test": (torch.rand(5, 2), torch.full((5,), 3))}, r"test(.|\n)*0 to 2(.|\n)*3 to 3"),
        ({"train": (torch.rand(5, 2), torch.rand(5))}, r"train(.|\n)*int64(.|\n)*float32"),
        ({"gate": (torch.full((5, 2), torch.nan), torch.zeros(5).long())}, "NaN"),
        ({"gate": (torch.rand(5, 2).double(), torch.zeros(5).long())}, r"float32(.|\n)*float64"),
        ({"gate": torch.rand(5, 2)}, "pair of tensors"),
        ({"test": (torch.rand(0, 2), torch.zeros(0).long())}, r"\(0, 2\)"),
        ({"exam": (torch.rand(5, 2), torch.zeros(5).long())}, "unknown: exam"),
    ],
)
def test_a_split_that_does_not_fit_is_refused_with_both_values(parts: dict[str, Any], words: str) -> None:
    _changed().check()
    with pytest.raises(TaskError, match=words):
        _changed(**parts).check()
