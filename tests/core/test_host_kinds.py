"""Hosts of every kind: a slot works in them, or one error at attach gives the reason and the way."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from kasmina_core import (
    BlueprintRegistry,
    BlueprintSpec,
    GerminationError,
    HostError,
    InjectionPoint,
    MorphogeneticModel,
    SeedStage,
    Topology,
)
from kasmina_core.testing.lives import bring_to, shake
from tests.core.state_helpers import PerToken, open_config

DIM = 4


def example() -> Tensor:
    return torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(5))


def blocks() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))


def attach(host: nn.Module, path: str, x: Any = None) -> MorphogeneticModel:
    registry = BlueprintRegistry()
    registry.register(BlueprintSpec("scale", Topology.TRANSFORMER, PerToken, lambda dim: dim), pack="mine")
    x = example() if x is None else x
    return MorphogeneticModel(host, [path], example=x, registry=registry, config=open_config())


# -- those that work -----------------------------------------------------------------------------------------------


class Detector(nn.Module):
    """Takes a list of images of any sizes; returns losses in training, where it takes a list of targets, else detections."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        batch = images[0].new_zeros(len(images), 3, 16, 16)
        for image, place in zip(images, batch, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        scores = self.head(self.body(batch))
        if not self.training:
            return [{"scores": one.flatten()} for one in scores]
        assert targets is not None
        labels = torch.stack([target["label"] for target in targets])
        return {"loss": nn.functional.cross_entropy(scores.mean((2, 3)), labels)}


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [torch.rand(3, h, w, generator=draw) for h, w in sizes]


def test_a_host_of_lists_of_images_holds_slots_where_they_are_declared_as_the_refusal_says() -> None:
    torch.manual_seed(0)
    host, seen = Detector(), images((9, 12), (16, 7))
    with pytest.raises(HostError, match="no axis is proved to be the batch") as refusal:
        MorphogeneticModel(host, ["body"], example=(seen,))
    declared = re.search(r"InjectionPoint\(.*\)", str(refusal.value))
    assert declared is not None
    assert declared.group() == 'InjectionPoint("body", "body", 8, Topology("cnn"))'
    point = InjectionPoint("body", "body", 8, Topology("cnn"))
    bare = copy.deepcopy(host)

    def grown(stage: SeedStage) -> MorphogeneticModel:
        model = MorphogeneticModel(copy.deepcopy(host), [point], example=(seen,), config=open_config())
        model.evaluate_with(lambda: torch.stack([one["scores"].sum() for one in model(seen)]))
        bring_to(model, stage, "body", "cnn:conv_light")
        shake(model)
        return model

    model = grown(SeedStage.TRAINING)
    targets = [{"label": torch.tensor(0)}, {"label": torch.tensor(1)}]
    for module in (model.train(), bare.train()):
        module(seen, targets)["loss"].backward()
    for mine, its in zip(model.host_parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)
    assert any(bool(parameter.grad.any()) for parameter in model.seed_parameters())
    model = grown(SeedStage.FOSSILIZED).eval()
    for image, found in zip(seen, model(seen), strict=True):
        torch.testing.assert_close(model([image])[0], found)


class Checkpointed(nn.Module):
    """Computes its block anew in the backward pass, where the point fires again."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(DIM, DIM), blocks()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant)


class Mapped(nn.Module):
    """Maps its layers over the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.block = blocks()

    def forward(self, x: Tensor) -> Any:
        return torch.vmap(self.block)(x[None])[0]


class Edited(nn.Module):
    """Writes to what its layer, and so the slot, returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Any:
        x = self.layer(x)
        x += 1.0
        return self.last(x.relu_())


def compiled_part() -> nn.Module:
    host = blocks()
    host[1] = torch.compile(host[1], backend="eager")
    return host


def scripted_part() -> nn.Module:
    host = blocks()
    host[2] = torch.jit.trace(host[2], example())
    return host


WORKING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "checkpointed": (lambda: Checkpointed(use_reentrant=False), "block.0"),
    "checkpointed, reentrant": (lambda: Checkpointed(use_reentrant=True), "block.0"),
    "torch.fx": (lambda: torch.fx.symbolic_trace(blocks()), "0"),
    "vmap": (Mapped, "block.1"),
    "behind a compiled part": (compiled_part, "1"),
    "before a scripted part": (scripted_part, "1"),
    "writes to the slot's output": (Edited, "layer"),
    "frozen": (lambda: blocks().requires_grad_(False), "0"),
    "encoder with nested tensors": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(DIM, 2, 8, batch_first=True, dropout=0.0), 2
        ),
        "layers.0",
    ),
}


# torch warns of torch.jit, of its own graphs, and of reentrant checkpoints in evaluation.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad attr", "ignore:None of the inputs"
)
@pytest.mark.parametrize(("make", "path"), WORKING.values(), ids=WORKING)
def test_a_seed_lives_in_such_a_host(make: Callable[[], nn.Module], path: str) -> None:
    torch.compiler.reset()
    x = example()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        host = make()
        torch.manual_seed(1)
        bare = make()
    model = attach(host, path)
    (name,) = model.slots
    model.evaluate_with(lambda: model(x).flatten())
    model.germinate(name, "scale")
    for _ in range(4):
        if model.slots[name].stage is not SeedStage.TRAINING:
            model.step_epoch()
    assert model.slots[name].stage is SeedStage.TRAINING
    x.requires_grad_(True)
    expected, output = bare(x), model(x)
    assert torch.equal(expected, output)
    expected.square().sum().backward()
    output.square().sum().backward()
    for ours, theirs in zip(model.host_parameters(), bare.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    assert all(bool(p.grad.any()) for p in model.seed_parameters())
    while model.slots[name].stage is not SeedStage.PROBATIONARY:
        model.step_epoch()
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.mul_(3.0)
    grown = model(x)
    assert not torch.allclose(grown, expected)
    grown.sum().backward()


# -- those that are refused ----------------------------------------------------------------------------------------


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(DIM, DIM), nn.LSTM(DIM, DIM, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        packed = pack_padded_sequence(self.first(x), torch.tensor([3, 2]), batch_first=True)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


class Calls(nn.Module):
    """Calls a function of its layer, its input and the layer's output."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(DIM, DIM), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer, x)


class Makes(nn.Module):
    """Turns its input into something else."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def between(to: Callable[[Tensor], Any], back: Callable[[Any], Tensor]) -> nn.Module:
    return nn.Sequential(Makes(to), Makes(back))


def edits_alias(layer: nn.Module, x: Tensor) -> Tensor:
    before = x * 1.0
    behind = layer.alias(before)
    before += 1.0
    return layer(behind)


def with_alias() -> nn.Module:
    host = Calls(edits_alias)
    host.layer.alias = nn.Identity()
    return host


def compiled_inside() -> nn.Module:
    host = nn.Sequential(blocks(), nn.Linear(DIM, DIM))
    host[0].compile(backend="eager")
    return host


def shared() -> nn.Module:
    block = blocks()
    return nn.Sequential(block, nn.GELU(), block)


def in_use() -> nn.Module:
    host = blocks()
    KEPT.append(attach(host, "0"))
    return host


KEPT: list[MorphogeneticModel] = []

REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "scripted": (lambda: torch.jit.script(blocks()), "0", "is scripted or traced by torch.jit"),
    "traced": (lambda: torch.jit.trace(blocks(), example()), "0", "is scripted or traced by torch.jit"),
    "a scripted part": (scripted_part, "2", "'2' is, or is inside of, a module scripted or traced"),
    "exported": (
        lambda: torch.export.export(blocks(), (example(),)).module(),
        "0",
        "was made by torch.export.*\nGive the Python module that was exported",
    ),
    "exported and unflattened": (
        lambda: torch.export.unflatten(torch.export.export(blocks(), (example(),))),
        "0",
        "was made by torch.export",
    ),
    "compiled": (
        lambda: torch.compile(blocks(), backend="eager"),
        "0",
        r"compiled before it has slots.*\n.*torch.compile\(MorphogeneticModel\(host._orig_mod",
    ),
    "inside of a compiled part": (
        lambda: nn.Sequential(torch.compile(blocks(), backend="eager")),
        "0._orig_mod.0",
        "'0._orig_mod.0' is inside of '0', which is compiled",
    ),
    "inside of a part with compile()": (compiled_inside, "0.1", "'0.1' is inside of '0', which is compiled"),
    "data parallel": (
        lambda: nn.DataParallel(blocks()),
        "module.0",
        "holds a DataParallel, .*\n.*distribute\\(",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.LazyLinear(DIM)),
        "0",
        "holds a LazyLinear at '1' that has no weights yet.*\n.*host\\(example\\)",
    ),
    "in another model": (in_use, "2", "'0' already has a slot: a host can be in one model at a time"),
    "a model": (lambda: attach(blocks(), "0"), "host.2", "a host can be in one model at a time"),
    "packed": (Packs, "rnn", "returns a PackedSequence.*\n.*before pack_padded_sequence or after"),
    "packed, by field": (Packs, "rnn:0:data", "returns a PackedSequence"),
    "nested": (
        lambda: between(
            lambda x: torch.nested.nested_tensor([x[0], x[1][:2]]),
            lambda x: torch.nested.to_padded_tensor(x, 0.0),
        ),
        "0",
        "returns a nested tensor.*\n.*enable_nested_tensor=False",
    ),
    "jagged": (
        lambda: between(
            lambda x: torch.nested.nested_tensor([x[0], x[1][:2]], layout=torch.jagged), lambda x: x.values()
        ),
        "0",
        "returns a nested tensor",
    ),
    "sparse": (lambda: between(Tensor.to_sparse, Tensor.to_dense), "0", "layout torch.sparse_coo"),
    "whole numbers": (lambda: between(Tensor.int, Tensor.float), "0", "torch.int32, not floating-point"),
    "complex": (lambda: between(torch.fft.fft, torch.real), "0", "torch.complex64, not floating-point"),
    "shared": (shared, "0.1", "fires 2 times; .* If layers share it, give each its own"),
    "called twice": (
        lambda: Calls(lambda layer, x: layer(layer(x))),
        "layer",
        "fires 2 times; a point must fire once",
    ),
    "weights alone": (
        lambda: Calls(lambda layer, x: nn.functional.linear(x, layer.weight)),
        "layer",
        "never calls it, or only its forward\\(\\) or its weights",
    ),
    "forward alone": (
        lambda: Calls(lambda layer, x: layer.forward(x)),
        "layer",
        "never calls it, or only its forward\\(\\) or its weights",
    ),
    "writes to the features": (with_alias, "layer.alias", "changed in place .* another reference"),
}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*prototype stage", "ignore:Sparse", "ignore:.*LeafSpec"
)
@pytest.mark.parametrize(("make", "path", "words"), REFUSED.values(), ids=REFUSED)
def test_such_a_host_is_refused_with_the_reason(make: Callable[[], nn.Module], path: str, words: str) -> None:
    torch.compiler.reset()
    host = make()
    hooks = sum(len(module._forward_hooks) for module in host.modules())
    with pytest.raises(HostError, match=words):
        attach(host, path)
    assert sum(len(module._forward_hooks) for module in host.modules()) == hooks
    KEPT.clear()


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_an_encoder_that_nests_padded_input_is_refused_with_the_option_that_stops_it() -> None:
    padding = torch.tensor([[False, False, False], [False, False, True]])
    inputs = {"src": example(), "src_key_padding_mask": padding}
    layer = nn.TransformerEncoderLayer(DIM, 2, 8, batch_first=True)
    with pytest.raises(HostError, match="enable_nested_tensor=False"):
        attach(nn.TransformerEncoder(layer, 2), "layers.0", inputs)
    attach(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "layers.0", inputs)


# -- where no gradient comes from the output ---------------------------------------------------------------------


class Partial(nn.Module):
    """Ignores what one part returns, computes another without gradients, and one so in evaluation alone."""

    def __init__(self) -> None:
        super().__init__()
        self.ignored, self.fixed, self.late, self.last = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        self.ignored(x)
        with torch.no_grad():
            y = self.fixed(x)
        with torch.set_grad_enabled(self.training):
            z = self.late(x)
        return self.last(x + y + z)


def test_a_place_from_which_the_output_gives_no_gradient_refuses_seeds_and_the_others_do_not() -> None:
    registry = BlueprintRegistry()
    registry.register(BlueprintSpec("scale", Topology.TRANSFORMER, PerToken, lambda dim: dim), pack="mine")
    names = ["ignored", "fixed", "late", "last"]
    model = MorphogeneticModel(Partial(), names, example=example(), registry=registry, config=open_config())
    for name in ("ignored", "fixed"):
        with pytest.raises(
            GerminationError, match=rf"no gradient would reach it\n.*features at '{name}', or they"
        ):
            model.germinate(name, "scale")
        assert model.slots[name].state is None
    for name in ("late", "last"):
        model.germinate(name, "scale")
        model.step_epoch()
    model(example()).sum().backward()
    assert all(p.grad is not None for p in model.seed_parameters())


# torch warns of reentrant checkpoints in evaluation.
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_where_a_backward_of_its_own_hides_the_way_nothing_is_said() -> None:
    assert attach(Checkpointed(use_reentrant=True), "block.0").slots["block_0"].has_gradient


# -- what changes after slots were attached ------------------------------------------------------------------------


class Changing(nn.Module):
    """Calls its block once, several times, or on features without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(DIM, DIM), blocks()

    def forward(self, x: Tensor, times: int = 1, pooled: bool = False) -> Tensor:
        x = self.first(x)
        for _ in range(times):
            x = self.block(x.mean(1) if pooled else x)
        return x


def changing() -> MorphogeneticModel:
    model = attach(Changing(), "block")
    model(example(), times=2)  # an empty slot does not mind
    model.germinate("block", "scale")
    model.step_epoch()
    assert model.slots["block"].stage is SeedStage.TRAINING
    return model


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch itself
@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_that_is_called_more_often_than_in_the_example_is_an_error_at_that_forward(
    compiled: bool,
) -> None:
    model = changing()
    torch.compiler.reset()
    run: Any = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    for _ in range(2):
        run(example())
    with pytest.raises(Exception if compiled else HostError, match="'block' is called more than once"):
        run(example(), times=2)
    run(example())
    model.eval()(example(), times=2)  # a seed in TRAINING does not compute there
    model.cull("block")
    model.train()(example(), times=2)


def test_features_of_another_kind_than_in_the_example_are_an_error_at_that_forward() -> None:
    model = changing()
    with pytest.raises(
        HostError, match=r"attached: \(b, t, d\), width 4\n  given:    shape \(2, 4\)\nName a submodule"
    ):
        model(example(), pooled=True)
    model(example())


def test_two_threads_may_run_a_model_at_once() -> None:
    model, meeting = changing(), Barrier(2, timeout=60)

    def meet(module: nn.Module, args: Any) -> None:
        meeting.wait()

    model.host.block.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(model, [example()] * 2))
    assert torch.equal(*outputs)
