"""A tiny host and seed on a CUDA device, and walks through a seed's life by public moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    GateThresholds,
    GrowthConfig,
    Incubation,
    MorphogeneticModel,
    QualityGates,
    SeedStage,
    Topology,
)

ACTIVE_STAGES = [stage for stage in SeedStage if SeedStage.TRAINING <= stage <= SeedStage.FOSSILIZED]
both_incubations = pytest.mark.parametrize("incubation", list(Incubation), ids=lambda i: i.value)
PERMISSIVE = QualityGates(
    thresholds=GateThresholds(
        min_training_epochs=0,
        min_shadowing_epochs=0,
        min_probation_epochs=0,
        min_samples=2,
        min_gain=-1e9,
        min_t=-1e9,
        max_harm_t=1e9,
        max_output_deviation=1e9,
    )
)


class ConvSeed(nn.Module):
    def __init__(self, dim: int, p: float = 0.0) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(dim, dim, 3, padding=1), nn.Dropout(p)
        nn.init.normal_(self.conv.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(x))


def new_host(dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


def batch(device: str = "cuda") -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 1, 6, 6, generator=source), torch.randint(0, 3, (16,), generator=source)
    return x.to(device), y.to(device)


def loss_of(model: nn.Module) -> Tensor:
    x, y = batch(next(model.parameters()).device.type)
    return F.cross_entropy(model(x).float(), y)


def new_model(host: nn.Module | None = None, device: str = "cuda", **config: Any) -> MorphogeneticModel:
    registry = BlueprintRegistry()
    registry.register(
        BlueprintSpec("conv", Topology.CNN, ConvSeed, lambda d: 9 * d * d + d, options={"p": 0.0}),
        pack="tiny",
    )
    model = MorphogeneticModel(
        (host if host is not None else new_host()).to(device),
        ["1", "4"],
        example=batch(device)[0][:2],
        registry=registry,
        config=GrowthConfig(**{"gates": PERMISSIVE} | config),
    )

    def evaluate() -> Tensor:
        x, y = batch(next(model.parameters()).device.type)
        return F.cross_entropy(model(x).float(), y, reduction="none")

    model.evaluate_with(evaluate)
    return model


def grow_to(model: MorphogeneticModel, slot: str, stage: SeedStage, **options: Any) -> None:
    place = model.slots[slot]
    if place.seed is None:
        model.germinate(slot, "conv", **options)
    while place.stage is not stage:
        if place.stage is SeedStage.BLENDING:
            place.set_alpha(1.0)
        if place.stage is SeedStage.PROBATIONARY:
            place.step_epoch()
        assert model.advance_stage(slot)
    if stage is SeedStage.BLENDING:
        place.set_alpha(0.5)
