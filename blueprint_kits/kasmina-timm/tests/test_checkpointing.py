"""timm's gradient checkpointing, which computes blocks again in the backward pass and may not call their stage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kasmina_core import HostError, SeedStage
from kasmina_core.testing.comparing import difference
from kasmina_core.testing.lives import bring_to, shake
from timm_cases import CASES, Case, timm

from kasmina_timm import GrowingModel, points

NAMES = ["timm-resnet", "timm-convnext", "timm-efficientnet", "timm-vit"]
STAGES = [SeedStage.DORMANT, SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED]


def checkpointed(case: Case, stage: SeedStage) -> GrowingModel:
    host = case.host()
    host.set_grad_checkpointing()
    model = case.open(host)
    bring_to(model, stage, case.slot, case.blueprint)
    shake(model)
    return model


@pytest.fixture(params=[False, True], ids=["", "reentrant"])
def checkpointing(request: pytest.FixtureRequest) -> Iterator[None]:
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(request.param)
    yield
    timm.layers.set_reentrant_ckpt(before)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.usefixtures("checkpointing")
@pytest.mark.parametrize("name", NAMES)
def test_points_of_a_model_in_training_are_those_without_checkpointing_and_leave_no_trace(name: str) -> None:
    case = CASES[name]
    host = case.host().train()
    host.set_grad_checkpointing()
    before = {key: value.clone() for key, value in host.state_dict().items()}
    found = points(host)
    assert [point.name for point in found] == [point.name for point in points(case.host())]
    assert not difference(host.state_dict(), before)
    assert all(module.training for module in host.modules())
    assert all(p.requires_grad and p.grad is None for p in host.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_those_without_checkpointing(name: str, stage: SeedStage) -> None:
    case = CASES[name]
    runs = [case.learn(model.train()) for model in (case.grown(stage), checkpointed(case, stage))]
    assert not difference(*runs)
    assert any("seed" in key for key in runs[0]) is (stage is not SeedStage.DORMANT)


def test_slots_are_at_blocks_that_run_and_keep_their_names() -> None:
    case = CASES["timm-resnet"]
    model = checkpointed(case, SeedStage.DORMANT)
    assert {name: slot.point.path for name, slot in model.slots.items()} == {
        "act1": "act1",
        "layer1": "layer1.0",
        "layer2": "layer2.0",
        "layer3": "layer3.0",
        "layer4": "layer4.0",
    }
    grown = case.grown(SeedStage.FOSSILIZED)
    model.load_state_dict(grown.state_dict())
    assert torch.equal(model(case.images()), grown(case.images()))


@pytest.mark.parametrize("name", ["timm-resnet", "timm-efficientnet"])
def test_checkpointing_that_would_pass_a_slot_by_is_refused(name: str) -> None:
    case = CASES[name]
    model = case.grown(SeedStage.FOSSILIZED)
    model.host.set_grad_checkpointing()  # type: ignore[operator]
    for owner in (model, model.host):
        with pytest.raises(
            HostError, match=r"(?s)may pass by the one at .*set_grad_checkpointing\(\) before"
        ):
            owner(case.images())
    model.host.set_grad_checkpointing(False)  # type: ignore[operator]
    model(case.images())


def test_checkpointing_that_calls_each_block_may_be_turned_on_later() -> None:
    case = CASES["timm-vit"]
    model = case.grown(SeedStage.FOSSILIZED)
    before = model(case.images())
    model.host.set_grad_checkpointing()  # type: ignore[operator]
    assert torch.equal(model(case.images()), before)
