"""Seeds that mix positions: padding, packed documents and caches, as the host's call tells them."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from numeric_helpers import scramble
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kasmina_core import (
    WHOLE_SEQUENCES,
    BlueprintError,
    BlueprintRegistry,
    BlueprintSpec,
    CheckpointError,
    EveryPosition,
    GerminationError,
    HookedHost,
    HostError,
    InjectionPoint,
    MorphogeneticModel,
    SeedContext,
    SeedStage,
    Topology,
    TorchTransformer,
    call_arguments,
    export_model,
    load_checkpoint,
    save_checkpoint,
)
from kasmina_core.testing.lives import bring_to, open_config

DIM, LENGTH = 8, 6
PADDED = torch.tensor(
    [
        [False] * 6,
        [False] * 4 + [True] * 2,
        [True] * 3 + [False] * 3,
        [True] + [False] * 4 + [True],
        [True] * 6,
    ]
)
CONTRIBUTING = [SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.FOSSILIZED]


def rows(n: int = len(PADDED), seed: int = 3) -> Tensor:
    return torch.randn(n, LENGTH, DIM, generator=torch.Generator().manual_seed(seed))


def encoder(*, nested: bool = False, batch_first: bool = True) -> nn.TransformerEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(DIM, 2, 16, dropout=0.0, batch_first=batch_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


class Documents(HookedHost, nn.Module):
    """A host that treats each position by itself, and is told of padding and documents in words of its own.

    Nothing in it shows which axis is the batch, so it states its points.
    """

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.causal = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), causal

    def injection_points(self) -> list[InjectionPoint]:
        return [
            InjectionPoint(path, path, DIM, Topology.TRANSFORMER, self.causal) for path in ("first", "last")
        ]

    def forward(self, x: Tensor, lengths: Tensor | None = None, document: Tensor | None = None) -> Tensor:
        return self.last(self.first(x).tanh())


def own_reader(host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SeedContext:
    given = call_arguments(host, args, kwargs)
    lengths = given.get("lengths")
    real = None if lengths is None else torch.arange(given["x"].shape[1]) < lengths[:, None]
    return SeedContext(real=real, documents=given.get("document"))


def grown(
    host: nn.Module,
    path: str,
    context: Any,
    stage: SeedStage = SeedStage.FOSSILIZED,
    blueprint: str = "transformer:attention",
    **options: Any,
) -> MorphogeneticModel:
    """A model with a seed whose every weight is random."""
    model = MorphogeneticModel(
        host, [path], example=rows(2), context=context, config=open_config(), **options
    )
    return live(model, stage, blueprint, rows(2))


def live(model: MorphogeneticModel, stage: SeedStage, blueprint: str, *inputs: Tensor) -> MorphogeneticModel:
    """Bring a seed in each slot to a stage, and make its every weight random."""
    model.evaluate_with(lambda: model(*inputs).square().mean((1, 2)))
    for name in model.slots:
        bring_to(model, stage, name, blueprint)
        scramble(model.slots[name].seed)
    return model.eval()


def assert_padding_changes_nothing(model: nn.Module, **kwargs: Any) -> None:
    x = rows()
    together = model(x, src_key_padding_mask=PADDED, **kwargs)
    for row in range(4):
        real = ~PADDED[row]
        torch.testing.assert_close(together[row : row + 1, real], model(x[row : row + 1, real]))


# -- the refusal ---------------------------------------------------------------------------------------------------


def test_without_a_reader_a_seed_that_mixes_positions_is_refused_with_the_line_to_write() -> None:
    model = MorphogeneticModel(Documents(), ["first"], example=rows(2))
    with pytest.raises(GerminationError, match=r"positions failed.*context=EveryPosition\(\)") as caught:
        model.germinate("first", "transformer:attention")
    assert caught.value.result is not None
    assert "positions" in [check.name for check in caught.value.result.checks if check.verdict.stops]
    model.germinate("first", "transformer:mlp")


def test_a_saved_seed_that_mixes_positions_is_refused_by_a_model_without_a_reader(tmp_path: Any) -> None:
    model = grown(Documents(), "first", EveryPosition())
    save_checkpoint(tmp_path / "run", model)
    bare = MorphogeneticModel(Documents(), ["first"], example=rows(2))
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    for load in (
        lambda: bare.load_state_dict(model.state_dict()),
        lambda: load_checkpoint(tmp_path / "run", bare),
    ):
        with pytest.raises(CheckpointError, match=r"context=EveryPosition\(\)"):
            load()
        assert bare.slots["first"].seed is None
        assert all(torch.equal(value, before[name]) for name, value in bare.state_dict().items())


@pytest.mark.parametrize("made", ["checkpoint", "state_dict", "deepcopy", "pickle"])
def test_a_model_with_a_reader_takes_it_along(made: str, tmp_path: Any) -> None:
    model = grown(encoder(), "layers.0", TorchTransformer())
    twin = MorphogeneticModel(encoder(), ["layers.0"], example=rows(2), context=TorchTransformer()).eval()
    if made == "checkpoint":
        save_checkpoint(tmp_path / "run", model)
        load_checkpoint(tmp_path / "run", twin)
    elif made == "state_dict":
        twin.load_state_dict(model.state_dict())
    else:
        twin = copy.deepcopy(model) if made == "deepcopy" else pickle.loads(pickle.dumps(model))
        model.detach_slots()
    assert_padding_changes_nothing(twin)


def test_a_checkpoint_names_no_reader() -> None:
    file = io.BytesIO()
    torch.save(grown(encoder(), "layers.0", TorchTransformer()).state_dict(), file)
    assert b"TorchTransformer" not in file.getvalue()


def test_a_reader_that_cannot_read_is_refused_when_the_model_is_made() -> None:
    with pytest.raises(TypeError, match=r"context must read a call, as EveryPosition\(\) does"):
        MorphogeneticModel(Documents(), ["first"], example=rows(2), context=True)  # type: ignore[arg-type]
    with pytest.raises(HostError, match="no submodule 'encoder'"):
        MorphogeneticModel(Documents(), ["first"], example=rows(2), context=TorchTransformer("encoder"))


@pytest.mark.parametrize(
    ("mixes", "topology", "words"),
    [
        ("channels", Topology.TRANSFORMER, "mixes must be 'positions' or empty, not 'channels'"),
        ("positions", Topology.CNN, "cnn features have no positions"),
    ],
)
def test_what_a_blueprint_mixes_is_proved_where_it_is_declared(
    mixes: str, topology: Topology, words: str
) -> None:
    with pytest.raises(BlueprintError, match=words):
        BlueprintSpec("odd", topology, "pack:Seed", lambda dim: dim, mixes=mixes)


# -- equality with one sequence at a time --------------------------------------------------------------------------


@pytest.mark.parametrize("stage", CONTRIBUTING)
def test_padding_changes_nothing_in_torchs_encoder(stage: SeedStage) -> None:
    model = grown(encoder(), "layers.0", TorchTransformer(), stage)
    assert_padding_changes_nothing(model)
    with torch.no_grad():  # torch takes another path without gradients
        assert_padding_changes_nothing(model)


def test_a_seed_in_training_gets_the_gradient_of_the_real_positions_alone() -> None:
    x, together = rows(), None
    for _ in range(2):
        model = grown(encoder(), "layers.0", TorchTransformer(), SeedStage.TRAINING).train()
        if together is None:
            model(x, src_key_padding_mask=PADDED)[~PADDED].square().sum().backward()
            together = [p.grad for p in model.seed_parameters()]
            continue
        for row in range(4):
            model(x[row : row + 1, ~PADDED[row]]).square().sum().backward()
        for one, other in zip(together, [p.grad for p in model.seed_parameters()], strict=True):
            assert one is not None
            assert bool(one.any())
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blueprint", ["transformer:attention", "transformer:block"])
def test_padding_changes_nothing_in_a_seed_behind_a_fossil(blueprint: str) -> None:
    model = grown(encoder(), "layers.0", TorchTransformer())
    bring_to(model, SeedStage.FOSSILIZED, model.open_slot("layers.0").name, blueprint)
    scramble(model.slots["layers_0__2"].seed)
    with torch.no_grad():
        assert_padding_changes_nothing(model.eval())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = rows()
    torch.testing.assert_close(
        compiled(x, src_key_padding_mask=PADDED), model(x, src_key_padding_mask=PADDED)
    )


def test_positions_of_padding_keep_the_hosts_features() -> None:
    model = grown(Documents(), "first", own_reader)
    lengths, seen = torch.tensor([6, 2, 0]), []
    model.slots["first"].register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    loss = model(rows(3), lengths).square().sum()
    ((before, after),) = seen
    real = torch.arange(LENGTH) < lengths[:, None]
    assert torch.equal(after[~real], before[~real])
    assert bool((after[real] != before[real]).any(-1).all())
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("causal", [False, True])
def test_documents_in_a_row_do_not_know_of_each_other(causal: bool) -> None:
    model = grown(Documents(), "first", own_reader, causal=causal)
    x = rows(1)
    together = model(x, document=torch.tensor([[0, 0, 0, 7, 7, 3]]))
    for part in (slice(0, 3), slice(3, 5), slice(5, 6)):
        torch.testing.assert_close(together[:, part], model(x[:, part]))
    assert not torch.allclose(together, model(x))


def test_padding_and_documents_go_together() -> None:
    model = grown(Documents(), "first", own_reader)
    x = rows(2)
    together = model(x, torch.tensor([6, 5]), torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]))
    torch.testing.assert_close(together[1:, 1:5], model(x[1:, 1:5]))
    torch.testing.assert_close(together[:1, :2], model(x[:1, :2]))


def test_torchs_transformer_has_a_context_for_each_side() -> None:
    torch.manual_seed(0)
    host = nn.Transformer(DIM, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    host.encoder.use_nested_tensor = False
    source, target = rows(2), rows(2, 5)[:, :4]
    model = MorphogeneticModel(
        host,
        [
            "encoder.layers.0",
            InjectionPoint("after", "decoder.layers.0", DIM, Topology.TRANSFORMER, causal=True),
        ],
        example=(source, target),
        context=TorchTransformer(),
        config=open_config(),
    )
    live(model, SeedStage.FOSSILIZED, "transformer:attention", source, target)
    hidden = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
    late = torch.tensor([[False] * 4, [False] * 2 + [True] * 2])
    mask = nn.Transformer.generate_square_subsequent_mask(4) < 0
    masks = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden, "tgt_key_padding_mask": late}
    together = model(source, target, tgt_mask=mask, **masks)
    short = mask[:2, :2]
    alone = model(source[1:, :3], target[1:, :2], tgt_mask=short)
    torch.testing.assert_close(together[1:, :2], alone)


def test_a_causal_mask_makes_a_seed_causal_that_its_point_does_not() -> None:
    model = grown(encoder(), "layers.0", TorchTransformer())
    x, mask = rows(2), nn.Transformer.generate_square_subsequent_mask(LENGTH)
    changed = torch.cat([x[:, :-1], x[:, -1:] + 1.0], 1)
    for options in ({"mask": mask}, {"mask": mask, "is_causal": True}, {"mask": mask < 0}):
        before, after = (model(one, **options)[:, :-1] for one in (x, changed))
        torch.testing.assert_close(before, after)


def test_a_mask_that_hides_other_than_later_positions_and_documents_is_refused() -> None:
    model = grown(encoder(), "layers.0", TorchTransformer())
    band = torch.ones(LENGTH, LENGTH).tril().triu(-1) == 0
    with pytest.raises(HostError, match="no combination of padding, documents and causality"):
        model(rows(2), mask=band)
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)) == 0
    together = model(rows(2), mask=blocks)
    torch.testing.assert_close(together[:, 2:], model(rows(2)[:, 2:]))


@pytest.mark.parametrize("blueprint", ["transformer:attention", "transformer:mlp"])
def test_nested_tensors_of_torchs_encoder_are_refused_with_the_line_to_write(blueprint: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = grown(encoder(nested=True), "layers.0", TorchTransformer(), blueprint=blueprint)
        assert model(rows(2)).shape == (2, LENGTH, DIM)
        padded = torch.tensor([[False] * 6, [False] * 2 + [True] * 4])
        with torch.no_grad(), pytest.raises(HostError, match="enable_nested_tensor=False"):
            model(rows(2), src_key_padding_mask=padded)
    if blueprint == "transformer:attention":  # and before that in training, which would end in an evaluation
        with pytest.raises(HostError, match="enable_nested_tensor=False"):
            model.train()(rows(2), src_key_padding_mask=padded)


# -- what a call shows to EveryPosition ----------------------------------------------------------------------------


class TakesAnything(Documents):
    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return super().forward(x)


class Filled:
    def get_seq_length(self) -> int:
        return 3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zeros": ({"attention_mask": torch.tensor([[1, 1, 0]])}, "'attention_mask' hides positions"),
    "another form": ({"attention_mask": torch.zeros(1, 1, 3, 3)}, r"shape \(1, 1, 3, 3\), not \(b, t\)"),
    "padding": ({"src_key_padding_mask": torch.tensor([[False, True]])}, "'src_key_padding_mask' hides"),
    "added": ({"tgt_key_padding_mask": torch.tensor([[0.0, -torch.inf]])}, "'tgt_key_padding_mask' hides"),
    "packed": ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "'position_ids' begins anew"),
    "lengths": ({"cu_seq_lens_q": torch.tensor([0, 2, 4])}, "packs several documents"),
    "a cache": ({"past_key_values": Filled()}, "'past_key_values' is a cache"),
    "any mask": ({"mask": torch.tensor([[True, True, False]])}, "'mask' differs between positions"),
    "rows": ({"lengths": torch.tensor([3, 2])}, "'lengths' differs between rows"),
    "in a mapping": (
        {"batch": {"attention_mask": torch.tensor([[1, 0]])}},
        "'attention_mask' hides positions",
    ),
}


@pytest.mark.parametrize(("given", "words"), REFUSED.values(), ids=list(REFUSED))
def test_padding_packing_and_caches_contradict_every_position(given: dict[str, Any], words: str) -> None:
    model = grown(TakesAnything(), "first", EveryPosition())
    with pytest.raises(HostError, match=rf"(?s){words}.*MorphogeneticModel\(host, \.\.\., context=reader\)"):
        model(rows(2), **given)
    with model.bypassed("first"):  # nobody mixes
        model(rows(2), **given)


def test_a_call_that_shows_nothing_of_it_is_taken() -> None:
    model = grown(TakesAnything(), "first", EveryPosition())
    given = {
        "attention_mask": torch.ones(2, LENGTH),
        "position_ids": torch.arange(LENGTH)[None],
        "src_key_padding_mask": torch.zeros(2, LENGTH).bool(),
        "past_key_values": (),
        "labels": torch.zeros(2),
        "mask": torch.ones(2, LENGTH).bool(),
        "lengths": torch.tensor([LENGTH, LENGTH]),
        "src_mask": torch.ones(LENGTH, LENGTH).triu(1).bool(),
    }
    assert torch.equal(model(rows(2), **given), model(rows(2)))


# -- the call that a seed belongs to -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, *CONTRIBUTING])
def test_compiled_to_one_graph_masks_are_followed(stage: SeedStage) -> None:
    model = grown(encoder(), "layers.0", TorchTransformer(), stage)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    other = PADDED.flip(0)
    for mask in (PADDED, other, None, PADDED):
        expected = model(rows(), src_key_padding_mask=mask)
        torch.testing.assert_close(compiled(rows(), src_key_padding_mask=mask), expected)


@torch.no_grad()
def test_a_compiled_layer_follows_the_masks_of_its_hosts_calls() -> None:
    model, x = grown(encoder(), "layers.0", TorchTransformer()), rows(4)
    masks = [PADDED[:4], PADDED[:4].flip(0)]
    expected = [model(x, src_key_padding_mask=mask) for mask in masks]
    torch.compiler.reset()
    model.host.layers[0].compile(fullgraph=True, backend="eager")
    for mask, one in zip(masks, expected, strict=True):
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), one)


def test_a_compiled_call_that_contradicts_every_position_fails() -> None:
    model = grown(TakesAnything(), "first", EveryPosition())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(rows(2), attention_mask=torch.ones(2, LENGTH))
    with pytest.raises(RuntimeError, match="hides positions"):
        compiled(rows(2), attention_mask=torch.zeros(2, LENGTH))


def test_a_part_of_the_host_outside_of_its_forward_has_no_context() -> None:
    model = grown(encoder(), "layers.0", TorchTransformer())
    model(rows(), src_key_padding_mask=PADDED)
    with pytest.raises(HostError, match="call the model, not a part of it"):
        model.host.layers[0](rows())
    with pytest.raises(ZeroDivisionError):
        with_failing_end(model)
    with pytest.raises(HostError, match="call the model, not a part of it"):
        model.host.layers[0](rows())


class Translating(nn.Module):
    """Has an encoder that others call before it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.last = Documents(), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.last(self.encoder(x, lengths))


