"""Slots get into any host by name, the host is proved first, and a failed attempt changes nothing."""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from numeric_helpers import (
    CNN_SLOTS,
    PERMISSIVE,
    ConvSeed,
    causal_host,
    cnn_host,
    cnn_model,
    grow_to,
    images,
    registry,
    same_tensors,
    snapshot,
    tokens,
)
from torch import Tensor, nn

from kasmina_core import (
    GrowthConfig,
    HookedHost,
    HostError,
    HostProtocol,
    InjectionPoint,
    MorphogeneticModel,
    SeedStage,
    Topology,
    UnknownNameError,
)


def attach(host: nn.Module, slots: Any = None, example: object = None, **keywords: Any) -> MorphogeneticModel:
    return MorphogeneticModel(host, slots, example=example, registry=registry(), **keywords)


def attach_images(host: nn.Module, slots: Any = None) -> MorphogeneticModel:
    return attach(host, slots, images(2))


# -- naming the points ---------------------------------------------------------------------------------------------


def test_paths_become_slots_in_the_order_asked_with_layout_and_width_read_off() -> None:
    model = attach_images(cnn_host(), ["act2", "norm"])
    assert list(model.slots) == ["act2", "norm"]
    assert model.slots["norm"].point == InjectionPoint("norm", "norm", 4, Topology.CNN)
    assert model.slots["norm"].shape == (2, 4, 5, 5)


def test_dotted_path_names_a_slot_without_dots_and_still_finds_it() -> None:
    model = attach(causal_host(), ["blocks.1"], tokens(1))
    assert list(model.slots) == ["blocks_1"]
    assert model.slots["blocks.1"] is model.slots["blocks_1"]
    assert "blocks.1" in model.slots
    assert model.slots["blocks_1"].point.topology is Topology.TRANSFORMER


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("blocks.*", ["blocks_0", "blocks_1"]),
        ("blocks.?", ["blocks_0", "blocks_1"]),
        ("blocks.[1-9]", ["blocks_1"]),
        ("blocks.*.mlp", ["blocks_0_mlp", "blocks_1_mlp"]),
        ("*.0.out", ["blocks_0_out"]),
    ],
)
def test_globs_match_within_one_part_of_a_path(pattern: str, found: list[str]) -> None:
    assert list(attach(causal_host(), [pattern], tokens(1)).slots) == found


def test_one_name_alone_needs_no_list_and_a_point_asked_twice_is_one_slot() -> None:
    assert list(attach_images(cnn_host(), "norm").slots) == ["norm"]
    assert list(attach_images(cnn_host(), ["norm", "norm?", "norm"]).slots) == ["norm", "norm2"]


def test_declared_points_are_kept_as_declared() -> None:
    points = [
        InjectionPoint("early", "norm", 4, Topology.CNN),
        InjectionPoint("late", "act2", 4, Topology.CNN),
    ]
    model = attach_images(cnn_host(), points)
    assert [slot.point for slot in model.slots.values()] == points
    assert model.slots["norm"] is model.slots["early"]


@pytest.mark.parametrize("causal", [True, False])
def test_points_given_by_path_are_causal_if_the_caller_says_so(causal: bool) -> None:
    model = attach(causal_host(), ["blocks.*"], tokens(1), causal=causal)
    assert [slot.point.causal for slot in model.slots.values()] == [causal] * 2
    assert not attach(cnn_host(), ["norm"], images(2), causal=causal).slots["norm"].point.causal


def test_unknown_slot_name_suggests_a_near_one() -> None:
    model = cnn_model()
    with pytest.raises(UnknownNameError, match=r"no slot 'nrom'\. Did you mean 'norm'\?"):
        model.germinate("nrom", "conv")
    assert "nrom" not in model.slots


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        (["nrom"], "Sequential has no submodule 'nrom'. Did you mean 'norm'?"),
        (["layer*"], r"No submodule of Sequential matches 'layer\*'. There are: stem, norm, act"),
        ([], "list of slots is empty"),
        (None, "does not declare injection points, so say where the slots go"),
        ([InjectionPoint("x", "nrom", 4, Topology.CNN)], "no submodule 'nrom'"),
    ],
)
def test_points_that_do_not_exist_are_refused_with_a_hint(slots: Any, words: str) -> None:
    with pytest.raises(HostError, match=words):
        attach_images(cnn_host(), slots)


