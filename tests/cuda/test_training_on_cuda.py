"""Optimisers, precisions and memory on a CUDA device. The CPU half of each claim is in tests/core."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_helpers import ACTIVE_STAGES, batch, both_incubations, grow_to, loss_of, new_host, new_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from kasmina_core import Incubation, MorphogeneticModel, SeedStage, tie_optimizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

kinds_of_adamw = pytest.mark.parametrize("kind", ["foreach", "fused"])


def adamw(parameters: list[nn.Parameter], kind: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-2, **{kind: True})


def train_step(
    model: MorphogeneticModel,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor] | None = None,
) -> Tensor:
    closure = loss if loss is not None else lambda: loss_of(model)
    optimizer.zero_grad()
    found = closure()
    found.backward()
    model.incubate(closure)
    model.step()
    optimizer.step()
    return found.detach()


@kinds_of_adamw
@both_incubations
def test_a_cull_gives_the_memory_of_seed_gradient_and_optimiser_state_back(
    kind: str, incubation: Incubation
) -> None:
    model = new_model(incubation=incubation)
    optimizer = tie_optimizer(model, adamw(model.host_parameters(), kind))

    def allocated() -> int:
        optimizer.zero_grad()
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def live(slot: str) -> int:
        grow_to(model, slot, SeedStage.TRAINING)
        for _ in range(2):
            train_step(model, optimizer)
        held = allocated()
        model.cull(slot)
        return held

    live("4")  # libraries take their workspaces at first use
    before = allocated()
    held = live("1")
    assert held > before
    assert allocated() == before


@kinds_of_adamw
@both_incubations
def test_a_seed_with_its_own_parameter_group_leaves_no_trace_once_culled(
    kind: str, incubation: Incubation
) -> None:
    def train(grow: bool) -> list[Tensor]:
        model = new_model(new_host(dropout=0.3), incubation=incubation)
        torch.manual_seed(7)
        optimizer, losses = tie_optimizer(model, adamw(model.host_parameters(), kind)), []
        for step in range(6):
            if grow and step == 1:
                grow_to(model, "1", SeedStage.TRAINING)
            losses.append(train_step(model, optimizer))
            if grow and step == 4:
                model.measure("1")
                model.cull("1")
        state = optimizer.state_dict()["state"]
        kept = [t for of in state.values() for t in of.values() if isinstance(t, Tensor)]
        return [*losses, *model.host.parameters(), *model.host.buffers(), *kept, torch.cuda.get_rng_state()]

    assert all(map(torch.equal, train(grow=True), train(grow=False)))


@kinds_of_adamw
def test_moments_are_kept_when_a_seed_is_fossilised(kind: str) -> None:
    model = new_model()
    optimizer = tie_optimizer(model, adamw(model.host_parameters(), kind))
    for stage in ACTIVE_STAGES:
        grow_to(model, "1", stage)
        train_step(model, optimizer)
    steps = {int(optimizer.state[p]["step"]) for p in model.seed_parameters()}
    assert steps == {len(ACTIVE_STAGES)}
    assert {optimizer.state[p]["exp_avg"].device.type for p in model.seed_parameters()} == {"cuda"}


@both_incubations
def test_a_seed_that_overflows_half_precision_leaves_the_host_stepping(incubation: Incubation) -> None:
    model = new_model(incubation=incubation)
    grow_to(model, "1", SeedStage.TRAINING)
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.fill_(6e4)  # the largest number in half precision is 65504
    host, seed = (
        torch.optim.SGD(p, 0.05, foreach=True) for p in (model.host_parameters(), model.seed_parameters())
    )
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    hosts, seeds = (
        [p.detach().clone() for p in of] for of in (model.host_parameters(), model.seed_parameters())
    )

    def closure() -> Tensor:
        with torch.autocast("cuda", torch.float16):
            return loss_of(model)

    scaler.scale(closure()).backward()
    model.incubate(closure, scaler)
    scaler.step(host)
    scaler.step(seed)
    scaler.update()
    assert scaler.get_scale() < 256.0
    assert all(map(torch.equal, model.seed_parameters(), seeds))
    assert all(bool(p.isfinite().all()) for p in model.host_parameters())
    changed = [not torch.equal(p, before) for p, before in zip(model.host_parameters(), hosts, strict=True)]
    assert sum(changed) >= len(changed) - 1  # a bias before BatchNorm has no gradient


@pytest.mark.parametrize("stage", ACTIVE_STAGES, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_in_each_stage_gives_features_of_its_dtype_and_finite_gradients(
    stage: SeedStage, dtype: torch.dtype
) -> None:
    model = new_model()
    grow_to(model, "1", stage)
    seen: list[Tensor] = []
    model.slots["1"].register_forward_hook(lambda _m, args, out: seen.extend([args[0], out]))
    with torch.autocast("cuda", dtype):
        loss_of(model).backward()
    into, out = seen[-2:]
    assert out.dtype is into.dtype
    reached = [p for p in model.parameters() if p.grad is not None]
    assert len(reached) == len(list(model.parameters()))
    assert all(bool(p.grad.isfinite().all()) for p in reached)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_is_bit_identical_to_the_host_under_autocast_and_in_channels_last(
    dtype: torch.dtype | None, memory: torch.memory_format
) -> None:
    bare, model = new_host().cuda().to(memory_format=memory), new_model().to(memory_format=memory)
    for slot in model.slots:
        grow_to(model, slot, SeedStage.TRAINING)
    x, y = batch()
    outputs = []
    for module in (bare, model):
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            outputs.append(module(x.to(memory_format=memory)))
        F.cross_entropy(outputs[-1].float(), y).backward()
    assert torch.equal(*outputs)
    for (name, expected), found in zip(bare.named_parameters(), model.host_parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad), name


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.filterwarnings("ignore:.*ynchronization debug mode:UserWarning")
@both_incubations
@pytest.mark.parametrize("stage", ACTIVE_STAGES, ids=lambda s: s.name)
def test_a_training_step_waits_for_the_device_nowhere(stage: SeedStage, incubation: Incubation) -> None:
    model = new_model(incubation=incubation)
    optimizer = tie_optimizer(model, adamw(model.host_parameters(), "foreach"))
    grow_to(model, "1", stage)
    x, y = batch()

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    train_step(model, optimizer, loss)  # libraries wait at first use
    model.slots["1"].step_epoch()  # the first step of an epoch begins the sums of gradient norms
    with no_synchronisation():
        for _ in range(3):
            train_step(model, optimizer, loss)


@pytest.mark.filterwarnings("ignore:.*ynchronization debug mode:UserWarning")
def test_a_step_of_the_ramp_does_not_wait_for_the_device() -> None:
    model = new_model(ramp_unit="step", ramp_steps=50)
    optimizer = tie_optimizer(model, adamw(model.host_parameters(), "fused"))
    grow_to(model, "1", SeedStage.BLENDING)
    x, y = batch()
    train_step(model, optimizer, lambda: F.cross_entropy(model(x), y))
    alpha = model.slots["1"].alpha
    with no_synchronisation():
        train_step(model, optimizer, lambda: F.cross_entropy(model(x), y))
    assert model.slots["1"].alpha > alpha
    assert float(model.slots["1"].alpha_buffer) == pytest.approx(model.slots["1"].alpha)


def test_gradient_norms_are_those_of_the_device() -> None:
    model = new_model()
    optimizer = tie_optimizer(model, torch.optim.SGD(model.host_parameters(), 0.0))
    grow_to(model, "1", SeedStage.TRAINING)
    train_step(model, optimizer)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.seed_parameters()))
    state = model.slots["1"].state
    assert state is not None
    model.step_epoch()
    assert state.metrics.gradient_norm == pytest.approx(norm, rel=1e-5)


def test_evidence_is_that_of_the_same_samples_with_and_without_the_seed() -> None:
    model = new_model()
    grow_to(model, "1", SeedStage.TRAINING)
    evidence = model.measure("1")
    seed = model.slots["1"].seed
    assert evidence is not None
    assert seed is not None
    host, (x, y) = copy_with_seed(model, seed), batch()
    with torch.no_grad():
        model.eval()
        without = F.cross_entropy(model(x), y)
        grown = F.cross_entropy(host.eval()(x), y)
    assert evidence.loss_without == pytest.approx(float(without), rel=1e-5)
    assert evidence.loss_with == pytest.approx(float(grown), rel=1e-5)
    assert evidence.samples == len(x)


def copy_with_seed(model: MorphogeneticModel, seed: nn.Module) -> nn.Sequential:
    layers = list(new_host().cuda())
    host = nn.Sequential(*layers[:2], seed, *layers[2:])
    rest = {k: v for k, v in model.host.state_dict().items() if not k.startswith("kasmina")}
    nn.Sequential(*layers).load_state_dict(rest)
    return host


@pytest.mark.parametrize(
    "stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED], ids=lambda s: s.name
)
def test_gradient_checkpointing_gives_the_same_gradients(stage: SeedStage) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return (
                checkpoint_sequential(self, 3, x, use_reentrant=False)
                if self.training
                else super().forward(x)
            )

    plain = new_model(new_host(dropout=0.3))
    saving = new_model(Checkpointed(*new_host(dropout=0.3)))
    gradients = []
    for model in (plain, saving):
        grow_to(model, "1", stage)
        torch.manual_seed(3)
        loss_of(model).backward()
        gradients.append([p.grad for p in model.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("stage", [SeedStage.GERMINATED, *ACTIVE_STAGES], ids=lambda s: s.name)
def test_a_run_continued_from_a_saved_state_is_the_uninterrupted_one(
    stage: SeedStage, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for deterministic products

    def begin() -> tuple[MorphogeneticModel, torch.optim.Optimizer]:
        model = new_model(new_host(dropout=0.3))
        return model, tie_optimizer(model, adamw(model.host_parameters(), "fused"))

    torch.use_deterministic_algorithms(True)
    try:
        model, optimizer = begin()
        train_step(model, optimizer)
        grow_to(model, "1", stage)
        train_step(model, optimizer)
        torch.save(
            (model.state_dict(), optimizer.state_dict(), torch.get_rng_state(), torch.cuda.get_rng_state()),
            tmp_path / "saved.pt",
        )
        expected = [train_step(model, optimizer) for _ in range(3)]
        fresh, other = begin()
        weights, moments, cpu, cuda = torch.load(tmp_path / "saved.pt", weights_only=True, map_location="cpu")
        fresh.load_state_dict(weights)
        other.load_state_dict(moments)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state(cuda)
        found = [train_step(fresh, other) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == expected
    assert all(map(torch.equal, fresh.parameters(), model.parameters()))
    assert fresh.slots["1"].stage is stage


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_device_than_the_current_one_leaves_both_generators_alone() -> None:
    states = [torch.cuda.get_rng_state(device) for device in (0, 1)]
    host = new_host().to("cuda:1")
    x, y = (t.to("cuda:1") for t in batch())
    model = new_model(host, device="cuda:1")
    model.evaluate_with(lambda: F.cross_entropy(model(x), y, reduction="none"))
    grow_to(model, "1", SeedStage.TRAINING)
    model.slots["1"].check_isolation()
    model.measure("1")
    for device, state in zip((0, 1), states, strict=True):
        assert torch.equal(torch.cuda.get_rng_state(device), state)
