"""Tiny hosts and seeds, and walks through a seed's life by public moves, for the numeric tests of the core."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

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
    SeedSlot,
    SeedStage,
    Topology,
)

torch.set_num_threads(1)  # on tensors this small more threads only wait for each other

WIDTH = 4
VOCABULARY = 11
CNN_SLOTS = ("norm", "norm2", "act2")
TRANSFORMER_SLOTS = ("blocks.0", "blocks.1")
ACTIVE_STAGES = (
    SeedStage.TRAINING,
    SeedStage.BLENDING,
    SeedStage.SHADOWING,
    SeedStage.PROBATIONARY,
    SeedStage.FOSSILIZED,
)
LIVING_STAGES = (SeedStage.DORMANT, SeedStage.GERMINATED, *ACTIVE_STAGES)
FAILURE_STAGES = (SeedStage.CULLED, SeedStage.EMBARGOED, SeedStage.RESETTING)

PERMISSIVE = QualityGates(
    thresholds=GateThresholds(
        min_training_epochs=0,
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
"""Gates that let every measured seed pass, for tests of what a stage computes."""


# -- hosts ---------------------------------------------------------------------------------------------------------


def cnn_host(width: int = WIDTH, *, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Slots ``norm`` and ``norm2`` have an in-place ReLU right behind them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                stem=nn.Conv2d(1, width, 3, padding=1, bias=False),
                norm=nn.BatchNorm2d(width),
                act=nn.ReLU(inplace=True),
                drop=nn.Dropout(dropout),
                conv=nn.Conv2d(width, width, 3, padding=1, bias=False),
                norm2=nn.BatchNorm2d(width),
                act2=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool2d(1),
                flat=nn.Flatten(),
                head=nn.Linear(width, 3),
            )
        )


class CausalBlock(nn.Module):
    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        _, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.mT / d**0.5).masked_fill(future, -torch.inf).softmax(-1)
        x = x + self.drop(self.out(weights @ v))
        return x + self.mlp(x)


class CausalHost(nn.Module):
    """Token ids ``(b, t)`` to logits ``(b, t, vocabulary)``; slots behind ``blocks.*``."""

    def __init__(self, dim: int = 8, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(CausalBlock(dim, dropout) for _ in range(layers))
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def causal_host(*, dropout: float = 0.0, seed: int = 0) -> CausalHost:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CausalHost(dropout=dropout)


# -- seeds ---------------------------------------------------------------------------------------------------------


class ConvSeed(nn.Module):
    """``x + conv(x)``."""

    def __init__(self, dim: int, std: float = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        nn.init.normal_(self.conv.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class NormSeed(nn.Module):
    """Has buffers of its own: ``x + scale * batch_norm(x)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        nn.init.constant_(self.norm.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x)


class DropoutSeed(nn.Module):
    """Draws random numbers in training mode: ``x + dropout(conv(x))``."""

    def __init__(self, dim: int, p: float = 0.5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(x))


class CountingSeed(ConvSeed):
    """Writes to a buffer at every call, in eval mode too."""

    calls: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class InPlaceSeed(nn.Module):
    """Writes to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu_(x))


class TrainsInPlaceSeed(InPlaceSeed):
    """Writes to its input in training mode only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu_(x) if self.training else F.relu(x))


class ForeignSeed(nn.Module):
    """``scale * x`` in another dtype or memory layout than it was given."""

    def __init__(self, dim: int, dtype: str = "", layout: str = "") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dtype, self.layout = dtype, layout

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * x
        if self.dtype:
            y = y.to(getattr(torch, self.dtype))
        if self.layout == "channels_last":
            y = y.contiguous(memory_format=torch.channels_last)
        if self.layout == "contiguous":
            y = y.contiguous()
        if self.layout == "transposed":
            y = y.mT.contiguous().mT
        return y


