"""What a slot's gates look at through a seed's life: looks are counted, error rates shared, the start remembered."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from state_helpers import (
    FIRST,
    SECOND,
    CountingEvaluator,
    bring_to,
    make_batch,
    make_model,
    open_config,
    open_thresholds,
)
from torch import Tensor

from kasmina_core import CheckVerdict, ErrorBudget, MorphogeneticModel, QualityGates, SeedStage
from kasmina_core.evidence.measuring import Processes
from kasmina_core.growth.agreement import Agreement
from kasmina_core.parallel.team import Team

S = SeedStage
START = "gain over the host at blending"


def closed(**changes: object):
    """Gates that only the sequential test keeps shut."""
    defaults = {"min_t": None, "min_training_epochs": 0, "error_rate": 1e-6}
    return open_config(gates=QualityGates(thresholds=open_thresholds(**{**defaults, **changes})))


def start_check(model: MorphogeneticModel):
    result = model.slots[FIRST].check_gate(5)
    (found,) = [c for c in result.checks if c.name == START]
    return found


def in_probation(**samples: bool) -> tuple[MorphogeneticModel, CountingEvaluator]:
    model, _ = make_model(evaluate=False)
    evaluator = CountingEvaluator(model, samples=40)
    model.evaluate_with(evaluator, **samples)
    bring_to(model, S.PROBATIONARY)
    for _ in range(2):
        model.step_epoch(1.0)
    return model, evaluator


def test_looks_are_counted_once_an_epoch_from_the_first_of_a_stage() -> None:
    model, _ = make_model(closed())
    bring_to(model, S.TRAINING)
    slot = model.slots[FIRST]
    for number in (1, 2, 3):
        model.measure(FIRST)  # looking on without a decision is no look
        assert model.step_epoch(1.0)[FIRST].finding.look == number
        slot.pause()
        slot.resume()  # asks the gate anew, with the evidence it had
        assert slot.check_gate(2).finding.look == number
    twin = pickle.loads(pickle.dumps(model))
    twin.evaluate_with(CountingEvaluator(twin))
    assert twin.step_epoch(1.0)[FIRST].finding.look == 4


def test_probation_counts_its_looks_from_the_first_again() -> None:
    model, _ = in_probation()
    assert model.slots[FIRST].last_gate.finding.look == 1  # the first at which the dwell was over


def test_the_model_is_compared_with_its_host_as_blending_began() -> None:
    model, _ = make_model(evaluate=False)
    evaluator = CountingEvaluator(model, samples=40)
    model.evaluate_with(evaluator)
    bring_to(model, S.TRAINING)
    while model.slots[FIRST].stage is S.TRAINING:
        with torch.no_grad():
            before = evaluator_without(model, evaluator)
        model.step_epoch(1.0)
    with torch.no_grad():
        model.host[-1].bias.add_(torch.tensor([3.0, 0.0, 0.0]))  # the host is much worse from now on
    bring_on(model)
    evidence = model.slots[FIRST].last_evidence
    with torch.no_grad(), model.evaluation():
        now = evaluator()
    assert evidence.since_blending.gain == pytest.approx(float((before - now).mean()), rel=1e-4)
    assert evidence.since_blending.gain < -0.3
    assert evidence.gain > -0.3  # the seed is not to blame, but its host's epochs are charged
    found = start_check(model)
    assert found.value == pytest.approx(evidence.since_blending.t)


def evaluator_without(model: MorphogeneticModel, evaluator: CountingEvaluator) -> Tensor:
    with model.evaluation(), model.bypassed(FIRST):
        return evaluator()


def bring_on(model: MorphogeneticModel) -> None:
    while model.slots[FIRST].stage is not S.PROBATIONARY:
        model.step_epoch(1.0)
    for _ in range(2):
        model.step_epoch(1.0)


def test_samples_that_change_are_never_compared_over_epochs() -> None:
    model, _ = in_probation(fixed_samples=False)
    assert start_check(model).verdict is CheckVerdict.NOT_REQUIRED
    assert model.slots[FIRST].get_extra_state()["host_losses"] is None


def test_other_samples_are_not_compared_with_those_of_the_start() -> None:
    model, _ = in_probation()
    assert start_check(model).verdict is CheckVerdict.PASSED
    model.evaluate_with(CountingEvaluator(model, samples=40))
    model.step_epoch(1.0)
    assert "never measured" in str(start_check(model))
    model, _ = in_probation()
    model.growth.examiner.samples = None  # as in a model that was loaded
    model.evaluate_with(CountingEvaluator(model, samples=39))
    model.step_epoch(1.0)
    assert start_check(model).verdict is CheckVerdict.NOT_REQUIRED


def test_the_start_is_remembered_by_a_model_that_is_loaded() -> None:
    model, _ = in_probation()
    fresh, _ = make_model(evaluate=False)
    fresh.load_state_dict(model.state_dict())
    fresh.evaluate_with(CountingEvaluator(fresh, samples=40))
    model.step_epoch(1.0)
    fresh.step_epoch(1.0)
    assert start_check(fresh) == start_check(model)
    assert start_check(fresh).verdict is CheckVerdict.PASSED


def shares(model: MorphogeneticModel) -> list[float]:
    return [round(slot.notes.error_share, 6) for slot in model.slots.values()]


def test_seeds_that_are_tested_together_share_the_error_rate() -> None:
    model, _ = make_model(closed())
    model.germinate(FIRST, "scale")
    model.germinate(SECOND, "scale")
    model.step_epoch(1.0)
    assert shares(model) == [0.5, 0.5]
    model.cull(SECOND, "no use")
    results = model.step_epoch(1.0)
    assert shares(model)[0] == 0.5  # what a test began with is what it goes on with
    assert results[FIRST].finding.error_rate == pytest.approx(0.5e-6)


def test_one_seed_after_the_other_has_the_whole_error_rate() -> None:
    model, _ = make_model(closed())
    for slot in (FIRST, SECOND):
        bring_to(model, S.TRAINING, slot)
        assert model.slots[slot].notes.error_share == 1.0
        model.cull(slot, "no use")


def test_a_budget_of_the_run_leaves_less_to_each_seed_that_comes_later() -> None:
    model, _ = make_model(closed(error_budget=ErrorBudget.PER_RUN))
    found = []
    for slot in (FIRST, SECOND):
        bring_to(model, S.TRAINING, slot)
        found.append(model.slots[slot].notes.error_share)
        model.cull(slot, "no use")
    while model.slots[FIRST].state is not None:
        model.step_epoch(1.0)
    bring_to(model, S.TRAINING, FIRST)
    found.append(model.slots[FIRST].notes.error_share)
    assert found == pytest.approx([1 / 2, 1 / 6, 1 / 12])
    assert sum(1 / (j * (j + 1)) for j in range(1, 10**4)) <= 1.0


def test_a_team_of_processes_answers_every_question_itself() -> None:
    questions = {name for name in dir(Agreement) if not name.startswith("_")}
    assert questions <= vars(Team).keys()


class TwoAlike(Processes):
    def samples(self, losses: torch.Tensor) -> torch.Tensor:
        return torch.cat([losses, losses])


def test_every_vector_of_losses_is_gathered_over_processes() -> None:
    model, _ = make_model()
    bring_to(model, S.TRAINING)
    alone = model.measure(FIRST)
    model.step_epoch(1.0)
    model.growth.examiner.measurer.processes = TwoAlike()
    together = model.measure(FIRST, CountingEvaluator(model))
    assert together.samples == 2 * alone.samples
    assert [gain.samples for _, gain in together.smaller] == [2 * alone.samples]
    assert model.attribute(evaluator=CountingEvaluator(model)).joint.samples == 2 * alone.samples
    model.host[0].weight.requires_grad_(True)
    assert model.screen(CountingEvaluator(model))[FIRST].samples == 2 * alone.samples


def test_an_evaluator_that_leaves_train_mode_on_moves_no_statistics():
    model, _ = make_model(evaluate=False)
    x, y = make_batch(16, seed=12)

    def evaluator():
        model.train()  # as a helper does that wants to go on with training
        return F.cross_entropy(model(x), y, reduction="none")

    bring_to(model, SeedStage.TRAINING)
    before = model.host[1].running_mean.clone()
    model.evaluate_with(evaluator)
    measured = model.measure(FIRST)
    assert torch.equal(model.host[1].running_mean, before)
    assert model.training
    model.evaluate_with(lambda: F.cross_entropy(model(x), y, reduction="none"))
    model.step_epoch(1.0)
    assert model.measure(FIRST).gain == measured.gain
