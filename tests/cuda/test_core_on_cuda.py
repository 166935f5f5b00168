"""What the core promises, on a CUDA device. The CPU half of each claim is in tests/core."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cuda_helpers import ACTIVE_STAGES, batch, both_incubations, grow_to, loss_of, new_host, new_model
from torch import Tensor, nn

from kasmina_core import GerminationError, Incubation, SeedStage, straight_through, tie_optimizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@both_incubations
def test_a_whole_life_on_the_device(incubation: Incubation) -> None:
    model = new_model(incubation=incubation)
    optimizer = tie_optimizer(model, torch.optim.Adam(model.host_parameters(), 1e-2))
    for stage in [SeedStage.GERMINATED, *ACTIVE_STAGES]:
        grow_to(model, "1", stage)
        assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
        optimizer.zero_grad()
        loss_of(model).backward()
        model.incubate(lambda: loss_of(model))
        model.step()
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        if stage is SeedStage.TRAINING:
            assert model.slots["1"].check_isolation().leak == 0.0
    assert model.slots["1"].stage is SeedStage.FOSSILIZED


@both_incubations
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_training_stage_is_bit_identical_to_the_host(dtype: torch.dtype, incubation: Incubation) -> None:
    bare, model = new_host().to("cuda", dtype), new_model(incubation=incubation).to(dtype)
    for slot in model.slots:
        grow_to(model, slot, SeedStage.TRAINING)
    x, y = batch()
    for module in (bare, model):
        F.cross_entropy(module(x.to(dtype)), y).backward()
    for (name, expected), found in zip(bare.named_parameters(), model.host_parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_straight_through_returns_the_host_bit_for_bit(dtype: torch.dtype) -> None:
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.5, 6e-8], dtype=dtype, device="cuda")
    host, seed = (t[..., None] for t in torch.meshgrid(odd, odd, indexing="ij"))
    for s in (seed, torch.full_like(seed, torch.nan)):
        assert torch.equal(straight_through(host, s).view(torch.uint8), host.contiguous().view(torch.uint8))


@pytest.mark.parametrize("stage", ACTIVE_STAGES, ids=lambda s: s.name)
def test_moving_a_grown_model_to_the_device_and_back_moves_the_seed(stage: SeedStage) -> None:
    model = new_model(device="cpu")
    grow_to(model, "1", stage)
    x, y = batch("cpu")
    expected = model.eval()(x)
    model.to("cuda")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
    torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    model.train()
    F.cross_entropy(model(x.cuda()), y.cuda()).backward()
    if stage is SeedStage.TRAINING:
        assert model.slots["1"].check_isolation().leak == 0.0
    model.cpu()
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert bool(model(x).isfinite().all())
    model.to("cuda")
    grow_to(model, "4", SeedStage.TRAINING)  # a seed germinated after the move is where the host is
    assert {p.device.type for p in model.seed_parameters()} == {"cuda"}


def test_state_saved_on_the_device_loads_on_the_cpu() -> None:
    model = new_model()
    grow_to(model, "1", SeedStage.FOSSILIZED)
    fresh = new_model(device="cpu")
    fresh.load_state_dict(model.state_dict())
    assert {t.device.type for t in fresh.parameters()} == {"cpu"}
    x, _ = batch("cpu")
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x.cuda()).cpu(), rtol=1e-3, atol=1e-3)


@both_incubations
def test_half_precision_autocast_with_a_grad_scaler(incubation: Incubation) -> None:
    model = new_model(incubation=incubation)
    optimizer = tie_optimizer(model, torch.optim.SGD(model.host_parameters(), 0.05))
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    grow_to(model, "1", SeedStage.TRAINING)
    before = copy.deepcopy(dict(model.named_parameters()))

    def closure() -> Tensor:
        with torch.autocast("cuda", torch.float16):
            return loss_of(model)

    for stage in ACTIVE_STAGES:
        grow_to(model, "1", stage)
        optimizer.zero_grad()
        scaler.scale(closure()).backward()
        losses = model.incubate(closure, scaler)
        assert bool(losses) == (incubation is Incubation.COUNTERFACTUAL and stage is SeedStage.TRAINING)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 256.0
    for name, parameter in model.named_parameters():
        assert bool(parameter.isfinite().all()), name
        assert not torch.equal(parameter, before[name]) or name == "host.0.bias", name


@both_incubations
def test_the_generator_of_the_device_is_not_touched(incubation: Incubation) -> None:
    model = new_model(new_host(dropout=0.3), incubation=incubation)
    numbers = torch.get_rng_state(), torch.cuda.get_rng_state()
    options = {"p": 0.5} if incubation is Incubation.COUNTERFACTUAL else {}
    grow_to(model, "1", SeedStage.TRAINING, **options)
    model.incubate(lambda: loss_of(model))
    model.measure("1")
    model.slots["1"].check_isolation()
    model.cull("1")
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert torch.equal(torch.cuda.get_rng_state(), numbers[1])


def test_seed_that_draws_from_the_device_is_refused_in_straight_through_incubation() -> None:
    with pytest.raises(GerminationError, match="draws global random numbers"):
        new_model().germinate("1", "conv", p=0.5)


@both_incubations
def test_a_culled_seed_leaves_no_trace(incubation: Incubation) -> None:
    def train(module: nn.Module, grow: bool) -> list[Tensor]:
        torch.manual_seed(7)
        host = getattr(module, "host", module)
        optimizer, losses = torch.optim.Adam(host.parameters(), 1e-2), []
        for step in range(6):
            if grow and step == 1:
                grow_to(module, "1", SeedStage.TRAINING)
            optimizer.zero_grad()
            loss = loss_of(module)
            loss.backward()
            if grow:
                module.incubate(lambda: loss_of(module))
            optimizer.step()
            losses.append(loss.detach())
            if grow and step == 4:
                module.measure("1")
                module.cull("1")
        return [*losses, *host.parameters(), *host.buffers(), torch.cuda.get_rng_state()]

    expected = train(new_host(dropout=0.3).cuda(), grow=False)
    found = train(new_model(new_host(dropout=0.3), incubation=incubation), grow=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("stage", ACTIVE_STAGES, ids=lambda s: s.name)
def test_channels_last_hosts_stay_channels_last_under_autocast(stage: SeedStage) -> None:
    model = new_model().to(memory_format=torch.channels_last)
    grow_to(model, "1", stage)
    seen: list[tuple[Tensor, Tensor]] = []
    model.slots["1"].register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    with torch.autocast("cuda", torch.float16):
        model(batch()[0].contiguous(memory_format=torch.channels_last))
    into, out = seen[-1]
    assert out.dtype is into.dtype
    assert out.is_contiguous(memory_format=torch.channels_last) == into.is_contiguous(
        memory_format=torch.channels_last
    )
