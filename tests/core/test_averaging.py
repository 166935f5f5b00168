"""Averaged weights follow a model that grows: the right pairs, each seed over its own life."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    ConvSeed,
    cnn_host,
    cnn_model,
    grow_to,
    images,
    registry,
    same_tensors,
    scramble,
)
from state_helpers import FIRST, make_model
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from kasmina_core import GrowingAveragedModel, HostError, MisuseWarning, SeedStage, tie_optimizer

DECAY = 0.75
KINDS = {
    "equal": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)},
    "ema, one by one": {"avg_fn": get_ema_avg_fn(DECAY)},
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def move(model, step):
    """As a training step would: parameters, and statistics through a forward."""
    scramble(model, 0.1, seed=step)
    model.train()(images(seed=step))


def averages(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def expected(history, kind):
    """The average of one parameter's values over its life, by hand."""
    mean = history[0]
    for n, value in enumerate(history[1:], start=1):
        mean = mean + (value - mean) / (n + 1) if kind == "equal" else DECAY * mean + (1 - DECAY) * value
    return mean


@every_kind
@pytest.mark.parametrize("use_buffers", [False, True])
def test_while_nothing_grows_it_is_torchs(kind, use_buffers):
    host = cnn_host()
    model = cnn_model(host)
    # torch cannot average a count of batches in every way: it sees the host without one.
    for norm in (m for m in host.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.num_batches_tracked = None
    theirs = AveragedModel(host, use_buffers=use_buffers, **KINDS[kind])
    ours = GrowingAveragedModel(model, use_buffers=use_buffers, **KINDS[kind])
    for step in range(4):
        move(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(host)
    assert same_tensors(dict(ours.module.host.state_dict()), dict(theirs.module.state_dict()))
    assert ours.n_averaged == theirs.n_averaged == 4


@every_kind
@pytest.mark.parametrize("use_buffers", [False, True])
def test_every_parameter_is_averaged_over_its_own_life(kind, use_buffers):
    model = cnn_model(embargo_epochs=0)
    ema = GrowingAveragedModel(model, use_buffers=use_buffers, **KINDS[kind])
    history = {}
    for step in range(9):
        if step == 2:
            grow_to(model, "norm2", SeedStage.TRAINING)
        if step == 4:
            grow_to(model, "norm", SeedStage.BLENDING, "norm")
        if step == 6:
            model.cull("norm2")
            while model.slots["norm2"].state is not None:
                model.step_epoch()
            grow_to(model, "norm2", SeedStage.FOSSILIZED)
            history = {name: past for name, past in history.items() if "norm2.seed" not in name}
        move(model, step)
        ema.update_parameters(model)
        for name, value in averages(model).items():
            history.setdefault(name, []).append(value)
        found = averages(ema.module)
        assert found.keys() == averages(model).keys()
        for name, past in history.items():
            torch.testing.assert_close(found[name], expected(past, kind))


def test_torchs_own_average_is_wrong_after_growth():
    model = cnn_model()
    theirs = AveragedModel(model)
    theirs.update_parameters(model)
    grow_to(model, "norm", SeedStage.TRAINING)
    if any("seed" in name for name, _ in theirs.module.named_parameters()):
        pytest.fail("torch follows growth: GrowingAveragedModel is not needed any more")


@pytest.mark.parametrize(
    "stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.FOSSILIZED]
)
def test_the_average_is_in_the_models_stage_and_computes_with_averaged_weights(stage):
    model = cnn_model()
    ema = GrowingAveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ema.update_parameters(model)
    slot = grow_to(model, "norm", stage, alpha=0.25)
    for step in range(3):
        move(model, step)
        ema.update_parameters(model)
    twin = ema.module.slots["norm"]
    assert (twin.stage, twin.alpha, twin.mode) == (slot.stage, slot.alpha, slot.mode)
    by_hand = copy.deepcopy(model)
    by_hand.load_state_dict(ema.module.state_dict())
    assert torch.equal(ema.eval()(images()), by_hand.eval()(images()))
    if stage is SeedStage.BLENDING:
        slot.set_alpha(0.75)
        ema.update_parameters(model)
        assert twin.alpha == twin.alpha_buffer == 0.75


def test_a_cull_takes_the_seeds_average_along():
    model = cnn_model()
    ema = GrowingAveragedModel(model)
    grow_to(model, "norm", SeedStage.TRAINING)
    ema.update_parameters(model)
    assert ema.module.seed_parameters()
    model.cull("norm")
    ema.update_parameters(model)
    assert ema.module.seed_parameters() == []
    assert ema.module.slots["norm"].stage is SeedStage.CULLED
    assert ema.seed_updates.tolist() == [0, 0, 0]


def test_the_average_and_the_model_share_no_tensor():
    model = cnn_model()
    ema = GrowingAveragedModel(model)
    grow_to(model, "norm", SeedStage.BLENDING, "norm")
    ema.update_parameters(model)
    ours = {t.data_ptr() for t in [*ema.parameters(), *ema.buffers()]}
    assert not ours & {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert ema.module.slots["norm"].state is not model.slots["norm"].state


def test_what_a_seed_borrows_from_the_host_its_copy_borrows_from_the_hosts_average():
    lent = []

    class Borrows(ConvSeed):
        def __init__(self, dim):
            super().__init__(dim)
            self.borrowed = lent[0]

    model = cnn_model(seeds=registry(borrows=Borrows))
    lent.append(model.host.norm.weight)
    ema = GrowingAveragedModel(model)
    grow_to(model, "norm2", SeedStage.TRAINING, "borrows")
    for step in range(3):
        move(model, step)
        ema.update_parameters(model)
    assert ema.module.slots["norm2"].seed.borrowed is ema.module.host.norm.weight


@pytest.mark.parametrize("use_buffers", [False, True])
def test_statistics_are_the_models_or_averaged_and_update_bn_makes_them_anew(use_buffers):
    model = cnn_model()
    ema = GrowingAveragedModel(model, use_buffers=use_buffers)
    grow_to(model, "norm", SeedStage.FOSSILIZED, "norm")
    for step in range(3):
        move(model, step)
        ema.update_parameters(model)
    theirs = dict(model.named_buffers())
    ours = dict(ema.module.named_buffers())
    assert ours.keys() == theirs.keys()
    same = all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert same is not use_buffers
    batches = [images(8, seed=seed) for seed in range(3)]
    update_bn(batches, ema)
    reference = copy.deepcopy(ema.module)
    statistics = {name: t.clone() for name, t in ema.module.named_buffers() if "running" in name}
    assert any("seed" in name for name in statistics)
    update_bn(batches, reference)
    assert same_tensors(statistics, {n: t for n, t in reference.named_buffers() if "running" in n})


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED])
def test_a_saved_average_goes_on_in_a_fresh_process_as_if_nothing_had_been(stage):
    def build():
        model = cnn_model()
        return model, GrowingAveragedModel(model)

    model, ema = build()
    ema.update_parameters(model)
    grow_to(model, "norm", stage)
    for step in range(3):
        move(model, step)
        ema.update_parameters(model)
    saved = copy.deepcopy((model.state_dict(), ema.state_dict()))
    fresh, again = build()
    fresh.load_state_dict(saved[0], strict=True)
    assert again.load_state_dict(saved[1], strict=True).missing_keys == []
    for step in range(3, 6):
        for m, e in ((model, ema), (fresh, again)):
            move(m, step)
            e.update_parameters(m)
    assert same_tensors(averages(ema), averages(again))
    assert torch.equal(ema.eval()(images()), again.eval()(images()))
    assert ema.seed_updates.tolist() == again.seed_updates.tolist() == [6, 0, 0]


def test_the_model_may_be_inside_another_module_or_compiled():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Linear(2, 2)
            self.net = cnn_model()

    task = Task()
    ema = GrowingAveragedModel(task)
    grow_to(task.net, "norm", SeedStage.TRAINING)
    ema.update_parameters(task)
    assert averages(ema.module).keys() == averages(task).keys()
    model = cnn_model()
    ema = GrowingAveragedModel(model)
    compiled = torch.compile(model, backend="eager")
    grow_to(model, "norm", SeedStage.TRAINING)
    scramble(model)
    ema.update_parameters(compiled)
    assert same_tensors(averages(ema.module), averages(model))


def test_an_average_of_another_width_of_numbers_takes_new_seeds_in_it():
    model = cnn_model()
    ema = GrowingAveragedModel(model).double()
    grow_to(model, "norm", SeedStage.BLENDING)
    ema.update_parameters(model)
    assert {p.dtype for p in ema.parameters()} == {torch.float64}
    ema.eval()(images().double())


def test_a_model_with_other_slots_is_refused():
    ema = GrowingAveragedModel(cnn_model())
    with pytest.raises(HostError, match=r"average: norm, norm2, act2\n  model:   norm$"):
        ema.update_parameters(cnn_model(slots=("norm",)))
    assert ema.n_averaged == 0


def test_it_trains_nothing_and_draws_nothing():
    model = cnn_model()
    ema = GrowingAveragedModel(model)
    grow_to(model, "norm", SeedStage.TRAINING)
    F.cross_entropy(model(images()), torch.zeros(6, dtype=torch.long)).backward()
    before = torch.get_rng_state()
    ema.update_parameters(model)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in ema.parameters())


