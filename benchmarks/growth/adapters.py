"""The arm with PEFT's LoRA: what one does to a trained host whose weights shall stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from benchmarks.growth.arms import Arm
from benchmarks.growth.growing import InsertionTraining, Recipe
from benchmarks.growth.settings import Setting

RANK: Final = 4
"""Rank of an adapter."""


class AdapterTraining(InsertionTraining):
    """Trains the host to its first plateau, then adapters on every convolution and linear layer, the host frozen.

    Source: https://huggingface.co/docs/peft/package_reference/lora
    """

    def __init__(self, setting: Setting, host: nn.Module, arm: Arm, recipe: Recipe, *args: Any) -> None:
        import peft  # an arm that says so where it is not installed

        self._peft = peft
        super().__init__(setting, host, arm, replace(recipe, together=1), *args)

    def put_in(self, slot: str, blueprint: str) -> None:
        """Adapt every layer at once; the slot does not matter."""
        layers = [
            name for name, module in self.module.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        config = self._peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers)
        adapted = self._peft.get_peft_model(self.module, config)
        self.module = adapted
        trained = [p for p in adapted.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, self.lr, fused=True)
        for name in self.points:
            self.kept[name] = "lora"
        self.log.append((self.intervals, "every layer", "kept", f"LoRA of rank {RANK}"))
