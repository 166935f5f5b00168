"""`torch.inference_mode` around growth works as `torch.no_grad` does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from state_helpers import FIRST, bring_to, make_model, train_once

from kasmina_core import (
    MorphogeneticModel,
    SeedStage,
    graft_seeds,
    load_checkpoint,
    save_checkpoint,
    save_seeds,
    tie_optimizer,
)

S = SeedStage


def trained() -> MorphogeneticModel:
    with torch.inference_mode(False):
        model, _ = make_model()
        bring_to(model, S.TRAINING)
    return model


def germinated(model: MorphogeneticModel) -> None:
    model.germinate(FIRST, "scale")


def judged(model: MorphogeneticModel) -> None:
    bring_to(model, S.TRAINING)
    for _ in range(3):
        model.step_epoch(torch.tensor(1.0))
    assert model.slots[FIRST].stage is S.BLENDING


def loaded(model: MorphogeneticModel) -> None:
    model.load_state_dict(trained().state_dict())


def resumed(model: MorphogeneticModel) -> None:
    load_checkpoint(save_checkpoint("checkpoint", trained()), model)


def grafted(model: MorphogeneticModel) -> None:
    graft_seeds(save_seeds("seeds", trained()), model)


def put_aside(model: MorphogeneticModel) -> None:
    bring_to(model, S.TRAINING)
    model.cull(FIRST, keep=True)
    for _ in range(6):
        model.step_epoch()
    model.regerminate(FIRST)


@pytest.mark.parametrize("grow", [germinated, judged, loaded, resumed, grafted, put_aside])
def test_what_grows_in_inference_mode_trains(
    grow: Callable[[MorphogeneticModel], None], tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = make_model()
    optimizer = tie_optimizer(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    with torch.inference_mode():
        grow(model)
        assert torch.is_inference_mode_enabled()
    model.step_epoch(1.0)
    before = [p.detach().clone() for p in model.seed_parameters()]
    assert not any(p.is_inference() for p in model.parameters())
    train_once(model, optimizer)
    train_once(model, optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.seed_parameters(), strict=True))
