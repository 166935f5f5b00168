"""Every command in any order on a real model, against a small account of what is allowed.

`Expected` is written from the description of the lifecycle and shares no code with it.
"""

from __future__ import annotations

import copy
import io
import math
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from state_helpers import (
    FIRST,
    SECOND,
    make_batch,
    make_host,
    make_model,
    open_config,
    picture,
    same_picture,
    train_once,
)

from kasmina_core import (
    CheckpointError,
    GateResult,
    GerminationError,
    Incubation,
    RampUnit,
    SeedStage,
    StageChanged,
    TransitionError,
    UnknownNameError,
    tie_optimizer,
)
from kasmina_core.growth.plain_data import from_bytes

ONWARD = {
    "DORMANT": "GERMINATED",
    "GERMINATED": "TRAINING",
    "TRAINING": "BLENDING",
    "BLENDING": "SHADOWING",
    "SHADOWING": "PROBATIONARY",
    "PROBATIONARY": "FOSSILIZED",
    "CULLED": "EMBARGOED",
    "EMBARGOED": "RESETTING",
    "RESETTING": "DORMANT",
}
LIVING = ("GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY")
COOLING = ("CULLED", "EMBARGOED", "RESETTING")
GATES = {"GERMINATED": 1, "TRAINING": 2, "BLENDING": 3, "SHADOWING": 4, "PROBATIONARY": 5}
RAMP, EMBARGO, TRAINING_EPOCHS, PROBATION_EPOCHS = 4, 2, 2, 2


def ramp(step: int) -> float:
    """A logistic curve through 12 temperatures, stretched to run from 0 to 1 exactly."""
    curve = [1.0 / (1.0 + math.exp(-12.0 * (k / RAMP - 0.5))) for k in range(RAMP + 1)]
    return (curve[step] - curve[0]) / (curve[-1] - curve[0])


@dataclass
class Expected:
    """What one slot should be."""

    stage: str = "DORMANT"
    dwell: int = 0
    alpha: float = 0.0
    step: int = 0
    paused: bool = False
    germinations: int = 0
    said: dict[int, bool] = field(default_factory=dict)

    def allowed(self) -> list[str]:
        onward = [ONWARD[self.stage]] if self.stage in ONWARD and self.stage != "DORMANT" else []
        return onward + (["CULLED"] if self.stage in LIVING else [])

    def move(self, target: str) -> None:
        self.stage, self.dwell = target, 0
        self.said.clear()
        if target == "BLENDING":
            self.step = 0
        if target == "SHADOWING":
            self.alpha = 1.0
        if target in ("CULLED", "DORMANT"):
            self.alpha, self.paused = 0.0, False

    def gate(self, number: int) -> bool:
        """What a gate says now; within an epoch it says the same."""
        if number not in self.said:
            ready = {
                0: False,  # nothing was found out about a germination that is over
                1: self.stage == "GERMINATED",
                2: self.dwell >= TRAINING_EPOCHS,
                3: self.alpha == 1.0 and self.step == RAMP,
                4: self.dwell >= 1,
                5: self.dwell >= PROBATION_EPOCHS,
            }
            self.said[number] = ready[number]
        return self.said[number]

    def advance(self) -> bool:
        """Go forward if that is due."""
        if self.paused:
            return False
        if self.stage in COOLING:
            passed = self.dwell >= (EMBARGO if self.stage == "EMBARGOED" else 1)
        else:
            passed = self.gate(GATES[self.stage])
        if passed:
            self.move(ONWARD[self.stage])
        return passed

    def climb(self) -> None:
        if self.stage == "BLENDING" and not self.paused and self.step < RAMP:
            self.step += 1
            self.alpha = ramp(self.step)

    def tick(self, climbs: bool) -> None:
        self.said.clear()
        if self.stage == "DORMANT" or self.paused:
            return
        self.dwell += 1
        if self.stage == "FOSSILIZED":
            return
        if self.stage == "PROBATIONARY":
            self.gate(5)
            return
        if climbs:
            self.climb()
        self.advance()


slots = st.sampled_from(
    [FIRST, FIRST, FIRST, SECOND]
)  # a seed meets its commands sooner where most are for one slot
metrics = st.none() | st.floats(0.1, 5.0) | st.sampled_from([math.nan, math.inf])
targets = st.sampled_from([*SeedStage, "BLENDING", 99])


