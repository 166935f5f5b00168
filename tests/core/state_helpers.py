"""Tiny hosts, blueprints and models for tests of a seed's life, and the public moves that reach each stage."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    GateThresholds,
    GrowthConfig,
    MorphogeneticModel,
    QualityGates,
    SeedStage,
    TelemetryEvent,
    Topology,
)
from kasmina_core.checkpoints.files import UNSEALED, seal_tensors, sealed

WIDTH = 4
FIRST, SECOND = "2", "4"


class Scale(nn.Module):
    """A scale and a shift per channel: the identity at birth, but for ``gain``."""

    def __init__(self, dim: int, gain: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(1.0 + gain * torch.randn(dim, 1, 1))
        self.bias = nn.Parameter(torch.zeros(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class NormedScale(nn.Module):
    """A residual scale of normalised features: it has buffers that move in training mode."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.weight = nn.Parameter(0.1 * torch.randn(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * self.norm(x)


class NarrowsToOne(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Poison(Scale):
    """Turns every feature into NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * math.nan


def cannot_be_built(dim: int) -> nn.Module:
    torch.randn(100)
    raise ZeroDivisionError("no such luck")


class PerToken(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def make_registry() -> BlueprintRegistry:
    registry = BlueprintRegistry()
    for spec in (
        BlueprintSpec("scale", Topology.CNN, Scale, lambda dim: 2 * dim, options={"gain": 0.1}),
        BlueprintSpec("normed", Topology.CNN, NormedScale, lambda dim: 3 * dim),
        BlueprintSpec("narrow", Topology.CNN, NarrowsToOne, lambda dim: dim + 1),
        BlueprintSpec("poison", Topology.CNN, Poison, lambda dim: 2 * dim),
        BlueprintSpec("unbuildable", Topology.CNN, cannot_be_built, lambda dim: 0),
        BlueprintSpec(
            "picky",
            Topology.CNN,
            Scale,
            lambda dim: 2 * dim,
            accepts_width=lambda dim: None if dim % 8 == 0 else f"{dim} is not a multiple of 8",
        ),
        BlueprintSpec("per-token", Topology.TRANSFORMER, PerToken, lambda dim: dim),
    ):
        registry.register(spec, pack="mine")
    return registry


def make_host() -> nn.Sequential:
    """Always the same weights; the global random numbers are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, padding=1),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(WIDTH, 3),
        )


def make_batch(samples: int = 8, seed: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, 5, 5, generator=generator)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def open_thresholds(**changes: Any) -> GateThresholds:
    """Thresholds that every finite measurement passes, after short dwells."""
    defaults = {
        "min_training_epochs": 2,
        "min_probation_epochs": 2,
        "min_samples": 2,
        "min_gain": -1e9,
        "min_t": -1e9,
        "max_harm_t": 1e9,
        "max_output_deviation": 1e9,
    }
    return GateThresholds(**{**defaults, **changes})


def open_config(**changes: Any) -> GrowthConfig:
    gates = changes.pop("gates", None) or QualityGates(thresholds=open_thresholds())
    return GrowthConfig(**{"ramp_steps": 4, "embargo_epochs": 2, "gates": gates, **changes})


class Recorder:
    """Takes events and keeps them."""

    def __init__(self) -> None:
        self.events: list[TelemetryEvent] = []

    def emit(self, event: TelemetryEvent) -> None:
        self.events.append(event)

    def kinds(self) -> list[str]:
        return [event.type.value for event in self.events]


class CountingEvaluator:
    """Losses of held-out samples, and how often somebody asked for them."""

    def __init__(self, model: MorphogeneticModel, samples: int = 16) -> None:
        self.model = model
        self.x, self.y = make_batch(samples, seed=12)
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return F.cross_entropy(self.model(self.x), self.y, reduction="none")


def make_model(
    config: GrowthConfig | None = None,
    *,
    evaluate: bool = True,
    slots: tuple[str, ...] = (FIRST, SECOND),
    registry: BlueprintRegistry | None = None,
) -> tuple[MorphogeneticModel, Recorder]:
    recorder = Recorder()
    model = MorphogeneticModel(
        make_host(),
        slots,
        config=config or open_config(),
        example=torch.zeros(2, 1, 5, 5),
        registry=registry or make_registry(),
        telemetry=recorder,
    )
    if evaluate:
        model.evaluate_with(CountingEvaluator(model))
    return model, recorder


def train_once(model: MorphogeneticModel, optimizer: torch.optim.Optimizer) -> Tensor:
    x, y = make_batch()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    model.incubate(lambda: F.cross_entropy(model(x), y))
    model.step()
    optimizer.step()
    return loss.detach()


WAY = (
    SeedStage.GERMINATED,
    SeedStage.TRAINING,
    SeedStage.BLENDING,
    SeedStage.SHADOWING,
    SeedStage.PROBATIONARY,
    SeedStage.FOSSILIZED,
)
COOLDOWN = (SeedStage.CULLED, SeedStage.EMBARGOED, SeedStage.RESETTING)
EVERY_STAGE = (SeedStage.DORMANT, *WAY, *COOLDOWN)


def bring_to(
    model: MorphogeneticModel, stage: SeedStage, slot: str = FIRST, blueprint: str = "scale"
) -> None:
    """Walk a dormant slot to a stage by public moves; the gates must be open."""
    if stage is SeedStage.DORMANT:
        return
    model.germinate(slot, blueprint)
    if stage in COOLDOWN:
        model.step_epoch(1.0)
        model.cull(slot, "no use")
    for _ in range(40):
        seed_slot = model.slots[slot]
        if seed_slot.stage is stage:
            return
        if (
            stage is SeedStage.FOSSILIZED
            and seed_slot.stage is SeedStage.PROBATIONARY
            and seed_slot.last_gate
        ):
            model.advance_stage(slot)
        else:
            model.step_epoch(1.0)
    raise AssertionError(f"{stage.name} was not reached: {model.slots[slot].last_gate}")


def picture(model: MorphogeneticModel, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that a refused command must leave as it was, as values to compare with `same_picture`."""
    seen: dict[str, Any] = {
        "weights": {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("_extra_state")},
        "records": {name: slot.get_extra_state() for name, slot in model.slots.items()},
        "random numbers": torch.get_rng_state(),
        "stages": {name: slot.stage for name, slot in model.slots.items()},
        "modes": {
            name: (slot.mode, slot.alpha, slot.alpha_buffer.item()) for name, slot in model.slots.items()
        },
        "seeds": {name: id(slot.seed) for name, slot in model.slots.items()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "gates": {name: slot.last_gate for name, slot in model.slots.items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "epoch": model.epoch,
        "optimizers": [copy.deepcopy(o.state_dict()) for o in optimizers],
    }
    return seen


def same_picture(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return isinstance(after, Tensor) and torch.equal(before.nan_to_num(), after.nan_to_num())
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same_picture(before[k], after[k]) for k in before)
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(map(same_picture, before, after))
    if isinstance(before, float) and math.isnan(before):
        return isinstance(after, float) and math.isnan(after)
    return bool(before == after)


def rewrite(file, manifest):
    """Write a manifest that was changed, with its checksum, as somebody with bad intentions would."""
    manifest = {key: value for key, value in manifest.items() if key != "crc32_of_the_above"}
    file.write_bytes(sealed(json.dumps(manifest)))


def rewrite_seeds(file, tensors, data):
    """Write a file of seeds that was changed, with its checksum, likewise."""
    save_file(tensors, file, {"kasmina_seeds": json.dumps(data), **UNSEALED})
    seal_tensors(file)
