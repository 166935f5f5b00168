"""Modules that return more than features: a slot takes the features and keeps the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    HostError,
    MorphogeneticModel,
    SeedStage,
    Topology,
)
from tests.core.state_helpers import WAY, PerToken, open_config

DIM = 4


@dataclass
class Record:
    """A plain dataclass that begins with the features."""

    features: Tensor
    weights: Tensor | None = None
    note: str = ""


@dataclass
class Output(OrderedDict[str, Any]):
    """Behaves as the outputs of the library transformers do: a dataclass, a mapping and a sequence in one."""

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    attentions: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]


def as_record(x: Tensor) -> Record:
    return Record(x, weights=x.sum(-1), note="kept")


def as_output(x: Tensor) -> Output:
    return Output(last_hidden_state=x, attentions=x.sum(-1))


def as_tuple(x: Tensor) -> tuple[Tensor, Tensor, None]:
    return x, x.sum(-1), None


class Layer(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x))


class Host(nn.Module):
    """Returns what its layer returned, so that a test sees what the slot made of it."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.layer = Layer(wrap)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def features_of(output: Any) -> Tensor:
    if isinstance(output, Record):
        return output.features
    return output[0]


def grown(wrap: Callable[[Tensor], Any], stage: SeedStage) -> tuple[MorphogeneticModel, Tensor]:
    registry = BlueprintRegistry()
    registry.register(BlueprintSpec("scale", Topology.TRANSFORMER, PerToken, lambda dim: dim), pack="mine")
    x = torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(5))
    model = MorphogeneticModel(Host(wrap), ["layer"], config=open_config(), example=x, registry=registry)
    model.evaluate_with(lambda: features_of(model(x)).flatten())
    if stage is not SeedStage.DORMANT:
        model.germinate("layer", "scale")
        for _ in range(30):
            if model.slots["layer"].stage is stage:
                break
            result = model.step_epoch()
            if model.slots["layer"].stage is SeedStage.PROBATIONARY and stage is SeedStage.FOSSILIZED:
                assert result is not None
                model.advance_stage("layer")
        with torch.no_grad():
            for parameter in model.seed_parameters():
                parameter.mul_(3.0)
    assert model.slots["layer"].stage is stage
    return model, x


WRAPS = [as_tuple, as_record, as_output]


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_point_of_a_layer_is_read_off_the_features_in_its_output(wrap: Callable[[Tensor], Any]) -> None:
    model, _ = grown(wrap, SeedStage.DORMANT)
    point = model.slots["layer"].point
    assert (point.dim, point.topology) == (DIM, Topology.TRANSFORMER)


@pytest.mark.parametrize("stage", [SeedStage.DORMANT, *WAY])
@pytest.mark.parametrize("wrap", WRAPS)
def test_the_rest_of_the_output_is_kept_and_the_features_pass_through_the_slot(
    wrap: Callable[[Tensor], Any], stage: SeedStage
) -> None:
    model, x = grown(wrap, stage)
    bare, output = Host(wrap)(x), model(x)
    assert type(output) is type(bare)
    factor = 1.0 + 2.0 * model.slots["layer"].alpha
    torch.testing.assert_close(features_of(output), features_of(bare) * factor)
    if model.slots["layer"].alpha == 0.0:
        assert torch.equal(features_of(output), features_of(bare))
    rest = output.weights if isinstance(output, Record) else output[1]
    assert torch.equal(rest, features_of(bare).sum(-1))


def test_every_way_to_read_an_output_gives_the_same_features() -> None:
    model, x = grown(as_output, SeedStage.FOSSILIZED)
    output = model(x)
    assert output[0] is output["last_hidden_state"] is output.last_hidden_state
    assert list(output) == ["last_hidden_state", "attentions"]


def test_a_module_that_is_given_an_output_may_use_it_again_unchanged() -> None:
    kept: list[Output] = []

    def remember(x: Tensor) -> Output:
        kept.append(as_output(x))
        return kept[-1]

    model, x = grown(remember, SeedStage.FOSSILIZED)
    output = model(x)
    assert output is not kept[-1]
    assert not torch.equal(output[0], kept[-1][0])


@pytest.mark.parametrize("output", [Output(), Output(loss=torch.tensor(1.0)), Record])
def test_an_output_without_features_is_refused(output: Any) -> None:
    host = Host(lambda x: output)
    with pytest.raises(HostError, match=r"returns (Output|type), not a tensor|has features of shape \(\)"):
        MorphogeneticModel(host, ["layer"], example=torch.zeros(1, 2, DIM))