@pytest.mark.parametrize(("name", "dim"), [("", 4), ("a.b", 4), ("a", 0)])
def test_impossible_declarations_of_a_point_are_refused(name: str, dim: int) -> None:
    with pytest.raises(HostError, match=str(dim) if name == "a" else repr(name)):
        InjectionPoint(name, "norm", dim, Topology.CNN)


# -- the proof -----------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A host with every kind of place where no slot can be."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.unused = nn.Conv2d(4, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.flat = nn.Flatten(0)
        self.several = Several()
        self.count = Count()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.body(x))
        x = self.twice(self.twice(x))
        features = self.several(x)["features"]
        self.count(features)
        return self.flat(features)


class Several(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x}


class Count(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).long()


IMPOSSIBLE = [
    ("unused", "'unused': does not fire"),
    ("twice", "'twice': fires 2 times"),
    ("several", "'several': returns dict, not floating-point features; it holds .*\n *'several:features' "),
    (
        "flat",
        r"'flat': has features of shape \(200,\); they must be one of: cnn \(b, c, h, w\), transformer \(b, t, d\), ",
    ),
    ("count", "'count': returns torch.int64, not floating-point features"),
    (
        InjectionPoint("body", "body", 8, Topology.CNN),
        r"declared: cnn \(b, c, h, w\), width 8\n    found:    features \(2, 4, 5, 5\)",
    ),
    (
        InjectionPoint("body", "body", 4, Topology.TRANSFORMER),
        r"declared: transformer \(b, t, d\), width 4\n    found:    features \(2, 4, 5, 5\)",
    ),
]


@pytest.mark.parametrize(("point", "words"), IMPOSSIBLE, ids=[words[:24] for _, words in IMPOSSIBLE])
def test_a_place_that_cannot_hold_a_slot_is_refused_with_the_reason(point: Any, words: str) -> None:
    with pytest.raises(HostError, match=words):
        attach_images(Odd(), [point])


def test_every_fault_is_listed_at_once() -> None:
    with pytest.raises(HostError, match="cannot hold the slots asked for") as caught:
        attach_images(Odd(), ["body", "unused", "twice", "several"])
    assert [name for name in ("body", "unused", "twice", "several") if f"'{name}'" in str(caught.value)] == [
        "unused",
        "twice",
        "several",
    ]


def test_two_points_of_one_name_are_refused() -> None:
    points = [InjectionPoint("x", path, 4, Topology.CNN) for path in ("norm", "norm2")]
    with pytest.raises(HostError, match="the name 'x' is used for more than one point"):
        attach_images(cnn_host(), points)


def test_a_host_without_example_inputs_asks_for_an_example() -> None:
    with pytest.raises(HostError, match=r"offers no example_inputs\(\): pass example="):
        attach(cnn_host(), ["norm"])


def test_an_example_that_the_host_cannot_take_is_named_with_the_cause() -> None:
    with pytest.raises(HostError, match=r"probe forward of Sequential failed: .*\n.*example=") as caught:
        attach(cnn_host(), ["norm"], torch.zeros(2, 7, 5, 5))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_proves_nothing(value: float) -> None:
    example = images(2)
    example[0, 0, 0, 0] = value
    with pytest.raises(
        HostError, match=r"'norm': nothing can be proved by this example: it holds NaN or inf"
    ):
        attach(cnn_host(), ["norm"], example)


def test_an_example_without_samples_proves_nothing() -> None:
    with pytest.raises(
        HostError, match=r"nothing can be proved by this example: the features are empty, \(0, 4"
    ):
        attach(cnn_host(), [InjectionPoint("x", "norm", 4, Topology.CNN)], images(2)[:0])


