"""The two hosts: a Transformer of the bundled pack, and causal residual convolutions, each of any number of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from kasmina_transformer import TransformerHost
from torch import Tensor, nn

from benchmarks.sizes.data import LENGTH, VOCABULARY
from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    ContextReader,
    EveryPosition,
    HookedHost,
    InjectionPoint,
    Topology,
    default_registry,
)

KERNEL: Final = 3
HEADS: Final = 2


class CausalConv(nn.Conv1d):
    """A convolution of which position ``t`` sees itself and those before it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, of the same length."""
        return super().forward(F.pad(x, (KERNEL - 1, 0)))


class PositionNorm(nn.Module):
    """Root-mean-square normalisation over the channels of each position."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised features."""
        return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.weight


class ConvBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``, the last convolution zero for a seed."""

    def __init__(self, dim: int, is_zero: bool = False) -> None:
        super().__init__()
        self.first_norm, self.second_norm = PositionNorm(dim), PositionNorm(dim)
        self.first = CausalConv(dim, dim, KERNEL, bias=False)
        self.second = CausalConv(dim, dim, KERNEL)
        if is_zero:
            nn.init.zeros_(self.second.weight)
            nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features."""
        branch: Tensor = self.second(F.silu(self.second_norm(self.first(F.silu(self.first_norm(x))))))
        return x + branch


class ConvSeed(nn.Module):
    """``copies`` blocks in a row."""

    def __init__(self, dim: int, *, copies: int = 1) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ConvBlock(dim, is_zero=True) for _ in range(copies)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features behind all blocks."""
        grown: Tensor = self.blocks(x)
        return grown


class ConvHost(HookedHost, nn.Module):
    """Bytes to logits by causal residual convolutions; slots before the first block and after the last."""

    def __init__(self, dim: int, n_layers: int) -> None:
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.entry = nn.Identity()
        self.layers = nn.ModuleList(ConvBlock(dim) for _ in range(n_layers))
        self.norm = PositionNorm(dim)
        self.head = nn.Conv1d(dim, VOCABULARY, 1)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return the points before the first block and behind the last."""
        paths = {"first": "entry", "last": f"layers.{len(self.layers) - 1}"}
        return [
            InjectionPoint(name, path, self.dim, Topology.SIGNAL, causal=True) for name, path in paths.items()
        ]

    def example_inputs(self) -> tuple[Tensor]:
        """Return two sequences."""
        return (torch.arange(32).view(2, 16),)

    def context_reader(self) -> ContextReader:
        """Return that every position is real."""
        return EveryPosition()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next byte at each position, ``(b, t, VOCABULARY)``."""
        x = self.entry(self.embedding(tokens).mT)  # (b, d, t)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).mT


def make_host(kind: str, dim: int, n_layers: int) -> nn.Module:
    """Return a fresh host; the caller owns the random numbers."""
    if kind == "cnn":
        return ConvHost(dim, n_layers)
    return TransformerHost(VOCABULARY, dim, n_layers=n_layers, n_heads=HEADS, max_len=LENGTH)


def slot_of(kind: str, n_layers: int, is_first: bool = False) -> str:
    """Return the name of the slot behind the last block, or of the convolutions' before the first."""
    if is_first:
        return "first"
    return "last" if kind == "cnn" else f"layer{n_layers}"


def options_of(kind: str) -> dict[str, int]:
    """Return the options with which a seed is a block like the host's own."""
    return {"copies": 1} if kind == "cnn" else {"copies": 1, "heads": HEADS, "expansion": 4}


def registry_of(kind: str) -> BlueprintRegistry:
    """Return where ``block`` comes from: the bundled pack, or this module for convolutions along text."""
    if kind != "cnn":
        return default_registry().blueprints
    found = BlueprintRegistry()
    spec = BlueprintSpec(
        "block",
        Topology.SIGNAL,
        ConvSeed,
        lambda dim: 2 * KERNEL * dim * dim + 3 * dim,
        "Causal residual convolutions",
        options={"copies": 1},
    )
    found.register(spec, pack="sizes")
    return found
