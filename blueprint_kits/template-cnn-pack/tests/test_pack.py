"""The pack keeps what it declares, and its seeds learn."""

from __future__ import annotations

import kasmina_template_cnn_pack
import pytest
import torch
from kasmina_template_cnn_pack.seeds import MixerSeed

from kasmina_core import BlueprintSpec
from kasmina_core.testing import check_pack, parametrize_blueprints

SPECS = list(kasmina_template_cnn_pack.kasmina_blueprints())


@parametrize_blueprints(kasmina_template_cnn_pack)
def test_blueprint(blueprint: BlueprintSpec, check) -> None:
    check(blueprint)


def test_installed_pack() -> None:
    report = check_pack("template-cnn-pack")
    report.raise_if_failed()
    assert sorted(report.blueprints) == sorted(f"template-cnn-pack:{spec.name}" for spec in SPECS)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_seed_is_the_identity_at_birth_and_then_learns(spec: BlueprintSpec) -> None:
    torch.manual_seed(0)
    seed = spec.load_factory()(8)
    x = torch.randn(4, 8, 6, 6)
    wanted = x + 0.1 * x.roll(1, dims=1)
    assert torch.equal(seed(x), x)
    optimizer = torch.optim.Adam(seed.parameters(), lr=0.02)
    before = torch.nn.functional.mse_loss(seed(x), wanted)
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(seed(x), wanted)
        loss.backward()
        optimizer.step()
    assert loss < before


def test_mixer_says_which_reduction_does_not_fit() -> None:
    with pytest.raises(ValueError, match="4 channels cannot be narrowed 8 times"):
        MixerSeed(4, reduction=8)
