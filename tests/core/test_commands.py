"""The commands of a slot and a model: what they do, and that a refused one changes nothing."""

from __future__ import annotations

import enum
import io
import math
import pickle
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from state_helpers import (
    COOLDOWN,
    EVERY_STAGE,
    FIRST,
    SECOND,
    WAY,
    Scale,
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

from kasmina_core import (
    BlueprintSpec,
    GateCheckSpec,
    GateLevel,
    GateProfile,
    GerminationError,
    GrowthConfig,
    Incubation,
    QualityGates,
    RampUnit,
    SeedShapeError,
    SeedSlot,
    SeedStage,
    Topology,
    TransitionError,
    UnknownNameError,
    is_failure_stage,
    tie_optimizer,
)
from kasmina_core.hosts import InjectionPoint
from kasmina_core.slots.forward import ForwardMode

S = SeedStage
LIVING = WAY[:-1]


def grown(stage: SeedStage, blueprint: str = "scale", **config):
    model, recorder = make_model(open_config(**config))
    optimizer = tie_optimizer(model, torch.optim.Adam(model.host_parameters(), 1e-2))
    bring_to(model, stage, blueprint=blueprint)
    return model, model.slots[FIRST], optimizer, recorder


def pass_epochs(model, goes_on):
    """Let epochs pass while ``goes_on()``, and give the results of each; fails where that takes too long."""
    for _ in range(30):
        if not goes_on():
            return
        yield model.step_epoch(1.0)
    raise AssertionError(f"still {model.slots}")


# -- germinate -------------------------------------------------------------------------------------------------------


def test_germination_returns_the_state_of_the_new_seed():
    model, slot, *_ = grown(S.DORMANT)
    assert slot.stage is S.DORMANT
    assert slot.alpha == 0.0
    assert not slot.is_active
    assert model.seed_parameters() == []
    state = model.germinate(FIRST, "scale", gain=0.5)
    assert state is slot.state
    assert state.stage is S.GERMINATED
    assert (state.seed_id, state.blueprint_id, state.slot) == ("2-1", "mine:scale", "2")
    assert [p.numel() for p in model.seed_parameters()] == [4, 4]
    assert not slot.is_active
    assert slot.active_seed_params == 0
    model.step_epoch()
    assert slot.is_active
    assert slot.active_seed_params == 8
    assert slot.options == {"gain": 0.5}


def test_a_seed_may_be_named():
    model, *_ = grown(S.DORMANT)
    assert model.germinate(FIRST, "mine:scale", "my seed").seed_id == "my seed"
    assert "mine:scale" in model.summary_table()


REFUSALS = {
    "narrow": ("shape", r"host: \(2, 4, 5, 5\), seed: \(2, 1, 5, 5\)"),
    "poison": ("finite output", "finite output failed$"),
    "unbuildable": ("builds", r"its factory raised ZeroDivisionError\('no such luck'\)"),
    "picky": ("width", "4 is not a multiple of 8"),
    "per-token": ("topology", "blueprint: transformer, slot: cnn; for cnn there are mine:narrow, "),
}


@pytest.mark.parametrize("blueprint", REFUSALS)
def test_a_blueprint_that_does_not_fit_is_refused_with_the_reason(blueprint):
    model, _, optimizer, recorder = grown(S.DORMANT)
    before = picture(model, optimizer)
    name, says = REFUSALS[blueprint]
    with pytest.raises(GerminationError, match=says) as caught:
        model.germinate(FIRST, blueprint)
    assert f"'mine:{blueprint}' cannot germinate in slot '2' (cnn, width 4)" in str(caught.value)
    assert caught.value.result.gate is GateLevel.G0
    assert name in [c.name for c in caught.value.result.failed_checks]
    assert same_picture(before, picture(model, optimizer))
    assert recorder.events == []


def not_a_module(dim):
    return "a seed"


def no_tensor(dim):
    class Pair(Scale):
        def forward(self, x):
            return x, x

    return Pair(dim)


def forward_raises(dim):
    class Broken(Scale):
        def forward(self, x):
            raise IndexError("too far")

    return Broken(dim)


def writes_to_its_input(dim):
    class Writes(Scale):
        def forward(self, x):
            return super().forward(x.mul_(2.0))

    return Writes(dim)


def counts_in_whole_numbers(dim):
    class Whole(Scale):
        def forward(self, x):
            return super().forward(x).long()

    return Whole(dim)


def asks_for_width(dim):
    raise LookupError("no table")


@pytest.mark.parametrize(
    ("factory", "accepts_width", "name", "says"),
    [
        (not_a_module, None, "builds", "its factory returned str, not a torch.nn.Module"),
        (no_tensor, None, "shape", "its forward returned tuple, not a tensor"),
        (forward_raises, None, "shape", r"its forward raised IndexError\('too far'\)"),
        (writes_to_its_input, None, "input unchanged", "the host"),
        (counts_in_whole_numbers, None, "dtype", "host: torch.float32, seed: torch.int64"),
        (Scale, asks_for_width, "width", r"accepts_width raised LookupError\('no table'\)"),
    ],
)
def test_a_faulty_seed_is_refused_before_anything_depends_on_it(factory, accepts_width, name, says):
    registry = make_registry()
    registry.register(
        BlueprintSpec("bad", Topology.CNN, factory, lambda dim: 0, accepts_width=accepts_width), pack="p"
    )
    model, _ = make_model(registry=registry)
    before = picture(model)
    with pytest.raises(GerminationError, match=says) as caught:
        model.germinate(FIRST, "bad")
    assert name in [c.name for c in caught.value.result.failed_checks]
    assert same_picture(before, picture(model))


def test_an_extra_check_can_refuse_a_germination():
    veto = GateCheckSpec("quota", (GateLevel.G0,), lambda c: 0.0, minimum=1.0)
    model, _ = make_model(open_config(gates=QualityGates(extra_checks=[veto])))
    before = picture(model)
    with pytest.raises(GerminationError, match="quota failed: 0"):
        model.germinate(FIRST, "scale")
    assert same_picture(before, picture(model))


@pytest.mark.parametrize("stage", [s for s in EVERY_STAGE if s is not S.DORMANT])
def test_a_slot_that_is_not_dormant_refuses_a_second_seed(stage):
    model, _, optimizer, _ = grown(stage)
    before = picture(model, optimizer)
    with pytest.raises(GerminationError, match=f"Slot '2' is not dormant but {stage.name}: it holds '2-1'"):
        model.germinate(FIRST, "scale")
    assert same_picture(before, picture(model, optimizer))


def test_unknown_slots_blueprints_and_options_are_refused_with_a_near_name():
    model, *_ = grown(S.DORMANT)
    before = picture(model)
    with pytest.raises(UnknownNameError, match="There is no slot 'x'"):
        model.germinate("x", "scale")
    with pytest.raises(UnknownNameError, match=r"No blueprint 'scala'.*Did you mean 'scale'"):
        model.germinate(FIRST, "scala")
    with pytest.raises(GerminationError, match=r"'mine:scale' has no option 'gian'. Did you mean 'gain'"):
        model.germinate(FIRST, "scale", gian=1.0)
    assert same_picture(before, picture(model))


class Size(float, enum.Enum):
    SMALL = 0.1


@pytest.mark.parametrize(
    "gain",
    [torch.ones(1), Size.SMALL, np.float64(0.1), {1: 2}, [object()], {"a": {"b": np.float64(1.0)}}],
    ids=["tensor", "enum", "numpy", "number-key", "object", "nested"],
)
def test_options_that_a_checkpoint_could_not_hold_are_refused(gain):
    model, *_ = grown(S.DORMANT)
    before = picture(model)
    with pytest.raises(GerminationError, match="Options of a seed must be plain data"):
        model.germinate(FIRST, "scale", gain=gain)
    assert same_picture(before, picture(model))


def test_options_are_not_shared_with_the_caller():
    registry = make_registry()
    registry.register(
        BlueprintSpec(
            "tuned", Topology.CNN, lambda dim, tune: Scale(dim), lambda dim: 2 * dim, options={"tune": []}
        ),
        pack="p",
    )
    model, _ = make_model(registry=registry)
    tune = [1, 2]
    model.germinate(FIRST, "tuned", tune=tune)
    tune.append(3)
    assert model.slots[FIRST].options == {"tune": [1, 2]}
    record = model.slots[FIRST].get_extra_state()
    record["options"]["tune"].append(4)
    assert model.slots[FIRST].options == {"tune": [1, 2]}


class Refuses:
    def __init__(self):
        self.heard = []

    def seed_added(self, slot, parameters):
        raise PermissionError(f"no room for {slot}")

    def seed_removed(self, slot, parameters):
        self.heard.append(slot)


def test_a_germination_that_a_listener_refuses_never_happened():
    model, _, optimizer, recorder = grown(S.DORMANT)
    refuses = Refuses()
    model.listen(refuses)
    before = picture(model, optimizer)
    with pytest.raises(PermissionError, match="no room for 2"):
        model.germinate(FIRST, "scale")
    assert same_picture(before, picture(model, optimizer))
    assert len(optimizer.param_groups) == 1
    assert refuses.heard == []
    assert recorder.events == []


def test_a_slot_checks_the_features_it_is_told_of():
    point = InjectionPoint("a", "a", 4, Topology.CNN)
    with pytest.raises(SeedShapeError, match=r"\(1, 4, 1, 1\)\n.*\(1, 3, 5, 5\)"):
        SeedSlot(point, (1, 3, 5, 5))
    with pytest.raises(SeedShapeError):
        SeedSlot(point, (1, 4, 5))


def test_a_slot_without_a_model_works_alone():
    slot = SeedSlot(InjectionPoint("a", "a", 4, Topology.CNN), (1, 4, 5, 5), open_config(), make_registry())
    x = torch.randn(2, 4, 5, 5)
    assert slot(x) is x
    slot.germinate("scale")
    assert slot(x) is x
    assert slot.advance_stage().passed
    assert torch.equal(slot(x), x)
    assert slot.measure() is None
    assert slot.check_isolation() is None
    assert not slot.step_epoch()
    slot.cull("enough")
    assert slot(x) is x
    with pytest.raises(TransitionError, match="Slot 'a' holds no seed"):
        slot.isolated_forward(x)


# -- the weights of a seed -------------------------------------------------------------------------------------------


def seed_weights(model, slot=FIRST):
    return torch.cat([p.detach().flatten() for p in model.seed_parameters(slot)])


def test_seed_weights_come_from_the_configured_seed_the_slot_and_the_count():
    def germinated(slot=FIRST, seed=0, noise=0):
        torch.manual_seed(noise)
        model, _ = make_model(open_config(seed=seed))
        model.germinate(slot, "scale")
        return seed_weights(model, slot)

    reference = germinated()
    assert torch.equal(reference, germinated(noise=99))
    assert not torch.equal(reference, germinated(seed=1))
    assert not torch.equal(reference, germinated(slot=SECOND))


def test_a_second_seed_in_a_slot_has_other_weights_also_after_a_load():
    model, _, _, _ = grown(S.TRAINING)
    first = seed_weights(model)
    model.cull(FIRST, "no use")
    for _ in pass_epochs(model, lambda: model.slots[FIRST].stage is not S.DORMANT):
        pass
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh, _ = make_model()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for grows in (model, fresh):
        assert grows.germinate(FIRST, "scale").seed_id == "2-2"
    assert torch.equal(seed_weights(model), seed_weights(fresh))
    assert not torch.equal(first, seed_weights(model))


GERMINATE_AND_PRINT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.manual_seed(int(sys.argv[2]))
from state_helpers import FIRST, make_model
model, _ = make_model()
model.germinate(FIRST, "scale")
print([p.flatten().tolist() for p in model.seed_parameters()])
"""


def test_another_process_draws_the_same_seed(request):
    folder = str(request.path.parent)
    command = [sys.executable, "-c", GERMINATE_AND_PRINT, folder, "1"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    model, _ = make_model()
    model.germinate(FIRST, "scale")
    assert printed == f"{[p.flatten().tolist() for p in model.seed_parameters()]}\n"


@pytest.mark.parametrize("incubation", Incubation)
def test_no_command_draws_from_the_global_random_numbers(incubation):
    model, _ = make_model(open_config(incubation=incubation, isolation_every=1))
    x, y = make_batch()
    states = [(torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())]

    def unchanged():
        now = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        return torch.equal(now[0], states[0][0]) and now[1:] == states[0][1:]

    for _ in range(12):
        for slot in (FIRST, SECOND):
            if model.slots[slot].state is None:
                model.germinate(slot, "normed")
            model.measure(slot)
        F.cross_entropy(model(x), y).backward()
        model.incubate(lambda: F.cross_entropy(model(x), y))
        model.step()
        model.step_epoch(1.0)
        model.advance_stage(FIRST) if model.slots[FIRST].stage is S.PROBATIONARY else None
        assert unchanged()
    assert model.slots[FIRST].stage is S.FOSSILIZED
    model.cull(SECOND, "end")
    assert unchanged()


# -- advance_stage and step_epoch ------------------------------------------------------------------------------------


def test_a_seed_walks_its_whole_life_by_ticks_and_a_decision():
    model, slot, _, _ = grown(S.DORMANT)
    model.germinate(FIRST, "scale")
    stages = []
    for _ in range(14):
        model.step_epoch(1.0)
        stages.append(slot.stage.name)
    assert stages == (["TRAINING"] * 2 + ["BLENDING"] * 4 + ["SHADOWING"] + ["PROBATIONARY"] * 7)
    assert model.advance_stage(FIRST).passed
    assert slot.stage is S.FOSSILIZED
    assert [s.name for s, _ in slot.state.stage_history] == [s.name for s in WAY]


def test_the_stage_that_asked_for_evidence_gets_its_dwell():
    model, slot, *_ = grown(S.TRAINING)
    seen = []
    for results in pass_epochs(model, lambda: slot.stage is S.TRAINING):
        seen.append((results[FIRST].gate.name, results[FIRST].passed))
    assert seen == [("G2", False), ("G2", True)]


@pytest.mark.parametrize("stage", [S.GERMINATED, S.TRAINING, S.BLENDING, S.SHADOWING])
def test_advance_and_step_epoch_ask_the_same_gate_and_agree(stage):
    model, slot, _, recorder = grown(stage)
    for _ in range(5):
        tick = model.step_epoch(1.0)[FIRST]
        if slot.stage is not stage:
            break
        assert not tick
        assert model.advance_stage(FIRST) is tick
    assert tick.passed
    asked = [e for e in recorder.events if e.type.value == "gate_evaluated" and e.gate == tick.gate.name]
    assert [e.passed for e in asked] == [False] * (len(asked) - 1) + [True]


def test_what_a_tick_would_do_can_be_done_by_hand():
    by_tick, slot, *_ = grown(S.BLENDING)
    by_hand, twin, *_ = grown(S.BLENDING)
    slot.set_alpha(1.0)
    twin.set_alpha(1.0)
    tick, hand = by_tick.step_epoch(1.0)[FIRST], by_hand.advance_stage(FIRST)
    assert tick.checks == hand.checks
    assert slot.stage is twin.stage is S.SHADOWING


def test_step_epoch_never_fossilises_and_never_culls():
    model, slot, *_ = grown(S.PROBATIONARY)
    for _ in range(30):
        result = model.step_epoch(1.0)[FIRST]
        assert slot.stage is S.PROBATIONARY
        assert result.gate is GateLevel.G5
    assert result.passed
    closed, _ = make_model(open_config(gates=QualityGates(thresholds=open_thresholds(min_gain=1e9))))
    closed.germinate(FIRST, "scale")
    for _ in range(30):
        closed.step_epoch(1.0)
    assert closed.slots[FIRST].stage is S.TRAINING


@pytest.mark.parametrize("stage", EVERY_STAGE)
@pytest.mark.parametrize("target", [*SeedStage, "BLENDING", 99])
def test_only_valid_targets_are_taken(stage, target):
    model, slot, optimizer, _ = grown(stage)
    before = picture(model, optimizer)
    legal = slot.state is not None and slot.state.can_move_to(target)
    if not legal:
        with pytest.raises(TransitionError):
            model.advance_stage(FIRST, target)
        assert same_picture(before, picture(model, optimizer))
        assert slot.stage is stage
        return
    result = model.advance_stage(FIRST, target)
    assert slot.stage is (target if result.passed else stage)


def test_a_refusal_says_where_the_seed_may_go():
    model, *_ = grown(S.TRAINING)
    with pytest.raises(
        TransitionError, match=r"from TRAINING to SHADOWING.\n  allowed from TRAINING: BLENDING, CULLED"
    ):
        model.advance_stage(FIRST, S.SHADOWING)
    with pytest.raises(TransitionError, match="to 'BLENDING'"):
        model.advance_stage(FIRST, "BLENDING")  # type: ignore[arg-type]
    with pytest.raises(TransitionError, match="Slot '4' is dormant: there is no seed to advance"):
        model.advance_stage(SECOND)
    fossil, *_ = grown(S.FOSSILIZED)
    with pytest.raises(TransitionError, match="from FOSSILIZED to anywhere"):
        fossil.advance_stage(FIRST)


def test_a_number_stands_for_its_stage():
    model, slot, *_ = grown(S.TRAINING)
    assert model.advance_stage(FIRST, 8).passed  # type: ignore[arg-type]
    assert slot.stage is S.CULLED
    assert slot.seed is None


def test_an_unknown_gate_fails_and_moves_nothing():
    model, slot, *_ = grown(S.TRAINING)
    before = picture(model)
    result = slot.check_gate(17)
    assert not result
    assert "17 is none of G0" in result.reason
    assert same_picture(before, picture(model))


def test_a_gate_that_did_not_pass_moves_nothing():
    model, *_ = grown(S.TRAINING)
    before = picture(model)
    result = model.advance_stage(FIRST)
    assert not result.passed
    assert result.reason == "epochs in training: 0 so far (needs >= 2)"
    after = picture(model)
    assert after.pop("gates")[FIRST] is result
    del before["gates"]
    for record in (before, after):  # what was measured is known now
        del record["records"][FIRST]["isolation_is_fresh"], record["records"][FIRST]["gates"]
    assert same_picture(before, after)


# -- cull and cooldown -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", LIVING)
@pytest.mark.parametrize("paused", [False, True])
def test_a_cull_removes_the_seed_at_once_and_keeps_why(stage, paused):
    model, slot, optimizer, recorder = grown(stage)
    if paused:
        slot.pause()
    model.cull(FIRST, "too slow")
    assert slot.stage is S.CULLED
    assert slot.seed is None
    assert slot.state.cull_reason == "too slow"
    assert not slot.state.is_paused
    assert slot.alpha == slot.alpha_buffer.item() == 0.0
    assert slot.schedule is None
    assert slot.options == {}
    assert slot.last_evidence is None
    assert slot.mode == ForwardMode.PASS
    assert len(optimizer.param_groups) == 1
    assert recorder.events[-1].type.value == "seed_culled"
    assert (recorder.events[-1].reason, recorder.events[-1].stage) == ("too slow", stage.name)
    x, _ = make_batch()
    bare = make_host()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("kasmina_slots")})
    assert torch.equal(model(x), bare(x))


@pytest.mark.parametrize("embargo", [0, 1, 3])
def test_the_cooldown_takes_its_ticks(embargo):
    model, slot, *_ = grown(S.TRAINING, embargo_epochs=embargo)
    model.cull(FIRST, "no use")
    stages = []
    for _ in pass_epochs(model, lambda: slot.stage is not S.DORMANT):
        stages.append(slot.stage.name)
        assert slot.seed is None
    assert stages == ["EMBARGOED"] * max(1, embargo) + ["RESETTING", "DORMANT"]
    assert slot.state is None
    model.germinate(FIRST, "scale")


def test_a_cooldown_cannot_be_cut_short():
    model, slot, *_ = grown(S.EMBARGOED, embargo_epochs=3)
    result = model.advance_stage(FIRST)
    assert not result
    assert result.gate is None
    assert result.reason == "epochs of cooldown: 0 so far (needs >= 3)"
    assert slot.stage is S.EMBARGOED


@pytest.mark.parametrize("stage", [S.FOSSILIZED, *COOLDOWN])
def test_fossils_and_culled_seeds_cannot_be_culled(stage):
    model, _, optimizer, _ = grown(stage)
    before = picture(model, optimizer)
    with pytest.raises(TransitionError, match=f"Seed '2-1' in slot '2' cannot be culled: it is {stage.name}"):
        model.cull(FIRST)
    assert same_picture(before, picture(model, optimizer))


def test_a_fossil_stays_for_ever():
    model, slot, optimizer, _ = grown(S.FOSSILIZED)
    for command in (lambda: model.cull(FIRST), slot.pause, slot.resume, lambda: slot.set_alpha(0.5)):
        with pytest.raises(TransitionError):
            command()
    for _ in range(20):
        train_once(model, optimizer)
        assert model.step_epoch(1.0) == {}
    assert slot.stage is S.FOSSILIZED
    assert slot.alpha == 1.0
    assert slot.state.metrics.epochs_in_current_stage == 20


# -- alpha -----------------------------------------------------------------------------------------------------------


def test_the_ramp_rises_from_zero_to_one_by_epochs():
    model, slot, *_ = grown(S.BLENDING)
    alphas = [slot.alpha]
    for _ in pass_epochs(model, lambda: slot.stage is S.BLENDING):
        alphas.append(slot.alpha)
    sigmoid = [1 / (1 + math.exp(-(k - 2) / (4 / 12))) for k in range(5)]
    expected = [(s - sigmoid[0]) / (sigmoid[4] - sigmoid[0]) for s in sigmoid]
    assert alphas == pytest.approx(expected)
    assert (alphas[0], alphas[-1]) == (0.0, 1.0)
    assert slot.alpha_buffer.item() == 1.0


def test_the_ramp_may_go_by_optimiser_steps():
    model, slot, optimizer, _ = grown(S.BLENDING, ramp_unit=RampUnit.STEP)
    alphas = [slot.alpha]
    for _ in range(6):
        train_once(model, optimizer)
        alphas.append(slot.alpha)
    assert alphas == sorted(alphas)
    assert alphas[4:] == [1.0, 1.0, 1.0]
    assert slot.stage is S.BLENDING
    model.step_epoch(1.0)
    assert slot.stage is S.SHADOWING


def test_a_seed_that_g3_lets_through_early_comes_in_whole():
    thresholds = open_thresholds(
        min_training_improvement=-1e9, min_blending_epochs=1, min_total_improvement=-1e9
    )
    model, slot, *_ = grown(S.BLENDING, gates=QualityGates(GateProfile.REPORT, thresholds))
    model.step_epoch(1.0)
    slot.set_alpha(0.96)
    assert model.advance_stage(FIRST)
    assert slot.stage is S.SHADOWING
    assert slot.alpha == slot.alpha_buffer.item() == 1.0


@pytest.mark.parametrize("by_hand", [0.0, 1e-6, 0.3, 0.5, 0.999999, 1.0])
def test_the_ramp_goes_on_from_an_alpha_set_by_hand(by_hand):
    model, slot, *_ = grown(S.BLENDING)
    model.step_epoch(1.0)
    slot.set_alpha(by_hand)
    assert slot.alpha == by_hand
    assert slot.alpha_buffer.item() == pytest.approx(by_hand)
    alphas = [by_hand]
    for _ in pass_epochs(model, lambda: slot.stage is S.BLENDING):
        alphas.append(slot.alpha)
    assert alphas[-1] == 1.0
    assert len(alphas) <= 5
    assert all(a < b for a, b in pairwise(alphas)) or by_hand == 1.0


def test_at_alpha_zero_a_blending_seed_goes_on_as_in_training():
    model, slot, *_ = grown(S.BLENDING)
    assert slot.mode == ForwardMode.STRAIGHT_THROUGH
    model.step_epoch(1.0)
    assert slot.mode == ForwardMode.BLEND_DETACHED
    with torch.no_grad():
        slot.seed.weight.fill_(math.inf)
    slot.set_alpha(0.0)
    assert slot.mode == ForwardMode.STRAIGHT_THROUGH
    assert model(make_batch()[0]).isfinite().all()
    model.eval()
    assert slot.mode == ForwardMode.PASS
    assert model(make_batch()[0]).isfinite().all()


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf, "half", None])
def test_an_alpha_out_of_range_is_refused(alpha):
    model, slot, *_ = grown(S.BLENDING)
    model.step_epoch(1.0)
    before = picture(model)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], not"):
        slot.set_alpha(alpha)
    assert same_picture(before, picture(model))


@pytest.mark.parametrize("stage", [s for s in EVERY_STAGE if s not in (S.BLENDING, S.DORMANT)])
def test_alpha_can_be_set_in_blending_only(stage):
    model, slot, *_ = grown(stage)
    before = picture(model)
    with pytest.raises(
        TransitionError, match=f"cannot be set in {stage.name}, only in BLENDING; it is {slot.alpha:g}"
    ):
        slot.set_alpha(0.5)
    assert same_picture(before, picture(model))


def test_a_new_alpha_is_judged_anew_within_the_epoch():
    model, slot, *_ = grown(S.BLENDING)
    assert not model.advance_stage(FIRST)
    slot.set_alpha(1.0)
    assert model.advance_stage(FIRST)
    assert slot.stage is S.SHADOWING


# -- pause and resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("incubation", Incubation)
@pytest.mark.parametrize("stage", LIVING)
def test_a_paused_seed_stands_still(stage, incubation):
    model, slot, optimizer, _ = grown(stage, incubation=incubation)
    train_once(model, optimizer)
    frozen = slot.seed.weight
    if stage is S.BLENDING:
        slot.set_alpha(0.3)
    slot.pause()
    weights = {k: v.clone() for k, v in slot.seed.state_dict().items()}
    host = [p.clone() for p in model.host_parameters()]
    kept = (
        slot.stage,
        slot.alpha,
        slot.state.metrics.epochs_total,
        slot.state.metrics.epochs_in_current_stage,
    )
    for _ in range(6):
        train_once(model, optimizer)
        assert model.step_epoch(1.0) == {}
    assert all(torch.equal(v, weights[k]) for k, v in slot.seed.state_dict().items())
    assert kept == (
        slot.stage,
        slot.alpha,
        slot.state.metrics.epochs_total,
        slot.state.metrics.epochs_in_current_stage,
    )
    assert not any(torch.equal(a, b) for a, b in zip(host, model.host_parameters(), strict=True))
    assert not model.advance_stage(FIRST)
    assert model.advance_stage(FIRST).reason.endswith(
        f"the seed is paused; resume it, model.slots['{FIRST}'].resume(), or cull it, model.cull('{FIRST}')"
    )
    slot.resume()
    assert frozen is slot.seed.weight
    assert frozen.requires_grad
    if stage is not S.GERMINATED:
        train_once(model, optimizer)
        assert not torch.equal(frozen, weights["weight"])


def test_a_paused_seed_in_training_does_not_run():
    model, slot, optimizer, _ = grown(S.TRAINING, blueprint="normed")
    slot.pause()
    before = slot.seed.norm.running_mean.clone()
    train_once(model, optimizer)
    assert torch.equal(slot.seed.norm.running_mean, before)
    slot.resume()
    train_once(model, optimizer)
    assert not torch.equal(slot.seed.norm.running_mean, before)


def test_resume_restores_exactly_what_pause_froze():
    _, slot, *_ = grown(S.TRAINING)
    slot.seed.bias.requires_grad_(False)
    slot.pause()
    assert not slot.seed.weight.requires_grad
    slot.resume()
    assert slot.seed.weight.requires_grad
    assert not slot.seed.bias.requires_grad


def test_pausing_drops_the_gradient_that_an_optimiser_would_still_step():
    model, slot, optimizer, _ = grown(S.TRAINING)
    x, y = make_batch()
    F.cross_entropy(model(x), y).backward()
    before = slot.seed.weight.clone()
    slot.pause()
    assert slot.seed.weight.grad is None
    optimizer.step()
    assert torch.equal(slot.seed.weight, before)


@pytest.mark.parametrize("stage", [S.FOSSILIZED, *COOLDOWN])
def test_only_a_living_seed_can_be_paused(stage):
    model, slot, *_ = grown(stage)
    before = picture(model)
    with pytest.raises(TransitionError, match=f"cannot be paused: it is {stage.name}"):
        slot.pause()
    with pytest.raises(TransitionError, match="Seed '2-1' in slot '2' is not paused"):
        slot.resume()
    assert same_picture(before, picture(model))


def test_pausing_twice_is_refused():
    model, slot, *_ = grown(S.TRAINING)
    slot.pause()
    before = picture(model)
    with pytest.raises(TransitionError, match="cannot be paused: it is already paused"):
        slot.pause()
    assert same_picture(before, picture(model))


def test_a_paused_seed_still_records_the_metric():
    model, slot, *_ = grown(S.TRAINING)
    slot.pause()
    model.step_epoch(0.25)
    assert slot.state.metrics.current_metric == 0.25


def test_a_pause_forgets_what_the_gates_said():
    model, slot, *_ = grown(S.PROBATIONARY)
    for _ in range(2):
        model.step_epoch(1.0)
    assert slot.last_gate is not None
    slot.pause()
    assert slot.last_gate is None
    assert model.observe().slots[0].gate_passed is None


@pytest.mark.parametrize("command", ["cull", "pause", "resume", "set_alpha", "check_gate"])
def test_commands_for_a_seed_say_that_there_is_none(command):
    _, slot, *_ = grown(S.DORMANT)
    argument = {"cull": ["why"], "set_alpha": [0.5], "check_gate": [GateLevel.G2]}.get(command, [])
    with pytest.raises(TransitionError, match="Slot '2' is dormant: there is no seed to"):
        getattr(slot, command)(*argument)
    assert slot.step_epoch(1.0) is None
    assert slot.step() is None
    assert slot.telemetry() is None


# -- bypass ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_bypassed_is_the_model_without_that_seed(stage):
    model, *_ = grown(stage)
    model.eval()
    x, _ = make_batch()
    bare = make_host().eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("kasmina_slots")})
    before = picture(model)
    with model.bypassed(FIRST) as same:
        assert same is model
        assert torch.equal(model(x), bare(x))
    assert same_picture(before, picture(model))
    contributes = stage in (S.SHADOWING, S.PROBATIONARY, S.FOSSILIZED)
    assert torch.equal(model(x), bare(x)) == (not contributes)


def test_bypass_ends_also_when_its_block_raises():
    model, slot, *_ = grown(S.FOSSILIZED)
    with pytest.raises(RuntimeError, match="stop"), model.bypassed(FIRST):
        raise RuntimeError("stop")
    assert slot.mode == ForwardMode.SEED


def test_bypass_and_measurement_can_be_nested():
    model, slot, *_ = grown(S.SHADOWING)
    model.step_epoch(1.0)
    with model.bypassed(FIRST):
        assert model.measure(FIRST) is not None
        assert slot.mode == ForwardMode.PASS
        slot.pause()
        slot.resume()
        assert slot.mode == ForwardMode.PASS
    assert slot.mode == ForwardMode.SEED


def test_a_seed_culled_within_a_bypass_is_gone_after_it():
    model, slot, *_ = grown(S.SHADOWING)
    with model.bypassed(FIRST):
        model.cull(FIRST)
    assert slot.mode == ForwardMode.PASS
    model(make_batch()[0])


# -- gradients that were noted ---------------------------------------------------------------------------------------


def test_gradient_norms_of_an_epoch_are_averaged():
    model, slot, optimizer, _ = grown(S.TRAINING)
    norms = []
    for _ in range(3):
        x, y = make_batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        norms.append(torch.cat([p.grad.flatten() for p in slot.seed_parameters()]).norm().item())
        model.step()
        optimizer.step()
    assert slot.state.metrics.gradient_norm is None
    model.step_epoch(1.0)
    assert slot.state.metrics.gradient_norm == pytest.approx(sum(norms) / 3)
    assert slot.state.metrics.gradient_norm_max == pytest.approx(max(norms))
    record = slot.telemetry(5)
    assert record.gradient_norm == slot.state.metrics.gradient_norm
    assert (record.epoch, record.gradient_health, record.is_vanishing) == (5, 1.0, False)
    kept = slot.state.metrics.gradient_norm
    model.step_epoch(1.0)
    assert slot.state.metrics.gradient_norm == kept


@pytest.mark.parametrize(
    ("scale", "vanishing", "exploding"), [(0.0, True, False), (1e9, False, True), (math.nan, False, True)]
)
def test_an_unhealthy_gradient_shows(scale, vanishing, exploding):
    model, slot, *_ = grown(S.TRAINING)
    for parameter in slot.seed_parameters():
        parameter.grad = torch.full_like(parameter, scale)
    model.step()
    model.step_epoch(1.0)
    record = slot.telemetry()
    assert (record.is_vanishing, record.is_exploding, record.gradient_health) == (vanishing, exploding, 0.0)


# -- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_a_pickled_model_goes_on_like_the_original(stage):
    model, slot, *_ = grown(stage)
    if stage in (S.TRAINING, S.BLENDING):
        slot.pause()
    twin = pickle.loads(pickle.dumps(model))
    assert twin.slots[FIRST].stage is slot.stage
    assert same_picture(picture(model)["weights"], picture(twin)["weights"])
    for one in (model, twin):
        if one.slots[FIRST].state is not None and one.slots[FIRST].state.is_paused:
            one.slots[FIRST].resume()
        one.evaluate_with(None)
        for _ in range(3):
            one.step_epoch(1.0)
    assert same_picture(picture(model)["records"], picture(twin)["records"])
    assert is_failure_stage(slot.stage) == is_failure_stage(twin.slots[FIRST].stage)


# -- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_deviation": 0.0}, "max_deviation must be above 0, not 0.0"),
        ({"max_deviation": math.nan}, "max_deviation must be above 0, not nan"),
        ({"ramp_steps": 0}, "ramp_steps must be a whole number of at least 1, not 0"),
        ({"embargo_epochs": -1}, "embargo_epochs must not be negative, but is -1"),
        ({"isolation_every": -1}, "isolation_every must not be negative, but is -1"),
        ({"temperature": 0.0}, "temperature=0.0 makes the ramp of 5 steps a jump"),
        ({"gradient_policies": {"cnn": None}}, "gradient_policies must map topologies, .* not 'cnn'"),
        (
            {"incubation": "straight_through"},
            "incubation must be one of .*'counterfactual'.* not 'straight_through'. Did you mean 'straight-through'",
        ),
        ({"ramp_unit": 3}, "ramp_unit must be one of 'epoch', 'step', not 3."),
    ],
)
def test_a_configuration_out_of_range_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        GrowthConfig(**changes)


def test_a_configuration_takes_names():
    config = GrowthConfig(incubation="counterfactual", ramp_unit="step")  # type: ignore[arg-type]
    assert config.incubation is Incubation.COUNTERFACTUAL
    assert config.ramp_unit is RampUnit.STEP


def test_counterfactual_seeds_learn_in_their_own_pass_only():
    model, slot, *_ = grown(S.TRAINING, incubation=Incubation.COUNTERFACTUAL)
    x, y = make_batch()
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in slot.seed_parameters())
    host = [p.grad.clone() for p in model.host_parameters()]
    losses = model.incubate(lambda: F.cross_entropy(model(x), y))
    assert list(losses) == [FIRST]
    assert all(p.grad is not None for p in slot.seed_parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.host_parameters(), host, strict=True))
    slot.pause()
    assert model.incubate(lambda: F.cross_entropy(model(x), y)) == {}