class Lifecycle(RuleBasedStateMachine):
    @initialize(
        unit=st.sampled_from(RampUnit),
        incubation=st.sampled_from(Incubation),
        grown=st.sampled_from([[FIRST], [FIRST, SECOND], []]),
        epochs=st.integers(0, 16),
        cooldown=st.sampled_from([0, 0, 0, 0, 1, 3, 5, 6]),
        paused=st.booleans(),
    )
    def begin(self, unit, incubation, grown, epochs, cooldown, paused):
        self.config = open_config(
            ramp_steps=RAMP, embargo_epochs=EMBARGO, ramp_unit=unit, incubation=incubation, isolation_every=3
        )
        self.by_epoch = unit is RampUnit.EPOCH
        self.random_numbers = torch.get_rng_state()
        self.new_model()
        self.expected = {FIRST: Expected(), SECOND: Expected()}
        self.saved = None
        self.bare = make_host()
        for slot in grown:  # a head start, so that the search sees late stages
            self.germinate(slot, "scale")
        for _ in range(epochs if grown else 0):
            self.train(RAMP if unit is RampUnit.STEP else 1)
            self.let_epochs_pass(1.0, 1)
            self.advance_when_due(grown[0])
        if grown and paused:
            self.pause(grown[0])
        if grown and cooldown:
            self.cull(grown[0], "no use")
            self.let_epochs_pass(1.0, cooldown - 1)

    def new_model(self):
        self.model, self.recorder = make_model(self.config)
        self.optimizer = tie_optimizer(self.model, torch.optim.Adam(self.model.host_parameters(), 1e-3))
        self.heard = 0
        self.told = {FIRST: "DORMANT", SECOND: "DORMANT"}

    def refused(self, command, error):
        before = picture(self.model, self.optimizer)
        events = len(self.recorder.events)
        with pytest.raises(error):
            command()
        assert same_picture(before, picture(self.model, self.optimizer))
        assert len(self.recorder.events) == events

    # -- commands ----------------------------------------------------------------------------------------------------

    @rule(slot=slots, blueprint=st.sampled_from(["scale", "normed"]))
    def germinate(self, slot, blueprint):
        expected = self.expected[slot]
        if expected.stage != "DORMANT":
            self.refused(lambda: self.model.germinate(slot, blueprint), GerminationError)
            return
        self.model.germinate(slot, blueprint)
        expected.germinations += 1
        expected.move("GERMINATED")
        assert self.model.slots[slot].state.seed_id == f"{slot}-{expected.germinations}"

    @rule(
        slot=slots,
        wrong=st.sampled_from(
            [
                ("narrow", {}, GerminationError),
                ("poison", {}, GerminationError),
                ("unbuildable", {}, GerminationError),
                ("picky", {}, GerminationError),
                ("per-token", {}, GerminationError),
                ("scale", {"gian": 1.0}, GerminationError),
                ("scale", {"gain": object()}, GerminationError),
                ("scala", {}, UnknownNameError),
            ]
        ),
    )
    def germinate_what_does_not_fit(self, slot, wrong):
        blueprint, options, error = wrong
        if self.expected[slot].stage != "DORMANT":
            error = GerminationError
        self.refused(lambda: self.model.germinate(slot, blueprint, **options), error)

    @rule(slot=slots, towards=st.none() | st.just(SeedStage.CULLED) | targets)
    def advance(self, slot, towards):
        expected = self.expected[slot]
        allowed = expected.allowed()
        goal = next(iter(allowed), None)
        if towards is not None:
            goal = towards.name if isinstance(towards, SeedStage) else "nowhere"
        if goal not in allowed:
            self.refused(lambda: self.model.advance_stage(slot, towards), TransitionError)
            return
        if goal == "CULLED":
            expected.move("CULLED")
            passed = True
        else:
            passed = expected.advance()
        result = self.model.advance_stage(slot, towards)
        assert isinstance(result, GateResult)
        assert result.passed == passed, str(result)

    @rule(slot=slots)
    def advance_to_every_stage_that_is_not_next(self, slot):
        before = picture(self.model, self.optimizer)
        for stage in SeedStage:
            if stage.name not in self.expected[slot].allowed():
                with pytest.raises(TransitionError):
                    self.model.advance_stage(slot, stage)
        assert same_picture(before, picture(self.model, self.optimizer))

    @rule(slot=slots)
    def advance_when_due(self, slot):
        """What a policy would do."""
        if self.expected[slot].stage in LIVING:
            self.advance(slot, None)

    @rule(metric=metrics, epochs=st.integers(1, 3))
    def let_epochs_pass(self, metric, epochs):
        for _ in range(epochs):
            for expected in self.expected.values():
                expected.tick(self.by_epoch)
            results = self.model.step_epoch(metric)
            for slot, expected in self.expected.items():
                told = results.get(slot)
                assert told is None or told.passed or self.model.slots[slot].stage.name == expected.stage

    @rule(steps=st.integers(1, 2))
    def train(self, steps):
        self.model.train()
        for _ in range(steps):
            still = {
                slot: copy.deepcopy(self.model.slots[slot].seed.state_dict())
                for slot, expected in self.expected.items()
                if expected.paused and expected.stage in ("GERMINATED", "TRAINING")
            }
            train_once(self.model, self.optimizer)
            if not self.by_epoch:
                for expected in self.expected.values():
                    expected.climb()
            for slot, before in still.items():
                after = self.model.slots[slot].seed.state_dict()
                assert all(torch.equal(before[key], after[key]) for key in before)

    @rule(slot=slots, reason=st.text(max_size=5))
    def cull(self, slot, reason):
        expected = self.expected[slot]
        if expected.stage not in LIVING:
            self.refused(lambda: self.model.cull(slot, reason), TransitionError)
            return
        self.model.cull(slot, reason)
        expected.move("CULLED")
        assert self.model.slots[slot].state.cull_reason == reason

    @rule(slot=slots, alpha=st.floats(0.0, 1.0) | st.sampled_from([0.0, 1.0, -0.5, 1.5, math.nan, "half"]))
    def set_alpha(self, slot, alpha):
        expected, command = self.expected[slot], lambda: self.model.slots[slot].set_alpha(alpha)
        if expected.stage != "BLENDING":
            self.refused(command, TransitionError)
        elif not (isinstance(alpha, float) and 0.0 <= alpha <= 1.0):
            self.refused(command, ValueError)
        else:
            command()
            expected.alpha = alpha
            expected.step = max(k for k in range(RAMP + 1) if ramp(k) <= alpha + 1e-12)
            expected.said.clear()

    @rule(slot=slots)
    def pause(self, slot):
        expected = self.expected[slot]
        if expected.stage not in LIVING or expected.paused:
            self.refused(self.model.slots[slot].pause, TransitionError)
            return
        self.model.slots[slot].pause()
        expected.paused = True
        expected.said.clear()

    @rule(slot=slots)
    def resume(self, slot):
        expected = self.expected[slot]
        if not expected.paused:
            self.refused(self.model.slots[slot].resume, TransitionError)
            return
        self.model.slots[slot].resume()
        expected.paused = False
        expected.said.clear()

    @rule(slot=slots, gate=st.integers(0, 6))
    def ask_a_gate(self, slot, gate):
        expected = self.expected[slot]
        if expected.stage == "DORMANT":
            self.refused(lambda: self.model.slots[slot].check_gate(gate), TransitionError)
            return
        result = self.model.slots[slot].check_gate(gate)
        assert (result.gate is None) == (gate == 6)
        own = GATES.get(expected.stage)
        if gate in (0, 6) or gate == own:
            assert result.passed == (gate == own and expected.gate(gate))

    @rule(slot=slots)
    def measure(self, slot):
        weights = picture(self.model)["weights"]
        evidence = self.model.measure(slot)
        computes = self.expected[slot].stage in (*LIVING[1:], "FOSSILIZED")
        assert (evidence is not None) == computes
        assert same_picture(weights, picture(self.model)["weights"])

    @rule(slot=slots)
    def bypass(self, slot):
        with self.model.bypassed(slot):
            self.check_host()

    @rule(training=st.booleans())
    def switch_mode(self, training):
        self.model.train(training)
        assert all(module.training == training for module in self.model.modules())

    # -- files -------------------------------------------------------------------------------------------------------

    @rule()
    def save(self):
        file = io.BytesIO()
        torch.save((self.model.state_dict(), self.optimizer.state_dict()), file)
        self.saved = (file.getvalue(), copy.deepcopy(self.expected))

    @precondition(lambda self: self.saved is not None)
    @rule(fresh=st.booleans())
    def load(self, fresh):
        weights, state = torch.load(io.BytesIO(self.saved[0]), weights_only=True)
        training = self.model.training
        if fresh:
            self.new_model()
            self.model.train(training)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state)
        self.expected = copy.deepcopy(self.saved[1])
        for slot, expected in self.expected.items():
            expected.said.clear()
            self.told[slot] = expected.stage
        self.heard = len(self.recorder.events)

    @rule()
    def what_is_saved_is_what_a_fresh_model_restores(self):
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        fresh, _ = make_model(self.config)
        fresh.train(self.model.training)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        before, after = picture(self.model), picture(fresh)
        for key in ("weights", "records", "stages", "modes", "trainable", "gates"):
            assert same_picture(before[key], after[key]), key

    @precondition(lambda self: self.saved is not None)
    @rule(slot=slots, damage=st.sampled_from(["version", "stage", "slot"]))
    def load_what_is_damaged(self, slot, damage):
        weights, _ = torch.load(io.BytesIO(self.saved[0]), weights_only=True)
        key = f"kasmina_slots.{slot}._extra_state"
        if key not in weights:
            return
        record = weights[key] = from_bytes(weights[key], "a record")
        if damage == "version":
            record["version"] = 99
        else:
            record["state"][damage] = 99 if damage == "stage" else "elsewhere"
        self.refused(lambda: self.model.load_state_dict(weights), CheckpointError)

    # -- what always holds -------------------------------------------------------------------------------------------

    def check_host(self):
        """Without the seeds that contribute, the output is the bare host's, bit for bit."""
        bare = self.bare.train(self.model.training)
        state = self.model.state_dict()
        bare.load_state_dict({k: v for k, v in state.items() if not k.startswith("kasmina_slots")})
        x, _ = make_batch(4)
        with ExitStack() as stack:
            for slot, expected in self.expected.items():
                if (
                    expected.stage not in ("DORMANT", "GERMINATED", "TRAINING", *COOLING)
                    and expected.alpha > 0
                ):
                    stack.enter_context(self.model.bypassed(slot))
            assert torch.equal(self.model(x), bare(x))

    @invariant()
    def the_host_is_untouched_by_seeds_that_do_not_contribute(self):
        self.check_host()

    @invariant()
    def every_slot_is_as_expected(self):
        for name, expected in self.expected.items():
            slot = self.model.slots[name]
            assert slot.stage.name == expected.stage
            assert slot.alpha == pytest.approx(expected.alpha, abs=1e-12)
            assert slot.alpha_buffer.item() == pytest.approx(expected.alpha, abs=1e-6)
            assert 0.0 <= slot.alpha <= 1.0
            assert slot.germinations == expected.germinations
            assert (slot.state is None) == (expected.stage == "DORMANT")
            assert (slot.seed is None) == (expected.stage in ("DORMANT", *COOLING))
            if slot.state is not None:
                assert slot.state.metrics.epochs_in_current_stage == expected.dwell
                assert slot.state.is_paused == expected.paused
                assert slot.state.metrics.isolation_violations == 0
            assert all(p.requires_grad != expected.paused for p in slot.seed_parameters())

    @invariant()
    def events_tell_every_move_once_and_in_order(self):
        events = self.recorder.events
        for event in events[self.heard :]:
            if isinstance(event, StageChanged):
                before, after = event.before, event.after
                assert before == self.told[event.slot]
                assert after == ONWARD.get(before) or (after == "CULLED" and before in LIVING)
                self.told[event.slot] = after
        self.heard = len(events)
        assert self.told == {slot: expected.stage for slot, expected in self.expected.items()}
        assert [event.sequence for event in events] == list(range(len(events)))

    @invariant()
    def the_optimiser_holds_each_parameter_once(self):
        held = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in self.model.parameters())
        assert {id(p) for p in self.optimizer.state} <= set(held)

    @invariant()
    def global_random_numbers_are_untouched(self):
        assert torch.equal(torch.get_rng_state(), self.random_numbers)


Lifecycle.TestCase.settings = settings(max_examples=45, stateful_step_count=30)
TestLifecycle = Lifecycle.TestCase
