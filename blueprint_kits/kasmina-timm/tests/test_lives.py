"""A seed's whole life in models of each kind, by the public moves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from kasmina_core import SeedStage
from timm_cases import CASES, Case, bring_to, every_case, open_config, trainer

from kasmina_timm import GrowingModel, grow


@every_case
def test_a_seed_learns_in_isolation_blends_in_and_becomes_part_of_the_model(case: Case) -> None:
    model = grow(case.host(), [case.slot], config=open_config())
    model.evaluate_with(lambda: case.losses(model))
    step = trainer(model, case)
    bring_to(model, SeedStage.TRAINING, case.slot, case.blueprint)
    at_birth = [p.detach().clone() for p in model.seed_parameters()]
    first = step()
    for _ in range(20):
        if model.slots[case.slot].stage is SeedStage.FOSSILIZED:
            break
        model.step_epoch(float(step()))
        if model.slots[case.slot].stage is SeedStage.PROBATIONARY:
            model.advance_stage(case.slot)
    assert model.slots[case.slot].stage is SeedStage.FOSSILIZED
    assert any(not torch.equal(a, b) for a, b in zip(at_birth, model.seed_parameters(), strict=True))
    assert step() < first


@every_case
def test_after_fossilising_host_and_seed_go_on_to_learn(case: Case) -> None:
    model = case.grown(SeedStage.FOSSILIZED).train()
    case.losses(model).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@every_case
def test_a_culled_seed_leaves_the_host_as_if_it_had_never_been(case: Case) -> None:
    models = [grow(case.host(), config=open_config()) for _ in range(2)]
    losses = []
    for model, grows in zip(models, (True, False), strict=True):
        torch.manual_seed(1)
        step = trainer(model, case)
        if grows:
            bring_to(model, SeedStage.TRAINING, case.slot, case.blueprint)
        losses.append([step() for _ in range(2)])
        if grows:
            model.cull(case.slot)
        losses[-1] += [step(), step()]
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    for (name, a), b in zip(
        models[0].host.state_dict().items(), models[1].host.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert not models[0].seed_parameters()


@every_case
@pytest.mark.parametrize("stage", [SeedStage.DORMANT, SeedStage.TRAINING])
@pytest.mark.parametrize("training", [False, True])
def test_before_blending_outputs_and_gradients_are_the_bare_model_s(
    case: Case, stage: SeedStage, training: bool
) -> None:
    bare, model = case.host().train(training), case.grown(stage).train(training)
    outputs = []
    for module in (bare, model):
        torch.manual_seed(5)  # dropout draws the same
        outputs.append(module(case.images()))
        outputs[-1].square().mean().backward()
    assert torch.equal(outputs[0], outputs[1])
    for (name, a), b in zip(bare.named_parameters(), model.host.parameters(), strict=True):
        assert a.grad is not None, name
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(bare.named_buffers(), model.host.buffers(), strict=True):
        assert torch.equal(a, b), name


@every_case
@pytest.mark.parametrize("stage", [SeedStage.BLENDING, SeedStage.FOSSILIZED])
def test_from_blending_on_the_seed_takes_part(case: Case, stage: SeedStage) -> None:
    model = case.grown(stage)
    with_seed = model(case.images())
    with model.bypassed(case.slot):
        without = model(case.images())
    assert torch.equal(without, case.host()(case.images()))
    assert not torch.equal(with_seed, without)


@every_case
def test_a_grown_model_s_state_dict_loads_into_a_fresh_one(case: Case) -> None:
    model = case.grown(SeedStage.FOSSILIZED)
    fresh = grow(case.build(), config=open_config()).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert fresh.slots[case.slot].stage is SeedStage.FOSSILIZED
    assert torch.equal(fresh(case.images()), model(case.images()))


@every_case
def test_a_model_without_seeds_has_the_bare_model_s_state_dict(case: Case) -> None:
    assert list(case.grown().state_dict()) == list(case.host().state_dict())


def pickled(model: GrowingModel) -> GrowingModel:
    copied: GrowingModel = pickle.loads(pickle.dumps(model))
    return copied


@pytest.mark.parametrize("name", ["timm-resnet", "timm-vit", "torchvision-mobilenet"])
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_a_copy_computes_the_same_and_lives_its_own_life(name: str, clone: object) -> None:
    case = CASES[name]
    model = case.grown(SeedStage.FOSSILIZED)
    twin = clone(model)  # type: ignore[operator]
    before = model(case.images())
    assert torch.equal(twin(case.images()), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(case.images()), before)
    assert not torch.equal(twin(case.images()), before)


@every_case
def test_detached_slots_leave_the_model_as_it_was(case: Case) -> None:
    model = case.grown(SeedStage.FOSSILIZED)
    for host in (copy.deepcopy(model).detach_slots(), model.detach_slots()):
        assert torch.equal(host(case.images()), case.host()(case.images()))
        modules = list(host.modules())
        assert not [hook for m in modules for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
        grow(host)  # it can be grown again


@pytest.mark.parametrize("name", ["timm-resnet", "timm-vit"])
def test_a_grown_model_compiles_to_one_graph(name: str) -> None:
    case = CASES[name]
    fresh = grow(case.build(), config=open_config()).eval()
    fresh.load_state_dict(case.grown(SeedStage.FOSSILIZED).state_dict())
    torch.compiler.reset()
    compiled = torch.compile(fresh, fullgraph=True, backend="eager")
    assert torch.equal(compiled(case.images()), fresh(case.images()))
