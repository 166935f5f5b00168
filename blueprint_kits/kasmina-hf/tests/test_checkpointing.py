"""Activation checkpointing of transformers, which computes layers again in the backward pass."""

from __future__ import annotations

import pytest
import torch
from hf_cases import CASES
from kasmina_core import SeedStage
from transformers import PreTrainedModel

NAMES = ["gpt2", "llama", "bert", "vit"]
STAGES = [SeedStage.DORMANT, SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED]


def enable(host: PreTrainedModel, use_reentrant: bool) -> None:
    # Its name since 5.23; the other warns from then on.
    switch = getattr(host, "activation_checkpointing_enable", host.gradient_checkpointing_enable)
    switch({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_those_without_checkpointing(name: str, stage: SeedStage, use_reentrant: bool) -> None:
    case = CASES[name]
    gradients = []
    for checkpoints in (False, True):
        model = case.grown(stage).train()
        if checkpoints:
            enable(model.host, use_reentrant)
            assert sum(getattr(m, "gradient_checkpointing", False) for m in model.host.modules()) >= 2
        torch.manual_seed(5)  # dropout draws the same
        loss = model(**case.batch()).loss
        loss.backward()
        gradients.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert gradient is not None, key
        assert torch.equal(gradient, gradients[1][key]), key
    assert any("seed" in key for key in gradients[0]) is (stage is not SeedStage.DORMANT)
