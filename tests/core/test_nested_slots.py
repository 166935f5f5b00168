"""Behind a fossil a further slot opens at the same point, and is a slot as any other."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from state_helpers import (
    FIRST,
    SECOND,
    Recorder,
    bring_to,
    make_batch,
    make_host,
    make_model,
    make_registry,
    open_config,
    open_thresholds,
    picture,
    same_picture,
    train_once,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from kasmina_core import (
    CheckpointError,
    ForwardMode,
    GrowingAveragedModel,
    HostError,
    InjectionPoint,
    MisuseWarning,
    MorphogeneticModel,
    PlanPolicy,
    PlateauPolicy,
    QualityGates,
    SeedStage,
    StraightInsertion,
    Topology,
    TransitionError,
    export_model,
    graft_seeds,
    growth_of,
    load_checkpoint,
    load_distributed,
    rebuild_growth,
    save_checkpoint,
    save_distributed,
    save_seeds,
    tie_optimizer,
)
from kasmina_core.growth.plain_data import to_bytes

NESTED, THIRD = f"{FIRST}__2", f"{FIRST}__3"
X, Y = make_batch()


def scramble(model: MorphogeneticModel, slot: str) -> None:
    with torch.no_grad():
        for parameter in model.seed_parameters(slot):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))


def grown(stage: SeedStage = SeedStage.FOSSILIZED, **config) -> MorphogeneticModel:
    """A model with a fossil, and behind it a seed in a stage; neither is near the identity."""
    model, _ = make_model(open_config(**{"nested_slots": 1, **config}))
    bring_to(model, SeedStage.FOSSILIZED)
    scramble(model, FIRST)
    bring_to(model, stage, NESTED, "normed")
    if stage is not SeedStage.DORMANT:
        scramble(model, NESTED)
    return model


def by_hand(model: MorphogeneticModel, *slots: str) -> Tensor:
    """What the host computes with the seeds of some slots one behind the other at the first point."""
    host = make_host().train(model.training)
    host.load_state_dict(model.host.state_dict())
    features = host[:3](X)
    for slot in slots:
        features = model.slots[slot].seed(features)
    return host[3:](features)


# -- opening -------------------------------------------------------------------------------------------------------


def test_a_slot_opens_behind_a_fossil_at_its_point() -> None:
    model, _ = make_model(open_config())
    bring_to(model, SeedStage.FOSSILIZED)
    assert list(model.slots) == [FIRST, SECOND]
    slot = model.open_slot(FIRST)
    assert list(model.slots) == [FIRST, NESTED, SECOND]
    assert slot is model.slots[NESTED]
    assert slot.stage is SeedStage.DORMANT
    first = model.slots[FIRST]
    assert (slot.point.path, slot.point.dim, slot.shape) == (first.point.path, first.point.dim, first.shape)
    bring_to(model, SeedStage.FOSSILIZED, NESTED)
    assert model.open_slot(FIRST).name == THIRD
    assert [o.slot for o in model.observe().slots] == [FIRST, NESTED, THIRD, SECOND]
    assert [row.slot for row in model.summary()] == [FIRST, NESTED, THIRD, SECOND]


@pytest.mark.parametrize("stage", [SeedStage.DORMANT, SeedStage.TRAINING, SeedStage.PROBATIONARY])
def test_behind_anything_else_than_a_fossil_none_opens(stage: SeedStage) -> None:
    model, _ = make_model(open_config())
    bring_to(model, stage)
    before = picture(model)
    with pytest.raises(
        TransitionError, match=rf"behind '{FIRST}', which is {stage.name}: .* must be a fossil"
    ):
        model.open_slot(FIRST)
    assert same_picture(before, picture(model))
    assert list(model.slots) == [FIRST, SECOND]


def test_a_name_that_is_taken_is_refused() -> None:
    points = [InjectionPoint(name, path, 4, Topology.CNN) for name, path in (("body", "2"), ("body__2", "4"))]
    model = MorphogeneticModel(make_host(), points, example=X, config=open_config(), registry=make_registry())
    model.evaluate_with(lambda: F.cross_entropy(model(X), Y, reduction="none"))
    bring_to(model, SeedStage.FOSSILIZED, "body")
    with pytest.raises(HostError, match=r"would be called 'body__2', and a slot elsewhere has this name"):
        model.open_slot("body")
    assert list(model.slots) == ["body", "body__2"]


def test_as_many_open_by_themselves_as_the_config_says() -> None:
    model, recorder = make_model(open_config(nested_slots=2))
    for slot in (FIRST, NESTED, THIRD):
        bring_to(model, SeedStage.FOSSILIZED, slot)
    assert list(model.slots) == [FIRST, NESTED, THIRD, SECOND]
    assert recorder.kinds().count("seed_fossilized") == 3
    with pytest.raises(ValueError, match="nested_slots must not be negative"):
        open_config(nested_slots=-1)


def test_a_policy_goes_on_in_the_new_slot() -> None:
    model, _ = make_model(open_config(nested_slots=1))
    bring_to(model, SeedStage.FOSSILIZED)
    bring_to(model, SeedStage.FOSSILIZED, SECOND)
    policy = PlateauPolicy({Topology.CNN: ["mine:scale"]}, patience=1)
    for _ in range(3):
        model.step_epoch(1.0)
        model.follow(policy)
    assert model.slots[NESTED].state is not None


# -- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_seeds_at_a_point_compute_one_behind_the_other(training: bool) -> None:
    model = grown().train(training)
    assert torch.equal(model(X), by_hand(model, FIRST, NESTED))
    with model.bypassed(NESTED):
        assert torch.equal(model(X), by_hand(model, FIRST))
    with model.bypassed(FIRST):
        assert torch.equal(model(X), by_hand(model, NESTED))
        with model.bypassed(NESTED):
            assert torch.equal(model(X), by_hand(model))
    assert torch.equal(model(X), by_hand(model, FIRST, NESTED))


def test_an_empty_slot_behind_a_fossil_is_not_called() -> None:
    model = grown(SeedStage.DORMANT)
    slot = model.slots[NESTED]
    assert slot.mode == ForwardMode.PASS
    slot.forward = None  # type: ignore[method-assign, assignment]  # a call would fail
    model(X)


@pytest.mark.parametrize("incubation", ["straight-through", "counterfactual"])
def test_a_seed_in_training_behind_a_fossil_changes_neither_output_nor_gradient(incubation: str) -> None:
    found = []
    for stage in (SeedStage.DORMANT, SeedStage.TRAINING):
        model = grown(stage, incubation=incubation)
        output = model(X)
        F.cross_entropy(output, Y).backward()
        learning = [*model.host_parameters(), *model.seed_parameters(FIRST)]
        found.append([output, *(p.grad.clone() for p in learning)])
        model.incubate(lambda model=model: F.cross_entropy(model(X), Y))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(bool(p.grad.any()) for p in model.seed_parameters(NESTED))
    assert model.slots[NESTED].check_isolation().leak == 0.0


def test_a_seed_is_measured_against_the_host_with_the_fossils_before_it() -> None:
    model = grown(SeedStage.TRAINING).eval()
    evidence = model.measure(NESTED, lambda: F.cross_entropy(model(X), Y, reduction="none"))
    without, with_it = by_hand(model, FIRST), by_hand(model, FIRST, NESTED)
    losses = [F.cross_entropy(y, Y, reduction="none") for y in (without, with_it)]
    assert evidence.gain == pytest.approx(float((losses[0] - losses[1]).detach().mean()), rel=1e-4)


def test_a_cull_behind_a_fossil_leaves_no_trace() -> None:
    model = grown(SeedStage.DORMANT).eval()
    before = model(X)
    bring_to(model, SeedStage.TRAINING, NESTED)
    model.cull(NESTED, "no use")
    assert torch.equal(model.eval()(X), before)
    assert list(model.slots) == [FIRST, NESTED, SECOND]


def test_a_revert_behind_a_fossil_is_exact() -> None:
    model = grown(SeedStage.DORMANT, keep_snapshot=True)
    optimizer = tie_optimizer(model, torch.optim.Adam(model.parameters(), 1e-2))
    bring_to(model, SeedStage.TRAINING, NESTED)
    while model.slots[NESTED].stage is not SeedStage.SHADOWING:
        kept = [p.detach().clone() for p in (*model.host_parameters(), *model.seed_parameters(FIRST))]
        stage = model.slots[NESTED].stage
        model.step_epoch(1.0)
        if stage is SeedStage.TRAINING and model.slots[NESTED].stage is SeedStage.BLENDING:
            expected = kept
        train_once(model, optimizer)
    model.cull(NESTED, "worse", revert=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip((*model.host_parameters(), *model.seed_parameters(FIRST)), expected, strict=True)
    )


# -- what is saved -------------------------------------------------------------------------------------------------


def through_state_dict(model, twin, _) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))


def through_a_checkpoint(model, twin, folder) -> None:
    save_checkpoint(folder / "run", model)
    load_checkpoint(folder / "run", twin)


def through_a_distributed_checkpoint(model, twin, folder) -> None:
    save_distributed(folder / "run", model)
    load_distributed(folder / "run", twin)


def through_what_has_grown(model, twin, _) -> None:
    rebuild_growth(twin, growth_of(model))
    twin.load_state_dict(model.state_dict())


def through_a_file_of_seeds(model, twin, folder) -> None:
    save_seeds(folder / "seeds.safetensors", model)
    assert graft_seeds(folder / "seeds.safetensors", twin) == [
        name for name, slot in model.slots.items() if slot.seed is not None
    ]
    twin.host.load_state_dict(model.host.state_dict())


WAYS = [
    through_state_dict,
    through_a_checkpoint,
    through_a_distributed_checkpoint,
    through_what_has_grown,
    through_a_file_of_seeds,
]


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.FOSSILIZED])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_load_opens_the_slots_that_were_open(
    way: Callable[..., None], stage: SeedStage, own: int, tmp_path: Path
) -> None:
    model = grown(stage)
    twin, _ = make_model(open_config(nested_slots=own))
    optimizer = tie_optimizer(twin, torch.optim.Adam(twin.host_parameters(), 1e-2))
    way(model, twin, tmp_path)
    assert list(twin.slots) == [FIRST, NESTED, SECOND]
    assert twin.slots[NESTED].stage is stage
    assert torch.equal(twin.eval()(X), model.eval()(X))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in twin.parameters()}
    assert list(twin.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("way", WAYS[:4], ids=lambda way: way.__name__)
def test_a_load_closes_what_was_not_open(way: Callable[..., None], tmp_path: Path) -> None:
    model, _ = make_model(open_config())
    twin = grown()
    optimizer = tie_optimizer(twin, torch.optim.Adam(twin.parameters(), 1e-2))
    way(model, twin, tmp_path)
    assert list(twin.slots) == [FIRST, SECOND]
    assert torch.equal(twin.eval()(X), model.eval()(X))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(twin.parameters()))


def test_a_run_with_nested_slots_resumes_bit_for_bit(tmp_path: Path) -> None:
    def trained(model: MorphogeneticModel) -> torch.optim.Optimizer:
        return tie_optimizer(model, torch.optim.Adam(model.parameters(), 1e-2))

    model = grown(SeedStage.BLENDING, keep_snapshot=True)
    optimizer = trained(model)
    train_once(model, optimizer)
    save_checkpoint(tmp_path / "run", model, optimizer=optimizer)
    twin, _ = make_model(open_config(nested_slots=1, keep_snapshot=True))
    other = trained(twin)
    load_checkpoint(tmp_path / "run", twin, optimizer=other)
    for one, own in ((model, optimizer), (twin, other)):
        for _ in range(2):
            train_once(one, own)
            one.step_epoch(1.0)
    assert same_picture(
        {k: v for k, v in picture(model, optimizer).items() if k not in ("seeds", "gates", "random numbers")},
        {k: v for k, v in picture(twin, other).items() if k not in ("seeds", "gates", "random numbers")},
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_slots_behind_of_its_own(copied: Callable[..., MorphogeneticModel]) -> None:
    model = grown(SeedStage.DORMANT)
    model.evaluate_with(None)
    for slot in model.slots.values():  # functions of a test are not pickled
        slot.maker.registry = None
    twin = copied(model).eval()
    for slot in (*model.slots.values(), *twin.slots.values()):
        slot.maker.registry = make_registry()
    before = model.eval()(X)
    twin.evaluate_with(lambda: F.cross_entropy(twin(X), Y, reduction="none"))
    bring_to(twin, SeedStage.FOSSILIZED, NESTED)
    scramble(twin, NESTED)
    assert torch.equal(model(X), before)
    assert torch.equal(twin(X), by_hand(twin, FIRST, NESTED))
    assert model.slots[NESTED].seed is None


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_load_that_fails_leaves_slots_as_they_were(way: Callable[..., None], tmp_path: Path) -> None:
    model = grown()
    model.slots[NESTED].state.blueprint_id = "mine:nobody"
    twin, _ = make_model(open_config(nested_slots=1))
    bring_to(twin, SeedStage.FOSSILIZED, SECOND)
    output, before = twin.eval()(X), picture(twin)
    with pytest.raises((CheckpointError, KeyError)):
        way(model, twin, tmp_path)
    assert list(twin.slots) == [FIRST, SECOND, f"{SECOND}__2"]
    assert twin.slots[FIRST].behind == ()
    assert same_picture(before, picture(twin))
    assert torch.equal(twin(X), output)


def test_a_file_cannot_open_a_slot_behind_anything_but_a_fossil() -> None:
    model, _ = make_model(open_config())
    bring_to(model, SeedStage.TRAINING)
    state = model.state_dict()
    record = {**model.slots[FIRST].get_extra_state(), "slot_behind": True}
    state[f"kasmina_slots.{FIRST}._extra_state"] = to_bytes(record, "a record")
    twin, _ = make_model(open_config())
    before = picture(twin)
    with pytest.raises(CheckpointError, match="has a slot behind it, which only a fossil can have"):
        twin.load_state_dict(state)
    assert same_picture(before, picture(twin))
    assert list(twin.slots) == [FIRST, SECOND]


def test_an_export_holds_the_fossils_of_a_point_in_a_row() -> None:
    model = grown().eval()
    exported = export_model(model, X)
    assert torch.equal(exported(X), model(X))
    kinds = [type(part).__name__ for part in exported[int(FIRST)]]
    assert kinds == ["ReLU", "Scale", "NormedScale"]
    bring_to(model, SeedStage.FOSSILIZED, SECOND)
    MorphogeneticModel(exported, [FIRST], example=X, registry=make_registry()).germinate(FIRST, "scale")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.conv(x), "more"


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x)[0].mean((2, 3))


def test_an_export_holds_the_fossils_behind_one_element_of_an_output() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MorphogeneticModel(
            Paired(), ["pair:0"], example=X, config=open_config(nested_slots=1), registry=make_registry()
        )
    model.evaluate_with(lambda: model(X).mean(1))
    for slot in ("pair_0", "pair_0__2"):
        bring_to(model, SeedStage.FOSSILIZED, slot)
        scramble(model, slot)
    exported = export_model(model.eval(), X)
    assert torch.equal(exported(X), model(X))


def test_an_average_opens_slots_as_its_model_does() -> None:
    model, _ = make_model(open_config(nested_slots=1))
    average = GrowingAveragedModel(model)
    bring_to(model, SeedStage.FOSSILIZED)
    average.update_parameters(model)
    bring_to(model, SeedStage.FOSSILIZED, NESTED)
    for _ in range(2):
        average.update_parameters(model)
    assert list(average.module.slots) == [FIRST, NESTED, SECOND]
    assert average.seed_updates.tolist() == [3, 2, 0]
    assert torch.equal(average.eval()(X), model.eval()(X))
    fresh = GrowingAveragedModel(make_model(open_config(nested_slots=1))[0])
    fresh.load_state_dict(average.state_dict())
    assert fresh.seed_updates.tolist() == [3, 2, 0]
    assert torch.equal(fresh.eval()(X), model(X))


def test_detached_slots_take_those_behind_them_along() -> None:
    model = grown().eval()
    host = model.detach_slots()
    assert torch.equal(host(X), by_hand(model))


# -- torch.compile -------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_slot_that_opens_after_compilation_takes_part_in_the_graph(
    in_place: bool, fresh_compiler: None
) -> None:
    model, _ = make_model(open_config(nested_slots=1))
    counter = CompileCounter()
    call = model if in_place else torch.compile(model, backend=counter, fullgraph=True)
    if in_place:
        model.compile(backend=counter, fullgraph=True)
    eager = MorphogeneticModel.forward
    model.evaluate_with(lambda: F.cross_entropy(eager(model, X), Y, reduction="none"))
    graphs = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        for slot in (FIRST, NESTED):
            call(X)
            bring_to(model, SeedStage.TRAINING, slot)
            call(X).sum().backward()
            bring_on(model, SeedStage.FOSSILIZED, slot)
            scramble(model, slot)
            before = counter.frame_count
            for _ in range(2):
                expected = eager(model, X) if not in_place else None
                output = call(X)
                assert expected is None or torch.allclose(output, expected, atol=1e-5)
            graphs.append(counter.frame_count - before)
        model.eval()
        torch.testing.assert_close(call(X), by_hand(model, FIRST, NESTED))
    assert graphs == [1, 1]


def bring_on(model: MorphogeneticModel, stage: SeedStage, slot: str) -> None:
    for _ in range(40):
        if model.slots[slot].stage is stage:
            return
        if model.slots[slot].stage is SeedStage.PROBATIONARY and model.slots[slot].last_gate:
            model.advance_stage(slot)
        else:
            model.step_epoch(1.0)
    raise AssertionError(f"{stage.name} was not reached: {model.slots[slot].last_gate}")


def test_recorded_events_name_the_new_slot() -> None:
    recorder = Recorder()
    model = grown(SeedStage.DORMANT)
    model.emit_to(recorder)
    model.germinate(NESTED, "scale")
    assert {event.slot for event in recorder.events} == {NESTED}
    assert model.slots[NESTED].state.seed_id == f"{NESTED}-1"


def test_a_plan_goes_from_one_layer_to_two_four_and_eight() -> None:
    from kasmina_transformer import TransformerHost

    model = MorphogeneticModel(
        TransformerHost(vocab_size=8, dim=8, n_layers=1, n_heads=2),
        config=open_config(
            nested_slots=2,
            straight=StraightInsertion(lag=1),
            gates=QualityGates(thresholds=open_thresholds(against_start="not asked")),
        ),
    )
    policy = PlanPolicy(
        {Topology.TRANSFORMER: ["transformer:block"]},
        at=[3, 6, 9],
        options={"copies": 1},
        doubles="copies",
    )
    tokens = torch.arange(12).view(2, 6) % 8
    before = model(tokens)
    for epoch in range(1, 15):
        model.step_epoch(1.0 - 0.05 * epoch)
        model.follow(policy)
    held = {name: slot.options.get("copies") for name, slot in model.slots.items()}
    assert held == {"layer1": 1, "layer1__2": 2, "layer1__3": 4}
    assert all(slot.stage is SeedStage.FOSSILIZED for slot in model.slots.values())
    assert torch.equal(model(tokens), before)  # whole layers that change nothing yet
    scramble(model, "layer1__2")
    assert not torch.equal(model(tokens), before)


def test_slots_behind_follow_a_module_that_was_replaced() -> None:
    model = grown().eval()
    expected = model(X)
    model.host[int(FIRST)] = nn.ReLU()
    with pytest.warns(MisuseWarning, match=f"slot '{FIRST}' was replaced"):
        output = model(X)
    assert torch.equal(output, expected)
