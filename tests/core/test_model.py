"""The model as a module: its keys, its copies, its moves, its parameters and what it measures."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    ACTIVE_STAGES,
    CNN_SLOTS,
    FAILURE_STAGES,
    LIVING_STAGES,
    PERMISSIVE,
    ConvSeed,
    causal_host,
    causal_model,
    cnn_host,
    cnn_model,
    gradients,
    grow_to,
    image_evaluator,
    images,
    labels,
    registry,
    same_tensors,
    scramble,
    snapshot,
    tokens,
)
from torch import Tensor, nn

from kasmina_core import (
    CheckpointError,
    GateLevel,
    GrowthConfig,
    HookedHost,
    HostProtocol,
    InjectionPoint,
    KasminaError,
    MisuseWarning,
    MorphogeneticModel,
    SeedStage,
    Topology,
    UnknownNameError,
    tie_optimizer,
)
from kasmina_core.growth.plain_data import from_bytes

every_stage = pytest.mark.parametrize("stage", [*LIVING_STAGES, *FAILURE_STAGES], ids=lambda s: s.name)
active_stages = pytest.mark.parametrize("stage", ACTIVE_STAGES, ids=lambda s: s.name)


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(images()), labels())


def grown(stage: SeedStage, slot: str = "norm", blueprint: str = "norm", **config: Any) -> MorphogeneticModel:
    """A model whose seed has weights and buffers that are not those of its birth."""
    model = cnn_model(embargo_epochs=1, **config)
    place = grow_to(model, slot, stage, blueprint, alpha=0.4)
    if place.seed is not None:
        scramble(place.seed)
        model(images())
    return model


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- keys and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "build"), [(cnn_host, cnn_model), (causal_host, causal_model)])
def test_empty_model_saves_like_its_bare_host(
    host: Callable[[], nn.Module], build: Callable[[], MorphogeneticModel]
) -> None:
    model, bare = build(), host()
    assert list(model.state_dict()) == list(bare.state_dict())
    assert list(nn.Sequential(model).state_dict()) == [f"0.{key}" for key in bare.state_dict()]
    scramble(bare)
    model.load_state_dict(bare.state_dict())
    assert same_tensors(dict(model.state_dict()), dict(bare.state_dict()))
    bare.load_state_dict(model.state_dict())


@every_stage
def test_grown_model_loads_strictly_into_a_fresh_one_through_a_safe_file(stage: SeedStage) -> None:
    model, fresh = grown(stage), cnn_model(cnn_host(seed=9), embargo_epochs=1)
    fresh.load_state_dict(through_file(model.state_dict()))
    here, there = model.slots["norm"], fresh.slots["norm"]
    assert (there.stage, there.alpha, there.mode) == (here.stage, here.alpha, here.mode)
    assert same_tensors(snapshot(fresh), snapshot(model))
    for training in (True, False):
        assert torch.equal(fresh.train(training)(images()), model.train(training)(images()))
    assert fresh.summary() == model.summary()


@every_stage
def test_bare_weights_load_strictly_into_a_grown_model_and_empty_its_slots(stage: SeedStage) -> None:
    model, bare = grown(stage), cnn_host(seed=9)
    lost = stage is SeedStage.FOSSILIZED
    with pytest.warns(MisuseWarning, match="they are gone") if lost else nullcontext():
        model.load_state_dict(bare.state_dict())
    assert model.slots["norm"].stage is SeedStage.DORMANT
    assert model.seed_parameters() == []
    assert torch.equal(model.eval()(images()), bare.eval()(images()))
    model.germinate("norm", "conv")


def test_grown_model_inside_another_module_saves_and_loads() -> None:
    outer = nn.Sequential(grown(SeedStage.FOSSILIZED), nn.Linear(3, 2))
    fresh = nn.Sequential(cnn_model(cnn_host(seed=9)), nn.Linear(3, 2))
    fresh.load_state_dict(through_file(outer.state_dict()))
    assert torch.equal(fresh.eval()(images()), outer.eval()(images()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_loaded_seed_takes_the_dtype_of_the_model_it_comes_into(dtype: torch.dtype) -> None:
    fresh = cnn_model().to(dtype)
    fresh.load_state_dict(grown(SeedStage.FOSSILIZED).state_dict())
    assert {p.dtype for p in fresh.parameters()} == {dtype}
    assert fresh(images().to(dtype)).dtype is dtype


class Ledger:
    """Keeps the parameters an optimiser would hold for seeds."""

    def __init__(self) -> None:
        self.held: dict[str, list[int]] = {}
        self.calls = 0

    def seed_added(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        self.calls += 1
        self.held[slot] = [id(p) for p in parameters]

    def seed_removed(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        self.calls += 1
        assert self.held.pop(slot) == [id(p) for p in parameters]


def broken_states() -> Iterator[tuple[str, dict[str, Any], type[Exception]]]:
    good = grown(SeedStage.TRAINING, "norm2").state_dict()
    slot = "kasmina_slots.norm2._extra_state"

    def changed(key: str, value: Any) -> dict[str, Any]:
        state = copy.deepcopy(dict(good))
        if value is None:
            del state[key]
        else:
            state[key] = value
        return state

    record = from_bytes(good[slot], "a record")
    yield "a host weight of another shape", changed("head.weight", torch.zeros(7)), RuntimeError
    yield "a host weight missing", changed("head.bias", None), RuntimeError
    yield "a weight that nobody has", changed("more", torch.zeros(1)), RuntimeError
    yield "a seed weight missing", changed("kasmina_slots.norm2.seed.norm.weight", None), RuntimeError
    yield "another version", changed(slot, record | {"version": 99}), CheckpointError
    yield "no version at all", changed(slot, [1, 2]), CheckpointError
    yield (
        "an unknown blueprint",
        changed(slot, record | {"state": record["state"] | {"blueprint_id": "tiny:nothing"}}),
        UnknownNameError,
    )
    yield (
        "another slot's state",
        changed(slot, record | {"state": record["state"] | {"slot": "x"}}),
        CheckpointError,
    )
    yield (
        "an impossible stage",
        changed(slot, record | {"state": record["state"] | {"stage": 77}}),
        CheckpointError,
    )
    yield (
        "an impossible alpha",
        changed(
            slot,
            record
            | {"state": record["state"] | {"metrics": record["state"]["metrics"] | {"alpha": math.nan}}},
        ),
        CheckpointError,
    )


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize(("fault", "error"), [(name, error) for name, _, error in broken_states()], ids=str)
def test_failed_load_changes_nothing(fault: str, error: type[Exception], assign: bool) -> None:
    state = next(state for name, state, _ in broken_states() if name == fault)
    model = cnn_model()
    grow_to(model, "norm", SeedStage.PROBATIONARY)
    grow_to(model, "act2", SeedStage.BLENDING, alpha=0.3)
    ledger, optimizer = Ledger(), tie_optimizer(model, torch.optim.Adam(model.host_parameters()))
    model.listen(ledger)
    loss_of(model).backward()
    optimizer.step()
    model.step_epoch(1.0)
    places = [(id(t), name) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    before = (
        dict(model.state_dict()),
        gradients(model),
        copy.deepcopy(optimizer.state_dict()),
        [[slot.stage, slot.alpha, slot.mode, str(slot.last_gate)] for slot in model.slots.values()],
        torch.get_rng_state(),
    )
    before = copy.deepcopy(before[:1]) + before[1:]
    with pytest.raises(error):
        model.load_state_dict(state, assign=assign)
    after = (
        dict(model.state_dict()),
        gradients(model),
        optimizer.state_dict(),
        [[slot.stage, slot.alpha, slot.mode, str(slot.last_gate)] for slot in model.slots.values()],
        torch.get_rng_state(),
    )
    assert same_tensors(before, after)
    assert places == [(id(t), name) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    assert ledger.calls == 0
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def test_a_load_tells_the_optimiser_which_seeds_went_and_came() -> None:
    model = grown(SeedStage.TRAINING, "norm")
    ledger, optimizer = Ledger(), tie_optimizer(model, torch.optim.SGD(model.host_parameters(), 0.1))
    ledger.held["norm"] = [id(p) for p in model.slots["norm"].seed.parameters()]
    model.listen(ledger)
    model.load_state_dict(grown(SeedStage.TRAINING, "norm2").state_dict())
    assert list(ledger.held) == ["norm2"]
    assert ledger.held["norm2"] == [id(p) for p in model.seed_parameters("norm2")]
    assert [group.get("kasmina_slot") for group in optimizer.param_groups] == [None, "norm2"]


# -- copies --------------------------------------------------------------------------------------------------------

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@every_stage
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copy_computes_the_same_and_lives_a_life_of_its_own(
    copied: Callable[[MorphogeneticModel], MorphogeneticModel], stage: SeedStage
) -> None:
    model = grown(stage)
    twin = copied(model)
    assert twin.slots["norm"].stage is stage
    assert same_tensors(snapshot(twin), snapshot(model))
    for training in (True, False):
        assert torch.equal(twin.train(training)(images()), model.train(training)(images()))
    kept, output = copy.deepcopy(dict(model.state_dict())), model.eval()(images())
    scramble(twin)
    slot = twin.slots["norm"]
    if stage not in (SeedStage.FOSSILIZED, SeedStage.DORMANT, *FAILURE_STAGES):
        slot.cull("in the copy alone")
    twin.step_epoch(1.0)
    twin.train()(images())
    assert same_tensors(dict(model.state_dict()), kept)
    assert torch.equal(model(images()), output)
    assert model.slots["norm"].stage is stage


@pytest.mark.parametrize("blueprint", ["norm", "counting"])
def test_newborn_seed_has_the_buffers_it_was_built_with(blueprint: str) -> None:
    seed = grow_to(cnn_model(), "norm", SeedStage.GERMINATED, blueprint).seed
    built = dict(registry().create(blueprint, 4).named_buffers())
    assert same_tensors(dict(seed.named_buffers()), built)
    assert seed.training


def test_copies_do_not_take_along_evaluators_sinks_and_optimisers() -> None:
    model, events, ledger = cnn_model(), [], Ledger()
    model.emit_to(type("Target", (), {"emit": staticmethod(events.append)})())
    model.listen(ledger)
    for copied in COPIES.values():
        twin = copied(model)
        assert twin.measure("norm") is None
        place = grow_to(twin, "norm", SeedStage.DORMANT)
        place.maker.registry = registry()
        twin.germinate("norm", "conv")
    assert events == []
    assert ledger.calls == 0
    assert isinstance(grow_to(model, "norm", SeedStage.TRAINING).seed, ConvSeed)
    assert ledger.calls == 1


def test_deepcopy_keeps_the_registry_and_can_be_grown_further() -> None:
    twin = copy.deepcopy(grown(SeedStage.FOSSILIZED))
    twin.evaluate_with(image_evaluator(twin))
    grow_to(twin, "norm2", SeedStage.FOSSILIZED)
    assert twin.slots["norm2"].is_active


def test_copy_gives_back_its_own_host_and_not_the_others() -> None:
    model = grown(SeedStage.FOSSILIZED)
    twin = copy.deepcopy(model)
    host = twin.detach_slots()
    assert host is twin.host
    assert not any(module._forward_hooks for module in host.modules())
    assert model.host.norm._forward_hooks


# -- bypassing -----------------------------------------------------------------------------------------------------


@active_stages
def test_bypassed_is_the_model_without_that_seed(stage: SeedStage) -> None:
    model = grown(stage).eval()
    bare = cnn_host().eval()
    bare.load_state_dict(model.host.state_dict())
    grown_output = model(images())
    with model.bypassed("norm") as same:
        assert same is model
        assert torch.equal(model(images()), bare(images()))
    assert torch.equal(model(images()), grown_output)
    assert model.slots["norm"].stage is stage


def test_bypassing_nests_and_ends_with_an_exception() -> None:
    model = cnn_model()
    for slot in ("norm", "norm2"):
        scramble(grow_to(model, slot, SeedStage.FOSSILIZED).seed)
    features = torch.randn(2, 4, 3, 3)
    with model.bypassed("norm"):
        assert model.slots["norm"](features) is features  # in training mode too
    model.eval()
    outputs = {"both": model(images())}
    with model.bypassed("norm"):
        outputs["norm2"] = model(images())
        with model.bypassed("norm2"):
            outputs["none"] = model(images())
            with model.bypassed("norm"):
                assert torch.equal(model(images()), outputs["none"])
            assert torch.equal(model(images()), outputs["none"])
        assert torch.equal(model(images()), outputs["norm2"])
    assert len({out.sum().item() for out in outputs.values()}) == 3
    bare = cnn_host().eval()
    bare.load_state_dict(model.host.state_dict())
    assert torch.equal(outputs["none"], bare(images()))
    with pytest.raises(RuntimeError, match="stop"), model.bypassed("norm"):
        raise RuntimeError("stop")
    assert torch.equal(model(images()), outputs["both"])


def test_bypassing_survives_a_change_of_mode_within() -> None:
    model = cnn_model()
    scramble(grow_to(model, "norm", SeedStage.FOSSILIZED).seed)
    bare = copy.deepcopy(model.host.eval())
    bare.norm._forward_hooks.clear()
    with model.bypassed("norm"):
        model.train()
        model.eval()
        assert torch.equal(model(images()), copy.deepcopy(model).detach_slots()(images()))


# -- parameters ----------------------------------------------------------------------------------------------------


def test_parameters_are_told_apart_by_identity_and_listed_once() -> None:
    model = cnn_model()
    for slot in CNN_SLOTS[:2]:
        grow_to(model, slot, SeedStage.TRAINING)
    host, seeds = model.host_parameters(), model.seed_parameters()
    assert [id(p) for p in host] == [id(p) for p in model.host.parameters()]
    assert {id(p) for p in host + seeds} == {id(p) for p in model.parameters()}
    assert len({id(p) for p in host + seeds}) == len(host) + len(seeds)
    assert [id(p) for p in model.seed_parameters("norm")] == [
        id(p) for p in model.slots["norm"].seed.parameters()
    ]
    assert model.seed_parameters("act2") == []
    with pytest.raises(UnknownNameError, match="Did you mean 'norm'"):
        model.seed_parameters("nrom")


def test_parameter_that_a_seed_shares_belongs_to_the_host() -> None:
    host = cnn_host()

    class Shares(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.own, self.shared = nn.Parameter(torch.ones(dim)), host.norm2.weight

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.own * self.shared).view(1, -1, 1, 1)

    model = cnn_model(host, seeds=registry(shares=Shares))
    seed = grow_to(model, "norm", SeedStage.TRAINING, "shares").seed
    assert [id(p) for p in model.seed_parameters()] == [id(seed.own)]
    assert id(host.norm2.weight) in {id(p) for p in model.host_parameters()}


@every_stage
def test_active_parameters_are_those_of_seeds_that_compute(stage: SeedStage) -> None:
    model = cnn_model(embargo_epochs=1)
    slot = grow_to(model, "norm", stage)
    size = 9 * 4 * 4 + 4
    assert slot.active_seed_params == (size if stage in ACTIVE_STAGES else 0)
    assert slot.is_active == (stage in ACTIVE_STAGES)
    assert sum(p.numel() for p in model.seed_parameters()) == (0 if slot.seed is None else size)


def test_summary_has_a_row_a_slot_and_shares_of_what_is_trainable() -> None:
    model = cnn_model()
    grow_to(model, "norm", SeedStage.BLENDING, alpha=0.25)
    grow_to(model, "norm2", SeedStage.TRAINING)
    model.slots["norm2"].seed.conv.bias.requires_grad_(False)
    rows = model.summary()
    assert [(r.slot, r.stage, r.blueprint, r.alpha, r.parameters) for r in rows] == [
        ("norm", "BLENDING", "tiny:conv", 0.25, 148),
        ("norm2", "TRAINING", "tiny:conv", 0.0, 148),
        ("act2", "DORMANT", "", 0.0, 0),
    ]
    host = sum(p.numel() for p in model.host_parameters())
    trainable = host + 148 + 144
    assert [r.trainable_share for r in rows] == pytest.approx([148 / trainable, 144 / trainable, 0.0])
    lines = model.summary_table().splitlines()
    assert len(lines) == 5
    assert lines[1].split()[:4] == ["norm", "BLENDING", "tiny:conv", "0.25"]
    assert lines[-1].split() == ["(host)", "-", "Sequential", "-", str(host), f"{host / trainable:.1%}"]


def test_summary_of_a_model_in_which_nothing_learns() -> None:
    model = cnn_model(cnn_host().requires_grad_(False))
    assert [r.trainable_share for r in model.summary()] == [0.0] * 3
    assert model.summary_table().splitlines()[-1].endswith(" 0.0%")


# -- evidence ------------------------------------------------------------------------------------------------------


@active_stages
def test_evidence_pairs_the_same_samples_with_and_without_the_seed(stage: SeedStage) -> None:
    model = grown(stage)
    before, modes = snapshot(model), [m.training for m in model.modules()]
    calls: list[bool] = []
    evaluate = image_evaluator(model)

    def evaluator() -> Tensor:
        calls.append(torch.is_grad_enabled() or any(m.training for m in model.modules()))
        return evaluate()

    model.evaluate_with(evaluator)
    evidence = model.measure("norm", evaluator)
    assert calls
    assert not any(calls)  # in eval mode, without gradients
    written_in = copy.deepcopy(model).eval()
    seed = written_in.slots["norm"].seed
    host = written_in.detach_slots()
    without = F.cross_entropy(host(images(8, seed=11)), labels(8, seed=12), reduction="none").double()
    host.norm.register_forward_hook(lambda _m, _a, features: seed(features))
    with_seed = F.cross_entropy(host(images(8, seed=11)), labels(8, seed=12), reduction="none").double()
    assert evidence.samples == 8
    assert evidence.loss_with == pytest.approx(with_seed.mean().item(), rel=1e-6)
    assert evidence.loss_without == pytest.approx(without.mean().item(), rel=1e-6)
    assert evidence.gain == pytest.approx((without - with_seed).mean().item(), rel=1e-5)
    assert evidence.standard_error == pytest.approx((without - with_seed).std().item() / 8**0.5, rel=1e-5)
    assert evidence.deviation > 0.0
    assert same_tensors(before, snapshot(model))
    assert [m.training for m in model.modules()] == modes


def test_deviation_in_the_evidence_is_that_of_this_measurement() -> None:
    model = grown(SeedStage.SHADOWING, blueprint="conv")
    large = model.measure("norm", image_evaluator(model)).deviation
    with torch.no_grad():
        for p in model.slots["norm"].seed.parameters():
            p.mul_(0.1)
    assert model.measure("norm", image_evaluator(model)).deviation == pytest.approx(0.1 * large, rel=1e-4)


def test_evidence_of_one_seed_leaves_the_others_as_they_are() -> None:
    model = cnn_model()
    scramble(grow_to(model, "norm", SeedStage.FOSSILIZED).seed)
    grow_to(model, "norm2", SeedStage.TRAINING)
    evidence = model.measure("norm2")
    expected = image_evaluator(model)
    model.eval()
    assert evidence.loss_without == pytest.approx(expected().mean().item(), rel=1e-6)


def test_no_evidence_without_an_evaluator_or_an_active_seed() -> None:
    model = cnn_model()
    assert model.measure("norm") is None
    grow_to(model, "norm", SeedStage.GERMINATED)
    assert model.measure("norm") is None
    model.advance_stage("norm")
    model.evaluate_with(None)
    assert model.measure("norm") is None


@pytest.mark.parametrize(
    ("wrong", "shape"),
    [
        (lambda losses: losses.mean(), r"\(\)"),
        (lambda losses: losses[:1], r"\(1,\)"),
        (lambda losses: losses[:, None], r"\(8, 1\)"),
    ],
    ids=["mean", "one sample", "matrix"],
)
def test_evaluator_of_another_shape_is_told_so_and_leaves_the_modes(
    wrong: Callable[[Tensor], Tensor], shape: str
) -> None:
    model = cnn_model()
    grow_to(model, "norm", SeedStage.TRAINING)
    model.host.norm2.eval()
    modes, evaluate = [m.training for m in model.modules()], image_evaluator(model)
    model.evaluate_with(lambda: wrong(evaluate()))
    with pytest.raises(ValueError, match=f"with the seed:    {shape}\n.*\n.*reduction='none'"):
        model.measure("norm")
    assert [m.training for m in model.modules()] == modes
    features = torch.randn(2, 4, 3, 3)
    assert model.slots["norm"](features) is not features  # straight-through again
    assert not model.slots["norm"].check_gate(GateLevel.G2)
    model.evaluate_with(evaluate)
    assert model.measure("norm") is not None


def test_evaluator_that_raises_leaves_modes_and_random_numbers() -> None:
    model = cnn_model()
    grow_to(model, "norm", SeedStage.TRAINING)
    modes, numbers = [m.training for m in model.modules()], torch.get_rng_state()

    def evaluator() -> Tensor:
        torch.rand(2)
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        model.measure("norm", evaluator)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), numbers)


# -- devices without data ------------------------------------------------------------------------------------------


def test_host_on_the_meta_device_takes_slots_and_seeds() -> None:
    host = causal_host().to("meta")
    model = causal_model_on_meta(host)
    slot = grow_to(model, "blocks.0", SeedStage.GERMINATED, "mlp")
    model.advance_stage("blocks.0", SeedStage.CULLED)
    assert slot.seed is None
    model.germinate("blocks.1", "mlp")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert model(tokens().to("meta")).shape == (3, 7, 11)
    assert [r.parameters for r in model.summary()] == [0, 72]


def causal_model_on_meta(host: nn.Module) -> MorphogeneticModel:
    return MorphogeneticModel(host, ["blocks.*"], example=tokens(1).to("meta"), registry=registry())


def test_every_error_of_the_library_can_be_caught_as_one() -> None:
    with pytest.raises(KasminaError):
        cnn_model().germinate("norm", "nothing")


class Speaker(HookedHost, nn.Module):
    """Has methods and properties of its own, as the models of libraries have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.config = {"architectures": ["Speaker"]}

    def injection_points(self) -> list[InjectionPoint]:
        return [InjectionPoint("point", "layer", 4, Topology.TRANSFORMER)]

    def example_inputs(self) -> tuple[Tensor]:
        return (torch.ones(2, 3, 4),)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.layer

    @torch.no_grad()
    def generate(self, x: Tensor, *, steps: int) -> Tensor:
        for _ in range(steps):
            x = self(x)
        return x

    def save_pretrained(self, path: str) -> None:
        raise AssertionError("the host would be saved without its seeds")

    @classmethod
    def can_generate(cls) -> bool:
        return cls is Speaker

    @classmethod
    def from_pretrained(cls) -> Speaker:
        return cls()


