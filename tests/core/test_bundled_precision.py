"""The bundled hosts in every stage: half precision, frozen, recomputed, channels last, and built without memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kasmina_cnn import CNNHost
from kasmina_transformer import TransformerHost
from numeric_helpers import (
    ACTIVE_STAGES,
    COUNTERFACTUAL,
    LIVING_STAGES,
    PERMISSIVE,
    STRAIGHT_THROUGH,
    VOCABULARY,
    gradients,
    grow_to,
    images,
    labels,
    registry,
    same_tensors,
    tokens,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kasmina_core import GrowthConfig, HostError, MorphogeneticModel, SeedStage, tie_optimizer
from kasmina_core.slots.forward import ForwardMode

every_stage = pytest.mark.parametrize("stage", ACTIVE_STAGES, ids=lambda s: s.name)
every_host = pytest.mark.parametrize("kind", ["cnn", "transformer"])
every_incubation = pytest.mark.parametrize(
    "incubation", [STRAIGHT_THROUGH, COUNTERFACTUAL], ids=lambda i: i.value
)


def host_of(kind: str, norm: str = "batch") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "cnn":
            return CNNHost(1, 3, n_blocks=3, base_channels=4, norm=norm)
        return TransformerHost(VOCABULARY, 8, n_layers=2, n_heads=2, max_len=8)


def model_of(kind: str, host: nn.Module | None = None, **config: Any) -> MorphogeneticModel:
    model = MorphogeneticModel(
        host if host is not None else host_of(kind),
        registry=registry(),
        config=GrowthConfig(**{"gates": PERMISSIVE} | config),
    )
    model.evaluate_with(lambda: losses(model, kind).detach())
    return model


def losses(model: nn.Module, kind: str) -> Tensor:
    """One loss a sample, in fp32."""
    parameter = next(model.parameters())
    if kind == "cnn":
        return F.cross_entropy(model(images(4, 8).to(parameter.dtype)).float(), labels(4), reduction="none")
    x = tokens(4, 7)
    return F.cross_entropy(model(x[:, :-1]).float().mT, x[:, 1:], reduction="none").mean(1)


def grown(kind: str, stage: SeedStage, host: nn.Module | None = None, **config: Any) -> MorphogeneticModel:
    model = model_of(kind, host, **config)
    grow_to(model, next(iter(model.slots)), stage, "conv" if kind == "cnn" else "mlp")
    return model


def train_step(model: MorphogeneticModel, kind: str, dtype: torch.dtype | None = None) -> None:
    """Backward, incubation and step, as the loop of the documents does; under autocast if a dtype is given."""

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            return losses(model, kind).mean()

    found = loss()
    if found.requires_grad:  # not with a frozen host while the seed is not in its pass
        found.backward()
    model.incubate(loss)
    model.step()


def assert_seed_has_learnt_something(model: MorphogeneticModel) -> None:
    for p in model.seed_parameters():
        assert p.grad is not None
        assert p.grad.dtype is p.dtype
        assert bool(p.grad.isfinite().all())
    assert any(bool(p.grad.any()) for p in model.seed_parameters())


@every_host
@every_stage
@every_incubation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kind: str, stage: SeedStage, incubation: Any, dtype: torch.dtype) -> None:
    model = grown(kind, stage, incubation=incubation)
    train_step(model, kind, dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_seed_has_learnt_something(model)
    if stage is SeedStage.TRAINING:
        bare = host_of(kind).train()
        with torch.autocast("cpu", dtype):
            losses(bare, kind).mean().backward()
        assert same_tensors(gradients(model.host), gradients(bare))


@every_host
@every_stage
@every_incubation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hosts_of_half_precision(kind: str, stage: SeedStage, incubation: Any, dtype: torch.dtype) -> None:
    model = grown(kind, stage, host_of(kind).to(dtype), incubation=incubation)
    assert {p.dtype for p in model.parameters()} == {dtype}
    optimizer = tie_optimizer(model, torch.optim.SGD(model.host_parameters(), 0.1, momentum=0.9))
    train_step(model, kind)
    assert_seed_has_learnt_something(model)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    if stage is SeedStage.TRAINING:
        bare = host_of(kind).to(dtype)
        reference = torch.optim.SGD(bare.parameters(), 0.1, momentum=0.9)
        losses(bare, kind).mean().backward()
        reference.step()
        assert same_tensors(list(model.host_parameters()), list(bare.parameters()))


@every_stage
@every_incubation
def test_channels_last(stage: SeedStage, incubation: Any) -> None:
    host = host_of("cnn").to(memory_format=torch.channels_last)
    model = grown("cnn", stage, host, incubation=incubation)
    seen: list[Tensor] = []
    handles = [s.register_forward_hook(lambda _m, _a, out: seen.append(out)) for s in model.slots.values()]
    model(images(4, 8).to(memory_format=torch.channels_last))
    for handle in handles:
        handle.remove()
    assert len(seen) == len(model.slots)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)
    train_step(model, "cnn")
    assert_seed_has_learnt_something(model)


# Frozen hosts


@every_host
@pytest.mark.parametrize("stage", LIVING_STAGES, ids=lambda s: s.name)
@every_incubation
def test_a_frozen_host_stays_as_it_is_and_its_seed_learns(
    kind: str, stage: SeedStage, incubation: Any
) -> None:
    model = model_of(kind, incubation=incubation)
    model.host.requires_grad_(False)
    slot = grow_to(model, next(iter(model.slots)), stage, "conv" if kind == "cnn" else "mlp")
    frozen = [p.clone() for p in model.host_parameters()]
    before = [p.clone() for p in model.seed_parameters()]
    optimizer = tie_optimizer(model, torch.optim.SGD([{"params": []}], 0.1))
    train_step(model, kind)
    optimizer.step()
    assert all(map(torch.equal, frozen, model.host_parameters()))
    assert all(p.grad is None for p in model.host_parameters())
    moved = not all(map(torch.equal, before, model.seed_parameters()))
    assert moved is (stage in ACTIVE_STAGES)
    reading = slot.check_isolation()
    assert (reading is not None) is (stage is SeedStage.TRAINING)
    assert reading is None or not reading.is_violation


@every_host
@every_incubation
def test_a_frozen_hosts_seed_goes_through_its_whole_life(kind: str, incubation: Any) -> None:
    model = model_of(kind, incubation=incubation, ramp_steps=2)
    model.host.requires_grad_(False)
    slot = next(iter(model.slots.values()))
    optimizer = tie_optimizer(model, torch.optim.AdamW([{"params": []}], 1e-2))
    model.germinate(slot.name, "conv" if kind == "cnn" else "mlp")
    for _ in range(12):
        optimizer.zero_grad()
        train_step(model, kind)
        optimizer.step()
        model.step_epoch(1.0)
    assert slot.stage is SeedStage.PROBATIONARY
    assert model.advance_stage(slot.name).passed


# Gradient checkpointing


class Recomputed(nn.Module):
    """A bundled host whose blocks are computed again in the backward pass, slots included."""

    def __init__(self, kind: str, reentrant: bool) -> None:
        super().__init__()
        # Batch statistics would move once more at each recomputation, in the bare host too.
        self.inner, self.reentrant = host_of(kind, "group"), reentrant
        self.blocks = [
            m
            for name, m in self.inner.named_modules()
            if name.startswith(("blocks.", "layers.")) and name.count(".") == 1
        ]
        assert len(self.blocks) >= 2
        for block in self.blocks:
            block.forward = self.again(block.forward)

    def again(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def recomputed(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args)
            return checkpoint(forward, *args, use_reentrant=self.reentrant)

        return recomputed

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def recomputed_and_plain(
    kind: str, stage: SeedStage, reentrant: bool, **config: Any
) -> tuple[MorphogeneticModel, MorphogeneticModel]:
    plain = grown(kind, stage, host_of(kind, "group"), **config)
    points = [f"inner.{slot.point.path}" for slot in plain.slots.values()]
    model = MorphogeneticModel(
        Recomputed(kind, reentrant),
        points,
        example=images(2, 8) if kind == "cnn" else tokens(2, 6),
        registry=registry(),
        config=GrowthConfig(**{"gates": PERMISSIVE} | config),
        causal=kind == "transformer",
    )
    model.evaluate_with(lambda: losses(model, kind).detach())
    slot = grow_to(model, next(iter(model.slots)), stage, "conv" if kind == "cnn" else "mlp")
    slot.seed.load_state_dict(next(iter(plain.slots.values())).seed.state_dict())
    return model, plain


@every_host
@every_stage
@every_incubation
def test_gradient_checkpointing_gives_the_gradients_of_the_plain_model(
    kind: str, stage: SeedStage, incubation: Any
) -> None:
    model, plain = recomputed_and_plain(kind, stage, False, incubation=incubation)
    for each in (model, plain):
        train_step(each, kind)
    assert same_tensors(list(gradients(model).values()), list(gradients(plain).values()))
    assert_seed_has_learnt_something(model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_refuses_the_counterfactual_pass_and_says_what_to_use() -> None:
    model, _ = recomputed_and_plain("transformer", SeedStage.TRAINING, True, incubation=COUNTERFACTUAL)
    with pytest.raises(HostError, match=r"reentrant gradient checkpointing[\s\S]*use_reentrant=False"):
        model.incubate(lambda: losses(model, "transformer").mean())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert {slot.mode for slot in model.slots.values()} == {ForwardMode.PASS}


def test_a_loss_that_the_seed_cannot_learn_from_is_refused() -> None:
    model = grown("cnn", SeedStage.TRAINING, incubation=COUNTERFACTUAL)
    with pytest.raises(HostError, match="depends on nothing that learns"):
        model.incubate(lambda: losses(model, "cnn").mean().detach())


# Meta device


@every_host
@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@pytest.mark.parametrize("stage", LIVING_STAGES, ids=lambda s: s.name)
def test_a_model_built_and_germinated_on_the_meta_device_becomes_the_saved_one(
    kind: str, stage: SeedStage, assign: bool
) -> None:
    saved = grown(kind, stage)
    with torch.device("meta"):
        model = model_of(kind)
        model.germinate(list(model.slots)[1], "conv" if kind == "cnn" else "mlp")
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model.state_dict().keys() >= model.host.state_dict().keys()
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(copy.deepcopy(saved.state_dict()), assign=assign)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    for train in (True, False):
        assert torch.equal(losses(model.train(train), kind), losses(saved.train(train), kind))
    for m in (model.train(), saved.train()):
        m.zero_grad()
        train_step(m, kind)
    assert same_tensors(list(gradients(model).values()), list(gradients(saved).values()))
    model.germinate(list(model.slots)[1], "conv" if kind == "cnn" else "mlp")
    assert not any(p.is_meta for p in model.seed_parameters())


def test_what_no_file_holds_is_right_after_to_empty_too() -> None:
    with torch.device("meta"):
        model = model_of("cnn")
        slot = next(iter(model.slots.values()))
        model.germinate(slot.name, "conv")
    for _ in range(3):  # memory that was used before
        torch.full((8,), 7.0)
    model.to_empty(device="cpu")
    assert slot.alpha_buffer == 0.0
    assert slot.deviation == 0.0


def test_a_way_through_another_dtype_leaves_alpha_as_it_was() -> None:
    model = model_of("cnn")
    slot = grow_to(model, next(iter(model.slots)), SeedStage.BLENDING, "conv", alpha=0.3)
    before = slot.alpha_buffer.clone()
    model.to(torch.bfloat16)
    assert slot.alpha_buffer == torch.tensor(0.3, dtype=torch.bfloat16)
    model.to(torch.float32)
    assert torch.equal(slot.alpha_buffer, before)
