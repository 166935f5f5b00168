"""Hosts that hold features in another order than their topology: seeds see the topology's, and nothing else differs."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from compile_helpers import graphs_per_stage
from numeric_helpers import ACTIVE_STAGES, PERMISSIVE, generator, grow_to, same_bits, scramble
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    GrowthConfig,
    HostError,
    Incubation,
    InjectionPoint,
    MorphogeneticModel,
    SeedStage,
    Topology,
    export_model,
    load_checkpoint,
    save_checkpoint,
)

DIM = 4
SIZES = (5, 3, 2)
LAYOUTS = [
    (Topology.CNN, "bhwc"),
    (Topology.CNN, "hwbc"),
    (Topology.TRANSFORMER, "tbd"),
    (Topology.TRANSFORMER, "bdt"),
    (Topology.VECTOR, "db"),
    (Topology.SIGNAL, "tbc"),
    (Topology.VOLUME, "bdhwc"),
]
each_layout = pytest.mark.parametrize(
    ("topology", "layout"), LAYOUTS, ids=[f"{t.value}-{layout}" for t, layout in LAYOUTS]
)


def per_feature(topology: Topology) -> tuple[int, ...]:
    """The shape of one value per feature, for features in the topology's order."""
    return topology.shape(DIM)[1:]


class Host(nn.Module):
    """Takes and returns features in the topology's order; holds them as ``layout`` at ``features``."""

    def __init__(self, topology: Topology, layout: str) -> None:
        super().__init__()
        self.there = tuple(topology.axes.index(axis) for axis in layout)
        self.back = topology.order(layout)
        self.scale = nn.Parameter(torch.randn(per_feature(topology), generator=generator(1)))
        self.features = nn.Identity()
        self.behind = nn.Identity()
        self.shift = nn.Parameter(torch.randn(per_feature(topology), generator=generator(2)))

    def forward(self, x: Tensor) -> Tensor:
        held = (x * self.scale).tanh().permute(self.there).contiguous()
        held = self.behind(self.features(held))
        return held.permute(self.back) + self.shift


class Mix(nn.Module):
    """``x + w x + v mean(x)``: mixes all values within a sample, or within a position of a sequence, and no samples."""

    def __init__(self, dim: int, topology: Topology) -> None:
        super().__init__()
        self.within = (-1,) if topology.sequence_axis else tuple(range(1, topology.ndim))
        self.own = nn.Parameter(torch.full(topology.shape(dim)[1:], 0.1))
        self.mean = nn.Parameter(torch.full(topology.shape(dim)[1:], 0.2))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.own * x + self.mean * x.mean(self.within, keepdim=True)
        return y.contiguous()  # in the topology's order, as a convolution or a linear layer returns it


def features(topology: Topology, batch: int = 3, seed: int = 0) -> Tensor:
    shape = topology.shape(DIM, batch, SIZES[: topology.ndim - 2])
    return torch.randn(shape, generator=generator(seed))


def make_model(topology: Topology, layout: str, **config: object) -> MorphogeneticModel:
    registry = BlueprintRegistry()
    registry.register(
        BlueprintSpec("mix", topology, partial(Mix, topology=topology), lambda dim: 2 * dim), pack="mine"
    )
    model = MorphogeneticModel(
        Host(topology, layout),
        [InjectionPoint("features", "features", DIM, topology, layout=layout)],
        example=features(topology),
        registry=registry,
        config=GrowthConfig(**{"gates": PERMISSIVE} | config),
    )
    held_out = features(topology, 6, seed=5)
    model.evaluate_with(lambda: model(held_out).square().flatten(1).mean(1))
    return model


def pair(topology: Topology, layout: str, **config: object) -> tuple[MorphogeneticModel, MorphogeneticModel]:
    """A model whose host holds features as ``layout``, and one with the same weights that holds them as seeds do."""
    return make_model(topology, layout, **config), make_model(topology, topology.layout, **config)


@each_layout
def test_a_point_tells_its_shape_in_the_order_of_the_topology(topology: Topology, layout: str) -> None:
    slot = make_model(topology, layout).slots["features"]
    assert slot.shape == tuple(features(topology).shape)
    assert slot.point.axes == layout


@each_layout
@pytest.mark.parametrize("stage", ACTIVE_STAGES)
def test_every_stage_computes_what_it_does_in_the_topologys_order(
    topology: Topology, layout: str, stage: SeedStage
) -> None:
    results = []
    for model in pair(topology, layout):
        slot = grow_to(model, "features", stage, "mix", alpha=0.25)
        scramble(slot.seed)
        seen: list[Tensor] = []
        model.host.behind.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        model.train()
        x = features(topology, seed=7).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        assert seen[0].is_contiguous()
        assert slot.seed.own.grad is not None
        results.append([y, x.grad, *(p.grad for p in model.parameters())])
    for turned, plain in zip(*results, strict=True):
        torch.testing.assert_close(turned, plain)


