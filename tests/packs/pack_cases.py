"""The bundled packs and their seeds, for the tests in this folder."""

from __future__ import annotations

import kasmina_cnn
import kasmina_signal
import kasmina_transformer
import kasmina_vector
import kasmina_volume
import pytest
import torch

from kasmina_core import BlueprintSpec

PACKS = {
    "cnn": kasmina_cnn,
    "signal": kasmina_signal,
    "transformer": kasmina_transformer,
    "vector": kasmina_vector,
    "volume": kasmina_volume,
}
SPECS: dict[str, BlueprintSpec] = {
    f"{pack}:{spec.name}": spec for pack, module in PACKS.items() for spec in module.kasmina_blueprints()
}
every_blueprint = pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
