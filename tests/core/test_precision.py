"""Whatever the dtype, the memory format and the batch: what leaves a slot is like what the host put in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    ACTIVE_STAGES,
    CNN_SLOTS,
    causal_host,
    causal_model,
    cnn_host,
    cnn_model,
    gradients,
    grow_to,
    images,
    labels,
    same_tensors,
    tokens,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kasmina_core import GrowthConfig, Incubation, MorphogeneticModel, SeedStage
from kasmina_core.blending import like_host

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_stage = pytest.mark.parametrize("stage", ACTIVE_STAGES, ids=lambda s: s.name)


@contextmanager
def passing_slots(model: MorphogeneticModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect what goes into each slot and what comes out."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        slot.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
        for slot in model.slots.values()
    ]
    yield seen
    for handle in handles:
        handle.remove()


def layout(t: Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]:
    return t.dtype, tuple(t.shape), t.stride()


def grown_cnn(stage: SeedStage, host: nn.Module | None = None, **options: object) -> MorphogeneticModel:
    model = cnn_model(host)
    for slot in CNN_SLOTS:
        grow_to(model, slot, stage, **options)
    return model


@every_stage
@every_dtype
def test_hosts_of_every_dtype_keep_it_and_train(dtype: torch.dtype, stage: SeedStage) -> None:
    model = grown_cnn(stage, cnn_host().to(dtype))
    assert {t.dtype for t in model.parameters()} == {dtype}
    with passing_slots(model) as seen:
        output = model(images().to(dtype))
    assert output.dtype is dtype
    assert len(seen) == len(CNN_SLOTS)
    assert all(layout(into) == layout(out) for into, out in seen)
    output.square().sum().backward()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        assert bool(gradient.isfinite().all()), name


@every_stage
@every_dtype
def test_transformers_of_every_dtype_keep_it_and_train(dtype: torch.dtype, stage: SeedStage) -> None:
    model = causal_model(causal_host().to(dtype))
    for slot in model.slots:
        grow_to(model, slot, stage, "mlp")
    with passing_slots(model) as seen:
        output = model(tokens())
    assert all(layout(into) == layout(out) for into, out in seen)
    assert output.dtype is dtype
    output.square().sum().backward()
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients(model).values())


@every_stage
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype_of_the_host_at_every_slot(dtype: torch.dtype, stage: SeedStage) -> None:
    bare = cnn_host()
    dtypes = []
    for name in CNN_SLOTS:
        getattr(bare, name).register_forward_hook(lambda _m, _a, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", dtype):
        bare(images())
    model = grown_cnn(stage)
    with passing_slots(model) as seen, torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(images()), labels())
    assert [out.dtype for _, out in seen] == dtypes
    assert all(layout(into) == layout(out) for into, out in seen)
    loss.backward()
    assert all(g.dtype is torch.float32 and bool(g.isfinite().all()) for g in gradients(model).values())


def test_training_under_autocast_is_bit_identical_to_the_host_under_autocast() -> None:
    bare, model = cnn_host(), grown_cnn(SeedStage.TRAINING)
    for module in (bare, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(module(images()), labels())
        loss.backward()
    assert same_tensors(gradients(model.host), gradients(bare))


@every_stage
def test_channels_last_hosts_stay_channels_last(stage: SeedStage) -> None:
    model = grown_cnn(stage, cnn_host().to(memory_format=torch.channels_last))
    with passing_slots(model) as seen:
        model(images().to(memory_format=torch.channels_last))
    for into, out in seen:
        assert into.is_contiguous(memory_format=torch.channels_last)
        assert out.is_contiguous(memory_format=torch.channels_last)


@every_stage
@pytest.mark.parametrize("returned", ["float64", "bfloat16", "float16"])
def test_seed_that_returns_another_dtype_is_brought_back(returned: str, stage: SeedStage) -> None:
    model = grown_cnn(stage, blueprint="foreign", dtype=returned)
    with passing_slots(model) as seen:
        loss = F.cross_entropy(model(images()), labels())
    assert [layout(out) for _, out in seen] == [layout(into) for into, _ in seen]
    loss.backward()
    assert all(bool(p.grad.any()) for p in model.seed_parameters())


@every_stage
@pytest.mark.parametrize(
    ("host_format", "seed_layout"),
    [
        (torch.contiguous_format, "channels_last"),
        (torch.contiguous_format, "transposed"),
        (torch.channels_last, "contiguous"),
        (torch.channels_last, "transposed"),
    ],
    ids=[
        "plain host, channels_last seed",
        "plain host, transposed seed",
        "cl host, plain seed",
        "cl host, transposed seed",
    ],
)
def test_seed_that_returns_another_memory_format_is_brought_back(
    host_format: torch.memory_format, seed_layout: str, stage: SeedStage
) -> None:
    model = grown_cnn(
        stage, cnn_host().to(memory_format=host_format), blueprint="foreign", layout=seed_layout
    )
    with passing_slots(model) as seen:
        model(images(size=6).to(memory_format=host_format))
    for _, out in seen:
        assert out.is_contiguous(memory_format=host_format)


@every_stage
def test_rows_that_a_seed_returns_transposed_can_be_viewed_again(stage: SeedStage) -> None:
    model = causal_model()
    grow_to(model, "blocks.0", stage, "foreign-rows", layout="transposed")
    with passing_slots(model) as seen:
        model(tokens())
    assert all(out.is_contiguous() for _, out in seen)


def test_like_host_leaves_what_already_fits() -> None:
    host = torch.randn(2, 3, 4, 4)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        seed = torch.randn(2, 3, 4, 4).contiguous(memory_format=memory_format)
        assert like_host(seed, host.contiguous(memory_format=memory_format)) is seed


@every_stage
@pytest.mark.parametrize("blueprint", ["conv", "norm"])
def test_batch_of_one(blueprint: str, stage: SeedStage) -> None:
    model = grown_cnn(stage, blueprint=blueprint)
    for training in (True, False):
        output = model.train(training)(images(1))
        assert output.shape == (1, 3)
        assert bool(output.isfinite().all())


class CheckpointedCnn(nn.Module):
    """Recomputes its body in the backward pass, slots included."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = cnn_host(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@every_stage
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_gradients_of_the_plain_model(
    reentrant: bool, stage: SeedStage
) -> None:
    slots = tuple(f"body.{name}" for name in CNN_SLOTS)
    plain, model = cnn_model(), cnn_model(CheckpointedCnn(reentrant), slots)
    for name in CNN_SLOTS:
        there = grow_to(model, f"body.{name}", stage)
        here = grow_to(plain, name, stage)
        here.seed.load_state_dict(there.seed.state_dict())
    for module in (plain, model):
        module.step()
        F.cross_entropy(module(images().requires_grad_()), labels()).backward()
    assert same_tensors(list(gradients(model).values()), list(gradients(plain).values()))


