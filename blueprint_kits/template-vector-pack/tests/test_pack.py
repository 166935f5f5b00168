"""The pack keeps what it declares, and its seeds learn."""

from __future__ import annotations

import kasmina_template_vector_pack
import pytest
import torch
from kasmina_template_vector_pack.seeds import WaistSeed

from kasmina_core import BlueprintSpec
from kasmina_core.testing import check_pack, parametrize_blueprints

SPECS = list(kasmina_template_vector_pack.kasmina_blueprints())


@parametrize_blueprints(kasmina_template_vector_pack)
def test_blueprint(blueprint: BlueprintSpec, check) -> None:
    check(blueprint)


def test_installed_pack() -> None:
    report = check_pack("template-vector-pack")
    report.raise_if_failed()
    assert sorted(report.blueprints) == sorted(f"template-vector-pack:{spec.name}" for spec in SPECS)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_seed_is_the_identity_at_birth_and_then_learns(spec: BlueprintSpec) -> None:
    torch.manual_seed(0)
    seed = spec.load_factory()(8)
    x = torch.randn(spec.topology.example_shapes(8)[0])
    assert torch.equal(seed(x), x)
    optimizer = torch.optim.Adam(seed.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(torch.nn.functional.mse_loss(seed(x), 1.1 * x))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_waist_says_which_width_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least 1 feature, not 0"):
        WaistSeed(8, width=0)
