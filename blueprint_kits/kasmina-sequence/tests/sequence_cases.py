"""The pack's seeds, and features to feed them, for the tests in this folder."""

from __future__ import annotations

from typing import Any

import kasmina_sequence
import pytest
import torch
from torch import Tensor, nn

from kasmina_core import BlueprintSpec

SPECS: dict[str, BlueprintSpec] = {spec.name: spec for spec in kasmina_sequence.kasmina_blueprints()}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SOME_WIDTHS = (2, 3, 4, 5, 7, 8, 12, 16, 31, 64)

every_blueprint = pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))


def newborn(spec: BlueprintSpec, dim: int, seed: int = 0, **options: Any) -> nn.Module:
    """A seed as it is at birth, from its own random numbers; the global stream is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.load_factory()(dim, **options)


def grown(spec: BlueprintSpec, dim: int, seed: int = 0, std: float = 0.3, **options: Any) -> nn.Module:
    """A seed whose every parameter has moved, so that no part of it is zero."""
    module = newborn(spec, dim, seed, **options)
    source = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=source))
    return module


def features(dim: int, batch: int = 4, length: int = 12, seed: int = 2) -> Tensor:
    """Random features ``(batch, length, dim)``."""
    return torch.randn((batch, length, dim), generator=torch.Generator().manual_seed(seed))
