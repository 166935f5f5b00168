"""What is true of every seed in the pack."""

from __future__ import annotations

from collections.abc import Callable

import kasmina_vision
import pytest
from vision_cases import SPECS, every_blueprint, features

from kasmina_core import BlueprintError, BlueprintRegistry, BlueprintSpec, Topology
from kasmina_core.testing import SeedCases, parametrize_blueprints
from kasmina_core.testing.seeds import fit, newborn


@parametrize_blueprints(kasmina_vision)
def test_registration_check(blueprint: BlueprintSpec, check: Callable[[BlueprintSpec], None]) -> None:
    check(blueprint)


class TestSeeds(SeedCases):
    pack = kasmina_vision
    topology = Topology.CNN
    sources = "https://arxiv.org/abs/"


@pytest.mark.parametrize("name", ["convnext", "inverted_residual"])
def test_convolutions_learn_to_look_at_the_pixel_beside(name: str) -> None:
    x = features(8, batch=8)
    assert fit(newborn(SPECS[name], 8), x, x + x.roll(1, dims=3)) < 0.5


@pytest.mark.parametrize(("dim", "kept"), [(1, "nothing of one channel"), (2, "which is the larger")])
def test_convnext_refuses_widths_at_which_its_kernel_could_not_learn(dim: int, kept: str) -> None:
    registry = BlueprintRegistry()
    registry.register(SPECS["convnext"], pack="vision")
    reason = rf"does not take width {dim}: .*{kept}.* takes 3 channels or more"
    with pytest.raises(BlueprintError, match=reason):
        registry.create("vision:convnext", dim)
    with pytest.raises(ValueError, match=reason):
        SPECS["convnext"].load_factory()(dim)


def test_all_other_widths_are_accepted() -> None:
    refused = [(name, d) for name, spec in SPECS.items() for d in range(1, 97) if spec.refusal(d) is not None]
    assert refused == [("convnext", 1), ("convnext", 2)]


@every_blueprint
@pytest.mark.parametrize("dim", [0, -1, 8.0, None, True])
def test_a_width_that_is_no_positive_number_is_refused(spec: BlueprintSpec, dim: object) -> None:
    with pytest.raises(ValueError, match=rf"'{spec.name}'(?s:.*)given: +dim={dim!r}"):
        spec.load_factory()(dim)
