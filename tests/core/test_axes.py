"""Which axis is the batch and which the width is proved at attach, read from modules or stated; else it is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    EveryPosition,
    ForwardMode,
    GerminationError,
    HostError,
    InjectionPoint,
    MorphogeneticModel,
    Topology,
)
from tests.core.state_helpers import open_config

WIDTH = 8


class Inside(nn.Module):
    """A host that turns its input around before its point, and back behind it."""

    def __init__(
        self, body: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.body, self.before, self.after = body, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(self.before(x)))


class Call(nn.Module):
    """A function as a module, with weights that the function is given."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([torch.randn(shape) for shape in shapes])

    def forward(self, *args: Any, **keywords: Any) -> Any:
        return self.function(*args, *self.weights, **keywords)


class Body(nn.Module):
    """Makes the point of a host whose input is more than features."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x: Tensor, *rest: object, **keywords: object) -> Tensor:
        return self.body(x)


class WithMask(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=batch_first)

    def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        return self.body(x, src_mask=options["mask"], src_key_padding_mask=options["padding"])


class AttendToItself(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.body = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, x, x)[0]


class Tokens(nn.Module):
    """Ids (b, t) to features; ``turn`` holds them (t, b, d) as XLNet does."""

    def __init__(self, turn: bool, body: nn.Module | None = None) -> None:
        super().__init__()
        self.embed, self.turn = nn.Embedding(11, WIDTH), turn
        self.body = body or nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=not turn)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        x = self.body(x.transpose(0, 1)).transpose(0, 1) if self.turn else self.body(x)
        return self.head(x if mask is None else x * mask.unsqueeze(-1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], batch_first: bool, both_ways: bool = False) -> None:
        super().__init__()
        self.body = kind(WIDTH, WIDTH, batch_first=batch_first, bidirectional=both_ways)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return self.body(x, state)[0]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))


def encoder(**keywords: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, **keywords)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


def last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def image_windows(x: Tensor) -> Tensor:
    """Return the four quarters of (b, c, h, w) as (4b, h/2*w/2, c)."""
    b, c, h, w = x.shape
    x = x.view(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b * 4, -1, c)


SHAPE_T, SHAPE_I = (3, 5, WIDTH), (2, 3, 12, 10)

READ: list[tuple[str, Callable[[], nn.Module], object, tuple[Topology, str]]] = [
    (
        "conv1d",
        lambda: Body(nn.Conv1d(3, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv1d(WIDTH, WIDTH, 1)),
        normal(2, 3, 9),
        (Topology.SIGNAL, "bct"),
    ),
    (
        "conv1d, one sample",
        lambda: Body(nn.Conv1d(3, WIDTH, 3)),
        normal(1, 3, 9),
        (Topology.SIGNAL, "bct"),
    ),
    (
        "conv1d with stride on raw sound",
        lambda: Body(nn.Unflatten(1, (1, -1)), nn.Conv1d(1, WIDTH, 10, 5), nn.GELU()),
        normal(2, 400),
        (Topology.SIGNAL, "bct"),
    ),
    ("encoder layer of torch", lambda: Body(encoder()), normal(*SHAPE_T), (Topology.TRANSFORMER, "tbd")),
    (
        "encoder layer, batch first",
        lambda: Body(encoder(batch_first=True)),
        normal(*SHAPE_T),
        (Topology.TRANSFORMER, "btd"),
    ),
    ("encoder, one sample", lambda: Body(encoder()), normal(5, 1, WIDTH), (Topology.TRANSFORMER, "tbd")),
    ("encoder of zeros", lambda: Body(encoder()), torch.zeros(SHAPE_T), (Topology.TRANSFORMER, "tbd")),
    ("encoder, sizes alike", lambda: Body(encoder()), normal(4, 4, WIDTH), (Topology.TRANSFORMER, "tbd")),
    (
        "encoder, sizes all alike",
        lambda: Body(encoder(batch_first=True)),
        normal(WIDTH, WIDTH, WIDTH),
        (Topology.TRANSFORMER, "btd"),
    ),
    (
        "masks, positions first",
        lambda: WithMask(False),
        (
            normal(5, 3, WIDTH),
            {"mask": torch.ones(5, 5).triu(1).bool(), "padding": torch.zeros(3, 5).bool()},
        ),
        (Topology.TRANSFORMER, "tbd"),
    ),
    (
        "masks, batch first",
        lambda: WithMask(True),
        (
            normal(3, 5, WIDTH),
            {"mask": torch.ones(5, 5).triu(1).bool(), "padding": torch.zeros(3, 5).bool()},
        ),
        (Topology.TRANSFORMER, "btd"),
    ),
    ("attention", lambda: AttendToItself(False), normal(*SHAPE_T), (Topology.TRANSFORMER, "tbd")),
    ("attention, batch first", lambda: AttendToItself(True), normal(*SHAPE_T), (Topology.TRANSFORMER, "btd")),
    ("lstm", lambda: Recurrent(nn.LSTM, False), normal(*SHAPE_T), (Topology.TRANSFORMER, "tbd")),
    ("lstm of two", lambda: Recurrent(nn.LSTM, False), normal(2, 2, WIDTH), (Topology.TRANSFORMER, "tbd")),
    (
        "lstm, both ways",
        lambda: Recurrent(nn.LSTM, False, True),
        normal(*SHAPE_T),
        (Topology.TRANSFORMER, "tbd"),
    ),
    ("gru, batch first", lambda: Recurrent(nn.GRU, True), normal(*SHAPE_T), (Topology.TRANSFORMER, "btd")),
    (
        "gru with a state",
        lambda: Recurrent(nn.GRU, True),
        (normal(*SHAPE_T), normal(1, 3, WIDTH)),
        (Topology.TRANSFORMER, "btd"),
    ),
    (
        "gru with a state, positions first",
        lambda: Recurrent(nn.GRU, False),
        (normal(5, 2, WIDTH), normal(1, 2, WIDTH)),
        (Topology.TRANSFORMER, "tbd"),
    ),
    ("tokens", lambda: Tokens(False), ids(2, 6), (Topology.TRANSFORMER, "btd")),
    ("one token twice", lambda: Tokens(False), torch.zeros(2, 6).long(), (Topology.TRANSFORMER, "btd")),
    ("one text", lambda: Tokens(False), ids(1, 6), (Topology.TRANSFORMER, "btd")),
    ("held by positions", lambda: Tokens(True), ids(2, 6), (Topology.TRANSFORMER, "tbd")),
    ("held by positions, one text", lambda: Tokens(True), ids(1, 6), (Topology.TRANSFORMER, "tbd")),
    (
        "keywords with a mask and nothing",
        lambda: Tokens(True),
        {"ids": ids(3, 6), "mask": torch.ones(3, 6)},
        (Topology.TRANSFORMER, "tbd"),
    ),
    (
        "images",
        lambda: Body(convolutions(), nn.Conv2d(WIDTH, WIDTH, 1)),
        normal(*SHAPE_I),
        (Topology.CNN, "bchw"),
    ),
    (
        "images as wide as high as many",
        lambda: Body(nn.Conv2d(4, 4, 3, padding=1)),
        normal(4, 4, 4, 4),
        (Topology.CNN, "bchw"),
    ),
    (
        "images, width last",
        lambda: Body(convolutions(), Call(last), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
        normal(*SHAPE_I),
        (Topology.CNN, "bhwc"),
    ),
    (
        "images, width last, by a function",
        lambda: Body(convolutions(), Call(last)),
        normal(*SHAPE_I),
        (Topology.CNN, "bhwc"),
    ),
    (
        "images with a head of one size",
        lambda: Inside(convolutions(), lambda x: x, lambda x: x.flatten(1) @ torch.ones(240, 2)),
        normal(*SHAPE_I),
        (Topology.CNN, "bchw"),
    ),
    ("vectors", lambda: Body(nn.Linear(5, WIDTH), nn.ReLU()), normal(3, 5), (Topology.VECTOR, "bd")),
    ("one vector", lambda: Body(nn.Linear(5, WIDTH), nn.ReLU()), normal(1, 5), (Topology.VECTOR, "bd")),
    (
        "pooled images",
        lambda: Body(convolutions(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        normal(*SHAPE_I),
        (Topology.VECTOR, "bd"),
    ),
    ("volumes", lambda: Body(nn.Conv3d(1, WIDTH, 1)), normal(2, 1, 4, 5, 6), (Topology.VOLUME, "bcdhw")),
    (
        "volumes, width last",
        lambda: Body(nn.Conv3d(1, WIDTH, 1), Call(last)),
        normal(2, 1, 4, 5, 6),
        (Topology.VOLUME, "bdhwc"),
    ),
    (
        "features that are zero",
        lambda: Body(encoder(batch_first=True), Call(lambda x: 0 * x)),
        normal(*SHAPE_T),
        (Topology.TRANSFORMER, "btd"),
    ),
    (
        "random in evaluation",
        lambda: Body(encoder(batch_first=True), Call(lambda x: nn.functional.dropout(x, 0.5))),
        normal(*SHAPE_T),
        (Topology.TRANSFORMER, "btd"),
    ),
    (
        "a batch of one size",
        lambda: Body(Call(lambda x: x.view(3, 5, WIDTH)), encoder(batch_first=True)),
        normal(3, 5, WIDTH),
        (Topology.TRANSFORMER, "btd"),
    ),
    (
        "positions of one number",
        lambda: Body(Call(lambda x, p: x + p, (5, WIDTH)), encoder(batch_first=True)),
        normal(*SHAPE_T),
        (Topology.TRANSFORMER, "btd"),
    ),
    (
        "bfloat16",
        lambda: Body(encoder()).bfloat16(),
        normal(*SHAPE_T).bfloat16(),
        (Topology.TRANSFORMER, "tbd"),
    ),
    ("float64", lambda: Body(encoder()).double(), normal(*SHAPE_T).double(), (Topology.TRANSFORMER, "tbd")),
]


@pytest.mark.parametrize(
    ("make", "example", "expected"), [case[1:] for case in READ], ids=[case[0] for case in READ]
)
def test_a_path_is_read_as_the_host_holds_it(
    make: Callable[[], nn.Module], example: object, expected: tuple[Topology, str]
) -> None:
    torch.manual_seed(0)
    point = MorphogeneticModel(make(), ["body"], example=example).slots["body"].point
    assert (point.topology, point.axes) == expected


class Silent(nn.Module):
    """An LSTM whose values tell nothing: it starts with zeros, or its inputs are drawn in evaluation too."""

    def __init__(self, is_zero: bool, batch_first: bool) -> None:
        super().__init__()
        self.is_zero, self.body = is_zero, nn.LSTM(WIDTH, WIDTH, batch_first=batch_first)
        for parameter in self.body.parameters() if is_zero else ():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if self.is_zero else x + torch.randn_like(x))[0]


@pytest.mark.parametrize("is_zero", [True, False], ids=["zero weights", "random inputs"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_where_values_tell_nothing_a_module_says_which_axis_is_its_batch(
    is_zero: bool, batch_first: bool
) -> None:
    host = Silent(is_zero, batch_first)
    model = MorphogeneticModel(
        host, ["body"], example=torch.randn(5, 3, WIDTH), context=EveryPosition(), causal=True
    )
    assert model.slots["body"].point.axes == ("btd" if batch_first else "tbd")
    model.germinate("body", "transformer:attention")


class Flat(nn.Module):
    """Puts the positions of all samples in one axis, and treats each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(0, 1)).view_as(x)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3)])
