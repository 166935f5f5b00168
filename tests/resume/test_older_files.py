"""Files of every format version that was ever released load: they are kept as they were written then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from older_files import SLOTS, Run

from kasmina_core import graft_seeds, load_checkpoint, load_distributed, rebuild_growth

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = sorted(folder.name for folder in FIXTURES.iterdir())


@pytest.fixture(params=VERSIONS)
def folder(request: pytest.FixtureRequest) -> Path:
    return FIXTURES / str(request.param)


def expected(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "expected.json").read_text()))


def assert_same(seen: dict[str, Any], saved: dict[str, Any], *names: str) -> None:
    for name in names:
        if name == "output":  # written on another machine, perhaps
            torch.testing.assert_close(torch.tensor(seen[name]), torch.tensor(saved[name]))
        else:
            assert seen[name] == saved[name], name


GROWN = ("output", "stages", "alphas", "parameters")


def test_a_checkpoint_loads_and_its_run_goes_on(folder: Path) -> None:
    run, saved = Run(), expected(folder)
    loaded = load_checkpoint(
        folder / "checkpoint",
        run.model,
        optimizer=run.optimizer,
        schedulers=run.scheduler,
        policy=run.policy,
        generators={"data": run.generator},
    )
    assert loaded.data_position == {"batch": 3}
    assert loaded.extra == "more"
    assert_same(run.seen(), saved["seen"], *saved["seen"])
    torch.testing.assert_close(torch.tensor(run.go_on()), torch.tensor(saved["losses"]))
    for parameter, values in zip(run.model.host_parameters(), saved["first"], strict=True):
        torch.testing.assert_close(parameter.detach().flatten()[:4], torch.tensor(values))


def test_a_distributed_checkpoint_loads(folder: Path) -> None:
    run = Run()
    assert load_distributed(folder / "distributed", run.model, optimizer=run.optimizer) == {"epoch": 7}
    assert_same(run.seen(), expected(folder)["seen"], *GROWN)


def test_a_state_dict_loads(folder: Path) -> None:
    run = Run()
    saved = torch.load(folder / "state_dict.pt", weights_only=True)
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    assert_same(run.seen(), expected(folder)["seen"], *GROWN)


def test_a_description_of_what_has_grown_rebuilds_it(folder: Path) -> None:
    run = Run()
    rebuild_growth(run.model, json.loads((folder / "growth.json").read_text())["topology"])
    assert_same(run.seen(), expected(folder)["seen"], "stages", "alphas", "parameters")


def test_a_file_of_seeds_is_grafted(folder: Path) -> None:
    run = Run()
    grafted = graft_seeds(folder / "seeds.safetensors", run.model)
    assert sorted(grafted) == sorted(SLOTS[name] for name in ("fossil", "blending", "training"))
    seen = run.seen()
    for name in grafted:
        assert seen["stages"][name] == expected(folder)["seen"]["stages"][name]
