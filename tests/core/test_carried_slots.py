"""Copies of a host's layers carry its slots, with the seeds in them: they are refused, or made without."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from state_helpers import (
    FIRST,
    SECOND,
    WIDTH,
    bring_to,
    make_batch,
    make_model,
    make_registry,
    picture,
    same_picture,
)
from torch import Tensor, nn

from kasmina_core import (
    BlueprintError,
    BlueprintRegistry,
    BlueprintSpec,
    CheckpointError,
    GerminationError,
    HostError,
    MorphogeneticModel,
    SeedStage,
    Topology,
    check_blueprint_spec,
    copy_without_slots,
)

WAY_OUT = r"copy_without_slots\(module\)"


class Residual(nn.Module):
    """A copy of a layer as a branch, its last factor zero."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.body(x)


def spec_of(body: Callable[[], nn.Module]) -> BlueprintSpec:
    return BlueprintSpec(
        "copy", Topology.CNN, lambda dim: Residual(body()), lambda dim: 0, accepts_width=only_the_hosts
    )


def only_the_hosts(dim: int) -> str | None:
    return None if dim == WIDTH else "it copies a layer"


@pytest.fixture
def grown() -> tuple[MorphogeneticModel, BlueprintRegistry]:
    """A model with a fossil in its second slot, whose output is far from its input."""
    registry = make_registry()
    model, _ = make_model(registry=registry)
    bring_to(model, SeedStage.FOSSILIZED, SECOND)
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.add_(1.0)
    return model.eval(), registry


BAD: dict[str, tuple[Callable[[MorphogeneticModel], nn.Module], str]] = {
    "a deep copy": (lambda model: copy.deepcopy(model.host[3:]), r"slot '4' hangs on its ReLU 'body\.4'"),
    "the layer itself": (lambda model: model.host[4], "slot '4' hangs on its ReLU 'body'"),
    "a slot": (lambda model: copy.deepcopy(model.slots[SECOND]), "its SeedSlot 'body' is"),
    "the model": (lambda model: copy.deepcopy(model), "its MorphogeneticModel 'body' is"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_seed_that_carries_a_slot_is_refused_with_what_to_write(what: str, grown) -> None:
    model, registry = grown
    make, says = BAD[what]
    registry.register(spec_of(lambda: make(model)), pack="mine")
    before = picture(model)
    with pytest.raises(GerminationError, match=rf"builds failed(?s:.*){says}(?s:.*){WAY_OUT}"):
        model.germinate(FIRST, "copy")
    assert same_picture(before, picture(model))
    with pytest.raises(BlueprintError, match=rf"'mine:copy' carries a slot of a model(?s:.*){says}"):
        registry.create("copy", WIDTH)


@pytest.mark.parametrize("what", BAD)
def test_the_checks_of_a_registration_refuse_it_too(what: str, grown) -> None:
    model, _ = grown
    make, says = BAD[what]
    report = check_blueprint_spec(spec_of(lambda: make(model)), device="cpu", widths=[WIDTH], full=False)
    first = report.failures[0]
    assert first.name == "factory"
    assert "carries a slot of a model" in str(first)
    assert re.search(says, str(first.measured))


def test_a_saved_seed_is_not_rebuilt_with_a_slot_in_it(grown) -> None:
    model, registry = grown
    registry.register(spec_of(lambda: copy_without_slots(model.host[3])), pack="mine")
    model.germinate(FIRST, "copy")
    saved = model.state_dict()
    other = make_registry()
    other.register(spec_of(lambda: copy.deepcopy(model.host[3:])), pack="mine")
    empty, _ = make_model(registry=other)
    before = picture(empty)
    with pytest.raises(CheckpointError, match=WAY_OUT):
        empty.load_state_dict(saved)
    assert same_picture(before, picture(empty))


def test_a_copy_without_slots_computes_as_the_layers_do_without_their_seeds(grown) -> None:
    model, registry = grown
    registry.register(spec_of(lambda: copy_without_slots(model.host[3:5])), pack="mine")
    model.germinate(FIRST, "copy")
    body = model.slots[FIRST].seed.body
    x = torch.randn(2, WIDTH, 5, 5, generator=torch.Generator().manual_seed(0))
    with model.bypassed(SECOND):
        expected = model.host[3:5](x)
    assert torch.equal(body(x), expected)
    assert not torch.equal(model.host[3:5](x), expected)
    assert len(model.seed_parameters(FIRST)) == 3
    assert {id(p) for p in model.seed_parameters(FIRST)}.isdisjoint(map(id, model.host_parameters()))


def test_a_host_that_was_copied_with_its_slots_is_refused_and_one_without_is_taken(grown) -> None:
    model, registry = grown
    x, _ = make_batch()
    with pytest.raises(
        HostError, match=rf"is a copy of a host that had: slot '\d' hangs on (?s:.*){WAY_OUT}"
    ):
        MorphogeneticModel(copy.deepcopy(model.host), ["0"], example=x, registry=registry)
    clean = copy_without_slots(model.host)
    again = MorphogeneticModel(clean, [FIRST, SECOND], example=x, registry=registry)
    with model.bypassed(SECOND):
        assert torch.equal(again(x), model(x))
    again.germinate(SECOND, "scale")


def test_a_copy_keeps_other_hooks_and_leaves_the_original_alone(grown) -> None:
    model, _ = grown
    seen: list[str] = []
    model.host[4].register_forward_hook(_Notes(seen))
    x, _ = make_batch()
    model(x).sum().backward()
    before = model(x)
    clean = copy_without_slots(model.host)
    assert torch.equal(model(x), before)
    assert any(p.grad is not None for p in model.host_parameters())
    assert all(p.grad is None for p in clean.parameters())
    assert [type(hook) for hook in clean[4]._forward_hooks.values()] == [_Notes]
    assert sum(map(len, (clean[4]._forward_hooks_with_kwargs, clean[4]._forward_hooks_always_called))) == 0


class _Notes:
    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        self.seen.append(type(module).__name__)


@pytest.mark.parametrize("of", ["model", "slot"])
def test_what_holds_slots_itself_cannot_be_copied_without(of: str, grown) -> None:
    model, _ = grown
    with pytest.raises(TypeError, match=r"Copy the host or a part of it, model\.host, not the"):
        copy_without_slots(model if of == "model" else model.slots[FIRST])


def test_a_copy_of_a_model_is_still_a_model(grown) -> None:
    model, registry = grown
    twin = copy.deepcopy(model)
    x, _ = make_batch()
    assert torch.equal(twin(x), model(x))
    host = twin.detach_slots()
    MorphogeneticModel(host, [FIRST], example=x, registry=registry)