def test_positions_in_the_axis_of_the_samples_are_no_samples(size: tuple[int, int]) -> None:
    with pytest.raises(HostError, match="no axis is proved to be the batch"):
        MorphogeneticModel(Flat(), ["body"], example=torch.randn(*size, WIDTH))


class OfAnyLength(nn.Module):
    """Draws how many positions there are: no run on other inputs tells what an axis follows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        t = int(torch.randint(2, 20, ()))
        return self.body(x[:, None] + torch.randn(x.shape[0], t, 1)).mean(1)


def test_a_host_that_draws_its_lengths_takes_seeds_that_do_not_mix_positions() -> None:
    torch.manual_seed(0)
    model = MorphogeneticModel(
        OfAnyLength(), ["body"], example=torch.randn(5, WIDTH), context=EveryPosition(), causal=False
    )
    with pytest.raises(GerminationError, match="proved"):
        model.germinate("body", "transformer:attention")
    model.germinate("body", "transformer:mlp")


class Packed(nn.Module):
    """Puts the positions of all samples in one row, where they attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.reshape(1, -1, WIDTH)).view_as(x)


class OwnStatistics(nn.Module):
    """Norms by the statistics of the batch in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 1)
        self.body = nn.BatchNorm2d(WIDTH, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.conv(x))


class Graph(nn.Module):
    """Each node takes in what the edges bring from others."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, WIDTH)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        return self.body(nodes.index_add(0, edges[1], nodes[edges[0]]))


