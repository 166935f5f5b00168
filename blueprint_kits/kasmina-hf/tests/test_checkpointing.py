"""Activation checkpointing of transformers, which computes layers again in the backward pass."""

from __future__ import annotations

import pytest
from hf_cases import CASES
from kasmina_core import SeedStage
from kasmina_core.testing.comparing import difference
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
    runs = []
    for checkpoints in (False, True):
        model = case.grown(stage).train()
        if checkpoints:
            enable(model.host, use_reentrant)
            assert sum(getattr(m, "gradient_checkpointing", False) for m in model.host.modules()) >= 2
        runs.append(case.learn(model))
    assert not difference(*runs)
    assert any("seed" in key for key in runs[0]) is (stage is not SeedStage.DORMANT)