class Imputing(nn.Module):
    """Puts 0 in place of values that lack; of a sample that is masked everywhere it makes NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.inside(x.nan_to_num(0.0) + mask.softmax(-1).sum(-1, keepdim=True)))


def test_values_that_the_host_itself_fills_in_and_masks_may_lack() -> None:
    x, mask = torch.randn(4, 6), torch.zeros(4, 2)
    x[1, 2] = float("nan")
    assert attach(Imputing(), ["inside"], (x, mask)).slots["inside"].point.topology is Topology.VECTOR
    x[1, 2], mask[3] = 0.0, -float("inf")
    assert attach(Imputing(), ["inside"], (x, mask)).slots["inside"].point.topology is Topology.VECTOR


def hooks_of(host: nn.Module) -> list[list[Any]]:
    return [
        [
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *module._backward_hooks.values(),
        ]
        for module in host.modules()
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("slots", "example"),
    [
        (["body", "unused"], images(2)),
        (["body", "body", InjectionPoint("body", "norm", 4, Topology.CNN)], images(2)),
        (["body"], torch.zeros(2, 7, 5, 5)),
        (["nothing"], images(2)),
        (None, images(2)),
    ],
    ids=["does not fire", "same name", "wrong example", "no such path", "nothing declared"],
)
def test_a_failed_attachment_changes_nothing(slots: Any, example: Tensor, training: bool) -> None:
    host = Odd().train(training)
    host.norm.eval()
    own = host.body.register_forward_hook(lambda _m, _a, _o: None)
    before = hooks_of(host), snapshot(host), torch.get_rng_state()
    modes, attributes = [m.training for m in host.modules()], [set(vars(m)) for m in host.modules()]
    with pytest.raises(HostError):
        attach(host, slots, example)
    assert hooks_of(host) == before[0]
    assert same_tensors(before[1:], (snapshot(host), torch.get_rng_state()))
    assert [m.training for m in host.modules()] == modes
    assert [set(vars(m)) for m in host.modules()] == attributes
    own.remove()


class Counting(nn.Module):
    """Writes to its buffers and draws random numbers in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.conv(x) + torch.rand(())
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean((0, 2, 3))  # a new tensor takes its place
        return y


def test_the_probe_leaves_buffers_modes_and_random_numbers_of_the_host() -> None:
    host = Counting()
    before = snapshot(host), torch.get_rng_state()
    model = attach_images(host, ["conv"])
    assert same_tensors(before, (snapshot(host), torch.get_rng_state()))
    assert model.training
    assert host.training
    assert not attach_images(Counting().eval(), ["conv"]).training


class Remembering(nn.Module):
    """Keeps what it saw in attributes of many kinds, which it changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.seen: list[Any] = [0]
        self.by_name = {"calls": [0], "last": (None, {"sizes"})}
        self.recent, self.counted = deque([1, 2], maxlen=2), Counter(a=1)
        self.state = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if not hasattr(self, "late"):
            self.late = nn.Identity()
        self.seen.append(y)
        self.by_name["calls"][0] += 1
        self.by_name["last"][1].add(len(x))
        self.by_name["new"] = y
        self.recent.append(len(x))
        self.counted.update("ab")
        self.state.add_(1)
        return y

    def memory(self) -> list[Any]:
        return [self.seen, self.by_name, self.recent, self.counted, self.state]


def test_what_a_host_changes_in_place_while_it_is_probed_is_put_back() -> None:
    host = Remembering()
    before, held = copy.deepcopy(host.memory()[:-1]), host.memory()
    attach_images(host, ["conv"])
    assert host.memory()[:-1] == before
    assert all(a is b for a, b in zip(host.memory(), held, strict=True))
    assert not bool(host.state.any())
    assert [name for name, _ in host.named_children()] == ["conv"]
    host(images())
    assert len(host.seen) == 2
    assert host.counted == Counter(a=2, b=1)


# -- what stays of the host ----------------------------------------------------------------------------------------


def test_host_keeps_class_keys_children_and_its_own_hooks() -> None:
    host = cnn_host()
    calls: list[str] = []
    host.norm.register_forward_pre_hook(lambda _m, _a: calls.append("pre"))
    host.norm.register_forward_hook(lambda _m, _a, out: calls.append("post") or 2 * out)
    kind, keys, names = type(host), list(host.state_dict()), [n for n, _ in host.named_modules()]
    bare = copy.deepcopy(host).eval()
    model = attach_images(host, CNN_SLOTS)
    calls.clear()
    output = model.eval()(images())
    assert calls == ["pre", "post"]
    assert (type(model.host), list(host.state_dict()), [n for n, _ in host.named_modules()]) == (
        kind,
        keys,
        names,
    )
    assert torch.equal(output, bare(images()))


def test_a_slot_sees_what_the_hosts_own_hooks_made_of_the_features() -> None:
    host = cnn_host().eval()
    host.norm.register_forward_hook(lambda _m, _a, out: 0 * out)
    model = attach_images(host, ["norm"])
    seen: list[Tensor] = []
    model.slots["norm"].register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    model(images())
    assert not bool(seen[0].any())


def test_a_second_model_on_the_same_host_is_refused_and_leaves_the_first_whole() -> None:
    host = cnn_host()
    first = cnn_model(host)
    grow_to(first, "norm", SeedStage.FOSSILIZED)
    expected, hooks = first.eval()(images()), hooks_of(host)
    with pytest.raises(HostError, match="'norm' already has a slot: a host can be in one model at a time"):
        attach_images(host, ["stem", "norm"])
    assert hooks_of(host) == hooks
    assert torch.equal(first(images()), expected)


def test_detach_slots_gives_the_host_back_for_another_model() -> None:
    bare, host = cnn_host().eval(), cnn_host().eval()
    own = host.norm.register_forward_hook(lambda _m, _a, _o: None)
    hooks, attributes = hooks_of(host), [set(vars(m)) for m in host.modules()]
    model = cnn_model(host)
    grow_to(model, "norm", SeedStage.FOSSILIZED)
    assert not torch.equal(model(images()), bare(images()))
    assert model.detach_slots() is host
    assert hooks_of(host) == hooks
    assert [set(vars(m)) for m in host.modules()] == attributes
    assert torch.equal(host(images()), bare(images()))
    model.detach_slots()  # once is enough, twice does no harm
    again = cnn_model(host)
    assert torch.equal(again(images()), bare(images()))
    own.remove()


def test_models_of_copied_hosts_are_independent() -> None:
    host = cnn_host()
    twin = copy.deepcopy(host)
    first, second = cnn_model(host), cnn_model(twin)
    grow_to(first, "norm", SeedStage.FOSSILIZED)
    assert second.slots["norm"].stage is SeedStage.DORMANT
    assert torch.equal(second.eval()(images()), cnn_host().eval()(images()))
    grow_to(second, "norm2", SeedStage.TRAINING)
    assert first.slots["norm2"].stage is SeedStage.DORMANT


# -- inputs and outputs of other shapes ----------------------------------------------------------------------------


class Attention(nn.Module):
    """Returns its features with a second thing, as attention layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.linear(x), "weights"


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, str]:
        features, rest = self.attention(x)
        return features * scale, rest