class Unknown(nn.Module):
    """Returns (b, x, y), from inputs of one size, by matrices that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Call(lambda x, w: torch.einsum("btc,tcxy->bxy", x, w), (5, WIDTH, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


REFUSED: list[tuple[str, Callable[[], nn.Module], object, list[str]]] = [
    (
        "packed in a row",
        Packed,
        normal(3, 5, WIDTH),
        ["no axis is proved to be the batch", "axis 1 holds 5 rows for each sample"],
    ),
    ("one sample in a row", Packed, normal(1, 5, WIDTH), ["axis 1 holds 5 rows for each sample"]),
    (
        "windows",
        lambda: Body(nn.Conv2d(3, WIDTH, 1), Call(image_windows), encoder(batch_first=True)),
        normal(2, 3, 8, 8),
        [
            "axis 0 holds 4 rows for each sample",
            "If a seed may take each row for a sample, as a frame or a window, state it: InjectionPoint",
        ],
    ),
    (
        "rows of positions",
        lambda: Body(Call(lambda x: x.reshape(-1, WIDTH)), nn.Linear(WIDTH, 4)),
        normal(2, 5, WIDTH),
        [
            "axis 0 holds 5 rows for each sample",
            'state it: InjectionPoint("body", "body", 4, Topology("vector"))',
        ],
    ),
    (
        "one sequence alone",
        lambda: Body(encoder()),
        normal(5, WIDTH),
        ["changes features of entries that stay"],
    ),
    (
        "statistics of the batch",
        OwnStatistics,
        normal(*SHAPE_I),
        ["Samples must not change each other's features"],
    ),
    (
        "a graph's nodes",
        Graph,
        (normal(4, 5), torch.tensor([[0, 1, 2], [1, 2, 3]])),
        ["changes features", 'Topology("vector")'],
    ),
    (
        "nobody knows",
        Unknown,
        normal(2, 5, WIDTH),
        [
            "whose batch is axis 0",
            "no run and no module tells",
            'InjectionPoint("body", "body", 4, Topology("transformer"))',
            'InjectionPoint("body", "body", 6, Topology("signal"))',
        ],
    ),
    (
        "squeezed",
        lambda: Body(encoder(batch_first=True), Call(lambda x: x.squeeze(0))),
        normal(1, 5, WIDTH),
        ["another number of samples they have another number of axes"],
    ),
]


@pytest.mark.parametrize(
    ("make", "example", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_is_not_proved_is_refused_with_the_reason(
    make: Callable[[], nn.Module], example: object, words: list[str]
) -> None:
    torch.manual_seed(0)
    with pytest.raises(HostError) as caught:
        MorphogeneticModel(make(), ["body"], example=example)
    for text in words:
        assert text in str(caught.value)


def test_of_nodes_of_a_graph_the_one_statement_that_can_be_right_is_shown() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
            return self.body(edges @ self.first(nodes).relu())

    torch.manual_seed(0)
    example = (torch.randn(6, WIDTH), torch.softmax(torch.randn(6, 6), -1))
    with pytest.raises(HostError) as caught:
        MorphogeneticModel(Graph(), ["body"], example=example)
    (line,) = [line for line in str(caught.value).splitlines() if "state it: " in line]
    assert line.strip() == (
        "If a seed may treat each row by itself, as a node or a position, state it: "
        'InjectionPoint("body", "body", 8, Topology("vector"))'
    )
    point = InjectionPoint("body", "body", WIDTH, Topology.VECTOR)
    assert MorphogeneticModel(Graph(), [point], example=example).slots["body"].shape == (6, WIDTH)


def test_samples_that_mix_in_a_row_of_positions_are_not_to_be_stated() -> None:
    with pytest.raises(
        HostError, match="Name a module whose features keep each sample on an entry of one axis"
    ) as e:
        MorphogeneticModel(Packed(), ["body"], example=torch.randn(3, 5, WIDTH))
    assert "state it" not in str(e.value)


def stated(dim: int, topology: Topology, layout: str | None = None) -> InjectionPoint:
    return InjectionPoint("body", "body", dim, topology, layout=layout)


STATED: list[tuple[str, Callable[[], nn.Module], object, InjectionPoint, str]] = [
    ("positions first", lambda: Body(encoder()), normal(*SHAPE_T), stated(WIDTH, Topology.TRANSFORMER), 'write:    InjectionPoint("body", "body", 8, Topology("transformer"), layout="tbd")'),
    ("batch first", lambda: Body(encoder(batch_first=True)), normal(*SHAPE_T), stated(WIDTH, Topology.TRANSFORMER, "tbd"), 'write:    InjectionPoint("body", "body", 8, Topology("transformer"))'),
    ("a signal", lambda: Body(nn.Conv1d(3, WIDTH, 1)), normal(2, 3, 9), stated(9, Topology.TRANSFORMER), 'write:    InjectionPoint("body", "body", 8, Topology("signal"))'),
    ("width last", lambda: Body(convolutions(), Call(last)), normal(2, 3, 12, 10), stated(6, Topology.CNN), 'write:    InjectionPoint("body", "body", 8, Topology("cnn"), layout="bhwc")'),
    ("packed in a row", Packed, normal(3, 5, WIDTH), stated(WIDTH, Topology.TRANSFORMER), "axis 0 does not follow the number of samples"),
    ("statistics of the batch", OwnStatistics, normal(*SHAPE_I), stated(WIDTH, Topology.CNN), "another sample changes features along axis 0"),
    ("by modules", lambda: Body(Call(lambda x: x.view(3, 5, 6)), nn.Conv1d(5, WIDTH, 1)), normal(3, 5, 6), stated(6, Topology.TRANSFORMER), "is not what the modules give"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "example", "point", "words"), [case[1:] for case in STATED], ids=[case[0] for case in STATED]
)
def test_what_a_point_states_is_refused_if_the_host_shows_something_else(
    make: Callable[[], nn.Module], example: object, point: InjectionPoint, words: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises(
        HostError, match=r"is not as declared\n    declared: .*\n    found:    features "
    ) as caught:
        MorphogeneticModel(make(), [point], example=example)
    assert words in str(caught.value)


TAKEN: list[tuple[str, Callable[[], nn.Module], object, InjectionPoint]] = [
    ("nobody knows", Unknown, normal(2, 5, WIDTH), stated(6, Topology.SIGNAL)),
    ("rows of positions", lambda: Body(Call(lambda x: x.reshape(-1, WIDTH)), nn.Linear(WIDTH, 4)), normal(2, 5, WIDTH), stated(4, Topology.VECTOR)),
    ("windows", lambda: Body(nn.Conv2d(3, WIDTH, 1), Call(image_windows), encoder(batch_first=True)), normal(2, 3, 8, 8), stated(WIDTH, Topology.TRANSFORMER)),
    ("a graph's nodes", Graph, (normal(4, 5), torch.tensor([[0, 1, 2], [1, 2, 3]])), stated(WIDTH, Topology.VECTOR)),
    ("any number of channels", lambda: Body(nn.Sigmoid()), normal(2, 4, 3, 3), stated(4, Topology.CNN)),
    ("each position by itself", lambda: Body(nn.Linear(WIDTH, 4)), normal(*SHAPE_T), stated(4, Topology.TRANSFORMER, "tbd")),
    ("each position by itself, batch first", lambda: Body(nn.Linear(WIDTH, 4)), normal(*SHAPE_T), stated(4, Topology.TRANSFORMER)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "example", "point"), [case[1:] for case in TAKEN], ids=[case[0] for case in TAKEN]
)
def test_what_a_point_states_is_taken_if_nothing_contradicts_it(
    make: Callable[[], nn.Module], example: object, point: InjectionPoint
) -> None:
    torch.manual_seed(0)
    assert MorphogeneticModel(make(), [point], example=example).slots["body"].point == point


# -- other samples ---------------------------------------------------------------------------------------------------


class MixSeed(nn.Module):
    """Adds to each position what all positions of its sample hold, as attention may."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, context: object = None) -> Tensor:
        return x + self.weight * x.square().mean(tuple(range(1, x.dim())), keepdim=True)