class MlpSeed(nn.Module):
    """``x + linear(x)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.normal_(self.linear.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


def registry(**factories: Callable[..., nn.Module]) -> BlueprintRegistry:
    """The seeds above under their short names, and ``factories`` for CNN hosts besides."""
    cnn, transformer = Topology.CNN, Topology.TRANSFORMER
    specs = [
        BlueprintSpec("conv", cnn, ConvSeed, lambda d: 9 * d * d + d, options={"std": 0.1}),
        BlueprintSpec("norm", cnn, NormSeed, lambda d: 2 * d),
        BlueprintSpec("dropout", cnn, DropoutSeed, lambda d: d * d + d, options={"p": 0.5}),
        BlueprintSpec("counting", cnn, CountingSeed, lambda d: 9 * d * d + d),
        BlueprintSpec("inplace", cnn, InPlaceSeed, lambda d: d * d + d),
        BlueprintSpec("trains-inplace", cnn, TrainsInPlaceSeed, lambda d: d * d + d),
        BlueprintSpec("foreign", cnn, ForeignSeed, lambda d: 1, options={"dtype": "", "layout": ""}),
        BlueprintSpec("mlp", transformer, MlpSeed, lambda d: d * d + d),
        BlueprintSpec(
            "foreign-rows", transformer, ForeignSeed, lambda d: 1, options={"dtype": "", "layout": ""}
        ),
        *(BlueprintSpec(name, cnn, factory, lambda d: d) for name, factory in factories.items()),
    ]
    found = BlueprintRegistry()
    for spec in specs:
        found.register(spec, pack="tiny")
    return found


# -- data and models -----------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 6, size: int = 5, seed: int = 1) -> Tensor:
    return torch.randn((n, 1, size, size), generator=generator(seed))


def labels(n: int = 6, classes: int = 3, seed: int = 2) -> Tensor:
    return torch.randint(0, classes, (n,), generator=generator(seed))


def tokens(n: int = 3, length: int = 7, seed: int = 3) -> Tensor:
    return torch.randint(0, VOCABULARY, (n, length), generator=generator(seed))


def cnn_model(
    host: nn.Module | None = None,
    slots: tuple[str, ...] = CNN_SLOTS,
    *,
    seeds: BlueprintRegistry | None = None,
    **config: Any,
) -> MorphogeneticModel:
    """A CNN host (a new one by default) with permissive gates that measure on fixed images."""
    host = host if host is not None else cnn_host()
    parameter = next(host.parameters())
    example = images(2).to(parameter)
    model = MorphogeneticModel(
        host,
        slots,
        example=example,
        registry=seeds or registry(),
        config=GrowthConfig(**{"gates": PERMISSIVE} | config),
    )
    model.evaluate_with(image_evaluator(model))
    return model


def image_evaluator(model: MorphogeneticModel) -> Callable[[], Tensor]:
    x, y = images(8, seed=11), labels(8, seed=12)

    def evaluate() -> Tensor:
        parameter = next(model.parameters())
        logits = model(x.to(parameter)).float()
        return F.cross_entropy(logits, y.to(parameter.device), reduction="none")

    return evaluate


def causal_model(host: nn.Module | None = None, **config: Any) -> MorphogeneticModel:
    """A causal transformer host with permissive gates that measure on fixed sequences."""
    host = host if host is not None else causal_host()
    model = MorphogeneticModel(
        host,
        TRANSFORMER_SLOTS,
        example=tokens(1),
        registry=registry(),
        config=GrowthConfig(**{"gates": PERMISSIVE} | config),
        causal=True,
    )
    held_out = tokens(4, seed=13)
    model.evaluate_with(
        lambda: F.cross_entropy(model(held_out[:, :-1]).float().mT, held_out[:, 1:], reduction="none").mean(1)
    )
    return model


def grow_to(
    model: MorphogeneticModel,
    slot: str,
    stage: SeedStage,
    blueprint: str = "conv",
    *,
    alpha: float = 0.5,
    **options: Any,
) -> SeedSlot:
    """Walk a slot from DORMANT to ``stage`` by public moves; in BLENDING alpha is then ``alpha``."""
    place = model.slots[slot]
    if stage is SeedStage.DORMANT:
        return place
    model.germinate(slot, blueprint, **options)
    if stage in FAILURE_STAGES:
        model.cull(slot, "for a test")
        while place.stage is not stage:
            model.step_epoch()
        return place
    return walk_to(model, slot, stage, alpha=alpha)


def walk_to(model: MorphogeneticModel, slot: str, stage: SeedStage, *, alpha: float = 0.5) -> SeedSlot:
    """Bring a seed that is there to a later stage."""
    place = model.slots[slot]
    while place.stage is not stage:
        if place.stage is SeedStage.BLENDING:
            place.set_alpha(1.0)
        if place.stage is SeedStage.PROBATIONARY:
            place.step_epoch()  # probation is judged on what was measured in it
        result = model.advance_stage(slot)
        assert result, str(result)
    if stage is SeedStage.BLENDING:
        place.set_alpha(alpha)
    return place


def scramble(module: nn.Module, std: float = 0.3, seed: int = 5) -> None:
    """Move every parameter, so that none is at its value at birth."""
    source = generator(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(std * torch.randn(p.shape, generator=source).to(p))


# -- comparing -----------------------------------------------------------------------------------------------------

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0.0 from +0.0 and takes NaN as equal to itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = _BITS[a.element_size()]
    a, b = (t.detach().contiguous() for t in (a, b))
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def same_tensors(a: Any, b: Any) -> bool:
    """`same_bits` through nested mappings and sequences; other values by ``==``."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and same_bits(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_tensors(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return bool(a == b)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, copied, those that are not saved too, but not where slots note what they measure."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: t.detach().clone() for name, t in named if not name.endswith("deviation")}


COUNTERFACTUAL = Incubation.COUNTERFACTUAL
STRAIGHT_THROUGH = Incubation.STRAIGHT_THROUGH
