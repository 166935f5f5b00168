"""Files of every format version that was ever released load: they are kept as they were written then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from older_files import SLOTS, Run

from kasmina_core import (
    graft_seeds,
    growth_of,
    load_checkpoint,
    load_distributed,
    rebuild_growth,
    rebuild_topology,
    topology_of,
)
from kasmina_core.checkpoints.run_state import Run as Parts
from kasmina_core.integrations.growing import GrowthClock

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
    with pytest.warns(UserWarning, match="before files of seeds had a checksum"):
        grafted = graft_seeds(folder / "seeds.safetensors", run.model)
    assert sorted(grafted) == sorted(SLOTS[name] for name in ("fossil", "blending", "training"))
    seen = run.seen()
    for name in grafted:
        assert seen["stages"][name] == expected(folder)["seen"]["stages"][name]


def test_a_trainers_record_of_the_first_format_loads() -> None:
    run = Run()
    memory = run.policy.state_dict()
    record = {"version": 1, "noted": 0.5, "policy": memory, "epoch": 4, "sequence": 9, "lost_epochs": 1}
    record |= {"last_metric": 0.25, "germinations": dict.fromkeys(SLOTS.values(), 2)}
    clock = GrowthClock(run.policy)
    clock.load_state_dict(Parts(run.model, [run.optimizer], policy=run.policy), record)
    assert clock.noted == 0.5
    assert run.model.epoch == 4
    assert run.model.lost_epochs == 1
    assert [slot.germinations for slot in run.model.slots.values()] == [2] * 5


def test_the_older_names_for_what_has_grown_warn_and_work() -> None:
    model = Run().model
    with pytest.warns(DeprecationWarning, match="now called growth_of"):
        data = topology_of(model)
    assert data == growth_of(model)
    with pytest.warns(DeprecationWarning, match="now called rebuild_growth"):
        rebuild_topology(model, data)
