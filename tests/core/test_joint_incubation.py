"""Seeds that share a counterfactual pass: each learns from its part of the batch, as in a pass of its own over it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    CNN_SLOTS,
    COUNTERFACTUAL,
    cnn_model,
    gradients,
    grow_to,
    images,
    labels,
    same_tensors,
    scramble,
    snapshot,
)
from torch import Tensor, nn

from kasmina_core import (
    GrowthConfig,
    HookedHost,
    InjectionPoint,
    MisuseWarning,
    MorphogeneticModel,
    SeedContext,
    SeedStage,
    Topology,
)


def joint_model(*slots: str, blueprint: str = "conv", **settings: object) -> MorphogeneticModel:
    model = cnn_model(incubation=COUNTERFACTUAL, joint_incubation=True, **settings)
    for number, slot in enumerate(slots):
        grow_to(model, slot, SeedStage.TRAINING, blueprint)
        torch.manual_seed(number)
        scramble(model.slots[slot].seed)
    return model


def batch(count: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    return torch.randn(count, *images().shape[1:], generator=made), torch.arange(count) % int(
        labels().max() + 1
    )


def mean_loss(model: MorphogeneticModel, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(x), y)


def seed_gradients(model: MorphogeneticModel, slot: str) -> list[Tensor]:
    return [g.clone() for g in gradients(model.slots[slot].seed).values()]


def alone(
    model: MorphogeneticModel, slot: str, closure: Callable[[MorphogeneticModel], Tensor]
) -> list[Tensor]:
    """Return the gradient of a seed in a pass of its own."""
    twin = copy.deepcopy(model)
    for name in CNN_SLOTS:
        if name != slot and twin.slots[name].seed is not None:
            twin.slots[name].pause()
    twin.incubate(lambda: closure(twin))
    return seed_gradients(twin, slot)


def counted(closure: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], list[int]]:
    calls: list[int] = []

    def counting() -> Tensor:
        calls.append(1)
        return closure()

    return counting, calls


@pytest.mark.parametrize("count", [8, 9])
def test_each_seed_gets_the_gradient_of_a_pass_of_its_own_over_its_part(count: int) -> None:
    slots = CNN_SLOTS[:3]
    model = joint_model(*slots)
    x, y = batch(count)
    before = copy.deepcopy(model)
    losses = model.incubate(mean_loss(model, x, y))
    assert set(losses) == set(slots)
    parts = [(count * k // 3, count * (k + 1) // 3) for k in range(3)]
    places = []
    for slot in slots:
        mine = seed_gradients(model, slot)
        fits = [
            all(map(torch.allclose, mine, own))
            for a, b in parts
            for own in [alone(before, slot, lambda m, a=a, b=b: F.cross_entropy(m(x[a:b]), y[a:b]))]
        ]
        assert sum(fits) == 1
        places.append(fits.index(True))
    assert sorted(places) == [0, 1, 2]


def test_after_it_was_tried_once_all_seeds_learn_in_one_pass_and_take_turns() -> None:
    slots = CNN_SLOTS[:2]
    model = joint_model(*slots)
    x, y = batch(8)
    closure, calls = counted(mean_loss(model, x, y))
    model.incubate(closure)
    assert len(calls) == 1 + len(slots)
    seen = []
    for number in range(2):
        model.zero_grad()
        model.incubate(closure)
        assert len(calls) == 2 + len(slots) + number
        seen.append(seed_gradients(model, slots[0]))
    assert not any(map(torch.equal, *seen))


def contrast(model: MorphogeneticModel, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    return -(logits @ logits.T).log_softmax(1).diagonal().mean()


def test_a_loss_that_couples_samples_is_found_and_its_seeds_learn_from_whole_batches() -> None:
    model = joint_model(*CNN_SLOTS[:2])
    x, y = batch(8)
    expected = {slot: alone(model, slot, lambda m: contrast(m, x, y)) for slot in CNN_SLOTS[:2]}
    with pytest.warns(MisuseWarning, match="changes with the other samples of the batch") as caught:
        model.incubate(lambda: contrast(model, x, y))
    assert caught[0].filename == __file__
    for slot, own in expected.items():
        assert all(map(torch.equal, seed_gradients(model, slot), own))
    closure, calls = counted(lambda: contrast(model, x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.incubate(closure)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("blueprint", "count", "passes"),
    [("conv", 3, 1), ("conv", 2, 2), ("conv", 1, 3), ("norm", 6, 1), ("norm", 5, 2), ("norm", 3, 3)],
)
def test_a_batch_with_too_few_samples_takes_more_passes(blueprint: str, count: int, passes: int) -> None:
    model = joint_model(*CNN_SLOTS[:3], blueprint=blueprint)
    model.incubate(mean_loss(model, *batch(12)))
    model.zero_grad()
    forwards = []
    model.host.register_forward_hook(lambda *_: forwards.append(1))
    losses = model.incubate(mean_loss(model, *batch(count)))
    assert len(losses) == 3
    assert len(forwards) == passes
    assert all(any(g.any() for g in seed_gradients(model, slot)) for slot in losses)


def test_nothing_but_the_seeds_gradients_changes() -> None:
    model = joint_model(*CNN_SLOTS[:3]).train()
    x, y = batch(9)
    before, state = snapshot(model), torch.get_rng_state()
    model.incubate(mean_loss(model, x, y))
    assert same_tensors(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.host_parameters())
    assert all(slot.seed.training or slot.seed is None for slot in model.slots.values() if slot.seed)


def test_a_closure_that_raises_leaves_no_gradient_and_no_mode() -> None:
    model = joint_model(*CNN_SLOTS[:2])
    x, y = batch(8)
    for fails_at in range(3):
        calls: list[int] = []

        def closure(calls: list[int] = calls, fails_at: int = fails_at) -> Tensor:
            calls.append(1)
            if len(calls) > fails_at:
                raise OSError("gone")
            return F.cross_entropy(model(x), y)

        with pytest.raises(OSError, match="gone"):
            model.incubate(closure)
        assert all(p.grad is None for p in model.parameters())
        assert not any(slot.is_forced for slot in model.slots.values())
        assert all(slot.notes.incubations == 0 for slot in model.slots.values())


def test_gradients_carry_the_scale_of_a_grad_scaler_and_add_to_what_is_there() -> None:
    x, y = batch(8)
    models = [joint_model(*CNN_SLOTS[:2]) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for p in models[1].seed_parameters():
        p.grad = torch.ones_like(p)
    models[0].incubate(mean_loss(models[0], x, y))
    models[1].incubate(mean_loss(models[1], x, y), scaler)
    for slot in CNN_SLOTS[:2]:
        for plain, scaled in zip(*(seed_gradients(m, slot) for m in models), strict=True):
            assert torch.allclose(16 * plain + 1, scaled, rtol=1e-4)


class Padded(HookedHost, nn.Module):
    """A host of sequences that is told how long each is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def injection_points(self) -> list[InjectionPoint]:
        return [
            InjectionPoint(name, name, 8, Topology.TRANSFORMER, layout="btd") for name in ("first", "last")
        ]

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def real_positions(host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SeedContext:
    x, lengths = args
    return SeedContext(real=torch.arange(x.shape[1]) < lengths[:, None])


def test_a_seed_that_mixes_positions_is_given_the_padding_of_its_own_samples() -> None:
    made = torch.Generator().manual_seed(3)
    x, lengths = torch.randn(4, 6, 8, generator=made), torch.tensor([2, 6, 3, 5])
    torch.manual_seed(1)
    config = GrowthConfig(incubation=COUNTERFACTUAL, joint_incubation=True)
    model = MorphogeneticModel(Padded(), example=(x, lengths), context=real_positions, config=config)
    for name in model.slots:
        model.germinate(name, "transformer:attention")
        model.advance_stage(name)
        scramble(model.slots[name].seed)
    before = copy.deepcopy(model)
    closure, calls = counted(lambda: model(x, lengths).square().mean())
    model.incubate(closure)
    assert len(calls) == 3
    before.slots["last"].pause()
    before.incubate(lambda: before(x[2:], lengths[2:]).square().mean())
    assert all(map(torch.allclose, seed_gradients(model, "first"), seed_gradients(before, "first")))
