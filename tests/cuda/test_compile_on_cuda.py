"""Whole lives under torch.compile with Inductor, on a CUDA device. The CPU half of each claim is in tests/core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cuda_helpers import batch, grow_to, new_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kasmina_core import Incubation, SeedStage, tie_optimizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Dynamo makes an instance of an autograd.Function while it traces one.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # Inductor's own: other compilers' deprecations and advice on precision.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32:UserWarning"),
    # CUDA graph trees capture an empty graph when they begin.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_life_compiles_one_graph_a_forward_mode_and_computes_what_eager_does() -> None:
    model, eager = new_model(), new_model()
    counter = CompileCounterWithBackend("inductor")
    call = torch.compile(model, fullgraph=True, backend=counter)
    model.evaluate_with(lambda: F.cross_entropy(eager(batch()[0]), batch()[1], reduction="none"))
    x, y = batch()
    counts: dict[str, int] = {}

    def compare(name: str) -> None:
        before = counter.frame_count
        for m in (eager, model):
            m.zero_grad()
        expected, found = F.cross_entropy(eager(x), y), F.cross_entropy(call(x), y)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        expected.backward()
        found.backward()
        for (key, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=2e-2, atol=1e-3, msg=key)
        counts[name] = counter.frame_count - before

    compare("DORMANT")
    for stage in SeedStage:
        if not SeedStage.GERMINATED <= stage <= SeedStage.FOSSILIZED:
            continue
        for m in (eager, model):
            grow_to(m, "1", stage)
        compare(stage.name)
        if stage is SeedStage.BLENDING:
            for alpha in (0.1, 0.7, 1.0):
                for m in (eager, model):
                    m.slots["1"].set_alpha(alpha)
                compare(f"alpha {alpha}")
    once = {"DORMANT", "TRAINING", "BLENDING", "SHADOWING"}  # pass, straight-through, blend, seed
    assert counts == {name: int(name in once) for name in counts}


def test_a_second_seed_compiles_nothing_and_the_host_is_that_of_a_run_without() -> None:
    def train(grow: bool) -> tuple[list[Tensor], int]:
        model = new_model(embargo_epochs=0)
        counter = CompileCounterWithBackend("inductor")
        call = torch.compile(model, fullgraph=True, backend=counter)
        # Adam would blow the rounding of a gradient that is zero up to a whole step.
        optimizer = tie_optimizer(
            model, torch.optim.SGD(model.host_parameters(), 1e-2, momentum=0.9, fused=True)
        )
        x, y = batch()
        for step in range(8):
            if grow and step in (1, 5):
                grow_to(model, "1", SeedStage.TRAINING)
            optimizer.zero_grad()
            F.cross_entropy(call(x), y).backward()
            model.step()
            optimizer.step()
            if grow and step in (3, 6):
                model.cull("1")
                while model.slots["1"].state is not None:
                    model.step_epoch()
        return list(model.host_parameters()), counter.frame_count

    grown, graphs = train(grow=True)
    bare, _ = train(grow=False)
    assert graphs == 2
    # Another graph may sum in another order: close, where eager is equal.
    for found, expected in zip(grown, bare, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_counterfactual_incubation_compiles_its_pass_once() -> None:
    model = new_model(incubation=Incubation.COUNTERFACTUAL)
    counter = CompileCounterWithBackend("inductor")
    call = torch.compile(model, fullgraph=True, backend=counter)
    grow_to(model, "1", SeedStage.TRAINING)
    x, y = batch()
    for _ in range(3):
        F.cross_entropy(call(x), y).backward()
        model.incubate(lambda: F.cross_entropy(call(x), y))
    assert counter.frame_count == 2
    assert all(bool(p.grad.any()) for p in model.seed_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_under_autocast_in_each_forward_mode(dtype: torch.dtype) -> None:
    model = new_model()
    call = torch.compile(model, fullgraph=True)
    x, y = batch()
    for stage in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED):
        grow_to(model, "1", stage)
        with torch.autocast("cuda", dtype):
            loss = F.cross_entropy(call(x).float(), y)
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_captured_cuda_graphs_see_alpha_move() -> None:
    model = new_model()
    grow_to(model, "1", SeedStage.BLENDING)
    model.eval()
    call, (x, _) = torch.compile(model, fullgraph=True, mode="reduce-overhead"), batch()
    with torch.no_grad():
        for alpha in (0.2, 0.2, 0.2, 0.5, 0.9, 1.0):
            model.slots["1"].set_alpha(alpha)
            torch.testing.assert_close(call(x).clone(), model(x), rtol=1e-3, atol=1e-4)