@each_layout
def test_training_leaves_output_and_gradients_of_the_host_bit_identical(
    topology: Topology, layout: str
) -> None:
    model, host = make_model(topology, layout), Host(topology, layout)
    scramble(grow_to(model, "features", SeedStage.TRAINING, "mix").seed)
    x = features(topology, seed=3)
    y, bare = model.train()(x), host(x)
    assert same_bits(y, bare)
    y.square().sum().backward()
    bare.square().sum().backward()
    assert all(
        same_bits(p.grad, q.grad) for p, q in zip(model.host_parameters(), host.parameters(), strict=True)
    )


@each_layout
def test_evidence_is_that_of_the_topologys_order(topology: Topology, layout: str) -> None:
    found = []
    for model in pair(topology, layout, incubation=Incubation.COUNTERFACTUAL):
        slot = grow_to(model, "features", SeedStage.TRAINING, "mix")
        scramble(slot.seed)
        model.train()
        model.incubate(lambda model=model: model(features(topology)).square().mean())
        evidence, reading = model.measure("features"), slot.check_isolation()
        assert evidence is not None
        assert reading is not None
        assert reading.leak == 0.0
        gain = model.screen()["features"].gain
        found.append([evidence.gain, gain, slot.check_deviation(), slot.seed.own.grad])
    assert any(found[0][3].flatten() != 0.0)
    torch.testing.assert_close(found[0], found[1])


@each_layout
def test_a_sample_is_alone_in_its_batch(topology: Topology, layout: str) -> None:
    model = make_model(topology, layout)
    slot = grow_to(model, "features", SeedStage.FOSSILIZED, "mix")
    scramble(slot.seed)
    both = features(topology, 2)
    torch.testing.assert_close(model(both)[:1], model(both[:1]))
    other = torch.cat([both[:1], -3.0 * both[1:]])
    assert torch.equal(model(other)[:1], model(both)[:1])


@each_layout
def test_the_gradient_of_an_incubating_seed_is_bounded_per_sample(topology: Topology, layout: str) -> None:
    gradients = []
    for model in pair(topology, layout, max_deviation=0.1):
        slot = grow_to(model, "features", SeedStage.TRAINING, "mix")
        scramble(slot.seed, std=1.0)
        x = features(topology, seed=3)
        x[0] *= 100.0  # a bound over the whole batch would hide the others
        model.train()(x).square().sum().backward()
        gradients.append([p.grad for p in slot.seed_parameters()])
        assert math.isfinite(slot.check_deviation())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED])
def test_a_checkpoint_continues_in_a_fresh_model(stage: SeedStage, tmp_path: Path) -> None:
    model = make_model(Topology.TRANSFORMER, "tbd")
    scramble(grow_to(model, "features", stage, "mix", alpha=0.25).seed)
    save_checkpoint(tmp_path / "run", model)
    fresh = make_model(Topology.TRANSFORMER, "tbd")
    load_checkpoint(tmp_path / "run", fresh)
    x = features(Topology.TRANSFORMER, seed=4)
    assert fresh.slots["features"].stage is stage
    assert torch.equal(fresh.eval()(x), model.eval()(x))


@each_layout
def test_a_fossil_is_exported_in_the_hosts_layout(topology: Topology, layout: str) -> None:
    model = make_model(topology, layout)
    scramble(grow_to(model, "features", SeedStage.FOSSILIZED, "mix").seed)
    x = features(topology, 2, seed=6)
    exported = export_model(model, features(topology))
    assert torch.equal(exported.eval()(x), model.eval()(x))


# Dynamo instantiates torch.autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("topology", "layout"), [(Topology.TRANSFORMER, "tbd"), (Topology.CNN, "bhwc")])
def test_a_life_compiles_as_many_graphs_as_in_the_topologys_order(topology: Topology, layout: str) -> None:
    counts = []
    for model in pair(topology, layout):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        x = features(topology)
        counts.append(graphs_per_stage(model, lambda: compiled(x), counter, "features", "mix"))  # noqa: B023
    assert counts[0] == counts[1]


def test_a_declared_point_that_does_not_fit_is_refused_with_both_shapes() -> None:
    host, x = Host(Topology.TRANSFORMER, "tbd"), features(Topology.TRANSFORMER)
    with pytest.raises(
        HostError, match=r"declared: transformer \(d, b, t\), width 4\n    found:    features \(5, 3, 4\)"
    ):
        MorphogeneticModel(
            host, [InjectionPoint("x", "features", DIM, Topology.TRANSFORMER, layout="dbt")], example=x
        )


@pytest.mark.parametrize("layout", ["", "bh", "bhwd", "bchwc", "BCHW"])
def test_a_layout_of_other_axes_is_refused(layout: str) -> None:
    with pytest.raises(HostError, match=r"Injection point 'x': .* is not a layout of cnn: .*'bchw'"):
        InjectionPoint("x", "features", DIM, Topology.CNN, layout=layout)
