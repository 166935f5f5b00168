"""The pack keeps what it declares, its seeds learn, and none looks ahead where the host does not."""

from __future__ import annotations

import kasmina_template_transformer_pack
import pytest
import torch
from kasmina_template_transformer_pack.seeds import ContextSeed, WaistSeed
from torch import Tensor, nn

from kasmina_core import BlueprintSpec
from kasmina_core.testing import check_pack, parametrize_blueprints

SPECS = list(kasmina_template_transformer_pack.kasmina_blueprints())


@parametrize_blueprints(kasmina_template_transformer_pack)
def test_blueprint(blueprint: BlueprintSpec, check) -> None:
    check(blueprint)


def test_installed_pack() -> None:
    report = check_pack("template-transformer-pack")
    report.raise_if_failed()
    assert sorted(report.blueprints) == sorted(f"template-transformer-pack:{spec.name}" for spec in SPECS)


def trained(seed: nn.Module) -> tuple[Tensor, Tensor, nn.Module]:
    """Train a seed for a few steps; return the first and the last loss with it."""
    x = torch.randn(4, 5, 8)
    wanted = x + 0.1 * x.mean(1, keepdim=True)
    optimizer = torch.optim.Adam(seed.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(torch.nn.functional.mse_loss(seed(x), wanted))
        losses[-1].backward()
        optimizer.step()
    return losses[0], losses[-1], seed


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_seed_is_the_identity_at_birth_and_then_learns(spec: BlueprintSpec) -> None:
    torch.manual_seed(0)
    seed = spec.load_factory()(8)
    x = torch.randn(2, 3, 8)
    assert torch.equal(seed(x), x)
    first, last, _ = trained(seed)
    assert last < first


@pytest.mark.parametrize("causal", [True, False])
def test_context_looks_ahead_only_where_it_may(causal: bool) -> None:
    torch.manual_seed(0)
    _, _, seed = trained(ContextSeed(8, causal=causal))
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, 4:] += 1.0
    assert torch.equal(seed(x)[:, :4], seed(changed)[:, :4]) is causal


def test_waist_says_which_width_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least 1 feature, not 0"):
        WaistSeed(8, width=0)
