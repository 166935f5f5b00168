"""Lives of seeds in the bundled hosts for vectors, signals and volumes, and policies that choose them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from kasmina_signal import TCNHost
from kasmina_vector import MLPHost
from kasmina_volume import VolumeHost
from pack_cases import SPECS, generator
from torch import Tensor, nn

from kasmina_core import (
    BanditPolicy,
    BudgetPolicy,
    FixedTimesPolicy,
    Germinate,
    MorphogeneticModel,
    PlateauPolicy,
    Policy,
    Topology,
    TournamentPolicy,
    blueprint_costs,
    default_registry,
)
from kasmina_core.testing import LifeCase, LifeCases


class BundledCase(LifeCase):
    def __init__(self, blueprint: str, make: Callable[[], nn.Module], targets: tuple[int, ...]) -> None:
        self.name = self.blueprint = blueprint
        self.make = make
        self.x = torch.randn(8, *make().example_inputs()[0].shape[1:], generator=generator(0))
        self.y = torch.randint(3, (8, *targets), generator=generator(1))
        self.slot = make().injection_points()[-1].name

    def host(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval()

    def grow(self, host: nn.Module, **options: Any) -> MorphogeneticModel:
        return MorphogeneticModel(host, **options)

    def run(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        output = model(self.x)
        return F.cross_entropy(output, self.y), output

    def losses(self, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(self.x), self.y, reduction="none").view(8, -1).mean(1)


HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "signal": (lambda: TCNHost(2, 3, n_blocks=2, channels=6), (16,)),
    "vector": (lambda: MLPHost(5, 3, width=8), ()),
    "volume": (lambda: VolumeHost(1, 3, n_blocks=2, base_channels=2), ()),
}
CASES = {name: BundledCase(name, *HOSTS[pack]) for name in SPECS if (pack := name.partition(":")[0]) in HOSTS}


class TestLives(LifeCases):
    cases: ClassVar = {name: CASES[name] for name in ("signal:conv", "vector:mlp", "volume:depthwise")}


@pytest.mark.parametrize("name", sorted(CASES.keys() - TestLives.cases.keys()))
def test_every_other_blueprint_lives_as_long(name: str) -> None:
    LifeCases().test_a_seed_learns_in_isolation_blends_in_and_becomes_part_of_the_model(CASES[name])


# Policies, given candidates of each topology

CANDIDATES = {
    Topology.CNN: ["conv_light"],
    Topology.SIGNAL: ["conv", "dilated"],
    Topology.VECTOR: ["mlp", "bottleneck"],
    Topology.VOLUME: ["conv", "depthwise"],
}
POLICIES: dict[str, Callable[[], Policy]] = {
    "plateau": lambda: PlateauPolicy(CANDIDATES, patience=1),
    "fixed-times": lambda: FixedTimesPolicy(CANDIDATES, epochs=[1]),
    "budget": lambda: BudgetPolicy(
        CANDIDATES,
        flops=10**7,
        costs=blueprint_costs(default_registry().blueprints, count_operations=True),
        patience=1,
    ),
    "bandit": lambda: BanditPolicy(CANDIDATES, patience=1),
    "tournament": lambda: TournamentPolicy(CANDIDATES, patience=1),
}


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("pack", list(HOSTS))
def test_a_policy_grows_what_fits_the_topology_of_the_slots(pack: str, policy: str) -> None:
    case = next(case for name, case in CASES.items() if name.startswith(pack))
    model, chooses = case.open(), POLICIES[policy]()
    for _ in range(4):
        model.step_epoch(1.0)
        if grown := [c for c in model.follow(chooses) if isinstance(c, Germinate)]:
            break
    assert {command.blueprint for command in grown} <= set(CANDIDATES[Topology(pack)])
    slots = [slot for slot in model.slots.values() if slot.state is not None]
    assert slots
    assert all(slot.state.blueprint_id.startswith(f"{pack}:") for slot in slots if slot.state is not None)