class Positional(TwoInputs):
    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, str]:  # type: ignore[override]
        return super().forward(x, scale=scale)


ROWS, SCALE = torch.randn(2, 3, 4), torch.tensor(2.0)


@pytest.mark.parametrize(
    ("host", "example", "call"),
    [
        (Positional, (ROWS, SCALE), lambda model: model(ROWS, SCALE)),
        (TwoInputs, {"x": ROWS, "scale": SCALE}, lambda model: model(ROWS, scale=SCALE)),
    ],
    ids=["tuple", "mapping"],
)
def test_examples_may_be_tuples_of_arguments_or_mappings_of_keywords(
    host: type[nn.Module], example: object, call: Callable[[nn.Module], tuple[Tensor, str]]
) -> None:
    model = attach(host(), ["attention"], example, config=GrowthConfig(gates=PERMISSIVE))
    bare = copy.deepcopy(model.host)
    features, rest = call(model)
    assert rest == "weights"
    model.germinate("attention", "mlp")
    model.advance_stage("attention")
    trained, rest = call(model)
    assert rest == "weights"
    assert torch.equal(trained, features)
    assert trained.requires_grad
    assert torch.equal(call(bare)[0], features)


def test_a_seed_behind_a_tuple_changes_the_features_and_keeps_the_rest() -> None:
    model = attach(Positional(), ["attention"], (ROWS, SCALE), config=GrowthConfig(gates=PERMISSIVE))
    model.evaluate_with(lambda: model(ROWS, SCALE)[0].mean((1, 2)))
    slot = grow_to(model, "attention", SeedStage.FOSSILIZED, "mlp")
    features, rest = model(ROWS, SCALE)
    assert rest == "weights"
    torch.testing.assert_close(features, SCALE * slot.seed(model.host.attention.linear(ROWS)))


# -- hosts that know their own points ------------------------------------------------------------------------------


