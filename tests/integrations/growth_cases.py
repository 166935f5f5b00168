"""A small task, a host for it, and gates and a policy under which a seed comes, stays and goes within a few epochs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from kasmina_core import (
    Advance,
    BlueprintRegistry,
    BlueprintSpec,
    Command,
    Cull,
    GateThresholds,
    Germinate,
    GrowthConfig,
    MorphogeneticModel,
    Observation,
    QualityGates,
    Regerminate,
    SeedStage,
    Topology,
)

PERMISSIVE = QualityGates(
    thresholds=GateThresholds(
        min_training_epochs=1,
        min_shadowing_epochs=0,
        min_probation_epochs=0,
        max_isolation_violations=10**9,
        min_samples=2,
        min_gain=-1e9,
        min_t=-1e9,
        max_harm_t=1e9,
        max_output_deviation=1e9,
    )
)
SAMPLES = 24


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = SAMPLES, seed: int = 1) -> Tensor:
    return torch.randn((n, 1, 5, 5), generator=generator(seed))


def labels(n: int = SAMPLES, seed: int = 2) -> Tensor:
    return torch.randint(0, 3, (n,), generator=generator(seed))


def image_host(dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            OrderedDict(
                stem=nn.Conv2d(1, 4, 3, padding=1, bias=False),
                norm=nn.BatchNorm2d(4),
                act=nn.ReLU(inplace=True),
                drop=nn.Dropout(dropout),
                conv=nn.Conv2d(4, 4, 3, padding=1, bias=False),
                norm2=nn.BatchNorm2d(4),
                act2=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flat=nn.Flatten(),
                head=nn.Linear(4, 3),
            )
        )


class ConvSeed(nn.Module):
    """``x + conv(x)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class MlpSeed(nn.Module):
    """``x + linear(x)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.normal_(self.linear.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


def registry() -> BlueprintRegistry:
    found = BlueprintRegistry()
    found.register(BlueprintSpec("conv", Topology.CNN, ConvSeed, lambda d: 9 * d * d + d), pack="tiny")
    found.register(BlueprintSpec("mlp", Topology.TRANSFORMER, MlpSeed, lambda d: d * d + d), pack="tiny")
    return found


def growing(
    host: nn.Module, slots: Sequence[str], example: object, *, causal: bool = False, **config: Any
) -> MorphogeneticModel:
    settings = GrowthConfig(**{"gates": PERMISSIVE, "ramp_steps": 2, "embargo_epochs": 0} | config)
    return MorphogeneticModel(
        host, slots, example=example, registry=registry(), config=settings, causal=causal
    )


class Script:
    """A policy that germinates at given epochs, culls what it is told to, and fossilises what passes G5."""

    def __init__(self, plan: Mapping[int, tuple[str, str]], culls: Mapping[int, str] | None = None) -> None:
        self.plan, self.culls = dict(plan), dict(culls or {})
        self.seen: list[float | None] = []

    def decide(self, observation: Observation) -> Sequence[Command]:
        self.seen.append(observation.metric)
        commands: list[Command] = []
        if observation.epoch in self.plan:
            commands.append(Germinate(*self.plan[observation.epoch]))
        if observation.epoch in self.culls:
            commands.append(Cull(self.culls[observation.epoch], "the script says so"))
        commands += [
            Advance(s.slot)
            for s in observation.slots
            if s.stage is SeedStage.PROBATIONARY and s.gate_passed and s.slot not in self.culls.values()
        ]
        return commands

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = list(state["seen"])


class Returns(Script):
    """Culls a seed late, puts the host back and the seed aside, and makes it again after the embargo."""

    def decide(self, observation: Observation) -> Sequence[Command]:
        commands = [one for one in super().decide(observation) if not isinstance(one, Advance)]
        slot = next(iter(self.plan.values()))[0]
        if observation.epoch == 5:
            commands.append(Cull(slot, "late", revert=True, keep=True))
        if any(one.kept_seed and one.stage is SeedStage.DORMANT for one in observation.slots):
            commands.append(Regerminate(slot))
        return commands


class EpochSampler(Sampler[int]):
    """Shuffles by the number of the epoch alone, so that a run that goes on sees what it would have seen."""

    def __init__(self, n: int = SAMPLES) -> None:
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.n, generator=generator(100 + self.epoch)).tolist())


def same(a: object, b: object) -> bool:
    """Whether two nests of lists, dicts, tensors and plain values are equal, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
