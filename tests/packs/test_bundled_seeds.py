"""What is true of every seed in the bundled packs."""

from __future__ import annotations

import warnings

import kasmina_cnn
import kasmina_signal
import kasmina_transformer
import kasmina_vector
import kasmina_volume
import pytest
import torch
from pack_cases import PACKS, SPECS, every_blueprint

from kasmina_core import BlueprintError, BlueprintRegistry, BlueprintSpec, Topology
from kasmina_core.testing import SeedCases
from kasmina_core.testing.seeds import accepted_widths, features, fit, newborn


class TestConvolutions(SeedCases):
    pack = kasmina_cnn
    topology = Topology.CNN


class TestSignals(SeedCases):
    pack = kasmina_signal
    topology = Topology.SIGNAL


class TestTransformers(SeedCases):
    pack = kasmina_transformer
    topology = Topology.TRANSFORMER


class TestVectors(SeedCases):
    pack = kasmina_vector
    topology = Topology.VECTOR


class TestVolumes(SeedCases):
    pack = kasmina_volume
    topology = Topology.VOLUME


@every_blueprint
@pytest.mark.parametrize("dim", [48, 64])
def test_declared_size_is_the_size_that_fvcore_counts(spec: BlueprintSpec, dim: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")  # fvcore calls it on import
        from fvcore.nn import parameter_count
    assert spec.declared_params(dim) == parameter_count(newborn(spec, dim))[""]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cnn:block", {}),
        ("cnn:block", {"copies": 3}),
        ("cnn:bottleneck", {"reduction": 1}),  # eight independent channels do not fit through a waist of four
        ("cnn:conv_heavy", {}),
        ("cnn:conv_light", {}),
        ("cnn:depthwise", {}),
        ("signal:conv", {}),
        ("signal:depthwise", {}),
        ("signal:dilated", {"dilation": 1}),
        ("volume:bottleneck", {"reduction": 1}),
        ("volume:conv", {}),
        ("volume:depthwise", {}),
    ],
)
def test_convolutions_learn_to_look_at_the_position_beside(name: str, options: dict[str, int]) -> None:
    spec = SPECS[name]
    x = features(spec, 8, batch=8)
    assert fit(newborn(spec, 8, **options), x, x + x.roll(1, dims=-1), steps=80) < 0.5


@pytest.mark.parametrize("name", ["transformer:attention", "transformer:block"])
def test_attention_learns_to_average_the_past(name: str) -> None:
    spec = SPECS[name]
    x = features(spec, 8, batch=8, size=(3, 2))
    past = x.cumsum(1) / torch.arange(1, 7).view(1, -1, 1)
    assert fit(newborn(spec, 8, causal=True), x, x + past, steps=80) < 0.5


@pytest.mark.parametrize("pack", list(PACKS))
def test_declarations_have_the_packs_topology_and_come_sorted(pack: str) -> None:
    specs = list(PACKS[pack].kasmina_blueprints())
    assert {spec.topology for spec in specs} == {Topology(pack)}
    assert [spec.name for spec in specs] == sorted({spec.name for spec in specs})


def test_bundled_ids_are_these() -> None:
    assert list(SPECS) == [
        "cnn:attention",
        "cnn:block",
        "cnn:bottleneck",
        "cnn:conv_enhance",
        "cnn:conv_heavy",
        "cnn:conv_light",
        "cnn:depthwise",
        "cnn:norm",
        "signal:bottleneck",
        "signal:conv",
        "signal:depthwise",
        "signal:dilated",
        "signal:norm",
        "transformer:attention",
        "transformer:block",
        "transformer:lora",
        "transformer:mlp",
        "transformer:norm",
        "vector:bottleneck",
        "vector:mlp",
        "vector:norm",
        "volume:bottleneck",
        "volume:conv",
        "volume:depthwise",
        "volume:norm",
    ]


# Widths that are refused


@every_blueprint
def test_every_width_but_one_is_accepted_up_to_96(spec: BlueprintSpec) -> None:
    assert set(range(2, 97)) <= set(accepted_widths(spec))


REFUSED = [
    "cnn:bottleneck",
    "signal:conv",
    "signal:depthwise",
    "signal:norm",
    "transformer:attention",
    "transformer:block",
    "transformer:mlp",
    "transformer:norm",
    "vector:mlp",
    "vector:norm",
    "volume:bottleneck",
]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_width_is_refused_with_the_reason(name: str) -> None:
    registry = BlueprintRegistry()
    registry.register(SPECS[name], pack=name.partition(":")[0])
    with pytest.raises(
        BlueprintError, match=rf"'{name}' does not take width 1: .* takes 2 (channels|features)"
    ):
        registry.create(name, 1)
    with pytest.raises(ValueError, match=r"does not take width 1: .* takes 2 "):
        SPECS[name].load_factory()(1)


def test_all_other_blueprints_take_width_one() -> None:
    assert [name for name, spec in SPECS.items() if spec.refusal(1) is not None] == REFUSED
