"""An empty slot is passed by: nothing of it runs, and what listens to it still hears."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from numeric_helpers import cnn_model, grow_to, images
from torch import Tensor, nn

from kasmina_core import MorphogeneticModel, SeedStage


class Pair(NamedTuple):
    features: Tensor
    rest: int


class Returning(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x * 2.0, 7)


def test_an_empty_slot_leaves_the_very_output_of_its_module() -> None:
    host = Returning()
    outputs: list[Any] = []
    root = nn.Sequential(host)
    model = MorphogeneticModel(root, ["0"], example=torch.ones(1, 2, 3))
    host.register_forward_hook(lambda _m, _a, out: outputs.append(out))
    found = model(torch.ones(1, 2, 3))
    assert found is outputs[0]
    assert isinstance(found, Pair)
    assert found.rest == 7


def test_hooks_on_an_empty_slot_are_called_with_the_features() -> None:
    model = cnn_model()
    before, after = [], []
    slot = model.slots["norm"]
    one = slot.register_forward_pre_hook(lambda _m, args: before.append(args[0]))
    model(images())
    other = slot.register_forward_hook(lambda _m, _a, out: after.append(out))
    model(images())
    assert len(before) == 2
    assert len(after) == 1
    assert after[0] is before[1]
    one.remove()
    other.remove()


def test_a_hook_that_changes_the_features_of_an_empty_slot_changes_the_output() -> None:
    model = cnn_model().eval()
    expected = model(images())
    handle = model.slots["norm"].register_forward_hook(lambda _m, _a, out: out + 1.0)
    assert not torch.equal(model(images()), expected)
    handle.remove()
    assert torch.equal(model(images()), expected)


def test_a_seed_that_comes_and_goes_is_noticed_at_once() -> None:
    model = cnn_model().eval()
    expected = model(images())
    grow_to(model, "norm", SeedStage.SHADOWING)
    for parameter in model.seed_parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(model(images()), expected)
    model.cull("norm")
    assert torch.equal(model(images()), expected)
