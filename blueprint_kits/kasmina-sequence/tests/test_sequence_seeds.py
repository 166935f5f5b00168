"""What is true of every seed in the pack."""

from __future__ import annotations

from collections.abc import Callable

import kasmina_sequence
import pytest
import torch
from sequence_cases import SPECS, every_blueprint, features

from kasmina_core import BlueprintError, BlueprintRegistry, BlueprintSpec, Topology
from kasmina_core.testing import SeedCases, parametrize_blueprints
from kasmina_core.testing.seeds import fit, newborn


@parametrize_blueprints(kasmina_sequence)
def test_registration_check(blueprint: BlueprintSpec, check: Callable[[BlueprintSpec], None]) -> None:
    check(blueprint)


class TestSeeds(SeedCases):
    pack = kasmina_sequence
    topology = Topology.TRANSFORMER
    sources = "https://arxiv.org/abs/"
    largest = 1000.0


@pytest.mark.parametrize("name", ["moe", "rmsnorm_adapter", "swiglu"])
def test_position_wise_seeds_learn_a_product_of_two_features(name: str) -> None:
    x = features(8, batch=8)
    assert fit(newborn(SPECS[name], 8), x, x + x[..., :1] * x[..., 1:2]) < 0.5


def test_gau_learns_to_average_the_past() -> None:
    x = features(8, batch=8)
    past = x.cumsum(1) / torch.arange(1, 13).view(1, -1, 1)
    assert fit(newborn(SPECS["gau"], 8, causal=True), x, x + past) < 0.5


@every_blueprint
def test_a_single_feature_is_refused_with_the_reason_and_nothing_else_is(spec: BlueprintSpec) -> None:
    registry = BlueprintRegistry()
    registry.register(spec, pack="sequence")
    reason = r"does not take width 1: .*nothing but its sign; it takes 2 features or more"
    with pytest.raises(BlueprintError, match=reason):
        registry.create(f"sequence:{spec.name}", 1)
    with pytest.raises(ValueError, match=reason):
        spec.load_factory()(1)
    assert [dim for dim in range(1, 97) if spec.refusal(dim) is not None] == [1]


@every_blueprint
@pytest.mark.parametrize("dim", [0, -1, 8.0, None, True])
def test_a_width_that_is_no_positive_number_is_refused(spec: BlueprintSpec, dim: object) -> None:
    with pytest.raises(ValueError, match=rf"'{spec.name}'(?s:.*)given: +dim={dim!r}"):
        spec.load_factory()(dim)
