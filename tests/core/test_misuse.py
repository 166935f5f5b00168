"""What was forgotten, or cannot work, is said: once a model, with what to do, and never without a reason."""

from __future__ import annotations

import copy
import random
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from state_helpers import FIRST, SECOND, make_batch, make_host, make_model, make_registry, open_config
from torch import nn
from torch.optim import SGD, AdamW

from kasmina_core import (
    BudgetPolicy,
    Continue,
    GateProfile,
    GateThresholds,
    GrowthCause,
    GrowthConfig,
    MisuseWarning,
    MorphogeneticModel,
    NoGrowthPolicy,
    PlateauPolicy,
    QualityGates,
    SeedCost,
    SeedStage,
    Topology,
    TournamentPolicy,
    TransitionError,
    clip_gradients,
    distribute,
    export_model,
    load_checkpoint,
    save_checkpoint,
    tie_optimizer,
)

X, Y = make_batch(16)


class Loop:
    """A training loop that leaves out what it is told to."""

    def __init__(self, leave_out="", *, make=AdamW, tied=True, evaluator="good", **config):
        self.model = model = make_model(open_config(**config), evaluate=False)[0]
        self.leave_out = leave_out
        optimizer = make(model.parameters(), lr=1e-3)
        self.optimizer = tie_optimizer(model, optimizer) if tied else optimizer
        if evaluator == "good":
            model.evaluate_with(lambda: F.cross_entropy(model(X), Y, reduction="none"))
        elif evaluator is not None:
            model.evaluate_with(lambda: evaluator(model))
        model.germinate(FIRST, "scale")
        if not tied:
            optimizer.add_param_group({"params": model.seed_parameters()})

    def loss(self):
        return F.cross_entropy(self.model(X), Y)

    def epoch(self, batches=2):
        model = self.model
        for _ in range(batches):
            self.optimizer.zero_grad()
            self.loss().backward()
            if self.leave_out != "incubate":
                model.incubate(self.loss)
            if self.leave_out == "early zero_grad":
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.leave_out != "step":
                model.step()
            if self.leave_out not in ("early zero_grad", "optimizer"):
                self.optimizer.step()
        return model.step_epoch(float(self.loss().detach()))

    def epochs(self, number):
        """Run epochs; return what was said."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(number):
                self.epoch()
        assert all(w.category is MisuseWarning for w in said)
        assert all(w.filename == __file__ for w in said)
        return [str(w.message) for w in said]


@pytest.mark.parametrize("incubation", ["straight-through", "counterfactual"])
@pytest.mark.parametrize("make", [SGD, AdamW])
def test_a_whole_loop_is_told_nothing(make, incubation):
    loop = Loop(make=make, incubation=incubation)
    assert loop.epochs(12) == []
    assert loop.model.slots[FIRST].stage is SeedStage.PROBATIONARY


BROKEN = {
    "raises": (lambda model: 1 / 0, "ZeroDivisionError: division by zero"),
    "a mean": (lambda model: F.cross_entropy(model(X), Y), "reduction='none'"),
    "a number": (lambda model: float(F.cross_entropy(model(X), Y)), "returned: float"),
    "nothing": (lambda model: None, "returned: NoneType"),
    "nan": (lambda model: F.cross_entropy(model(X), Y, reduction="none") * float("nan"), "is NaN"),
}


@pytest.mark.parametrize(("evaluator", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_an_evaluator_that_cannot_work_is_told_with_the_reason(evaluator, reason):
    loop = Loop(evaluator=evaluator)
    (said,) = loop.epochs(8)
    assert reason in said
    assert f"slot '{FIRST}'" in said
    assert "evaluate_with" in said
    assert loop.model.slots[FIRST].stage is SeedStage.TRAINING


def test_an_evaluator_that_fails_runs_once_an_epoch_and_each_check_says_why():
    calls = []

    def fails(model):
        calls.append(1)
        raise RuntimeError("no such file")

    loop = Loop(evaluator=fails)
    loop.epochs(6)
    result = loop.model.slots[FIRST].last_gate
    waiting = [check for check in result.checks if check.name in ("gain", "gain in standard errors")]
    assert len(waiting) == 2
    assert all("no such file" in check.detail for check in waiting)
    before = len(calls)
    loop.epochs(1)
    assert len(calls) == before + 1
    with pytest.raises(RuntimeError, match="no such file"):
        loop.model.measure(FIRST)  # asks again


def test_a_new_evaluator_is_asked_in_the_epoch_in_which_the_old_one_failed():
    loop = Loop(evaluator=lambda model: 1 / 0)
    loop.epochs(6)
    loop.model.evaluate_with(lambda: F.cross_entropy(loop.model(X), Y, reduction="none"))
    slot = loop.model.slots[FIRST]
    slot.pause()
    slot.resume()  # asks the gate anew
    result = slot.check_gate(2)
    assert not any("raised" in check.detail for check in result.checks)


COMMANDS = {
    "step_epoch": lambda model: model.step_epoch(1.0),
    "advance_stage": lambda model: model.advance_stage(FIRST),
    "germinate": lambda model: model.germinate(SECOND, "scale"),
    "cull": lambda model: model.cull(FIRST),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_within_an_evaluator_are_refused(command):
    def commands(model):
        COMMANDS[command](model)
        return F.cross_entropy(model(X), Y, reduction="none")

    loop = Loop(evaluator=commands)
    loop.epochs(2)
    epoch, stage = loop.model.epoch, loop.model.slots[FIRST].stage
    with pytest.raises(TransitionError, match=f"{command}.* was called within an evaluator"):
        loop.model.measure(FIRST)
    assert (loop.model.epoch, loop.model.slots[FIRST].stage) == (epoch, stage)
    assert any("within an evaluator" in text for text in loop.epochs(6))


def test_right_and_wrong_answers_are_numbers():
    loop = Loop()
    loop.epochs(2)
    for dtype in (torch.bool, torch.uint8, torch.int64):

        def right(dtype=dtype):
            return (loop.model(X).argmax(1) == Y).to(dtype)

        found = loop.model.measure(FIRST, right, higher_is_better=True)
        expected = loop.model.measure(FIRST, lambda: right().float(), higher_is_better=True)
        assert (found.gain, found.loss_with, found.loss_without) == (
            expected.gain,
            expected.loss_with,
            expected.loss_without,
        )
        as_losses = pytest.warns(MisuseWarning, match="True is bad") if dtype is torch.bool else nullcontext()
        with as_losses:
            assert loop.model.attribute([FIRST], right).joint.gain == pytest.approx(-found.gain)
    with pytest.raises(TypeError, match="real numbers or booleans"):
        loop.model.measure(FIRST, lambda: loop.model(X)[:, 0].to(torch.complex64))


def test_booleans_are_told_once_and_where_the_program_called():
    loop = Loop(evaluator=lambda model: model(X).argmax(1) == Y)
    (said,) = loop.epochs(8)
    assert "True is bad" in said
    assert loop.model.verdict().cause is GrowthCause.DOUBTFUL_EVALUATOR


def test_some_losses_that_are_nan_are_no_broken_evaluator():
    def one_nan(model):
        losses = F.cross_entropy(model(X), Y, reduction="none")
        return torch.where(torch.arange(len(losses)) == 0, torch.nan, losses)

    assert Loop(evaluator=one_nan).epochs(8) == []


def test_a_host_that_has_diverged_is_no_broken_evaluator():
    loop = Loop()
    loop.epochs(1)
    with torch.no_grad():
        loop.model.host[0].weight.fill_(torch.nan)
    assert loop.epochs(8) == []


@pytest.mark.parametrize("wrong", [3, "loss", torch.ones(4)])
def test_an_evaluator_that_cannot_be_called_is_refused_at_once(wrong):
    loop = Loop()
    loop.epochs(2)
    before = loop.model.growth.evaluator
    for give in (
        loop.model.evaluate_with,
        lambda e: loop.model.measure(FIRST, e),
        lambda e: MorphogeneticModel(make_host(), [FIRST], example=X, evaluator=e),
    ):
        with pytest.raises(TypeError, match="is a function"):
            give(wrong)
    assert loop.model.growth.evaluator is before


@pytest.mark.parametrize("wrong", [None, 0.5, [0.5, 0.5]])
def test_measuring_with_an_evaluator_that_returns_no_tensor_says_what_it_returned(wrong):
    loop = Loop()
    loop.epochs(2)
    with pytest.raises(TypeError, match=f"returned: {type(wrong).__name__}"):
        loop.model.measure(FIRST, lambda: wrong)


def test_a_missing_evaluator_is_told_when_a_gate_first_waits_for_it():
    loop = Loop(evaluator=None)
    assert loop.epochs(2) == []
    (said,) = loop.epochs(8)
    assert f"slot '{FIRST}': " in said
    assert "model.evaluate_with(evaluator)" in said


def test_a_missing_evaluator_is_told_to_nobody_who_does_not_need_one():
    assert Loop(evaluator=None, gates=QualityGates(GateProfile.REPORT)).epochs(8) == []
    assert Loop("optimizer", evaluator=None).epochs(8) == []


def test_a_forgotten_step_is_told_after_the_first_whole_epoch():
    loop = Loop("step", make=SGD)
    assert loop.epochs(1) == []
    (said,) = loop.epochs(6)
    assert "model.step() was never called" in said
    assert f"slot '{FIRST}'" in said


def test_a_step_behind_zero_grad_is_told():
    (said,) = Loop("early zero_grad").epochs(6)
    assert "saw no gradients" in said
    assert f"slot '{FIRST}'" in said


def test_the_verdict_says_what_was_forgotten():
    loop = Loop("incubate", incubation="counterfactual")
    assert "warned" not in str(loop.model.verdict())
    loop.epochs(6)
    assert str(loop.model.verdict()).count("incubate() was never called") == 1


def test_a_forgotten_incubate_is_told():
    (said,) = Loop("incubate", incubation="counterfactual").epochs(2)
    assert "incubate() was never called" in said
    assert f"slot '{FIRST}'" in said
    assert Loop("incubate").epochs(6) == []


@pytest.mark.parametrize("lacks", ["step", "incubate"])
def test_nothing_is_told_of_epochs_in_which_nothing_was_trained(lacks):
    loop = Loop(lacks, incubation="counterfactual")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            loop.model.step_epoch(1.0)
            loop.model.load_state_dict(copy.deepcopy(loop.model.state_dict()))


def test_a_copy_of_a_model_is_told_anew():
    loop = Loop("step")
    assert len(loop.epochs(4)) == 1
    loop.model = copy.deepcopy(loop.model)
    loop.optimizer = tie_optimizer(loop.model, SGD(loop.model.host_parameters(), 0.1))
    assert len([said for said in loop.epochs(4) if "model.step()" in said]) == 1


CNN, OTHER = {Topology.CNN: ["scale"]}, {Topology.TRANSFORMER: ["per-token"]}


def tiny(blueprints, parameters=1):
    return BudgetPolicy(blueprints, parameters=parameters, costs=lambda slot, name: SeedCost(8), patience=1)


MISFITS = {
    "another topology": (lambda: PlateauPolicy(OTHER, patience=1), "names none"),
    "nothing": (lambda: TournamentPolicy({}, patience=1), "names none"),
    "a function of nothing": (lambda: PlateauPolicy(lambda slot: (), patience=1), "names none"),
    "too small a budget": (lambda: tiny(CNN), "1 parameters, the least that one takes is 8"),
}


def followed(policy, epochs=8):
    model = Loop().model
    model.cull(FIRST)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(epochs):
            model.step_epoch(1.0)
            model.follow(policy)
    return model, said


@pytest.mark.parametrize(("make", "reason"), MISFITS.values(), ids=MISFITS.keys())
def test_a_policy_whose_candidates_fit_no_slot_says_so_once(make, reason):
    policy = make()
    _, said = followed(policy)
    assert [w.category for w in said] == [MisuseWarning]
    assert reason in str(said[0].message)
    assert f"slot '{FIRST}': cnn, width 4" in str(said[0].message)


def loaded(model):
    """Another model that has what grew in this one, by a plain state_dict."""
    other = make_model(open_config())[0]
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    return other


def warned(model, policy):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model.step_epoch(1.0)
            model.follow(policy)
    return [str(w.message) for w in said if "remembers nothing" in str(w.message)]


def test_a_policy_that_starts_anew_in_a_loaded_model_is_told_once():
    model, policy = Loop().model, PlateauPolicy(CNN)
    model.step_epoch(1.0)
    model.follow(policy)
    (said,) = warned(loaded(model), PlateauPolicy(CNN))
    assert "PlateauPolicy remembers nothing" in said
    assert "save_checkpoint(policy=...)" in said


def test_a_policy_is_not_told_to_start_anew_where_nothing_is_lost(tmp_path):
    model, policy = Loop().model, PlateauPolicy(CNN)
    assert warned(model, policy) == []  # it was grown here
    again = PlateauPolicy(CNN)
    again.load_state_dict(policy.state_dict())
    assert warned(loaded(model), again) == []
    assert warned(loaded(make_model(open_config())[0]), PlateauPolicy(CNN)) == []  # nothing has grown
    assert warned(loaded(model), NoGrowthPolicy()) == []  # it has nothing to remember
    save_checkpoint(tmp_path / "run", model, policy=policy)
    for memory, number in ((PlateauPolicy(CNN), 0), (None, 1)):
        other = make_model(open_config())[0]
        load_checkpoint(tmp_path / "run", other, policy=memory)
        assert len(warned(other, memory or PlateauPolicy(CNN))) == number


def test_a_policy_that_has_spent_what_it_had_says_nothing():
    for policy in (
        PlateauPolicy(lambda slot: CNN[slot.topology] if slot.slot == FIRST else (), patience=1),
        PlateauPolicy({Topology.CNN: ["narrow"]}, patience=1),
        tiny(CNN, parameters=8),
    ):
        _, said = followed(policy)
        assert said == []


def test_attribution_takes_the_name_of_one_slot():
    model = Loop().model
    model.advance_stage(FIRST)
    assert [seed.slot for seed in model.attribute(FIRST).seeds] == [FIRST]


@pytest.mark.parametrize(("largest", "of_seeds"), [(-1.0, None), (1.0, -0.5), (float("nan"), 1.0)])
def test_a_norm_that_nothing_can_have_is_refused_before_anything_is_clipped(largest, of_seeds):
    loop = Loop()
    loop.loss().backward()
    before = [p.grad.clone() for p in loop.model.host_parameters()]
    with pytest.raises(ValueError, match=f"max_norm: +{largest!r}\n +seed_max_norm: {of_seeds!r}"):
        clip_gradients(loop.model, largest, of_seeds)
    assert all(map(torch.equal, before, [p.grad for p in loop.model.host_parameters()]))


class SaysNothing:
    def decide(self, observation):
        return None


class SaysOne:
    def decide(self, observation):
        return Continue()


WRONG = {
    "swapped": (lambda m: tie_optimizer(SGD(m.parameters(), 0.1), m), TypeError, "model comes first"),
    "no optimiser": (lambda m: tie_optimizer(m, 0.1), TypeError, "not 0.1"),
    "tied to a host": (
        lambda m: tie_optimizer(m.host, SGD(m.parameters(), 0.1)),
        TypeError,
        "not a Sequential",
    ),
    "another's optimiser": (
        lambda m: tie_optimizer(m, SGD(make_host().parameters(), 0.1)),
        ValueError,
        "parameters it holds: 8\n",
    ),
    "slot 3": (lambda m: m.germinate(3, "scale"), TypeError, f"not 3. Slots: {FIRST}"),
    "no blueprint": (lambda m: m.germinate(FIRST, None), TypeError, "not None"),
    "slots=1": (lambda m: MorphogeneticModel(make_host(), 1, example=X), TypeError, "not 1"),
    "slots=[1]": (lambda m: MorphogeneticModel(make_host(), [1], example=X), TypeError, "not 1"),
    "a class": (lambda m: MorphogeneticModel(torch.nn.Linear), TypeError, r"Linear\(...\)"),
    "no policy": (lambda m: m.follow(None), TypeError, "not None"),
    "a policy's class": (lambda m: m.follow(PlateauPolicy), TypeError, r"PlateauPolicy\(...\)"),
    "no list": (lambda m: m.follow(SaysNothing()), TypeError, "SaysNothing.decide .* not None"),
    "one command": (lambda m: m.follow(SaysOne()), TypeError, r"SaysOne.decide .* not Continue\(\)"),
    "three metrics": (lambda m: m.step_epoch(torch.ones(3)), ValueError, r"shape \(3,\)"),
    "a list of metrics": (lambda m: m.step_epoch([0.5]), TypeError, r"not \[0.5\]"),
    "a word for a metric": (lambda m: m.step_epoch("good"), TypeError, "not 'good'"),
    "text for a metric": (lambda m: m.step_epoch("0.5"), TypeError, "not '0.5'"),
    "a loss for a closure": (lambda m: m.incubate(torch.ones(())), TypeError, r"given: tensor\(1.\)"),
    "no step of a ramp": (lambda m: open_config(ramp_steps=-1), ValueError, "^ramp_steps .* not -1"),
    "half a step": (lambda m: open_config(ramp_steps=0.5), ValueError, "^ramp_steps .* not 0.5"),
    "text for steps": (lambda m: GrowthConfig.recommended("38"), ValueError, "^steps_per_epoch .* not '38'"),
    "less than no sample": (lambda m: GateThresholds(min_samples=-5), ValueError, "min_samples .* not -5"),
    "distribute": (lambda m: distribute(m.host), TypeError, "distribute takes a Morph.* not a Sequential"),
    "export": (lambda m: export_model(m.host), TypeError, "export_model takes a Morph.* not a Sequential"),
}


@pytest.mark.parametrize(("call", "error", "reason"), WRONG.values(), ids=WRONG.keys())
def test_what_is_something_else_is_refused_with_what_was_given_and_changes_nothing(call, error, reason):
    model = make_model()[0]
    before = model.observe()
    with pytest.raises(error, match=reason):
        call(model)
    assert model.observe() == before
    model.germinate(FIRST, "scale")


def test_an_optimiser_that_waits_for_seeds_holds_nothing_and_is_tied():
    model = make_model()[0]
    optimizer = tie_optimizer(model, SGD([{"params": []}], 0.1))
    model.germinate(FIRST, "scale")
    assert len(optimizer.param_groups[-1]["params"]) == 2


class PartlyWithoutGradient(nn.Module):
    """A backbone that runs under ``no_grad`` or is detached, and a part that learns."""

    def __init__(self, cut):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.rest = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 3)
        self.cut = cut

    def forward(self, x):
        with torch.no_grad() if self.cut == "no_grad" else nullcontext():
            x = self.backbone(x)
        if self.cut == "detach":
            x = x.detach()
        x = self.rest(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("incubation", "learns"),
    [
        ("straight-through", "another seed"),
        ("straight-through", "the head"),
        ("straight-through", "nothing"),
        ("counterfactual", "another seed"),
        ("counterfactual", "the head"),
    ],
)
@pytest.mark.parametrize("cut", ["no_grad", "detach", ""])
@pytest.mark.parametrize("tied", [True, False])
def test_a_seed_that_no_gradient_reaches_is_told_after_its_first_epoch(incubation, cut, tied, learns):
    host = PartlyWithoutGradient("")
    if learns == "nothing":
        host.requires_grad_(False)
    config = open_config(incubation=incubation)
    slots = ["backbone.1", "rest.1"]
    model = MorphogeneticModel(host, slots, example=X, config=config, registry=make_registry())
    model.evaluate_with(lambda: F.cross_entropy(model(X), Y, reduction="none"))
    optimizer = SGD([*model.host_parameters(), nn.Parameter(torch.ones(1))], 0.01)
    if tied:
        tie_optimizer(model, optimizer)
    for slot in slots if learns == "another seed" else slots[:1]:
        model.germinate(slot, "scale")
        if not tied:
            optimizer.add_param_group({"params": model.seed_parameters(slot)})
    host.cut = cut  # what attaching could not see

    def loss():
        return F.cross_entropy(model(X), Y)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            model.step_epoch(1.0)
            for _ in range(2):
                optimizer.zero_grad()
                if (value := loss()).requires_grad:
                    value.backward()
                model.incubate(loss)
                model.step()
                optimizer.step()
    told = [str(w.message) for w in said]
    if not cut:
        assert told == []
        return
    (message,) = told
    assert "had no gradient in any step of a whole epoch" in message
    assert "slot 'backbone_1'" in message
    assert "rest_1" not in message


def test_a_seed_that_learns_every_few_calls_of_incubate_is_not_told_to_learn_nothing():
    assert Loop(incubation="counterfactual", incubate_every=5).epochs(8) == []


ROWS = len(X)


ORDER = random.Random(0)


def shuffled(model):
    chosen = ORDER.sample(range(ROWS), ROWS)
    return F.cross_entropy(model(X[chosen]), Y[chosen], reduction="none")


def test_an_evaluator_that_shuffles_is_told_and_the_verdict_says_so():
    loop = Loop(evaluator=shuffled)
    (said,) = loop.epochs(8)
    assert "other samples in one pass" in said
    assert f"slot '{FIRST}'" in said
    assert loop.model.verdict().cause is GrowthCause.DOUBTFUL_EVALUATOR
    loop.model.evaluate_with(lambda: F.cross_entropy(loop.model(X), Y, reduction="none"))
    assert loop.epochs(2) == []
    assert not loop.model.replay_faults
    assert loop.model.verdict().cause is not GrowthCause.DOUBTFUL_EVALUATOR


def test_losses_of_parts_of_samples_are_told_and_the_verdict_says_so():
    loop = Loop(evaluator=lambda model: F.cross_entropy(model(X), Y, reduction="none").repeat_interleave(9))
    (said,) = loop.epochs(8)
    assert "more losses than the host was given samples" in said
    assert f"losses: {9 * len(X)}" in said
    assert loop.model.verdict().cause is GrowthCause.DOUBTFUL_EVALUATOR


def test_samples_with_missing_values_are_the_same_samples():
    def missing(model):
        x = torch.where(torch.arange(X.shape[-1]) == 0, torch.nan, X)
        return F.cross_entropy(model(x), Y, reduction="none").nan_to_num(1.0)

    loop = Loop(evaluator=missing)
    loop.epochs(8)
    assert not loop.model.replay_faults


TURNED_ROUND = {
    "negative": (lambda losses: -losses, False),
    "likelihood": (lambda losses: losses.neg().exp(), False),
    "loss called a score": (lambda losses: losses, True),
}


@pytest.mark.parametrize(("turned", "higher_is_better"), TURNED_ROUND.values(), ids=TURNED_ROUND.keys())
def test_an_evaluator_that_goes_the_other_way_than_the_metric_is_told_once(turned, higher_is_better):
    loop = Loop(evaluator=None, make=lambda parameters, lr: AdamW(parameters, 0.02))
    model = loop.model
    model.evaluate_with(
        lambda: turned(F.cross_entropy(model(X), Y, reduction="none")), higher_is_better=higher_is_better
    )
    (said,) = loop.epochs(16)
    assert f"higher_is_better={not higher_is_better}" in said
    assert ("0 or less" in said) == (turned(torch.ones(1)).item() < 0)
    assert model.verdict().cause is GrowthCause.DOUBTFUL_EVALUATOR
    assert "take them. (evaluator: " in str(model.verdict())


def test_a_loss_that_may_be_negative_and_a_share_of_errors_are_told_nothing():
    for right in (
        lambda model: F.cross_entropy(model(X), Y, reduction="none") - 10.0,
        lambda model: (model(X).argmax(1) != Y).float(),
    ):
        loop = Loop(evaluator=right, make=lambda parameters, lr: AdamW(parameters, 0.02))
        assert loop.epochs(12) == []


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(make_host()[0].out_channels), nn.Dropout(0.5), nn.Identity()]
)
def test_training_in_eval_mode_is_told_where_it_makes_a_difference(layer):
    host = nn.Sequential(make_host()[0], copy.deepcopy(layer), *make_host()[2:])
    model = MorphogeneticModel(host, ["0"], example=X, registry=make_registry())
    optimizer = SGD(model.parameters(), 0.1)

    def epoch(modes):
        for train in modes:
            model.train(train)
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            model.step()
            optimizer.step()
        model.eval()
        model.step_epoch(1.0)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        epoch([True, True])
        epoch([False, True])
        assert said == []
        for _ in range(2):
            epoch([False, False])
    assert ["eval mode" in str(one.message) for one in said] == [True] * (not isinstance(layer, nn.Identity))


def test_what_a_checkpoint_holds_and_nobody_loaded_is_told_at_the_next_step(tmp_path):
    loop = Loop()
    schedule = torch.optim.lr_scheduler.StepLR(loop.optimizer, 3)
    loop.epochs(2)
    save_checkpoint(tmp_path / "point", loop.model, optimizer=loop.optimizer, schedulers=schedule)
    for given, missing in (
        ({}, "optimizer=..., schedulers=..."),
        ({"optimizer": True}, "model, schedulers=..."),
        ({"optimizer": True, "schedulers": True}, None),
    ):
        again = Loop()
        here = {
            "optimizer": again.optimizer,
            "schedulers": torch.optim.lr_scheduler.StepLR(again.optimizer, 3),
        }
        load_checkpoint(tmp_path / "point", again.model, **{name: here[name] for name in given})
        said = again.epochs(2)
        assert [missing in one for one in said] == ([True] if missing else [])