class ReadsTheEncoder:
    def __call__(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SeedContext:
        return own_reader(host, args, kwargs)

    def entries(self, host: nn.Module) -> list[str]:
        return ["encoder"]


@torch.no_grad()
def test_a_part_that_its_reader_names_is_read_where_it_is_called_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        host = Translating()
    points = [InjectionPoint("first", "encoder.first", DIM, Topology.TRANSFORMER)]
    model = MorphogeneticModel(
        host, points, example=rows(2), context=ReadsTheEncoder(), config=open_config(), causal=False
    )
    live(model, SeedStage.FOSSILIZED, "transformer:attention", rows(2))
    x, lengths = rows(2), torch.tensor([6, 3])
    for module in (host, export_model(model, rows(2))):
        inside, whole = module.encoder(x, lengths), module(x, lengths)
        torch.testing.assert_close(module.last(inside), whole)
        torch.testing.assert_close(inside[1:, :3], module.encoder(x[1:, :3]))
        with pytest.raises(HostError, match="does not fit"):
            module.encoder(x, torch.tensor([6]))
        torch.testing.assert_close(module(x, lengths), whole)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for given in (lengths, lengths.flip(0)):
        torch.testing.assert_close(compiled(x, given), model(x, given))


def with_failing_end(model: MorphogeneticModel) -> None:
    handle = model.host.layers[1].register_forward_hook(lambda *_: 1 / 0)
    try:
        model(rows(), src_key_padding_mask=PADDED)
    finally:
        handle.remove()


def test_a_mask_of_other_positions_than_the_slots_is_refused() -> None:
    said = [WHOLE_SEQUENCES]
    model = grown(Documents(), "first", lambda *_: said[0])
    said[0] = SeedContext(real=torch.ones(2, 4).bool())
    with pytest.raises(HostError, match=r"(?s)real: \(2, 4\).*features: \(2, 6, 8\).*must be \(2, 6\)"):
        model(rows(2))


def test_a_slot_of_which_the_reader_says_nothing_refuses_a_seed_that_mixes() -> None:
    said: dict[str, SeedContext] = {"": WHOLE_SEQUENCES}
    model = grown(Documents(), "first", lambda *_: said)
    said["last"] = said.pop("")
    with pytest.raises(HostError, match="says nothing of the positions in slot 'first'"):
        model(rows(2))


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        (lambda *_: {"last": WHOLE_SEQUENCES}, "says nothing of the positions in slot 'first', at 'first'"),
        (lambda *_: SeedContext(real=torch.ones(2, 4).bool()), r"real: \(2, 4\)\n  features: \(2, 6, 8\)"),
        (TorchTransformer("last"), "reads the calls of torch.nn.Transformer"),
        (lambda host, args, kwargs: kwargs["lengths"], r"raised KeyError\('lengths'\)"),
    ],
)
def test_what_a_reader_cannot_say_of_the_example_is_found_at_germination(reader: Any, words: str) -> None:
    model = MorphogeneticModel(Documents(), ["first"], example=rows(2), context=reader, config=open_config())
    with pytest.raises(GerminationError, match=f"it mixes positions(?s:.*){words}"):
        model.germinate("first", "transformer:attention")
    assert model.slots["first"].state is None
    model.germinate("first", "transformer:mlp")
    model(rows(2))