def mixing_model(host: nn.Module, example: object, slots: Any = "body") -> MorphogeneticModel:
    registry = BlueprintRegistry()
    for topology in Topology:
        mixes = "positions" if topology is Topology.TRANSFORMER else ""
        spec = BlueprintSpec(f"mix-{topology.value}", topology, MixSeed, lambda dim: 1, mixes=mixes)
        registry.register(spec, pack="mine")
    return MorphogeneticModel(
        host, slots, example=example, registry=registry, context=EveryPosition(), config=open_config()
    )


LAYOUTS = [case for case in READ if case[0] in {"encoder layer of torch", "gru, batch first", "held by positions", "images", "images, width last", "conv1d", "volumes", "volumes, width last", "pooled images"}]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "example", "expected"), [case[1:] for case in LAYOUTS], ids=[case[0] for case in LAYOUTS]
)
def test_a_mixing_seed_at_alpha_one_moves_no_other_sample(
    make: Callable[[], nn.Module], example: Tensor, expected: tuple[Topology, str]
) -> None:
    torch.manual_seed(0)
    model = mixing_model(make(), example)
    model.germinate("body", f"mix-{expected[0].value}")
    bare = model.eval()(example)
    with torch.no_grad(), model.slots["body"].forced(ForwardMode.SEED):
        model.slots["body"].seed.weight.fill_(2.0)
        plain = model(example)
        batch = 1 if expected[1].index("b") == 1 and example.is_floating_point() else 0
        changed = example.clone()
        one = example.select(batch, 0)
        changed.select(batch, 0).copy_(1 - 2 * one if one.is_floating_point() else 10 - one)
        other = model(changed)
    rows = [t.narrow(batch, 1, t.shape[batch] - 1) for t in (plain, other)]
    assert not torch.allclose(plain, bare)
    torch.testing.assert_close(*rows)
    assert not torch.allclose(plain.narrow(batch, 0, 1), other.narrow(batch, 0, 1))


