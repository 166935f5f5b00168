"""Modules that return more than features: a slot takes the features and keeps the rest."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, NamedTuple

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
    UnknownNameError,
    export_model,
)
from kasmina_core.testing.comparing import tensors_in
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
    model.evaluate_with(lambda: features_of(model(x)).flatten(1).mean(1))
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


class Pair(NamedTuple):
    """A named tuple that begins with the features."""

    features: Tensor
    rest: Tensor


def as_named_tuple(x: Tensor) -> Pair:
    return Pair(x, x.sum(-1))


WRAPS = [as_tuple, as_record, as_output, as_named_tuple]


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
    with pytest.raises(
        HostError,
        match=r"returns (Output|type), not floating-point|at ':loss' of its Output, whose shape \(\) has no batch",
    ):
        MorphogeneticModel(host, ["layer"], example=torch.zeros(1, 2, DIM))


# -- features by index or key --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen:
    """Cannot be written to."""

    first: Tensor
    second: Tensor


class Rows(list[Any]):
    """A list of a class of its own."""


class Pairs(tuple[Any, ...]):
    """A tuple of a class of its own."""


INDEXED: dict[str, tuple[Callable[[Tensor], Any], str, Callable[[Any], Tensor]]] = {
    "tuple": (lambda x: (x + 1, x, None), ":1", lambda out: out[1]),
    "from the end": (lambda x: (x + 1, x), ":-1", lambda out: out[1]),
    "list": (lambda x: [x + 1, x], ":1", lambda out: out[1]),
    "list subclass": (lambda x: Rows([x + 1, x]), ":1", lambda out: out[1]),
    "tuple subclass": (lambda x: Pairs([x + 1, x]), ":1", lambda out: out[1]),
    "nested tuple": (lambda x: (x + 1, (x + 2, x)), ":1:1", lambda out: out[1][1]),
    "list in mapping": (lambda x: {"a": [x + 1, x], "b": x}, ":a:1", lambda out: out["a"][1]),
    "mapping": (lambda x: {"other": x + 1, "hidden": x}, ":hidden", lambda out: out["hidden"]),
    "ordered mapping": (lambda x: OrderedDict(a=x + 1, b=x), ":b", lambda out: out["b"]),
    "number as key": (lambda x: {3: x, 0: x + 1}, ":3", lambda out: out[3]),
    "named tuple by field": (lambda x: Pair(x + 1, x), ":rest", lambda out: out.rest),
    "named tuple by index": (lambda x: Pair(x + 1, x), ":1", lambda out: out.rest),
    "frozen dataclass": (lambda x: Frozen(x + 1, x), ":second", lambda out: out.second),
    "mapping dataclass": (
        lambda x: Output(last_hidden_state=x + 1, attentions=x),
        ":attentions",
        lambda out: out["attentions"],
    ),
    "result of torch": (lambda x: torch.return_types.max((x, x.long())), ":0", lambda out: out.values),
}


def fossilised(
    host: nn.Module, path: str, x: Tensor, features: Callable[[Any], Tensor]
) -> MorphogeneticModel:
    registry = BlueprintRegistry()
    registry.register(BlueprintSpec("scale", Topology.TRANSFORMER, PerToken, lambda dim: dim), pack="mine")
    expected = features(host(x))
    model = MorphogeneticModel(host, [path], config=open_config(), example=x, registry=registry)
    model.evaluate_with(lambda: features(model(x)).flatten(1).mean(1))
    model.germinate(path, "scale")
    for _ in range(30):
        model.step_epoch()
        if model.slots[path].alpha == 0.0:
            assert torch.equal(features(model(x)), expected)
        if model.slots[path].stage is SeedStage.PROBATIONARY and model.advance_stage(path):
            break
    assert model.slots[path].stage is SeedStage.FOSSILIZED
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.mul_(3.0)
    return model


def leaves(output: Any) -> list[tuple[str, Tensor]]:
    return list(tensors_in(output))


@pytest.mark.parametrize(("wrap", "index", "features"), INDEXED.values(), ids=INDEXED)
def test_an_index_or_key_names_the_features_and_all_else_is_kept(
    wrap: Callable[[Tensor], Any], index: str, features: Callable[[Any], Tensor]
) -> None:
    x = torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(5))
    model = fossilised(Host(wrap), f"layer{index}", x, features)
    bare, output = Host(wrap)(x), model(x)
    assert type(output) is type(bare)
    torch.testing.assert_close(features(output), 3.0 * features(bare))
    changed = [
        name for (name, a), (_, b) in zip(leaves(bare), leaves(output), strict=True) if not torch.equal(a, b)
    ]
    assert len(changed) == 1
    assert [name for name, _ in leaves(bare)] == [name for name, _ in leaves(output)]
    exported = export_model(model, example=x)
    torch.testing.assert_close(dict(leaves(exported(x))), dict(leaves(output)))
    assert type(exported(x)) is type(output)


def test_a_slot_by_index_has_a_name_without_signs_and_is_found_by_its_path() -> None:
    x = torch.zeros(1, 2, DIM)
    model = MorphogeneticModel(Host(lambda x: {"a": (x, x)}), ["layer:a:1"], example=x)
    assert list(model.slots) == ["layer_a_1"]
    assert model.slots["layer:a:1"] is model.slots["layer_a_1"]
    assert "layer:a:1" in model.slots
    assert "layer" not in model.slots
    with pytest.raises(UnknownNameError, match=r"no slot 'layer:a'\. Did you mean 'layer:a:1'\?"):
        model.slots["layer:a"]


def test_a_pattern_with_an_index_names_that_element_of_each_module() -> None:
    host = nn.Sequential(Layer(lambda x: x), Layer(lambda x: (x.sum(), x)))
    model = MorphogeneticModel(host, ["1*:1", "0"], example=torch.zeros(1, 2, DIM))
    assert [slot.point.path for slot in model.slots.values()] == ["1:1", "0"]


def test_two_elements_of_one_output_hold_a_slot_each() -> None:
    registry = BlueprintRegistry()
    registry.register(BlueprintSpec("scale", Topology.TRANSFORMER, PerToken, lambda dim: dim), pack="mine")
    x = torch.randn(2, 3, DIM)
    host = Host(lambda x: (x, {"b": x}))
    model = MorphogeneticModel(
        host, ["layer", "layer:1:b"], config=open_config(), example=x, registry=registry
    )
    expected = copy.deepcopy(host)(x)[0].detach()
    for factor, name in ((2.0, "layer"), (3.0, "layer:1:b")):
        model.germinate(name, "scale")
        model.evaluate_with(lambda: model(x)[0].flatten(1).mean(1))
        while model.slots[name].stage is not SeedStage.PROBATIONARY:
            model.step_epoch()
        with torch.no_grad():
            for parameter in model.seed_parameters(name):
                parameter.mul_(factor)
    first, second = model(x)
    torch.testing.assert_close(first, 2.0 * expected)
    torch.testing.assert_close(second["b"], 3.0 * expected)
    twin = MorphogeneticModel(
        Host(lambda x: (x, {"b": x})),
        ["layer", "layer:1:b"],
        config=open_config(),
        example=x,
        registry=registry,
    )
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x)[1]["b"], second["b"])


@pytest.mark.parametrize(("one", "other"), [("layer", "layer:0"), ("layer:0", "same:0")])
def test_one_element_holds_one_slot_whatever_it_is_called(one: str, other: str) -> None:
    host = Host(as_tuple)
    host.same = host.layer
    with pytest.raises(HostError, match=f"'{other}': names the features of '{one}' once more"):
        MorphogeneticModel(host, [one, other], example=torch.zeros(1, 2, DIM))


def test_the_output_of_the_host_itself_can_hold_a_slot() -> None:
    x = torch.randn(2, 3, DIM)
    model = fossilised(Host(lambda x: {"hidden": x, "n": 1}), ":hidden", x, lambda out: out["hidden"])
    assert list(model.slots) == ["output_hidden"]
    torch.testing.assert_close(model(x)["hidden"], 3.0 * Host(lambda x: x)(x))
    assert model.state_dict().keys() > Host(lambda x: x).state_dict().keys()


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (lambda x: 0.5, "float at ':0' of its tuple, not"),
        (torch.mean, r"whose shape \(\) has no batch and width"),
    ],
)
def test_a_number_before_the_features_is_named_with_the_line_to_write(first: Any, words: str) -> None:
    host = Host(lambda x: (first(x), x))
    with pytest.raises(HostError, match=rf"{words}.*\n *'layer:1'  .*\n *Say which: slots=\[\"layer:1\"\]"):
        MorphogeneticModel(host, ["layer"], example=torch.zeros(2, 3, DIM))


def test_a_missing_index_lists_what_there_is_with_the_line_to_write() -> None:
    host = Host(lambda x: (x.long(), [x, {"k": x[0]}]))
    with pytest.raises(HostError) as caught:
        MorphogeneticModel(host, ["layer"], example=torch.zeros(2, 3, DIM))
    assert str(caught.value).splitlines()[1:] == [
        "  'layer': returns torch.int64 at ':0' of its tuple, not floating-point features; it holds floating-point tensors at",
        "      'layer:1:0'    (2, 3, 4), torch.float32",
        "      'layer:1:1:k'  (3, 4), torch.float32",
        '    Say which: slots=["layer:1:0"]',
    ]


@pytest.mark.parametrize(
    ("wrap", "path", "words"),
    [
        (as_tuple, "layer:3", "returns tuple with nothing at ':3'; it has ':0', ':1', ':2'"),
        (as_tuple, "layer:2", "returns tuple with nothing at ':2'"),
        (
            as_record,
            "layer:feature",
            "returns Record with nothing at ':feature'; it has ':features', ':weights'",
        ),
        (lambda x: {"a": x}, "layer:b", "returns dict with nothing at ':b'; it has ':a'"),
        (lambda x: x, "layer:0", "returns Tensor with nothing at ':0'; it has nothing"),
    ],
)
def test_an_index_or_key_that_is_not_there_is_refused_with_those_that_are(
    wrap: Callable[[Tensor], Any], path: str, words: str
) -> None:
    with pytest.raises(HostError, match=words):
        MorphogeneticModel(Host(wrap), [path], example=torch.zeros(2, 3, DIM))


class Closed(tuple[Any, ...]):
    """Is built of two arguments, so that nobody else can build it again."""

    def __new__(cls, features: Tensor, rest: Tensor) -> Closed:
        return super().__new__(cls, (features, rest))


@dataclass
class Marked:
    """Has something that its fields do not hold."""

    features: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Marked:
        made = cls(x)
        made.extra = 1
        return made


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (
            lambda x: Closed(x, x),
            "returns a Closed that cannot be built again around a seed's features: TypeError",
        ),
        (Marked.of, "returns a Marked that loses the attribute 'extra' when it is built again"),
        (lambda x: MappingProxyType({"a": x}), "returns a mappingproxy that cannot be built again"),
    ],
)
def test_an_output_that_cannot_be_built_again_is_refused_when_slots_are_attached(
    wrap: Callable[[Tensor], Any], words: str
) -> None:
    path = "layer:a" if isinstance(wrap(torch.zeros(1)), MappingProxyType) else "layer"
    with pytest.raises(HostError, match=words):
        MorphogeneticModel(Host(wrap), [path], example=torch.zeros(2, 3, DIM))


def test_features_that_are_gone_in_training_are_an_error_and_no_silence() -> None:
    host = Host(lambda x: (x, x if not host.layer.training else None))
    model = MorphogeneticModel(host.eval(), ["layer:1"], config=open_config(), example=torch.zeros(2, 3, DIM))
    model.train()(torch.zeros(2, 3, DIM))
    model.germinate("layer:1", "transformer:norm")
    model.advance_stage("layer:1")
    with pytest.raises(HostError, match="nothing at ':1'"):
        model(torch.zeros(2, 3, DIM))


@pytest.mark.parametrize(
    "kind", ["nested tuple", "mapping", "ordered mapping", "named tuple by field", "list", "frozen dataclass"]
)
def test_outputs_are_built_again_in_one_graph(kind: str) -> None:
    wrap, index, features = INDEXED[kind]
    x = torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(5))
    model = fossilised(Host(wrap), f"layer{index}", x, features)
    expected = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    assert type(compiled) is type(expected)
    torch.testing.assert_close(dict(leaves(compiled)), dict(leaves(expected)))