class Recomputing(Documents):
    """A host with gradient checkpointing."""

    reentrant = False

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.last(checkpoint(lambda y: self.first(y).tanh(), x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_seed_that_runs_again_in_a_backward_has_the_context_of_its_forward(reentrant: bool) -> None:
    gradients = []
    for kind in (Documents, Recomputing):
        torch.manual_seed(0)
        model = grown(kind(), "first", own_reader, blueprint="transformer:attention")
        model.host.reentrant = reentrant
        x = rows(3).requires_grad_()
        model(x, torch.tensor([6, 2, 4])).square().sum().backward()
        assert x.grad is not None
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_two_forwards_with_other_masks_before_their_backward_are_refused_under_checkpointing() -> None:
    model = grown(Recomputing(), "first", own_reader)
    x = rows(2).requires_grad_()
    losses = [model(x, torch.tensor(lengths)).sum() for lengths in ([6, 2], [6, 3])]
    with pytest.raises(HostError, match="2 forwards with different masks"):
        sum(losses).backward()
    del losses
    for lengths in ([6, 2], [6, 3]):
        loss = model(x, torch.tensor(lengths)).sum()
        loss.backward()
    same = [model(x, torch.tensor([6, 2])).sum() for _ in range(2)]
    del loss
    sum(same).backward()


def test_threads_have_a_context_each() -> None:
    model = grown(encoder(), "layers.0", TorchTransformer())
    masks = [PADDED.roll(shift, 0) for shift in range(4)]
    expected = [model(rows(), src_key_padding_mask=mask) for mask in masks]
    wrong: list[int] = []

    def run(index: int) -> None:
        for _ in range(20):
            if not torch.equal(model(rows(), src_key_padding_mask=masks[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_functional_call_follows_masks() -> None:
    model = grown(encoder(), "layers.0", TorchTransformer())
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    found = torch.func.functional_call(model, weights, (rows(),), {"src_key_padding_mask": PADDED})
    assert torch.equal(found, model(rows(), src_key_padding_mask=PADDED))


def test_evidence_from_a_tape_follows_the_masks_of_its_batches() -> None:
    model = grown(encoder(), "layers.1", TorchTransformer(), SeedStage.BLENDING)
    batches = [(rows(4, seed), PADDED[:4].roll(seed, 0)) for seed in (3, 4)]

    def losses() -> Tensor:
        found = [model(x, src_key_padding_mask=mask).square() * ~mask[..., None] for x, mask in batches]
        return torch.cat(found).mean((1, 2))

    with model.evaluation():
        expected = losses()
    with_tape = [model.measure("layers.1", losses) for _ in range(3)]
    assert not model.replay_faults
    assert len({evidence.gain for evidence in with_tape if evidence is not None}) == 1
    with model.evaluation():
        assert torch.equal(losses(), expected)


def test_an_incubating_seed_is_measured_for_isolation_on_whole_sequences() -> None:
    model = grown(encoder(), "layers.0", TorchTransformer(), SeedStage.TRAINING)
    reading = model.slots["layers.0"].check_isolation(again=True)
    assert reading is not None
    assert not reading.is_violation


def test_no_call_is_read_unless_a_seed_that_mixes_takes_part() -> None:
    read: list[str] = []

    def reader(host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SeedContext:
        read.append(type(host).__name__)
        return WHOLE_SEQUENCES

    model = MorphogeneticModel(Documents(), ["first"], example=rows(2), context=reader, config=open_config())
    assert read == ["Documents"]  # tried on the example
    model(rows(2))
    live(model, SeedStage.BLENDING, "transformer:mlp", rows(2))(rows(2))
    assert len(read) == 1
    model = grown(Documents(), "first", reader)
    model(rows(2))
    assert read
    read.clear()
    host = model.detach_slots()
    host(rows(2))
    assert not read
    assert not host._forward_pre_hooks
    assert not host._forward_hooks


def test_a_host_whose_model_is_gone_reads_no_more_calls() -> None:
    host = encoder()
    model: Any = MorphogeneticModel(host, ["layers.0"], example=rows(2), context=TorchTransformer())
    del model
    MorphogeneticModel(host, ["layers.0"], example=rows(2)).detach_slots()
    assert not host._forward_pre_hooks
    assert not host._forward_hooks


# -- hosts and blueprints of one's own -----------------------------------------------------------------------------


class SaysItself(Documents):
    """A host that declares its points, and its reader."""

    def injection_points(self) -> list[InjectionPoint]:
        return [InjectionPoint("first", "first", DIM, Topology.TRANSFORMER)]

    def example_inputs(self) -> tuple[Tensor]:
        return (rows(2),)

    def context_reader(self) -> Callable[..., SeedContext]:
        return own_reader


def test_a_host_may_declare_its_reader() -> None:
    model = grown(SaysItself(), "first", None)
    x = rows(2)
    together = model(x, torch.tensor([6, 3]))
    torch.testing.assert_close(together[1:, :3], model(x[1:, :3]))


class Smoothing(nn.Module):
    """A causal average over two positions, silent at birth: a pack's own seed that mixes positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, context: SeedContext = WHOLE_SEQUENCES) -> Tensor:
        whole = context.with_past("features", x)
        seen = context.visible(x, causal=True)
        t, every = x.shape[1], whole.shape[1]
        if seen is None:
            seen = torch.ones(t, every, dtype=torch.bool, device=x.device).tril(every - t)[None, None]
        near = torch.ones(t, every, dtype=torch.bool, device=x.device).triu(every - t - 1)
        weights = (seen[:, 0] & near).to(x.dtype)
        return x + self.gain * ((weights / weights.sum(-1, keepdim=True)) @ whole)


def test_a_packs_own_seed_that_mixes_goes_the_whole_way() -> None:
    registry = BlueprintRegistry()
    registry.register(
        BlueprintSpec("smoothing", Topology.TRANSFORMER, Smoothing, lambda dim: dim, mixes="positions"),
        pack="own",
    )
    model = grown(Documents(causal=True), "first", own_reader, blueprint="own:smoothing", registry=registry)
    x = rows(2)
    together = model(x, torch.tensor([6, 3]), torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]))
    torch.testing.assert_close(together[1:, :3], model(x[1:, :3]))
    torch.testing.assert_close(together[:1, 2:], model(x[:1, 2:]))


# -- caches --------------------------------------------------------------------------------------------------------


class Caching(Documents):
    """A host with a cache of how many positions it saw; its store is what the seeds keep."""

    def forward(self, x: Tensor, cache: dict[str, Any] | None = None) -> Tensor:
        if cache is not None:
            cache["length"] = cache.get("length", 0) + x.shape[1]
        return super().forward(x)


def cache_reader(host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SeedContext:
    cache = call_arguments(host, args, kwargs).get("cache")
    if cache is None:
        return WHOLE_SEQUENCES
    return SeedContext(past=cache.get("length", 0), store=cache.setdefault("seeds", {}))


def test_positions_behind_cached_ones_are_as_in_one_pass() -> None:
    model = grown(Caching(causal=True), "first", cache_reader)
    x, cache = rows(2), {}
    pieces = [model(piece, cache) for piece in x.split([3, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(x))
    cache["length"] = 4  # cropped: the last two are taken back
    torch.testing.assert_close(model(x[:, 4:], cache), pieces[2])


@pytest.mark.parametrize("blueprint", ["transformer:attention", "transformer:block"])
def test_seeds_behind_a_fossil_keep_cached_positions_of_their_own(blueprint: str) -> None:
    model = grown(Caching(causal=True), "first", cache_reader)
    bring_to(model, SeedStage.FOSSILIZED, model.open_slot("first").name, blueprint)
    scramble(model.slots["first__2"].seed)
    x = rows(2)
    for one in (model.eval(), export_model(model, rows(2))):
        cache: dict[str, Any] = {}
        pieces = [one(piece, cache) for piece in x.split([3, 1, 2], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), one(x))


def test_a_cache_that_was_filled_without_the_seed_is_refused() -> None:
    model = grown(Caching(causal=True), "first", cache_reader)
    cache: dict[str, Any] = {}
    with model.bypassed("first"):
        model(rows(2), cache)
    with pytest.raises(HostError, match=r"(?s)positions that this seed has not seen.*cached: 6.*seen:   0"):
        model(rows(2), cache)


def test_a_cache_is_refused_where_positions_look_at_later_ones() -> None:
    model = grown(Caching(), "first", cache_reader, causal=False)
    cache: dict[str, Any] = {}
    model(rows(2), cache)
    with pytest.raises(HostError, match="not causal"):
        model(rows(2), cache)


# -- export --------------------------------------------------------------------------------------------------------


def test_an_exported_model_follows_the_masks_of_its_calls() -> None:
    model = grown(Documents(), "first", own_reader)
    exported = export_model(model, rows(2))
    assert not any(type(module).__name__ == "SeedSlot" for module in exported.modules())
    x, lengths = rows(2), torch.tensor([6, 3])
    for module in (exported, copy.deepcopy(exported), pickle.loads(pickle.dumps(exported))):
        assert torch.equal(module(x, lengths), model(x, lengths))
    traced = torch.export.export(exported, (x, lengths)).module()
    torch.testing.assert_close(traced(x, torch.tensor([2, 5])), model(x, torch.tensor([2, 5])))


def test_an_exported_model_without_a_call_to_read_refuses() -> None:
    exported = export_model(grown(Documents(), "first", own_reader), rows(2))
    with pytest.raises(HostError, match="call the model, not a part of it"):
        exported.first(rows(2))