def test_methods_and_properties_of_the_host_work_on_the_model_with_its_seeds() -> None:
    host = Speaker()
    calls: list[int] = []
    host.register_forward_pre_hook(lambda _m, args: calls.append(len(args)))
    model = MorphogeneticModel(host, registry=registry(), config=GrowthConfig(gates=PERMISSIVE))
    x = torch.ones(2, 3, 4)
    bare = model.generate(x, steps=2)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.get_input_embeddings() is host.layer
    assert model.can_generate()
    model.evaluate_with(lambda: model(x).flatten())
    grow_to(model, "point", SeedStage.BLENDING, "mlp")
    scramble(model.slots["point"].seed)
    model.slots["point"].set_alpha(1.0)
    calls.clear()
    generated = model.generate(x, steps=2)
    assert calls == [1, 1]
    assert torch.equal(generated, model(model(x)).detach())
    assert not torch.equal(generated, bare)
    host.layer = nn.Linear(4, 4)
    with pytest.warns(MisuseWarning, match="module of slot 'point' was replaced"):
        moved = model.generate(x, steps=1)
    assert torch.equal(moved, model(x).detach())


@pytest.mark.parametrize(
    "name",
    [
        "config",
        "save_pretrained",
        "from_pretrained",
        "injection_points",
        "register_slot",
        "example_inputs",
        "nothing",
    ],
)
def test_what_would_pass_by_the_seeds_is_at_the_host_alone(name: str) -> None:
    model = MorphogeneticModel(Speaker(), registry=registry())
    assert hasattr(model.host, name) is (name != "nothing")
    with pytest.raises(
        AttributeError, match=f"'MorphogeneticModel' object has no attribute '{name}'"
    ) as said:
        getattr(model, name)
    assert ("model.host." in str(said.value)) is name.endswith("_pretrained")
    assert not isinstance(model, HostProtocol)


def test_a_copy_uses_the_methods_of_its_own_host() -> None:
    model = MorphogeneticModel(Speaker(), registry=registry())
    twin = copy.deepcopy(model)
    assert twin.get_input_embeddings() is twin.host.layer
    assert pickle.loads(pickle.dumps(model)).device == model.device