@pytest.mark.parametrize("of", ["the model", "its host", "a module around it"])
def test_an_average_of_torch_is_warned_of_when_the_model_grows(of):
    model, _ = make_model()
    made_of = {"the model": model, "its host": model.host, "a module around it": nn.Sequential(model)}[of]
    average = AveragedModel(made_of)
    tie_optimizer(model, SGD(model.host_parameters(), 0.1))
    with pytest.warns(MisuseWarning, match=r"paired by position(.*\n)*Use GrowingAveragedModel"):
        model.germinate(FIRST, "scale")
    assert average.n_averaged == 0


def test_an_average_of_torch_is_warned_of_where_model_and_average_are_copies():
    model, _ = make_model()
    model, average = copy.deepcopy((model, AveragedModel(model)))
    tie_optimizer(model, SGD(model.host_parameters(), 0.1))
    with pytest.warns(MisuseWarning, match="paired by position"):
        model.germinate(FIRST, "scale")
    assert average.n_averaged == 0


def test_averages_that_grow_and_those_of_other_models_are_not_warned_of():
    model, _ = make_model()
    averages = GrowingAveragedModel(model), AveragedModel(make_model()[0])
    tie_optimizer(model, SGD(model.host_parameters(), 0.1))
    model.germinate(FIRST, "scale")
    assert len(averages) == 2
