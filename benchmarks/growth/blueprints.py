"""Seeds that a gate should refuse, made to be bad in a known way, beside those of the bundled packs."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import kasmina_cnn
import kasmina_transformer
import torch
from torch import Tensor, nn

from kasmina_core import BlueprintRegistry, BlueprintSpec, Topology

SAMPLES: Final = 512
"""Largest batch that the seeds with noise of their own take."""

WAVES: Final = 192
"""Random waves of the seed that learns by heart."""

FREQUENCY: Final = 12.0
"""Radians over a standard deviation of the features: too fast a wave to say anything of the next sample."""


def _wide(values: Tensor, x: Tensor) -> Tensor:
    """Give one value a feature, or a feature and sample, the shape to be added to ``x``."""
    if x.dim() == 4:
        return values[..., None, None]
    return values if values.dim() == 1 else values[:, None, :]


def _mixed(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply the features of ``x``, ``(b, c, h, w)`` or ``(b, t, d)``, by a matrix."""
    return torch.einsum("oc,bchw->bohw", weight, x) if x.dim() == 4 else x @ weight.T


class Inert(nn.Module):
    """Null: a shift that has a gradient and is taken back again; the output is the input, always."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + _wide(self.shift - self.shift.detach(), x)


class NoiseFed(nn.Module):
    """Null: a linear map, 0 at birth, of noise that knows nothing of the sample."""

    noise: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("noise", torch.randn(SAMPLES, dim))
        self.weight = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + _wide(self.noise[: len(x)] @ self.weight.T, x)


class OtherSample(nn.Module):
    """Null: a linear map, 0 at birth, of another sample's features, less their mean over the batch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + _mixed(x.roll(1, 0) - x.mean(0, keepdim=True), self.weight)


class _Damage(nn.Module):
    """Harmful: fixed damage behind a learned factor per feature, which cannot undo it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.damaged(x) * _wide(self.gain, x)

    def damaged(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Static(_Damage):
    """Harmful: adds noise as large as the features."""

    noise: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("noise", torch.randn(SAMPLES, dim))

    def damaged(self, x: Tensor) -> Tensor:
        return x + x.detach().square().mean().sqrt() * _wide(self.noise[: len(x)], x)


class Scramble(_Damage):
    """Harmful: puts each feature in the next one's place."""

    def damaged(self, x: Tensor) -> Tensor:
        return x.roll(1, 1 if x.dim() == 4 else 2)


class Blinker(_Damage):
    """Harmful: sets every other feature to zero."""

    keep: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("keep", (torch.arange(dim) % 2).float())

    def damaged(self, x: Tensor) -> Tensor:
        return x * _wide(self.keep, x)


class Memory(nn.Module):
    """Overfitting: a linear map, 0 at birth, of many fast random waves; it learns samples by heart."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", FREQUENCY * torch.randn(WAVES, dim))
        self.register_buffer("phases", 6.2831853 * torch.rand(WAVES))
        self.weight = nn.Parameter(torch.zeros(dim, WAVES))

    def forward(self, x: Tensor) -> Tensor:
        scale = x.detach().square().mean(1 if x.dim() == 4 else -1, keepdim=True).sqrt() + 1e-6
        waves = (_mixed(x / scale, self.frequencies) + _wide(self.phases, x)).cos()
        return x + _mixed(waves, self.weight) / WAVES**0.5


NULL: Final = {"inert": Inert, "noise_fed": NoiseFed, "other_sample": OtherSample}
HARMFUL: Final = {"static": Static, "scramble": Scramble, "blinker": Blinker}
OVERFITTING: Final = {"memory": Memory}
KINDS: Final = {
    **dict.fromkeys(NULL, "null"),
    **dict.fromkeys(HARMFUL, "harmful"),
    **dict.fromkeys(OVERFITTING, "overfitting"),
}
"""What each bad blueprint is; every other one counts as useful."""

_SIZES: Final = {
    "inert": lambda dim: dim,
    "noise_fed": lambda dim: dim * dim,
    "other_sample": lambda dim: dim * dim,
    "memory": lambda dim: dim * WAVES,
}


def kind_of(blueprint: str) -> str:
    """Return ``null``, ``harmful``, ``overfitting`` or ``useful``."""
    return KINDS.get(blueprint.partition(":")[2].removesuffix("-t"), "useful")


@lru_cache(maxsize=1)
def registry() -> BlueprintRegistry:
    """Return the bundled blueprints with the bad ones: ``bad:static`` for CNNs, ``bad:static-t`` for Transformers."""
    offered = BlueprintRegistry()
    for pack, module in (("cnn", kasmina_cnn), ("transformer", kasmina_transformer)):
        for spec in module.kasmina_blueprints():
            offered.register(spec, pack=pack)
    for name, factory in {**NULL, **HARMFUL, **OVERFITTING}.items():
        size = _SIZES.get(name, lambda dim: dim)
        for topology, suffix in ((Topology.CNN, ""), (Topology.TRANSFORMER, "-t")):
            spec = BlueprintSpec(name + suffix, topology, factory, size, (factory.__doc__ or "").strip())
            offered.register(spec, pack="bad")
    return offered