@every_stage
def test_moving_a_grown_model_to_another_dtype_and_back_moves_the_seed_with_it(stage: SeedStage) -> None:
    model = grown_cnn(stage).eval()
    before = model(images())
    model.to(torch.float64)
    assert {t.dtype for t in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(images().double()), before.double(), rtol=1e-4, atol=1e-5)
    model.to(torch.float32)
    assert torch.equal(model(images()), before)


def test_seed_germinated_after_a_move_has_the_dtype_of_the_moved_host() -> None:
    model = cnn_model().to(torch.bfloat16)
    slot = grow_to(model, "norm", SeedStage.BLENDING, alpha=0.5)
    assert {p.dtype for p in slot.seed_parameters()} == {torch.bfloat16}
    assert slot.alpha_buffer.dtype is torch.bfloat16
    assert model(images().bfloat16()).dtype is torch.bfloat16


def test_seed_in_an_autocast_host_has_the_dtype_of_the_parameters_not_of_the_features() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = cnn_host()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.body(x)

    model = cnn_model(Casting(), ("body.conv",))
    slot = grow_to(model, "body.conv", SeedStage.FOSSILIZED)
    assert {p.dtype for p in slot.seed_parameters()} == {torch.float32}
    with passing_slots(model) as seen:
        model(images())
    assert [out.dtype for _, out in seen] == [torch.bfloat16]


@every_dtype
def test_ramp_ends_at_exactly_the_seed_in_every_dtype(dtype: torch.dtype) -> None:
    model = cnn_model(cnn_host().to(dtype))
    slot = grow_to(model, "norm", SeedStage.SHADOWING)
    features = torch.randn(2, 4, 3, 3).to(dtype)
    assert torch.equal(slot(features), copy.deepcopy(slot.seed)(features))


class NormInFloat32(nn.Module):
    """A bf16 model whose norm keeps its parameters in float32, and gives bf16 features."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(16, dtype=torch.float32)
        self.head = nn.Linear(16, 20, dtype=torch.bfloat16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(ids)))


@pytest.mark.parametrize("incubation", list(Incubation))
def test_a_seed_has_the_dtype_of_the_features_not_of_the_parameters_beside_them(
    incubation: Incubation,
) -> None:
    ids = torch.arange(12).view(2, 6)
    config = GrowthConfig(incubation=incubation)
    model = MorphogeneticModel(NormInFloat32(), ["norm"], example=ids, config=config)
    model.germinate("norm", "mlp")
    assert {p.dtype for p in model.seed_parameters()} == {torch.bfloat16}
    model.step_epoch()
    loss = lambda: model(ids).float().square().mean()  # noqa: E731
    loss().backward()
    model.incubate(loss)
    assert any(p.grad is not None for p in model.seed_parameters())
    twin = MorphogeneticModel(NormInFloat32(), ["norm"], example=ids, config=config)
    twin.load_state_dict(model.state_dict(), assign=True)
    assert twin.slots["norm"].alpha_buffer.dtype is torch.bfloat16
