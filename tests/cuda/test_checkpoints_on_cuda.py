"""Checkpoints that come from a CUDA device or go to one. The CPU half of each claim is in tests/core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cuda_helpers import ACTIVE_STAGES, grow_to, loss_of, new_host, new_model
from torch import Tensor

from kasmina_core import MorphogeneticModel, SeedStage, load_checkpoint, save_checkpoint, tie_optimizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Run = tuple[MorphogeneticModel, torch.optim.Optimizer]


def begin(device: str = "cuda", **adamw: bool) -> Run:
    model = new_model(new_host(dropout=0.3), device=device)
    return model, tie_optimizer(model, torch.optim.AdamW(model.host_parameters(), 1e-2, **adamw))


def train(run: Run, steps: int = 1) -> list[Tensor]:
    model, optimizer = run
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        model.step()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("stage", [SeedStage.GERMINATED, *ACTIVE_STAGES], ids=lambda s: s.name)
@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_a_run_that_is_resumed_on_the_device_is_the_uninterrupted_one(
    stage: SeedStage, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for deterministic products
    torch.use_deterministic_algorithms(True)
    try:
        run = begin(**{kind: True})
        train(run)
        grow_to(run[0], "1", stage)
        train(run, 2)
        save_checkpoint(tmp_path / "saved", run[0], optimizer=run[1])
        expected = train(run, 3)
        fresh = begin(**{kind: True})
        load_checkpoint(tmp_path / "saved", fresh[0], optimizer=fresh[1])
        found = train(fresh, 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == expected
    assert all(map(torch.equal, fresh[0].parameters(), run[0].parameters()))


@pytest.mark.filterwarnings("ignore::kasmina_core.InexactResume")
@pytest.mark.parametrize(
    "stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED], ids=lambda s: s.name
)
def test_a_run_goes_from_the_device_to_the_cpu_and_back(stage: SeedStage, tmp_path: Path) -> None:
    first = begin()
    grow_to(first[0], "1", stage)
    train(first, 2)
    save_checkpoint(tmp_path / "cuda", first[0], optimizer=first[1])
    middle = begin("cpu")
    load_checkpoint(tmp_path / "cuda", middle[0], optimizer=middle[1])
    state = [t for of in middle[1].state.values() for t in of.values()]
    assert {t.device.type for t in [*middle[0].parameters(), *middle[0].buffers(), *state]} == {"cpu"}
    save_checkpoint(tmp_path / "cpu", middle[0], optimizer=middle[1])
    assert bool(torch.stack(train(middle, 2)).isfinite().all())
    last = begin()
    load_checkpoint(tmp_path / "cpu", last[0], optimizer=last[1])
    assert {t.device.type for t in [*last[0].parameters(), *last[0].buffers()]} == {"cuda"}
    assert last[0].slots["1"].stage is stage
    for a, b in zip(first[0].state_dict().values(), last[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    moments = [[of["exp_avg"] for of in run[1].state.values()] for run in (first, last)]
    assert all(map(torch.equal, *moments))
    assert bool(torch.stack(train(last, 2)).isfinite().all())


def test_the_numbers_of_the_device_go_on_where_they_were(tmp_path: Path) -> None:
    run = begin()
    save_checkpoint(tmp_path / "saved", run[0], optimizer=run[1])
    expected = torch.rand(5, device="cuda")
    load_checkpoint(tmp_path / "saved", run[0], optimizer=run[1])
    assert torch.equal(torch.rand(5, device="cuda"), expected)
