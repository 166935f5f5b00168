"""The pack as its users meet it: light to list, described truly, and its seeds grow into a model."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path

import kasmina_sequence
import pytest
import torch
from sequence_cases import SPECS
from torch import Tensor, nn

from kasmina_core import (
    BlueprintRegistry,
    EveryPosition,
    GrowthConfig,
    InjectionPoint,
    MorphogeneticModel,
    PluginRegistry,
    Topology,
)
from kasmina_core.testing.lives import fossilize_on_evidence

ROOT = Path(__file__).parents[1]


def test_the_pack_offers_these() -> None:
    assert list(SPECS) == ["gau", "moe", "rmsnorm_adapter", "swiglu"]


def test_entry_point_names_this_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"kasmina.plugins": {"sequence": "kasmina_sequence"}}
    assert project["name"] == "kasmina-sequence"


def test_readme_lists_every_blueprint_with_its_options_and_the_first_example_runs() -> None:
    text = (ROOT / "README.md").read_text()
    for name, spec in SPECS.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert all(f"`{option}={default}`" in row for option, default in spec.options.items())
        assert spec.source in row
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    # Installed, the pack is found by its entry point; here it may not be.
    installed = example.replace("(host, ", "(host, registry=registry, ")
    assert installed != example
    exec(compile(installed, "README.md", "exec"), {"registry": _registry()})


def _registry() -> BlueprintRegistry:
    registry = PluginRegistry(checks=False)
    registry.register_pack("sequence", kasmina_sequence)
    return registry.blueprints


def _host() -> nn.Sequential:
    """A linear map of each position: it can give no product of two features, and sees no other position."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Identity(), nn.Linear(8, 1))


def _model(example: Tensor) -> MorphogeneticModel:
    config = GrowthConfig(incubation="counterfactual")
    return MorphogeneticModel(
        _host(),
        [InjectionPoint("1", "1", 8, Topology.TRANSFORMER, causal=True)],
        example=example,
        registry=_registry(),
        config=config,
        context=EveryPosition(),
    )


@pytest.mark.parametrize("name", list(SPECS))
def test_seed_passes_every_gate_on_evidence_and_becomes_part_of_the_model(name: str) -> None:
    x = torch.randn(192, 6, 3)
    past = x[..., 2:].cumsum(1) / torch.arange(1, 7).view(1, -1, 1)
    y = x[..., :1] * x[..., 1:2] + past
    model = _model(x[:2])

    def losses(part: slice) -> Tensor:
        return (model(x[part]) - y[part]).square().mean((1, 2))

    fossilize_on_evidence(model, "1", f"sequence:{name}", losses, lr=0.01)

    changed = x.clone()
    changed[:, 3:] += 1.0
    assert torch.equal(model(changed)[:, :3], model(x)[:, :3])

    fresh = _model(x[:2])
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(fresh(x), model(x))
