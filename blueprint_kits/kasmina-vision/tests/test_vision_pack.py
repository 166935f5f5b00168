"""The pack as its users meet it: light to list, described truly, and its seeds grow into a model."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import kasmina_vision
import pytest
import torch
from torch import Tensor, nn
from vision_cases import SPECS

from kasmina_core import (
    BlueprintRegistry,
    GateLevel,
    GrowthConfig,
    MorphogeneticModel,
    PluginRegistry,
    SeedStage,
    tie_optimizer,
)

ROOT = Path(__file__).parents[1]

LISTING = """
import sys
import kasmina_vision

specs = list(kasmina_vision.kasmina_blueprints())
assert [spec.name for spec in specs] == ["cbam", "convnext", "eca", "inverted_residual"]
for spec in specs:
    assert [spec.refusal(dim) for dim in range(1, 97)].count(None) >= 94
    assert spec.declared_params(64) > 0
assert "torch" not in sys.modules, "listing imported torch"
"""


def test_listing_the_pack_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTING],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


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
    slot = model.slots["1"]
    optimizer = tie_optimizer(model, torch.optim.Adam(model.parameters(), lr=0.02))

    def losses(part: slice) -> Tensor:
        return (model(x[part]) - y[part]).square().flatten()

    def epoch() -> None:
        for _ in range(6):
            optimizer.zero_grad()
            losses(slice(64)).mean().backward()
            model.incubate(lambda: losses(slice(64)).mean())
            model.step()
            optimizer.step()

    model.evaluate_with(lambda: losses(slice(64, None)))
    for _ in range(10):
        epoch()
    model.germinate("1", f"vision:{name}")
    for _ in range(30):
        epoch()
        result = model.step_epoch().get("1")
        if result is not None and result.gate is GateLevel.G5 and result.passed:
            model.advance_stage("1")
            break
    assert slot.stage is SeedStage.FOSSILIZED, str(result)

    epoch()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    evidence = model.measure("1")
    assert evidence is not None
    assert evidence.gain > 0

    fresh = MorphogeneticModel(_host(), ["1"], example=x[:2], registry=_registry(), config=config)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(fresh(x), model(x))
