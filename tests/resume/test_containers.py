"""Every container of a run holds everything that the run needs: resumed is uninterrupted, bit for bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from older_files import Run
from torch import Tensor

from kasmina_core import (
    growth_of,
    load_checkpoint,
    load_distributed,
    named_optimizer_state,
    save_checkpoint,
    save_distributed,
)
from kasmina_core.checkpoints.run_state import Run as Parts
from kasmina_core.integrations.growing import GrowthClock

PARTS: dict[str, Callable[[Run], Any]] = {
    "weights and records, to the byte": lambda run: dict(run.model.state_dict()),
    "growth": lambda run: growth_of(run.model),
    "optimiser": lambda run: named_optimizer_state(run.model, run.optimizer),
    "schedulers": lambda run: run.scheduler.state_dict(),
    "policy": lambda run: run.policy.state_dict(),
    "scaler": lambda run: run.scaler.state_dict(),
    "random numbers": lambda run: torch.get_rng_state(),
    "generators": lambda run: run.generator.get_state(),
    "seeds put aside": lambda run: {slot.slot: slot.kept_seed for slot in run.model.observe().slots},
    "what a revert needs": lambda run: {name: run.model.can_revert(name) for name in run.model.slots},
}


def rest(run: Run) -> dict[str, Any]:
    names = {
        "optimizer": run.optimizer,
        "schedulers": run.scheduler,
        "policy": run.policy,
        "scaler": run.scaler,
    }
    return {**names, "generators": {"data": run.generator}}


def by_folder(run: Run, again: Run, place: Path) -> None:
    save_checkpoint(place, run.model, **rest(run))
    torch.manual_seed(77)
    load_checkpoint(place, again.model, **rest(again))


def by_distributed(run: Run, again: Run, place: Path) -> None:
    save_distributed(place, run.model, **rest(run))
    torch.manual_seed(77)
    load_distributed(place, again.model, **rest(again))


def by_trainer(run: Run, again: Run, place: Path) -> None:
    """What Lightning writes itself, by ``torch.save``, and what the callback adds; loaders are the trainer's."""
    record = GrowthClock(run.policy).state_dict(
        Parts(run.model, [run.optimizer], policy=run.policy), rng=["torch"]
    )
    own = [run.model, run.optimizer, run.scheduler, run.scaler]
    file = io.BytesIO()
    torch.save([record, *(one.state_dict() for one in own)], file)
    torch.manual_seed(77)
    file.seek(0)
    record, *states = torch.load(file, weights_only=True)
    for one, state in zip([again.model, again.optimizer, again.scheduler, again.scaler], states, strict=True):
        one.load_state_dict(state)
    GrowthClock(again.policy).load_state_dict(
        Parts(again.model, [again.optimizer], policy=again.policy), record
    )
    again.generator.set_state(run.generator.get_state())


CONTAINERS = {"folder": by_folder, "distributed": by_distributed, "trainer": by_trainer}


@pytest.fixture(scope="module", params=CONTAINERS)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What two runs are after a save and a load, and where they go from there with a late cull that reverts."""
    runs = Run(), Run()
    for scale, run in enumerate(runs):
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**scale)
        run.scaler.scale(torch.ones(()))
    runs[0].grow()
    runs[0].model.follow(runs[0].policy)
    found = []
    torch.manual_seed(5)
    before = {name: copy.deepcopy(part(runs[0])) for name, part in PARTS.items()}
    CONTAINERS[request.param](*runs, tmp_path_factory.mktemp("containers") / "point")
    after = {name: copy.deepcopy(part(runs[1])) for name, part in PARTS.items()}
    for run, parts in zip(runs, (before, after), strict=True):
        losses = run.go_on()
        found.append(parts | {"goes on": [losses, dict(run.model.state_dict()), growth_of(run.model)]})
    return found[0], found[1]


@pytest.mark.parametrize("part", [*PARTS, "goes on"])
def test_a_container_holds_what_a_run_needs(seen: tuple[Any, Any], part: str) -> None:
    assert same(seen[0][part], seen[1][part])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
