"""A seed's whole life in models of each kind, by the public moves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hf_cases import CASES, Case, bring_to, open_config, shake, trainer
from kasmina_core import SeedStage

from kasmina_hf import GrowingModel, grow


def test_a_seed_learns_in_isolation_blends_in_and_becomes_part_of_the_model(case: Case) -> None:
    model = grow(case.host(), config=open_config())
    model.evaluate_with(lambda: case.losses(model))
    step = trainer(model, case)
    bring_to(model, SeedStage.TRAINING, case.slot, case.blueprint)
    at_birth = [p.detach().clone() for p in model.seed_parameters()]
    first = step()
    for _ in range(20):
        model.step_epoch(float(step()))
        if model.slots[case.slot].stage is SeedStage.PROBATIONARY:
            model.advance_stage(case.slot)
    assert model.slots[case.slot].stage is SeedStage.FOSSILIZED
    assert any(not torch.equal(a, b) for a, b in zip(at_birth, model.seed_parameters(), strict=True))
    assert step() < first


def test_after_fossilising_host_and_seed_go_on_to_learn(case: Case) -> None:
    model = case.grown(SeedStage.FOSSILIZED).train()
    model(**case.batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_culled_seed_leaves_the_host_as_if_it_had_never_been(case: Case) -> None:
    models = [grow(case.host(), config=open_config()) for _ in range(2)]
    losses = []
    for model, grows in zip(models, (True, False), strict=True):
        torch.manual_seed(1)
        step = trainer(model, case)
        if grows:
            bring_to(model, SeedStage.TRAINING, case.slot, case.blueprint)
        losses.append([step() for _ in range(3)])
        if grows:
            model.cull(case.slot)
        losses[-1] += [step(), step()]
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    for (name, a), b in zip(
        models[0].host.state_dict().items(), models[1].host.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert not models[0].seed_parameters()


@pytest.mark.parametrize("stage", [SeedStage.DORMANT, SeedStage.GERMINATED, SeedStage.TRAINING])
@pytest.mark.parametrize("training", [False, True])
def test_before_blending_outputs_and_gradients_are_the_bare_model_s(
    case: Case, stage: SeedStage, training: bool
) -> None:
    bare, model = case.host().train(training), case.grown(stage).train(training)
    results = []
    for module in (bare, model):
        torch.manual_seed(5)  # dropout draws the same
        output = module(**case.batch())
        output.loss.backward()
        results.append(output)
    assert torch.equal(results[0].logits, results[1].logits)
    assert type(results[0]) is type(results[1])
    for (name, a), b in zip(bare.named_parameters(), model.host.parameters(), strict=True):
        assert a.grad is not None, name
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("stage", [SeedStage.BLENDING, SeedStage.SHADOWING, SeedStage.FOSSILIZED])
def test_from_blending_on_the_seed_takes_part(case: Case, stage: SeedStage) -> None:
    model = case.grown(stage)
    with_seed = model(**case.inputs()).logits
    with model.bypassed(case.slot):
        without = model(**case.inputs()).logits
    assert torch.equal(without, case.host()(**case.inputs()).logits)
    assert not torch.allclose(with_seed, without)


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED])
def test_a_grown_model_s_state_dict_loads_into_a_fresh_one(case: Case, stage: SeedStage) -> None:
    model = case.grown(stage)
    fresh = grow(case.build(), config=open_config()).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert fresh.slots[case.slot].stage is stage
    assert torch.equal(fresh(**case.inputs()).logits, model(**case.inputs()).logits)


def test_a_model_without_seeds_has_the_bare_model_s_state_dict(case: Case) -> None:
    assert list(case.grown().state_dict()) == list(case.host().state_dict())


def pickled(model: GrowingModel) -> GrowingModel:
    copied: GrowingModel = pickle.loads(pickle.dumps(model))
    return copied


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
@pytest.mark.parametrize("stage", [SeedStage.DORMANT, SeedStage.TRAINING, SeedStage.FOSSILIZED])
def test_a_copy_computes_the_same_and_lives_its_own_life(case: Case, stage: SeedStage, clone: object) -> None:
    model = case.grown(stage)
    twin = clone(model)  # type: ignore[operator]
    before = model(**case.inputs()).logits
    assert torch.equal(twin(**case.inputs()).logits, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(**case.inputs()).logits, before)
    assert not torch.equal(twin(**case.inputs()).logits, before)


def test_detached_slots_leave_the_model_as_it_was(case: Case) -> None:
    model = case.grown(SeedStage.FOSSILIZED)
    host = model.detach_slots()
    assert torch.equal(host(**case.inputs()).logits, case.host()(**case.inputs()).logits)
    hooks = [h for m in host.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not hooks
    grow(host)  # it can be grown again


@pytest.mark.parametrize("recorded_before", [False, True])
def test_recorded_hidden_states_are_those_that_the_next_layer_gets(case: Case, recorded_before: bool) -> None:
    host = case.host()
    if recorded_before:
        host(**case.inputs(), output_hidden_states=True)
    model = grow(host, config=open_config())
    model.evaluate_with(lambda: case.losses(model))
    first = next(iter(model.slots))
    bring_to(model, SeedStage.FOSSILIZED, first, case.blueprint)
    shake(model)
    passed: list[torch.Tensor] = []
    model.slots[first].register_forward_hook(lambda _m, _a, out: passed.append(out))
    states = model(**case.inputs(), output_hidden_states=True).hidden_states
    assert torch.equal(states[1], passed[0])


@pytest.mark.parametrize("blueprint", ["transformer:attention", "transformer:mlp"])
def test_a_grown_model_compiles_to_one_graph(blueprint: str) -> None:
    case = CASES["llama"]
    fresh = grow(case.build(), config=open_config()).eval()
    fresh.load_state_dict(case.grown(SeedStage.FOSSILIZED, blueprint).state_dict())
    torch.compiler.reset()
    compiled = torch.compile(fresh, fullgraph=True, backend="eager")
    inputs = {**case.inputs(), "use_cache": False}
    assert torch.equal(compiled(**inputs).logits, fresh(**inputs).logits)
