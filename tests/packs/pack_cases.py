"""The bundled packs' seeds, and features to feed them, for the tests in this folder."""

from __future__ import annotations

from typing import Any

import kasmina_cnn
import kasmina_transformer
import pytest
import torch
from torch import Tensor, nn

from kasmina_core import BlueprintSpec, Topology

PACKS = {"cnn": kasmina_cnn, "transformer": kasmina_transformer}
SPECS: dict[str, BlueprintSpec] = {
    f"{pack}:{spec.name}": spec for pack, module in PACKS.items() for spec in module.kasmina_blueprints()
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

every_blueprint = pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))


def accepted_widths(spec: BlueprintSpec, widths: range | tuple[int, ...] = range(1, 97)) -> list[int]:
    return [dim for dim in widths if spec.refusal(dim) is None]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def newborn(spec: BlueprintSpec, dim: int, seed: int = 0, **options: Any) -> nn.Module:
    """A seed as it is at birth, from its own random numbers; the global stream is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.load_factory()(dim, **options)


def grown(spec: BlueprintSpec, dim: int, seed: int = 0, std: float = 0.3, **options: Any) -> nn.Module:
    """A seed whose every parameter has moved, so that no part of it is zero."""
    module = newborn(spec, dim, seed, **options)
    source = generator(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=source))
    return module


def features(
    spec: BlueprintSpec, dim: int, batch: int = 4, size: tuple[int, int] = (6, 5), seed: int = 2
) -> Tensor:
    """Random features of the blueprint's layout; a sequence is ``size[0] * size[1]`` long."""
    b, (h, w) = batch, size
    shape = (b, dim, h, w) if spec.topology is Topology.CNN else (b, h * w, dim)
    return torch.randn(shape, generator=generator(seed))
