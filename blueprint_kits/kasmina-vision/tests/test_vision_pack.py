"""The pack as its users meet it: light to list, described truly, and its seeds grow into a model."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path

import kasmina_vision
import pytest
import torch
from torch import Tensor, nn
from vision_cases import SPECS

from kasmina_core import BlueprintRegistry, GrowthConfig, MorphogeneticModel, PluginRegistry
from kasmina_core.testing.lives import fossilize_on_evidence

ROOT = Path(__file__).parents[1]


def test_the_pack_offers_these() -> None:
    assert list(SPECS) == ["cbam", "convnext", "eca", "inverted_residual"]


def test_entry_point_names_this_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"kasmina.plugins": {"vision": "kasmina_vision"}}
    assert project["name"] == "kasmina-vision"


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
    registry.register_pack("vision", kasmina_vision)
    return registry.blueprints


def _host() -> nn.Sequential:
    """A linear map of the mean pixel: it can give no product of two channels."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)
    )


@pytest.mark.parametrize("name", list(SPECS))
def test_seed_passes_every_gate_on_evidence_and_becomes_part_of_the_model(name: str) -> None:
    x = torch.randn(576, 2, 4, 4) + torch.randn(576, 2, 1, 1)
    mean = x.mean((2, 3))
    y = mean[:, :1].square() + mean[:, :1] * mean[:, 1:]
    config = GrowthConfig(incubation="counterfactual")
    model = MorphogeneticModel(_host(), ["1"], example=x[:2], registry=_registry(), config=config)

    def losses(part: slice) -> Tensor:
        return (model(x[part]) - y[part]).abs().flatten()  # squares of squares: a few would decide

    fossilize_on_evidence(model, "1", f"vision:{name}", losses, lr=0.02)

    fresh = MorphogeneticModel(_host(), ["1"], example=x[:2], registry=_registry(), config=config)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(fresh(x), model(x))
