"""Under torch.compile(fullgraph=True) a life costs one graph a forward mode, and computes what eager does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from compile_helpers import compiled_in_place, compiled_outside, graphs_per_stage
from numeric_helpers import (
    COUNTERFACTUAL,
    causal_model,
    cnn_model,
    gradients,
    grow_to,
    images,
    labels,
    scramble,
    tokens,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from kasmina_core import MorphogeneticModel, SeedStage

# Dynamo makes an instance of an autograd.Function while it traces one.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [("cnn", compiled_outside), ("cnn", compiled_in_place), ("transformer", compiled_outside)],
    ids=["cnn, torch.compile(model)", "cnn, model.compile()", "transformer, torch.compile(model)"],
)
def test_a_life_compiles_once_per_forward_mode_and_never_per_alpha(
    kind: str, compiled: Callable[..., Callable[..., Tensor]]
) -> None:
    if kind == "cnn":
        model, x, slot, blueprint = cnn_model(), images(), "norm", "conv"
    else:
        model, x, slot, blueprint = causal_model(), tokens(), "blocks_0", "mlp"
    # The gates' evaluator runs the eager model here: what is counted is the training forward.
    eager = MorphogeneticModel.forward
    model.evaluate_with(lambda: eager(model, x).flatten(1).mean(1))
    counter = CompileCounter()
    call = compiled(model, counter)
    counts = graphs_per_stage(model, lambda: call(x), counter, slot, blueprint)
    once = {"DORMANT", "TRAINING", "BLENDING", "SHADOWING"}  # pass, straight-through, blend, seed
    assert counts == {stage: int(stage in once) for stage in counts}


def test_a_second_seed_of_the_same_blueprint_compiles_nothing_new() -> None:
    model = cnn_model(embargo_epochs=0)
    counter = CompileCounter()
    call = compiled_outside(model, counter)
    for life in range(3):
        call(images())
        model.germinate("norm", "conv")
        model.advance_stage("norm")
        for _ in range(2):
            call(images()).sum().backward()
        model.cull("norm")
        call(images())
        while model.slots["norm"].state is not None:
            model.step_epoch()
        if life == 0:
            after_one_life = counter.frame_count
    assert after_one_life == 2
    assert counter.frame_count == after_one_life


def test_graphs_grow_with_the_slots_that_live_even_where_the_evaluator_is_compiled_too() -> None:
    model, counter, counts = cnn_model(slots=("norm", "norm2")), CompileCounter(), []
    with torch._dynamo.config.patch(recompile_limit=8 * len(model.slots)):
        model.compile(fullgraph=True, backend=counter)
        for slot in model.slots:
            before = counter.frame_count
            graphs_per_stage(model, lambda: model(images()), counter, slot, "conv")
            model.eval()(images())
            model.train()
            counts.append(counter.frame_count - before)
    assert all(slot.stage is SeedStage.FOSSILIZED for slot in model.slots.values())
    assert max(counts) <= 8  # 4 forward modes in training, and as many without gradients


def test_counterfactual_incubation_compiles_one_graph_for_its_pass() -> None:
    model = cnn_model(incubation=COUNTERFACTUAL)
    counter = CompileCounter()
    call = compiled_outside(model, counter)
    call(images())
    grow_to(model, "norm", SeedStage.TRAINING)
    call(images())
    assert counter.frame_count == 1  # the host's pass is the one it was
    for _ in range(3):
        model.incubate(lambda: F.cross_entropy(call(images()), labels()))
        call(images())
    assert counter.frame_count == 2
    assert all(bool(p.grad.any()) for p in model.seed_parameters())


@pytest.mark.parametrize("kind", ["cnn", "transformer"])
def test_compiled_outputs_and_gradients_are_those_of_eager(kind: str) -> None:
    def build() -> MorphogeneticModel:
        return cnn_model() if kind == "cnn" else causal_model()

    def loss_of(call: Callable[..., Tensor]) -> Tensor:
        if kind == "cnn":
            return F.cross_entropy(call(images()), labels())
        return F.cross_entropy(call(tokens())[:, :-1].mT, tokens()[:, 1:])

    slot, blueprint = ("norm", "conv") if kind == "cnn" else ("blocks.0", "mlp")
    eager, model = build(), build()
    call = compiled_outside(model, "aot_eager")
    for stage in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.SHADOWING):
        for m in (eager, model):
            if m.slots[slot].seed is None:
                grow_to(m, slot, stage, blueprint)
                scramble(m.slots[slot].seed)
            while m.slots[slot].stage is not stage:
                if m.slots[slot].stage is SeedStage.BLENDING:
                    m.slots[slot].set_alpha(1.0)
                assert m.advance_stage(slot)
            if stage is SeedStage.BLENDING:
                m.slots[slot].set_alpha(0.3)
            m.zero_grad()
        expected, found = loss_of(eager), loss_of(call)
        torch.testing.assert_close(found, expected)
        expected.backward()
        found.backward()
        for name, gradient in gradients(eager).items():
            torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-4, atol=1e-6)


def test_training_stays_bit_identical_to_the_compiled_host() -> None:
    def outcome(module: nn.Module, host: nn.Module) -> list[Tensor]:
        loss = F.cross_entropy(torch.compile(module, fullgraph=True, backend="aot_eager")(images()), labels())
        loss.backward()
        return [loss.detach(), *(p.grad for p in host.parameters())]

    model = cnn_model()
    grow_to(model, "norm", SeedStage.TRAINING)
    bare = cnn_model().detach_slots()
    for found, expected in zip(outcome(model, model.host), outcome(bare, bare), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.FOSSILIZED], ids=lambda s: s.name)
def test_bypassing_and_measuring_work_on_a_model_compiled_in_place(stage: SeedStage) -> None:
    model = cnn_model()
    scramble(grow_to(model, "norm", stage).seed)
    eager = model.measure("norm", lambda: evaluate(model))
    model.compile(fullgraph=True, backend="eager")
    compiled = model.measure("norm", lambda: evaluate(model))
    assert compiled.gain == pytest.approx(eager.gain, rel=1e-4, abs=1e-7)
    assert compiled.deviation == pytest.approx(eager.deviation, rel=1e-4)
    with model.bypassed("norm"):
        without = evaluate(model.eval())
    assert float(without.mean()) == pytest.approx(eager.loss_without, rel=1e-5)


def evaluate(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(images(8)), labels(8), reduction="none")
