"""A slot whose module was replaced, wrapped or lost after it was attached; hosts used twice; other threads."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from state_helpers import (
    FIRST,
    SECOND,
    bring_to,
    make_batch,
    make_host,
    make_model,
    make_registry,
    open_config,
)
from torch import Tensor, nn

from kasmina_core import HostError, MisuseWarning, MorphogeneticModel, SeedStage, export_model


class Wrapper(nn.Module):
    """What an adapter does to a layer: holds it, and adds something to its output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5


def fossil(slot: str = SECOND) -> MorphogeneticModel:
    model, _ = make_model()
    bring_to(model, SeedStage.FOSSILIZED, slot)
    return model.eval()


def test_a_fossil_follows_the_module_that_takes_the_place_of_its_own() -> None:
    model = fossil(FIRST)
    slot = model.slots[FIRST]
    x, _ = make_batch()
    expected = model(x)
    model.host[int(FIRST)] = nn.ReLU()  # equal, and another object
    with pytest.warns(
        MisuseWarning, match=f"slot '{FIRST}' was replaced: its seed .FOSSILIZED. now follows the ReLU"
    ):
        found = model(x)
    assert torch.equal(found, expected)
    assert torch.equal(model(x), expected), "it is reported once"
    assert slot.stage is SeedStage.FOSSILIZED


def test_a_wrapper_is_before_the_seed_so_that_merging_it_changes_nothing() -> None:
    model = fossil()
    x, _ = make_batch()
    layer = model.host[int(SECOND)]
    model.host[int(SECOND)] = Wrapper(layer)
    with pytest.warns(MisuseWarning, match="now follows the Wrapper"):
        wrapped = model(x)

    class Merged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layer(x) + 0.5

    model.host[int(SECOND)] = Merged()
    with pytest.warns(MisuseWarning, match="now follows the Merged"):
        assert torch.equal(model(x), wrapped)


@pytest.mark.parametrize(
    "notice",
    [
        lambda model: model(make_batch()[0]),
        lambda model: model.step_epoch(1.0),
        lambda model: model.state_dict(),
        lambda model: export_model(model, example=make_batch()[0]),
    ],
    ids=["forward", "epoch", "save", "export"],
)
def test_a_seed_whose_module_is_gone_is_an_error_at_every_door(notice) -> None:
    model = fossil()
    del model.host[int(SECOND) :]
    with pytest.raises(
        HostError, match=f"The module of slot '{SECOND}' is gone: Sequential has no '{SECOND}' any more"
    ):
        notice(model)


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3))


def test_two_modules_that_hold_seeds_may_change_places() -> None:
    model = MorphogeneticModel(
        Twins(), ["layers.1", "layers.2"], example=torch.zeros(2, 1, 5, 5), registry=make_registry()
    )
    for slot in model.slots:
        model.germinate(slot, "scale")
    layers = model.host.layers
    layers[1], layers[2] = layers[2], layers[1]
    with pytest.warns(MisuseWarning, match="was replaced"):
        model(torch.ones(2, 1, 5, 5))
    model(torch.ones(2, 1, 5, 5))
    del layers[1]
    with pytest.raises(HostError, match="The module of slot 'layers_2' is gone"):
        model(torch.ones(2, 1, 5, 5))


def test_slots_that_were_taken_off_stay_off() -> None:
    model = fossil()
    x, _ = make_batch()
    host = model.detach_slots()
    assert torch.equal(model(x), host(x))
    with pytest.raises(HostError, match=r"taken off its host with detach_slots\(\)"):
        model.germinate(FIRST, "scale")
    assert torch.equal(model(x), host(x))


def test_an_empty_slot_follows_once_it_holds_a_seed() -> None:
    model, _ = make_model()
    model.host[int(FIRST)] = nn.ReLU()
    model(make_batch()[0])
    with pytest.warns(MisuseWarning, match="was replaced"):
        model.germinate(FIRST, "scale")
    for _ in range(3):
        model.step_epoch(1.0)
    model.train()
    x, y = make_batch()
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.seed_parameters(FIRST))


def test_a_copy_follows_its_own_modules() -> None:
    model = fossil()
    twin = copy.deepcopy(model)
    twin.host[int(SECOND)] = nn.ReLU()
    x, _ = make_batch()
    with pytest.warns(MisuseWarning, match="was replaced"):
        twin(x)
    assert torch.equal(model(x), twin(x))


def test_a_host_in_use_is_refused_with_the_way_out_and_free_once_its_model_is_gone() -> None:
    host = make_host()
    arguments = {"config": open_config(), "example": torch.zeros(2, 1, 5, 5), "registry": make_registry()}
    model = MorphogeneticModel(host, [FIRST], **arguments)
    with pytest.raises(HostError, match=r"already has a slot.*\n.*old_model\.detach_slots\(\)"):
        MorphogeneticModel(host, [FIRST], **arguments)
    x, y = make_batch()
    model.evaluate_with(lambda: F.cross_entropy(again(x), y, reduction="none"))
    again = model
    bring_to(model, SeedStage.BLENDING)
    model.slots[FIRST].set_alpha(0.5)
    del model, again
    gc.collect()
    with pytest.warns(MisuseWarning, match=r"is gone, and with it the seed in slot '2' \(BLENDING\)"):
        again = MorphogeneticModel(host, [FIRST], **arguments)
    assert torch.equal(again.eval()(x), make_host().eval()(x))


def test_another_thread_gets_the_predictions_of_the_model_while_a_seed_is_measured() -> None:
    model, _ = make_model(open_config(ramp_steps=50))
    bring_to(model, SeedStage.BLENDING)
    model.slots[FIRST].set_alpha(0.5)
    model.eval()
    x, y = make_batch()
    expected, over, answers = model(x).detach(), threading.Event(), []

    def serve() -> None:
        with torch.no_grad():
            while not over.is_set():
                answers.append(torch.equal(model(x), expected))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(10):
            model.measure(FIRST, lambda: F.cross_entropy(model(x), y, reduction="none"))
    finally:
        over.set()
        thread.join()
    assert answers
    assert all(answers)


def test_an_evaluator_that_runs_the_model_in_another_thread_is_an_error_and_never_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kasmina_core.quiet.PATIENCE", 0.2)
    model, _ = make_model()
    bring_to(model, SeedStage.TRAINING)
    x, y = make_batch()
    faults: list[str] = []

    def evaluator() -> Tensor:
        def work() -> None:
            try:
                model(x)
            except Exception as error:
                faults.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return F.cross_entropy(model(x), y, reduction="none")

    model.measure(FIRST, evaluator)
    assert faults
    assert "An evaluator must run the model in the thread that calls it" in faults[0]
