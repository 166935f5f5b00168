"""A pack that adds a topology is tested as any other: its blueprints, its host, and lives in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import kasmina_stations as stations
import pytest
import torch
from kasmina_stations.hosts import Forecast
from torch import Tensor, nn

from kasmina_core import (
    Incubation,
    MorphogeneticModel,
    PluginRegistry,
    SeedStage,
    load_checkpoint,
    save_checkpoint,
)
from kasmina_core.testing import check_blueprint, check_host, check_pack, parametrize_blueprints
from kasmina_core.testing.lives import (
    LifeCase,
    LifeCases,
    bring_to,
    fossilize_on_evidence,
    open_config,
    shake,
)
from kasmina_core.testing.seeds import SeedCases

REGISTRY = PluginRegistry()
REGISTRY.register_pack("stations", stations)


@parametrize_blueprints(stations)
def test_blueprint(blueprint: Any, check: Any) -> None:
    check(blueprint)


def test_every_memory_format_of_the_topology_is_checked() -> None:
    report = check_blueprint(stations.kasmina_blueprints()[1], device="cpu")
    found = {check.measured for check in report.checks if check.name == "channels_last"}
    assert "kept, with the same values" in found


def test_pack() -> None:
    report = check_pack(stations)
    report.raise_if_failed()
    assert list(report.hosts) == ["kasmina_stations:forecast"]


def test_host() -> None:
    check_host(Forecast).raise_if_failed()


class TestSeeds(SeedCases):
    pack = stations
    topology = stations.STATIONS


def data(n: int) -> Tensor:
    """Waves of ``n`` samples, ``(n, stations, t)``, that each station shows later."""
    draw = torch.Generator().manual_seed(n)
    phase = 6.3 * torch.rand(n, 1, 1, generator=draw)
    return (phase + torch.arange(3.0)[:, None] + 0.8 * torch.arange(9.0)).sin()


class Forecasting(LifeCase):
    def __init__(self, slot: str, blueprint: str) -> None:
        self.name, self.slot, self.blueprint = slot, slot, blueprint

    def host(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return Forecast().eval()

    def grow(self, host: nn.Module, **options: Any) -> MorphogeneticModel:
        return MorphogeneticModel(host, registry=REGISTRY.blueprints, **options)

    def errors(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x[..., :-1])
        return (output - x[..., 1:]).square().flatten(1).mean(1), output

    def run(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        losses, output = self.errors(model, data(8))
        return losses.mean(), output

    def losses(self, model: nn.Module) -> Tensor:
        return self.errors(model, data(16))[0]


class TestLives(LifeCases):
    cases: ClassVar = {
        "own order": Forecasting("first", "conv"),
        "(b, t, n, f)": Forecasting("second", "stations:bottleneck"),
    }


@pytest.mark.parametrize("slot", ["first", "second"])
def test_a_seed_is_fossilised_on_evidence(slot: str) -> None:
    case = Forecasting(slot, "conv")
    config = open_config(incubation=Incubation.COUNTERFACTUAL)
    model, x = case.grow(case.host(), config=config), data(96)
    fossilize_on_evidence(model, slot, "conv", lambda part: case.errors(model, x[part])[0], lr=0.01)


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED])
def test_a_checkpoint_continues_in_a_fresh_model(stage: SeedStage, tmp_path: Path) -> None:
    case = Forecasting("second", "norm")
    model, fresh = case.grown(stage), case.open()
    save_checkpoint(tmp_path / "run", model)
    load_checkpoint(tmp_path / "run", fresh)
    assert fresh.slots["second"].stage is stage
    assert torch.equal(case.output(fresh), case.output(model))


def test_a_seed_of_a_causal_host_looks_at_no_later_time() -> None:
    case = Forecasting("second", "conv")
    model = case.open()
    bring_to(model, SeedStage.FOSSILIZED, "second", "conv")
    shake(model)
    x = data(2)
    later = torch.cat([x[..., :5], -x[..., 5:]], -1)
    assert torch.equal(model(x)[..., :5], model(later)[..., :5])
    assert not torch.allclose(model(x)[..., 5:], model(later)[..., 5:])
