"""What did not finish did not happen: epochs and counterfactual passes that are interrupted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from state_helpers import (
    FIRST,
    SECOND,
    CountingEvaluator,
    Recorder,
    bring_to,
    make_batch,
    make_model,
    open_config,
    open_thresholds,
    picture,
    same_picture,
    train_once,
)

from kasmina_core import MorphogeneticModel, QualityGates, RampUnit, SeedStage, tie_optimizer

S = SeedStage


class Stop(BaseException):
    """What the handler of a signal raises."""


class Stopping(CountingEvaluator):
    """An evaluator in which a signal arrives at one call."""

    stop_at: int | None = None

    def __call__(self) -> torch.Tensor:
        losses = super().__call__()
        if self.calls == self.stop_at:
            raise Stop
        return losses


def make_run(
    first: SeedStage, second: SeedStage = S.TRAINING, **config: float
) -> tuple[MorphogeneticModel, Recorder, torch.optim.Optimizer, Stopping]:
    gates = QualityGates(thresholds=open_thresholds(min_training_epochs=1))
    config = open_config(ramp_unit=RampUnit.EPOCH, keep_snapshot=True, ramp_steps=2, gates=gates, **config)
    model, recorder = make_model(config, evaluate=False)
    optimizer = tie_optimizer(model, torch.optim.Adam(model.parameters(), 1e-2))
    evaluator = Stopping(model)
    model.evaluate_with(evaluator)
    bring_to(model, second, SECOND, "normed")
    model.germinate(FIRST, "scale")
    while model.slots[FIRST].stage is not first:
        model.slots[FIRST].step_epoch(1.0)
    train_once(model, optimizer)
    return model, recorder, optimizer, evaluator


@pytest.mark.parametrize("first", [S.TRAINING, S.BLENDING, S.SHADOWING, S.PROBATIONARY])
def test_an_epoch_that_is_interrupted_leaves_no_trace_and_can_be_repeated(first: SeedStage) -> None:
    model, recorder, optimizer, evaluator = make_run(first)
    whole, whole_recorder, whole_optimizer, _ = make_run(first)
    states = {name: slot.state for name, slot in model.slots.items()}
    results, interrupted = None, 0
    while results is None:
        before, events = picture(model, optimizer), len(recorder.events)
        evaluator.stop_at = evaluator.calls + interrupted + 1
        try:
            results = model.step_epoch(0.5)
        except Stop:
            interrupted += 1
            assert same_picture(before, picture(model, optimizer))
            assert len(recorder.events) == events
            assert all(slot.state is states[name] for name, slot in model.slots.items())
    assert interrupted
    evaluator.stop_at = None
    assert results == whole.step_epoch(0.5)
    for _ in range(3):
        assert same_but_for_identity(picture(model, optimizer), picture(whole, whole_optimizer))
        train_once(model, optimizer)
        train_once(whole, whole_optimizer)
        assert model.step_epoch(0.5) == whole.step_epoch(0.5)
    assert recorder.events == whole_recorder.events
    assert [event.sequence for event in recorder.events] == list(range(len(recorder.events)))


def same_but_for_identity(a: dict[str, object], b: dict[str, object]) -> bool:
    return same_picture({**a, "seeds": None}, {**b, "seeds": None})


def test_an_interrupted_epoch_of_one_slot_leaves_no_trace() -> None:
    model, recorder, optimizer, evaluator = make_run(S.TRAINING)
    before, events, evaluator.stop_at = picture(model, optimizer), len(recorder.events), evaluator.calls + 1
    with pytest.raises(Stop):
        model.slots[FIRST].step_epoch(0.5)
    assert same_picture(before, picture(model, optimizer))
    assert len(recorder.events) == events


def test_a_seed_that_is_stopped_in_an_undone_epoch_still_learns() -> None:
    model, recorder, optimizer, evaluator = make_run(S.TRAINING, S.SHADOWING, max_incubation_deviation=1e-9)
    before, events, evaluator.stop_at = picture(model, optimizer), len(recorder.events), evaluator.calls + 1
    with pytest.raises(Stop):
        model.step_epoch(0.5)
    assert same_picture(before, picture(model, optimizer))
    assert len(recorder.events) == events
    evaluator.stop_at = None
    model.step_epoch(0.5)
    assert model.slots[FIRST].state.is_stopped


def raising(times: int, closure: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A closure that raises after its forward, in the given call."""
    calls = 0

    def call() -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = closure()
        if calls == times:
            raise Stop
        return loss

    return call


@pytest.mark.parametrize("fails_in", [1, 2])
@pytest.mark.parametrize("has_gradients", [True, False])
def test_a_counterfactual_pass_that_raises_is_not_counted_and_leaves_no_gradient(
    fails_in: int, has_gradients: bool
) -> None:
    def grown() -> MorphogeneticModel:
        model, _ = make_model(open_config(incubate_every=2, incubation="counterfactual"))
        bring_to(model, S.TRAINING, FIRST)
        bring_to(model, S.TRAINING, SECOND)
        if has_gradients:
            for number, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 0.1 * (number + 1))
        return model

    x, y = make_batch()
    model, whole = grown(), grown()
    before = picture(model)
    with pytest.raises(Stop):
        model.incubate(raising(fails_in, lambda: F.cross_entropy(model(x), y)))
    assert same_picture(before, picture(model))
    for _ in range(3):
        again = model.incubate(lambda: F.cross_entropy(model(x), y))
        assert again.keys() == whole.incubate(lambda: F.cross_entropy(whole(x), y)).keys()
    assert same_but_for_identity(picture(model), picture(whole))
