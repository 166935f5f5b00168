"""A seed's whole life in models of each kind, by the public moves."""

from __future__ import annotations

import pytest
import torch
from kasmina_core import SeedStage
from kasmina_core.testing import LifeCases
from timm_cases import CASES


class TestLives(LifeCases):
    cases = CASES


@pytest.mark.parametrize("name", ["timm-resnet", "timm-vit"])
def test_a_grown_model_compiles_to_one_graph(name: str) -> None:
    case = CASES[name]
    fresh = case.open(case.build()).eval()
    fresh.load_state_dict(case.grown(SeedStage.FOSSILIZED).state_dict())
    torch.compiler.reset()
    compiled = torch.compile(fresh, fullgraph=True, backend="eager")
    assert torch.equal(compiled(case.images()), fresh(case.images()))
