"""The model whose files lie in ``tests/fixtures/``, one folder for each format version that must stay readable."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_core import (
    GateThresholds,
    GrowthConfig,
    MorphogeneticModel,
    PlateauPolicy,
    QualityGates,
    SeedStage,
    Topology,
    tie_optimizer,
)

WIDTH = 4
SLOTS = {"fossil": "0", "blending": "2", "training": "4", "cooling": "6", "empty": "8"}


class Chain(nn.Sequential):
    """Five small convolutions with a slot behind each."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        layers: list[nn.Module] = []
        for index in range(5):
            layers += [nn.Conv2d(WIDTH if index else 1, WIDTH, 3, padding=1), nn.Tanh()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def samples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(16, 1, 5, 5, generator=generator),
        torch.randint(0, 3, (16,), generator=generator),
    )


class Run:
    """A model with its optimiser, scheduler, policy and generator, as at the start of a run."""

    def __init__(self) -> None:
        thresholds = GateThresholds(
            min_training_epochs=2,
            min_probation_epochs=2,
            min_samples=2,
            min_gain=-1e9,
            min_t=-1e9,
            max_harm_t=1e9,
            max_output_deviation=1e9,
        )
        config = GrowthConfig(
            ramp_steps=4, embargo_epochs=3, keep_snapshot=True, gates=QualityGates(thresholds=thresholds)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            host = Chain()
        self.model = MorphogeneticModel(
            host, list(SLOTS.values()), config=config, example=torch.zeros(2, 1, 5, 5)
        )
        self.optimizer = torch.optim.AdamW(self.model.host_parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, gamma=0.5)
        tie_optimizer(self.model, self.optimizer, schedulers=[self.scheduler])
        self.policy = PlateauPolicy({Topology.CNN: ["cnn:norm"]})
        self.generator = torch.Generator().manual_seed(5)
        x, y = samples(12)
        self.model.evaluate_with(lambda: F.cross_entropy(self.model(x), y, reduction="none"))

    def epoch(self) -> float:
        x, y = samples(11)
        for _ in range(2):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.model.incubate(lambda: F.cross_entropy(self.model(x), y))
            self.model.step()
            self.optimizer.step()
        self.scheduler.step()
        torch.rand((), generator=self.generator)
        value = loss.item()
        self.model.step_epoch(value)
        return value

    def until(self, slot: str, stage: SeedStage) -> None:
        for _ in range(30):
            if self.model.slots[slot].stage is stage:
                return
            if stage is SeedStage.FOSSILIZED and self.model.slots[slot].stage is SeedStage.PROBATIONARY:
                self.model.advance_stage(slot)
            if self.model.slots[slot].stage is not stage:
                self.epoch()
        raise AssertionError(f"{stage.name} was not reached: {self.model.slots[slot].last_gate}")

    def grow(self) -> None:
        """Reach a fossil, a blending seed with its snapshot, one in training, one culled and put aside."""
        self.model.germinate(SLOTS["fossil"], "cnn:norm")
        self.until(SLOTS["fossil"], SeedStage.FOSSILIZED)
        self.model.germinate(SLOTS["blending"], "cnn:depthwise")
        self.until(SLOTS["blending"], SeedStage.BLENDING)
        self.model.germinate(SLOTS["training"], "cnn:norm")
        self.model.germinate(SLOTS["cooling"], "cnn:norm")
        self.epoch()
        self.epoch()
        self.model.cull(SLOTS["cooling"], "no use", keep=True)

    def seen(self) -> dict[str, Any]:
        """What must be equal after a load, as plain data."""
        model = self.model
        with torch.no_grad():
            output = model.eval()(samples(13)[0])
        model.train()
        return {
            "output": output.tolist(),
            "stages": {name: slot.stage.name for name, slot in model.slots.items()},
            "alphas": {name: slot.alpha for name, slot in model.slots.items()},
            "parameters": {name: len(model.seed_parameters(name)) for name in model.slots},
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "can_revert": {name: model.can_revert(name) for name in model.slots},
            "kept": {slot.slot: slot.kept_seed for slot in model.observe().slots},
            "draw": torch.rand((), generator=self.generator).item(),
        }

    def go_on(self) -> list[float]:
        """Revert the blending seed, and return the losses of the next epochs."""
        self.model.cull(SLOTS["blending"], "late", revert=True)
        return [self.epoch() for _ in range(3)]
