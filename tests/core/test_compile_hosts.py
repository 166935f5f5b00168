"""Under torch.compile(fullgraph=True) the bundled hosts, a plain module and GPT-2 live a whole life, in both ways."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compile_helpers import compiled_in_place, compiled_outside, graphs_per_stage
from kasmina_cnn import CNNHost
from kasmina_transformer import TransformerHost
from numeric_helpers import PERMISSIVE, VOCABULARY, cnn_model, images, registry, tokens
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from kasmina_core import GrowthConfig, MorphogeneticModel, SeedStage, tie_optimizer

# Dynamo makes an instance of an autograd.Function while it traces one.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Branching(nn.Module):
    """A host of one's own: two ways through it that meet again, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.left, self.right = nn.Linear(6, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU())
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.left(x) * self.scale + self.right(x)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=2, n_head=2, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config)
    forward = model.forward
    model.forward = lambda ids: forward(ids).logits
    return model


HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], str]] = {
    "cnn": (lambda: CNNHost(1, 3, n_blocks=3, base_channels=4), ("block2", "block3"), "conv"),
    "transformer": (
        lambda: TransformerHost(VOCABULARY, 8, n_layers=2, n_heads=2, max_len=8),
        ("block1", "block2"),
        "mlp",
    ),
    "plain": (Branching, ("left", "right"), "mlp"),
    "gpt2": (gpt2, ("transformer.h.0", "transformer.h.1"), "mlp"),
}


def grown_from(kind: str) -> tuple[MorphogeneticModel, Tensor, list[str], str]:
    build, wanted, blueprint = HOSTS[kind]
    x = images(2, 8) if kind == "cnn" else tokens(2, 6)
    host = build()
    names = None if kind in ("cnn", "transformer") else wanted
    model = MorphogeneticModel(
        host,
        names,
        example=x,
        registry=registry(),
        config=GrowthConfig(gates=PERMISSIVE, max_incubation_deviation=math.inf),
        causal=kind == "gpt2",
    )
    eager = MorphogeneticModel.forward
    model.evaluate_with(lambda: eager(model, x).flatten(1).mean(1))
    return model, x, list(model.slots), blueprint


@pytest.mark.parametrize(
    ("kind", "compiled", "lives"),
    [
        ("cnn", compiled_outside, 2),
        ("cnn", compiled_in_place, 1),
        ("transformer", compiled_outside, 1),
        ("transformer", compiled_in_place, 2),
        ("plain", compiled_outside, 1),
        pytest.param("gpt2", compiled_in_place, 1, marks=pytest.mark.slow),
    ],
)
def test_a_life_compiles_once_per_forward_mode(
    kind: str, compiled: Callable[..., Callable[..., Tensor]], lives: int
) -> None:
    model, x, slots, blueprint = grown_from(kind)
    counter = CompileCounter()
    call = compiled(model, counter)
    first = graphs_per_stage(model, lambda: call(x), counter, slots[0], blueprint)
    once = {"DORMANT", "TRAINING", "BLENDING", "SHADOWING"}  # pass, straight-through, blend, seed
    assert first == {stage: int(stage in once) for stage in first}
    if lives == 2:
        second = graphs_per_stage(model, lambda: call(x), counter, slots[1], blueprint)
        assert second == {stage: int(stage in once - {"DORMANT"}) for stage in second}


@pytest.mark.parametrize("kind", ["cnn", "transformer"])
def test_a_compiled_host_computes_what_eager_does_with_a_seed(kind: str) -> None:
    model, x, slots, blueprint = grown_from(kind)
    model.eval()
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(x), copy.deepcopy(model)(x))
    model.germinate(slots[0], blueprint)
    for stage in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.SHADOWING):
        if stage is SeedStage.SHADOWING:
            model.slots[slots[0]].set_alpha(1.0)
        assert model.advance_stage(slots[0])
        if stage is SeedStage.BLENDING:
            model.slots[slots[0]].set_alpha(0.3)
        torch.testing.assert_close(call(x), copy.deepcopy(model)(x))


def test_commands_on_the_wrapper_reach_the_model() -> None:
    model = cnn_model()
    wrapper: Any = torch.compile(model, fullgraph=True, backend="eager")
    optimizer = tie_optimizer(wrapper, torch.optim.SGD(wrapper.host_parameters(), 0.1))
    wrapper.germinate("norm", "conv")
    assert model.slots["norm"].stage is SeedStage.GERMINATED
    assert len(optimizer.param_groups) == 2
    assert wrapper.advance_stage("norm").passed
    wrapper.train()
    wrapper(images()).square().mean().backward()
    before = [p.clone() for p in wrapper.seed_parameters("norm")]
    wrapper.step()
    optimizer.step()
    assert not any(map(torch.equal, before, model.seed_parameters("norm")))
    wrapper.step_epoch(1.0)
    assert model.epoch == wrapper.epoch == 1
    assert wrapper.slots["norm"] is model.slots["norm"]
    assert "norm" in wrapper.summary_table()
    with wrapper.bypassed("norm"):
        bypassed = wrapper(images(seed=7))
    wrapper.eval()
    assert not model.training
    wrapper.train()
    assert torch.equal(bypassed, wrapper(images(seed=7))) or model.slots["norm"].stage > SeedStage.TRAINING
    wrapper.cull("norm")
    assert len(optimizer.param_groups) == 1
    assert wrapper.telemetry_records()[0].stage == "CULLED"
