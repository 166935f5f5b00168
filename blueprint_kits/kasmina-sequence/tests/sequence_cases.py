"""The pack's seeds, and features to feed them, for the tests in this folder."""

from __future__ import annotations

import kasmina_sequence
import pytest
from torch import Tensor

from kasmina_core import BlueprintSpec
from kasmina_core.testing import seeds

SPECS: dict[str, BlueprintSpec] = {spec.name: spec for spec in kasmina_sequence.kasmina_blueprints()}
every_blueprint = pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))


def features(dim: int, batch: int = 4, length: int = 12, seed: int = 2) -> Tensor:
    """Random features ``(batch, length, dim)``."""
    return seeds.features(SPECS["gau"], dim, batch, (length, 1), seed)
