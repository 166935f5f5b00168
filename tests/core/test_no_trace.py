"""A seed that was culled from TRAINING was never there: the host's run is bit for bit the one without it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    COUNTERFACTUAL,
    STRAIGHT_THROUGH,
    causal_host,
    causal_model,
    cnn_host,
    cnn_model,
    generator,
    grow_to,
    images,
    labels,
    same_tensors,
    snapshot,
    tokens,
)
from torch import Tensor, nn

from kasmina_core import GerminationError, Incubation, MorphogeneticModel, SeedStage, tie_optimizer

STEPS = 8
GERMINATE_AT, CULL_AT = 2, 6
both_incubations = pytest.mark.parametrize("incubation", list(Incubation), ids=lambda i: i.value)


@dataclass
class Run:
    """Everything a training run leaves behind."""

    losses: list[Tensor] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: list[Any] = field(default_factory=list)
    random_state: Tensor = field(default_factory=lambda: torch.empty(0))

    def as_list(self) -> list[Any]:
        return [self.losses, self.weights, self.optimizer, self.random_state]


def train(
    module: nn.Module,
    loss_of: Callable[[nn.Module], Tensor],
    *,
    grow: str = "",
    clip: float | None = None,
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
) -> Run:
    """Train a bare host, or a model in which ``grow`` germinates and is culled on the way."""
    model = module if isinstance(module, MorphogeneticModel) else None
    host: nn.Module = model.host if model is not None else module
    optimizer = make_optimizer(host.parameters(), lr=1e-2)
    if model is not None:
        tie_optimizer(model, optimizer)
    run = Run()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)  # the stream that dropout and the batches draw on
        for step in range(STEPS):
            if model is not None and step == GERMINATE_AT:
                for slot in model.slots:
                    model.germinate(slot, grow)
                    assert model.advance_stage(slot)
            optimizer.zero_grad()
            loss = loss_of(module)
            loss.backward()
            if model is not None:
                model.incubate(lambda: loss_of(module))
                if any(slot.is_incubating for slot in model.slots.values()):
                    assert any(p.grad is not None and bool(p.grad.any()) for p in model.seed_parameters())
                model.step()
            if clip is not None:
                nn.utils.clip_grad_norm_(host.parameters(), clip)
            optimizer.step()
            run.losses.append(loss.detach())
            if model is not None:
                for slot in model.slots:
                    if model.slots[slot].stage is SeedStage.TRAINING:
                        assert model.measure(slot) is not None
                        model.slots[slot].check_gate(2)  # measures isolation and evidence
                        model.slots[slot].check_isolation()
                if step == CULL_AT:
                    for slot in model.slots:
                        assert model.slots[slot].stage is SeedStage.TRAINING
                        model.cull(slot)
        run.random_state = torch.get_rng_state()
    run.weights = snapshot(host)
    run.optimizer = [optimizer.state[p] for p in host.parameters()]
    if model is not None:
        assert list(optimizer.state) == list(host.parameters())
        assert len(optimizer.param_groups) == 1
    return run


def image_loss(module: nn.Module) -> Tensor:
    batch = torch.randint(0, 24, (6,))
    return F.cross_entropy(module(images(24)[batch]), labels(24)[batch])


def token_loss(module: nn.Module) -> Tensor:
    batch = tokens(12)[torch.randint(0, 12, (4,))]
    return F.cross_entropy(module(batch[:, :-1]).mT, batch[:, 1:])


@both_incubations
@pytest.mark.parametrize("blueprint", ["conv", "norm"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout in the host"])
def test_cnn_run_with_a_culled_seed_is_the_run_without_it(
    incubation: Incubation, blueprint: str, dropout: float
) -> None:
    host = cnn_host(dropout=dropout)
    expected = train(copy.deepcopy(host), image_loss)
    found = train(cnn_model(host, incubation=incubation), image_loss, grow=blueprint)
    assert same_tensors(found.as_list(), expected.as_list())
    assert not torch.equal(expected.losses[0], expected.losses[-1])


@both_incubations
def test_transformer_run_with_a_culled_seed_is_the_run_without_it(incubation: Incubation) -> None:
    host = causal_host(dropout=0.2)
    expected = train(copy.deepcopy(host), token_loss)
    found = train(causal_model(host, incubation=incubation), token_loss, grow="mlp")
    assert same_tensors(found.as_list(), expected.as_list())


@both_incubations
def test_clipping_the_gradient_of_the_host_does_not_let_the_seed_in(incubation: Incubation) -> None:
    host = cnn_host(dropout=0.3)
    expected = train(copy.deepcopy(host), image_loss, clip=0.05)
    found = train(cnn_model(host, incubation=incubation), image_loss, grow="conv", clip=0.05)
    assert same_tensors(found.as_list(), expected.as_list())


@both_incubations
def test_momentum_of_sgd_does_not_know_of_a_culled_seed(incubation: Incubation) -> None:
    def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=1e-2)

    expected = train(cnn_host(), image_loss, make_optimizer=sgd)
    found = train(cnn_model(incubation=incubation), image_loss, grow="conv", make_optimizer=sgd)
    assert same_tensors(found.as_list(), expected.as_list())


def test_seed_with_dropout_leaves_no_trace_in_the_counterfactual_pass() -> None:
    host = cnn_host(dropout=0.3)
    expected = train(copy.deepcopy(host), image_loss)
    found = train(cnn_model(host, incubation=COUNTERFACTUAL), image_loss, grow="dropout")
    assert same_tensors(found.as_list(), expected.as_list())


def test_seed_with_dropout_cannot_germinate_in_straight_through_incubation() -> None:
    model = cnn_model(incubation=STRAIGHT_THROUGH)
    before, numbers = snapshot(model), torch.get_rng_state()
    with pytest.raises(
        GerminationError, match=r"draws global random numbers.*incubation='counterfactual'"
    ) as caught:
        model.germinate("norm", "dropout")
    (failed,) = caught.value.result.failed_checks
    assert failed.name == "random numbers"
    assert model.slots["norm"].stage is SeedStage.DORMANT
    assert same_tensors((before, numbers), (snapshot(model), torch.get_rng_state()))
    assert model.germinate("norm", "dropout", p=0.0).stage is SeedStage.GERMINATED


def test_fossil_with_dropout_loads_where_incubation_is_straight_through() -> None:
    grown = cnn_model(incubation=COUNTERFACTUAL)
    grow_to(grown, "norm", SeedStage.FOSSILIZED, "dropout")
    fresh = cnn_model(incubation=STRAIGHT_THROUGH)
    fresh.load_state_dict(grown.state_dict())
    assert torch.equal(fresh.eval()(images()), grown.eval()(images()))


@both_incubations
def test_seed_that_became_not_finite_leaves_no_trace(incubation: Incubation) -> None:
    host = cnn_host()
    expected = train(copy.deepcopy(host), image_loss)
    model = cnn_model(host, incubation=incubation)
    calls = []

    def poisoned(module: nn.Module) -> Tensor:
        calls.append(None)
        if len(calls) % 3 == 0:
            for p in model.seed_parameters():
                p.data.fill_(torch.nan)
        return image_loss(module)

    found = train(model, poisoned, grow="conv")
    assert same_tensors(found.as_list(), expected.as_list())


@both_incubations
def test_germination_and_cull_draw_no_global_random_number(incubation: Incubation) -> None:
    model = cnn_model(incubation=incubation)
    numbers = torch.get_rng_state()
    for slot in model.slots:
        model.germinate(slot, "conv")
        model.advance_stage(slot)
        model.incubate(lambda: F.cross_entropy(model(images()), labels()))
        model.measure(slot)
        model.slots[slot].check_isolation()
        model.cull(slot)
        model.step_epoch(1.0)
    assert torch.equal(torch.get_rng_state(), numbers)


def test_weights_of_a_seed_depend_on_the_config_the_slot_and_the_count_and_on_nothing_else() -> None:
    def weights(seed: int, slot: str, burn: int) -> Tensor:
        torch.rand(burn)
        model = cnn_model(seed=seed)
        model.germinate(slot, "conv")
        return model.slots[slot].seed.conv.weight.detach()

    assert torch.equal(weights(0, "norm", 0), weights(0, "norm", 17))
    assert not torch.equal(weights(0, "norm", 0), weights(1, "norm", 0))
    assert not torch.equal(weights(0, "norm", 0), weights(0, "norm2", 0))
    model = cnn_model(embargo_epochs=0)
    model.germinate("norm", "conv")
    first = model.slots["norm"].seed.conv.weight.detach().clone()
    model.cull("norm")
    while model.slots["norm"].state is not None:
        model.step_epoch()
    model.germinate("norm", "conv")
    assert not torch.equal(first, model.slots["norm"].seed.conv.weight)


def test_gradient_of_the_host_while_a_seed_blends_then_culled_is_only_what_it_learned() -> None:
    """Culled later than TRAINING, the slot is the host's again at once."""
    model = cnn_model()
    grow_to(model, "norm", SeedStage.SHADOWING)
    model.cull("norm")
    bare = cnn_host()
    bare.load_state_dict(model.host.state_dict())
    x = torch.randn(4, 1, 5, 5, generator=generator(3))
    assert torch.equal(model.eval()(x), bare.eval()(x))