class DeclaringHost(HookedHost, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = cnn_host()

    def injection_points(self) -> Sequence[InjectionPoint]:
        return [InjectionPoint(n, f"body.{n}", 4, Topology.CNN) for n in ("norm", "norm2")]

    def example_inputs(self) -> tuple[Tensor]:
        return (images(2),)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("asked", ["frist", "nothing.*"])
def test_a_wrong_name_at_a_host_that_declares_points_is_answered_with_those(asked: str) -> None:
    host = DeclaringHost()
    declared = ", ".join(point.name for point in host.injection_points())
    with pytest.raises(HostError, match=f"Injection points that it declares: {declared}"):
        MorphogeneticModel(host, slots=[asked], example=torch.zeros(1, 1, 2, 2))


class HandWrittenHost(nn.Module):
    """Follows the protocol by itself: it calls its slots in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.features = nn.Identity()
        self.__dict__["hung"] = {}

    def injection_points(self) -> Sequence[InjectionPoint]:
        return [InjectionPoint("middle", "features", 4, Topology.CNN)]

    def register_slot(self, name: str, slot: nn.Module) -> None:
        self.hung[name] = slot

    def unregister_slot(self, name: str) -> None:
        self.hung.pop(name, None)

    def example_inputs(self) -> tuple[Tensor]:
        return (images(2),)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.stem(x))
        for slot in self.hung.values():
            x = slot(x)
        return self.head(x)


@pytest.mark.parametrize("kind", [DeclaringHost, HandWrittenHost])
def test_a_host_that_declares_points_needs_neither_names_nor_an_example(kind: type[nn.Module]) -> None:
    host = kind()
    assert isinstance(host, HostProtocol)
    bare = copy.deepcopy(host).eval()
    model = attach(host, config=GrowthConfig(gates=PERMISSIVE))
    first = next(iter(model.slots))
    assert list(model.slots) == [point.name for point in host.injection_points()]
    assert torch.equal(model.eval()(images()), bare(images()))
    model.evaluate_with(lambda: model(images()).flatten(1).mean(1))
    slot = grow_to(model, first, SeedStage.FOSSILIZED)
    assert isinstance(slot.seed, ConvSeed)
    assert not torch.equal(model(images()), bare(images()))
    model.detach_slots()
    assert torch.equal(host(images()), bare(images()))


def test_a_declaring_host_takes_a_choice_of_its_points_by_name_glob_path_and_others_by_path() -> None:
    for slots, names in [
        (["norm2"], ["norm2"]),
        (["norm*"], ["norm", "norm2"]),
        (["body.norm"], ["norm"]),
        (["norm", "body.act2"], ["norm", "body_act2"]),
    ]:
        assert list(attach(DeclaringHost(), slots).slots) == names


def test_hooked_host_refuses_unknown_and_taken_points() -> None:
    host = DeclaringHost()
    host.register_slot("norm", nn.Identity())
    with pytest.raises(HostError, match="'norm' already has a slot"):
        host.register_slot("norm", nn.Identity())
    with pytest.raises(HostError, match=r"no injection point 'nrom'\. Did you mean 'norm'\?"):
        host.register_slot("nrom", nn.Identity())
    with pytest.raises(HostError, match="'norm' already has a slot"):
        attach(host, ["norm2", "norm"])
    assert not host.body.norm2._forward_hooks  # what was attached before the refusal is off again
    host.unregister_slot("norm")
    host.unregister_slot("norm")
    assert list(attach(host).slots) == ["norm", "norm2"]


def test_a_host_whose_declared_width_is_wrong_is_refused() -> None:
    class Wrong(DeclaringHost):
        def injection_points(self) -> Sequence[InjectionPoint]:
            return [InjectionPoint("norm", "body.norm", 64, Topology.CNN)]

    with pytest.raises(
        HostError, match=r"declared: cnn \(b, c, h, w\), width 64\n    found:    features \(2, 4, 5, 5\)"
    ):
        attach(Wrong())


def test_hooked_host_that_declares_nothing_says_so() -> None:
    class Silent(HookedHost, nn.Module):
        pass

    with pytest.raises(NotImplementedError, match="Silent must return its injection points"):
        attach(Silent(), example=images(2))


def test_a_list_of_submodules_that_is_cut_says_how_many_it_leaves_out() -> None:
    host = nn.Sequential(*(nn.Linear(2, 2) for _ in range(45)))
    with pytest.raises(HostError, match=r"11 and 33 more \(host.named_modules\(\)\)\.$"):
        MorphogeneticModel(host, ["blocks.*"], example=torch.ones(1, 2))
    with pytest.raises(HostError, match="and 5 more"):
        MorphogeneticModel(host, ["zzz"], example=torch.ones(1, 2))