def test_a_mixing_seed_is_refused_where_two_readings_explain_the_host_until_one_is_stated() -> None:
    host, x = Body(nn.Linear(WIDTH, WIDTH)), normal(*SHAPE_T)
    with pytest.raises(GerminationError, match=r'which axis they are on is not proved.*layout="tbd"'):
        mixing_model(host, x).germinate("body", "mix-transformer")
    point = stated(WIDTH, Topology.TRANSFORMER, "tbd")
    assert mixing_model(Body(nn.Linear(WIDTH, WIDTH)), x, [point]).germinate("body", "mix-transformer")


def test_what_follows_tells_the_batch_of_a_place_that_treats_each_entry_by_itself() -> None:
    host = nn.Sequential(nn.Linear(WIDTH, WIDTH), Recurrent(nn.LSTM, False))
    assert MorphogeneticModel(host, ["0"], example=normal(*SHAPE_T)).slots["0"].point.layout == "tbd"


class Remembers(nn.Module):
    """Keeps a state between calls, of the size of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.state = nn.Linear(WIDTH, WIDTH), None

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x if self.state is None else x + self.state)
        self.state = y.detach()
        return y


def test_the_runs_leave_no_state_in_the_host() -> None:
    host, x = Remembers(), normal(3, WIDTH)
    before = torch.get_rng_state()
    MorphogeneticModel(host, ["body"], example=x)
    assert host.state is None
    assert host.training
    assert torch.equal(before, torch.get_rng_state())


def test_a_host_runs_a_handful_of_times() -> None:
    calls: list[tuple[int, ...]] = []
    host = Body(nn.Conv2d(3, WIDTH, 1))
    host.register_forward_pre_hook(lambda _module, args: calls.append(tuple(args[0].shape)))
    MorphogeneticModel(host, ["body"], example=normal(16, 3, 8, 8))
    assert len(calls) <= 6
    assert sum(shape[0] for shape in calls) <= 6 * 16


class Mixing(nn.Module):
    """``x + gain * mean(x)`` over one axis; the identity at birth."""

    def __init__(self, dim: int, axis: int = 0) -> None:
        super().__init__()
        self.gain, self.axis = nn.Parameter(torch.zeros(dim)), axis

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * x.mean(self.axis, keepdim=True)


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        (0, "kept apart failed: another sample changes a sample's features"),
        (
            1,
            "kept apart failed: another position changes a position's features, and its blueprint does not say so",
        ),
    ],
)
def test_a_seed_that_was_registered_by_hand_and_mixes_what_it_must_not_is_refused(
    axis: int, words: str
) -> None:
    registry = BlueprintRegistry()
    registry.register(
        BlueprintSpec("mean", Topology.TRANSFORMER, partial(Mixing, axis=axis), lambda dim: dim), pack="mine"
    )
    registry.register(
        BlueprintSpec("own", Topology.TRANSFORMER, partial(Mixing, axis=2), lambda dim: dim), pack="mine"
    )
    host = Body(encoder(batch_first=True))
    model = MorphogeneticModel(
        host, ["body"], example=normal(*SHAPE_T), registry=registry, context=EveryPosition()
    )
    with pytest.raises(GerminationError, match=words):
        model.germinate("body", "mean")
    assert model.slots["body"].state is None
    model.germinate("body", "own")
