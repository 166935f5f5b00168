"""The slot: a module at an injection point that holds at most one seed and moves it through its life."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, cast

import torch
from torch import nn

from kasmina_core.blending import AlphaSchedule
from kasmina_core.errors import GerminationError, KasminaError, TransitionError
from kasmina_core.events import (
    AlphaChanged,
    GateChecksJoined,
    GateEvaluated,
    GatesNotAsked,
    IncubationStopped,
    IsolationViolation,
    SeedCulled,
    SeedFossilized,
    SeedGerminated,
    StageChanged,
    TelemetryEvent,
)
from kasmina_core.hosts import InjectionPoint
from kasmina_core.isolation import IsolationReading
from kasmina_core.lifecycle import VALID_TRANSITIONS, SeedStage, SeedState, is_active_stage, is_failure_stage
from kasmina_core.positions import NO_READER
from kasmina_core.quiet import derived_seed
from kasmina_core.records import is_plain
from kasmina_core.slots.forward import ForwardMode, Slot
from kasmina_core.slots.notes import SeedNotes
from kasmina_core.slots.owner import UNOWNED, Judge, SeedMaker, SlotOwner, Trial, shared_command
from kasmina_core.slots.settings import Incubation, RampUnit, SlotSettings
from kasmina_core.verdicts import GATE_INTO, CheckVerdict, Evidence, GateCheck, GateLevel, GateResult


class SeedSlot(Slot):
    """A slot whose seed lives through the stages.

    Commands change the stage through one transition; the stage says in which mode the slot computes. What a slot cannot
    know by itself it asks of others: ``maker`` makes seeds, ``judge`` judges them at the gates, ``owner`` measures them
    and takes part in changes. Further arguments are those of `Slot`; ``config`` says how seeds are treated.

    Attributes:
        state: The seed's state, or ``None`` in a dormant slot. It stays through the cooldown after a cull.
        notes: What was measured and counted of the seed.
        doubt: Why no seed that depends on whether the host is causal can be here; set by the model, empty for none.
        unread: Why the model's reader cannot say what positions mean here; set by the model, empty if it can.
        has_gradient: Whether the host's output gives a seed here a gradient, as far as the model knows.
        owned_by: A weak reference to the model around the slot, as the slot sees it; set by the model.
    """

    def __init__(
        self,
        point: InjectionPoint,
        shape: tuple[int, ...],
        config: SlotSettings,
        maker: SeedMaker,
        judge: Judge,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(point, shape, config.max_deviation, dtype=dtype, device=device)
        self.config = config
        self.maker = maker
        self.judge = judge
        self.owned_by: weakref.ref[SlotOwner] | None = None
        self.doubt = self.unread = ""
        self.has_gradient = True
        self.state: SeedState | None = None
        self.schedule: AlphaSchedule | None = None
        self.options: dict[str, Any] = {}
        self.germinations = 0
        self.notes = SeedNotes()

    # -- what one may ask ------------------------------------------------------------------------------------------

    @property
    def owner(self) -> SlotOwner:
        """The model around the slot; a slot outside of a model has one that does nothing.

        Raises:
            KasminaError: If the model is gone.
        """
        # A weak reference: the owner refers to slots, listeners and evaluators, and these may refer to the host.
        if self.owned_by is None:
            return UNOWNED
        if (owner := self.owned_by()) is None:
            raise KasminaError(
                f"The model of slot '{self.name}' is gone. Keep a reference to it as long as its slots."
            )
        return owner

    @property
    def stage(self) -> SeedStage:
        """The seed's stage; DORMANT where there is none."""
        return self.state.stage if self.state is not None else SeedStage.DORMANT

    @property
    def alpha(self) -> float:
        """Blend weight in [0, 1]: 0 up to TRAINING, 1 from SHADOWING on."""
        return self.state.metrics.alpha if self.state is not None else 0.0

    @property
    def is_active(self) -> bool:
        """Whether a seed is there and computes (TRAINING to FOSSILIZED)."""
        return self.seed is not None and is_active_stage(self.stage)

    @property
    def active_seed_params(self) -> int:
        """Number of parameters of the seed, if it is active; else 0."""
        return sum(p.numel() for p in self.seed_parameters()) if self.is_active else 0

    @property
    def _last_gain(self) -> float | None:
        return self.notes.evidence.gain if self.notes.evidence is not None else None

    def extra_repr(self) -> str:
        """Show the point and the stage."""
        return f"{self.name}, {self.point.topology.value}, width {self.point.dim}, {self.stage.name}"

    @property
    def blending_mode(self) -> ForwardMode:
        """The forward mode of BLENDING, by the gradient policy of the slot's topology."""
        policy = self.config.gradient_policies.get(self.point.topology, self.point.topology)
        return ForwardMode.BLEND_DETACHED if policy.detach_input_in_blending else ForwardMode.BLEND

    @property
    def natural_mode(self) -> ForwardMode:
        """The forward mode of the present stage.

        In eval mode a seed in TRAINING does not run: the output would be the host's anyway.
        """
        if self.seed is None or not is_active_stage(self.stage):
            return ForwardMode.PASS
        if self.is_apart:
            # lerp at alpha 0 is NaN where the seed is infinite, so alpha 0 goes on as TRAINING does.
            learns = self.training and self.is_incubating
            is_in_place = self.config.incubation is Incubation.STRAIGHT_THROUGH
            return ForwardMode.STRAIGHT_THROUGH if learns and is_in_place else ForwardMode.PASS
        return self.blending_mode if self.stage is SeedStage.BLENDING else ForwardMode.SEED

    @property
    def is_incubating(self) -> bool:
        """Whether the seed learns without contributing: `is_apart`, and not while paused."""
        return self.is_apart and self.state is not None and not self.state.is_paused

    @property
    def is_apart(self) -> bool:
        """Whether the seed computes without contributing: TRAINING, or BLENDING while alpha is 0."""
        if self.seed is None:
            return False
        return self.stage is SeedStage.TRAINING or (self.stage is SeedStage.BLENDING and self.alpha == 0.0)

    @property
    def can_advance(self) -> bool | None:
        """Whether `advance_stage` would move the seed now; ``None`` where only a measurement could tell.

        Nothing is measured, and no other process of a job is asked.
        """
        state = self.state
        if state is None or state.is_paused or state.stage is SeedStage.FOSSILIZED:
            return False
        if is_failure_stage(state.stage):
            waited, needed = self._cooldown(state)
            return waited >= needed
        gate = GATE_INTO[VALID_TRANSITIONS[state.stage][0]]
        known = self.notes.answers.get(gate)
        return known.passed if known is not None else self.judge.foresee(self, gate)

    # -- commands --------------------------------------------------------------------------------------------------

    @shared_command
    def germinate(
        self, blueprint_id: str, seed_id: str | None = None, *, straight: bool = False, **options: Any
    ) -> SeedState:
        """Make a seed from a blueprint; it starts to learn at the next tick.

        Its weights are drawn from a generator derived from ``config.seed``, the slot's name and the number of
        germinations, so that nothing else's random numbers change and every process draws the same.

        Args:
            blueprint_id: ``pack:name``, or a short name that is unique for this topology.
            seed_id: Name of the seed; default ``<slot>-<number>``.
            straight: Whether it contributes at once, before anything is proved, as ``config.straight`` says. It goes
                through the stages up to PROBATIONARY, or to BLENDING if alpha rises over a ramp; the gates on the way
                are not asked (`SeedState.unasked`, `GatesNotAsked`). G5 compares the model with the host's trend.
            options: Options of the blueprint: plain data.

        Returns:
            The state of the new seed.

        Raises:
            GerminationError: If the slot is not dormant, there are too few metrics for a trend that G5 asks for, or
                gate G0 fails; ``.result`` holds the gate's checks. Nothing
                is changed then.
            UnknownNameError: If nobody offers the blueprint.
            TypeError: If the blueprint is not named by text.
        """
        if not isinstance(blueprint_id, str):
            raise TypeError(
                f"A blueprint is named by text, 'pack:name' or 'name', not {blueprint_id!r:.200} (slot '{self.name}')."
            )
        if self.state is not None:
            way = "Cull it and let the cooldown pass, or use another slot."
            if self.stage is SeedStage.FOSSILIZED:
                way = "A fossil is part of the model and stays; use another slot."
            elif is_failure_stage(self.stage):
                way = "Its cooldown goes on with every step_epoch; germinate when it is over."
            raise GerminationError(
                f"Slot '{self.name}' is not dormant but {self.stage.name}: it holds '{self.state.seed_id}'. {way}"
            )
        if not is_plain(options):
            raise GerminationError(
                f"Options of a seed must be plain data (numbers, text, booleans, lists, mappings), not {options!r}: "
                "they are written to checkpoints."
            )
        found = self.maker.find(blueprint_id, self.point.topology)
        number = self.germinations + 1
        state = SeedState(seed_id or f"{self.name}-{number}", found, self.name)
        state.metrics.higher_is_better = self.config.higher_is_better
        first = SeedStage.BLENDING if straight else SeedStage.GERMINATED
        trial = self._make_seed(found, options, number, first)
        doubt = self.doubt if trial.takes_causal or trial.mixes else ""
        if not self.has_gradient:
            doubt = (
                "no gradient would reach it\n"
                f"    found:    on the example the host's output does not depend on the features at '{self.point.path}', or "
                "they are computed under torch.no_grad()\n"
                "    Name a module on the way to the output, or make the model with an example whose output depends on it"
            )
        if doubt:
            raise GerminationError(f"'{found}' cannot germinate in slot '{self.name}': {doubt}")
        result = self.judge.judge_trial(state, trial)
        if not result.passed or trial.seed is None:
            raise GerminationError(
                f"'{found}' cannot germinate in slot '{self.name}' "
                f"({self.point.topology.value}, width {self.point.dim}).\n  {result}",
                result,
            )
        seed = trial.seed.train(self.training)
        self._announce(state, seed)
        try:
            trend = self.owner.begin_straight(self) if straight else ()
        except BaseException:
            self.owner.seed_removed(self, list(seed.parameters()))
            raise
        self.germinations = number
        self.state, self.seed, self.options = state, seed, copy.deepcopy(options)
        self.takes_context = trial.mixes
        self._begin_notes()
        self._emit(SeedGerminated, blueprint_id=found, parameters=sum(p.numel() for p in seed.parameters()))
        if joined := self.judge.joined:
            self._emit(GateChecksJoined, checks=joined)
        self._emit_result(result)
        self._transition(SeedStage.GERMINATED)
        if straight:
            self._put_in(state, trend)
        return state

    def _put_in(self, state: SeedState, trend: tuple[tuple[int, float], ...]) -> None:
        """Let a new seed contribute; the gates on the way are not asked."""
        at_once = self.config.straight.ramp_steps == 1
        state.unasked = ("G1", "G2", "G3", "G4") if at_once else ("G1", "G2", "G4")
        self.notes.trend = trend
        self._emit(GatesNotAsked, gates=state.unasked)
        self._transition(SeedStage.TRAINING)
        self._transition(SeedStage.BLENDING)
        self._step_ramp()
        if at_once:
            self._transition(SeedStage.SHADOWING)
            self._transition(SeedStage.PROBATIONARY)

    @shared_command
    def advance_stage(self, target: SeedStage | None = None) -> GateResult:
        """Ask the gate for the next stage and move there if it passes.

        Args:
            target: The stage to move to; default the next one forward. ``CULLED`` culls.

        Returns:
            What the gate said; the same within an epoch, measured once.

        Raises:
            TransitionError: If there is no seed, or `VALID_TRANSITIONS` does not lead from here to ``target``.
        """
        state = self._require_seed("advance")
        goal = next(iter(VALID_TRANSITIONS[state.stage]), None) if target is None else target
        state.demand_move(goal)
        goal = SeedStage(cast("SeedStage", goal))  # from here on an int that equals a stage is that stage
        if goal is SeedStage.CULLED:
            self.cull("asked to")
            return _plain_result("culled", True, state)
        if state.is_paused:
            return _plain_result("not paused", False, state, self._why_paused())
        if is_failure_stage(state.stage):
            waited, needed = self._cooldown(state)
            check = GateCheck(
                "epochs of cooldown",
                waited,
                CheckVerdict.PASSED if waited >= needed else CheckVerdict.WAITING,
                minimum=needed,
            )
            result = GateResult(None, (check,), state.metrics.epochs_total)
        else:
            result = self.check_gate(GATE_INTO[goal])
        if result.passed:
            self._transition(goal)
            if goal is SeedStage.SHADOWING and "G4" in state.unasked:
                self._transition(SeedStage.PROBATIONARY)
        return result

    def _why_paused(self) -> str:
        """Return why a paused seed stands still, and the way out."""
        state = self._require_seed("ask")
        ways = f"resume it, model.slots[{self.name!r}].resume(), or cull it, model.cull({self.name!r})"
        if not state.is_stopped:
            return f"the seed is paused; {ways}"
        deviation, limit = state.metrics.deviation or math.nan, self.config.max_incubation_deviation
        return (
            f"the seed was stopped: it went {deviation:.3g} from the host, and max_incubation_deviation is {limit:g}; {ways}. "
            "A smaller learning rate for it, or a larger bound, keeps it from being stopped again"
        )

    def check_gate(self, gate: GateLevel | int) -> GateResult:
        """Ask a gate without moving. Within an epoch the answer is cached: nothing is evaluated twice.

        Raises:
            TransitionError: If there is no seed.
        """
        self._require_seed("check a gate")
        if (known := self.notes.answers.get(cast("GateLevel", gate))) is not None:
            return known
        if gate in (GateLevel.G2, GateLevel.G5):
            self.check_isolation()
            self.check_deviation()
        result = self.judge.judge(self, gate)
        if result.gate is not None:
            self.notes.answers[result.gate] = result
        self._emit_result(result)
        return result

    @shared_command
    def step_epoch(self, metric: float | None = None) -> GateResult | None:
        """Let one epoch pass: record the metric, move alpha, and advance as far as one gate allows.

        It never fossilises or culls; in PROBATIONARY it asks G5 so that a policy can decide on the answer. A paused
        seed only records the metric.

        Args:
            metric: Validation metric of the whole model, if one was measured.

        Returns:
            What the gate of this epoch said, or ``None`` if none was asked.
        """
        state = self.state
        if state is None:
            return None
        metrics = state.metrics
        if metric is not None:
            metrics.record(metric)
        norms = self.notes.epoch.norms
        if norms.count:
            metrics.gradient_norm, metrics.gradient_norm_max = norms.mean, norms.largest
        self.notes.begin_epoch()
        if state.is_paused:
            return None
        metrics.epochs_total += 1
        metrics.epochs_in_current_stage += 1
        if state.stage is SeedStage.FOSSILIZED:
            return None
        if state.stage is SeedStage.PROBATIONARY and state.is_straight:
            return self.check_gate(GateLevel.G5)
        if state.stage is SeedStage.PROBATIONARY:
            with suppress(Exception):  # the gate asks again and says what an evaluator raised
                self.measure_once()  # every epoch of probation counts for G5's stability, not only those past the dwell
            return self.check_gate(GateLevel.G5)
        if state.stage is SeedStage.BLENDING and self._ramp_unit is RampUnit.EPOCH:
            self._step_ramp()
        return self.advance_stage()

    def step(self) -> None:
        """Let one optimiser step pass: note the seed's gradient, move alpha if the ramp goes by steps.

        Call it after ``backward`` and before the optimiser clears the gradients.
        """
        state = self.state
        if state is None or self.seed is None or state.is_paused or not is_active_stage(state.stage):
            return
        gradients = [p.grad for p in self.seed_parameters() if p.grad is not None]
        if gradients:
            self.notes.epoch.norms.note(gradients)
        self.notes.steps += 1
        if state.stage is SeedStage.BLENDING and self._ramp_unit is RampUnit.STEP:
            self._step_ramp()
        if state.stage is SeedStage.TRAINING and self.config.isolation_every:
            self.notes.steps_since_isolation += 1
            if self.notes.steps_since_isolation >= self.config.isolation_every:
                self.check_isolation(again=True)
                self.check_deviation()

    def check_isolation(self, *, again: bool = False) -> IsolationReading | None:
        """Measure what a seed in TRAINING leaks into the host; a violation is counted and emitted.

        Args:
            again: Whether to measure though it was measured in this epoch, as every ``isolation_every`` steps.

        Returns:
            The reading, or ``None`` if there is nothing to measure now (no host known, other stage, fresh already).
        """
        state = self.state
        is_due = again or not self.notes.epoch.isolation_is_fresh
        if state is None or state.stage is not SeedStage.TRAINING or not is_due:
            return None
        reading = self.owner.measure_isolation(self)
        if reading is None:
            return None
        self.notes.epoch.isolation_is_fresh = True
        self.notes.steps_since_isolation = 0
        if reading.is_violation:
            state.metrics.isolation_violations += 1
            self._emit(
                IsolationViolation, leak=reading.leak, threshold=reading.threshold, tensors=reading.tensors
            )
        return reading

    def check_deviation(self) -> float | None:
        """Read how far a seed in TRAINING went from the host, and stop it if that is too far.

        Every pass in which the seed learns measures it. A stopped seed is paused, fails G2 and emits an event; `resume`
        gives it another chance.

        Returns:
            The largest ``rms(seed - host) / rms(host)`` since the last reading, or ``None`` if there was none.
        """
        state = self.state
        if state is None or state.stage is not SeedStage.TRAINING or state.is_paused:
            return None
        deviation = self.share_deviation()
        if deviation is None:
            return None
        self.forget_training_deviation()
        state.metrics.deviation = deviation
        limit = self.config.max_incubation_deviation
        if not (math.isfinite(deviation) and deviation <= limit):
            self.pause()
            state.is_stopped = True
            self._emit(IncubationStopped, deviation=deviation, limit=limit)
        return deviation

    def share_deviation(self) -> float | None:
        """Note the largest deviation that any process of a job measured since the last reading, and return it.

        A checkpoint that one process writes then holds what all of them know.

        Returns:
            The deviation, or ``None`` if no process measured any.
        """
        own = float(self.training_deviation) if self.has_training_deviation else -math.inf
        largest = self.owner.largest(self, "deviation", own)
        if largest == -math.inf:
            return None
        self.training_deviation.fill_(largest)
        self.has_training_deviation.fill_(True)
        return largest

    @shared_command
    def cull(self, reason: str, *, lost_epochs: int | None = None) -> None:
        """Remove the seed, free its memory, and let the slot cool down.

        Args:
            reason: Why, for people.
            lost_epochs: Epochs of the host that are given up with the seed; `MorphogeneticModel.cull` reverts the host
                and says so here.

        Raises:
            TransitionError: If there is no seed, or it is fossilised: fossils are part of the model.
        """
        state = self._require_seed("cull")
        if not state.can_move_to(SeedStage.CULLED):
            raise TransitionError(
                f"Seed '{state.seed_id}' in slot '{self.name}' cannot be culled: it is {state.stage.name}."
            )
        before, parameters, gain = state.stage, self.seed_parameters(), self._last_gain
        state.cull_reason = reason
        state.is_paused = state.is_stopped = False
        self._transition(SeedStage.CULLED)
        self._emit(
            SeedCulled,
            blueprint_id=state.blueprint_id,
            reason=reason,
            stage=before.name,
            gain=gain,
            total_improvement=state.metrics.total_improvement,
            reverted=lost_epochs is not None,
            lost_epochs=lost_epochs or 0,
        )
        self.owner.seed_removed(self, parameters)

    @shared_command
    def set_alpha(self, alpha: float) -> None:
        """Set the blend weight by hand; the ramp goes on from there.

        Args:
            alpha: In [0, 1].

        Raises:
            TransitionError: If the seed is not in BLENDING: everywhere else the stage fixes alpha.
            ValueError: If ``alpha`` is not in [0, 1].
        """
        state = self._require_seed("set alpha")
        if state.stage is not SeedStage.BLENDING or self.schedule is None:
            raise TransitionError(
                f"Alpha of slot '{self.name}' cannot be set in {state.stage.name}, only in BLENDING; "
                f"it is {self.alpha:g} here."
            )
        if not (isinstance(alpha, (int, float)) and 0.0 <= alpha <= 1.0):
            raise ValueError(f"alpha must be in [0, 1], not {alpha!r}.")
        step = self.schedule.first_step_reaching(float(alpha))
        # The last step that lies no higher, so that the next one rises, also from just below 1.
        self._set_alpha(float(alpha), step - (self.schedule(step) > alpha))
        self.notes.answers = {}

    @shared_command
    def pause(self) -> None:
        """Let the seed stand still: its clock, its ramp and its weights stay as they are until `resume`.

        Raises:
            TransitionError: If there is no living seed to pause, or it is paused already.
        """
        state = self._require_seed("pause")
        if self.seed is None or state.is_paused or state.stage is SeedStage.FOSSILIZED:
            why = "already paused" if state.is_paused else state.stage.name
            raise TransitionError(
                f"Seed '{state.seed_id}' in slot '{self.name}' cannot be paused: it is {why}."
            )
        self._freeze([name for name, p in self.seed.named_parameters() if p.requires_grad])
        state.is_paused = True
        self.notes.answers = {}
        self.refresh_mode()

    @shared_command
    def resume(self) -> None:
        """Let a paused seed go on.

        Raises:
            TransitionError: If there is no seed, or it is not paused.
        """
        state = self._require_seed("resume")
        if not state.is_paused:
            raise TransitionError(f"Seed '{state.seed_id}' in slot '{self.name}' is not paused.")
        self._thaw()
        state.is_paused = state.is_stopped = False
        self.notes.answers = {}
        self.refresh_mode()

    # -- the one way a stage changes -------------------------------------------------------------------------------

    def _transition(self, target: SeedStage) -> None:
        """Move to ``target``; every stage change comes through here. What can refuse comes before `move_to`."""
        state = self._require_seed("move")
        before = state.stage
        self.owner.before_move(self, target)
        state.move_to(target)
        self.notes.begin_stage()
        if target in (SeedStage.GERMINATED, SeedStage.TRAINING):
            self.notes.error_share = self.owner.error_share(self)
        if target is SeedStage.BLENDING:
            straight = AlphaSchedule(self.config.straight.ramp_steps) if state.is_straight else None
            self.schedule = straight or self.config.make_schedule()
            state.metrics.blending_steps_done = 0
            state.metrics.blending_steps_total = self.schedule.total_steps
        if target in (SeedStage.SHADOWING, SeedStage.CULLED):
            state.metrics.alpha = 1.0 if target is SeedStage.SHADOWING else 0.0
            self.alpha_buffer.fill_(state.metrics.alpha)
        if target is SeedStage.CULLED:
            self.seed, self.schedule, self.options = None, None, {}
            self._begin_notes()
        self.refresh_mode()
        self._emit(StageChanged, before=before.name, after=target.name)
        if target is SeedStage.FOSSILIZED:
            self._emit(
                SeedFossilized,
                blueprint_id=state.blueprint_id,
                parameters=self.active_seed_params,
                gain=self._last_gain,
                total_improvement=state.metrics.total_improvement,
            )
            self.owner.fossilized(self)
        if target is SeedStage.DORMANT:
            self.state = None

    @property
    def _ramp_unit(self) -> RampUnit:
        is_straight = self.state is not None and self.state.is_straight
        return self.config.straight.ramp_unit if is_straight else self.config.ramp_unit

    def _step_ramp(self) -> None:
        metrics = cast("SeedState", self.state).metrics
        schedule = cast("AlphaSchedule", self.schedule)
        if metrics.blending_steps_done < schedule.total_steps:
            done = metrics.blending_steps_done + 1
            self._set_alpha(schedule(done), done)

    def _set_alpha(self, alpha: float, step: int) -> None:
        metrics = cast("SeedState", self.state).metrics
        metrics.blending_steps_done, metrics.alpha = step, alpha
        self.alpha_buffer.fill_(alpha)
        self.refresh_mode()
        self._emit(AlphaChanged, alpha=alpha, progress=metrics.ramp_progress)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _announce(self, state: SeedState, seed: nn.Module) -> None:
        """Call the owner with a new seed, which is in place meanwhile; the owner may raise to prevent it."""
        before = self.state, self.seed
        self.state, self.seed = state, seed
        try:
            self.owner.seed_made(self, seed, state.blueprint_id)
            self.owner.seed_added(self, list(seed.parameters()))
        finally:
            self.state, self.seed = before

    def _cooldown(self, state: SeedState) -> tuple[int, int]:
        """Return the epochs that a culled seed's slot has waited in its stage, and those it must."""
        needed = self.config.embargo_epochs if state.stage is SeedStage.EMBARGOED else 1
        return state.metrics.epochs_in_current_stage, needed

    def _require_seed(self, command: str) -> SeedState:
        if self.state is None:
            raise TransitionError(
                f"Slot '{self.name}' is dormant: there is no seed to {command}. Germinate one first."
            )
        return self.state

    def _make_seed(
        self, blueprint_id: str, options: Mapping[str, Any], number: int, stage: SeedStage
    ) -> Trial:
        # In straight-through TRAINING the seed runs in the host's own pass, where it must not draw random numbers.
        is_learning_in_place = stage in (SeedStage.GERMINATED, SeedStage.TRAINING)
        may_draw = self.config.incubation is Incubation.COUNTERFACTUAL or not is_learning_in_place
        like = self.alpha_buffer.new_empty((1, *self.shape[1:]))
        random_seed = derived_seed(self.config.seed, self.name, number)
        trial = self.maker.make(blueprint_id, self.point, options, like, random_seed, may_draw)
        reason = self._why_not_mix() if trial.mixes else ""
        trial.findings["positions"] = (not reason, reason)
        return trial

    def _why_not_mix(self) -> str:
        """Return why no seed that mixes positions can be here; nothing if one can."""
        if self.calls.reader is None:
            return NO_READER
        if self.has_proved_layout:
            return f"it mixes positions. {self.unread}" if self.unread else ""
        layouts = " or ".join(f'layout="{layout}"' for layout in ("btd", "tbd"))
        return (
            "it mixes positions, and which axis they are on is not proved: the host treats each entry of two axes by "
            f"itself. State it, with {layouts}: slots=[InjectionPoint({self.name!r}, {self.point.path!r}, "
            f'{self.point.dim}, Topology("{self.point.topology.value}"), layout="{self.point.axes}")]'
        )

    def measure(self) -> Evidence | None:
        """Return the seed's evidence of this epoch, measuring it if nobody has yet.

        Returns:
            The evidence, or ``None`` if the seed is not active or the model has no evaluator.
        """
        if self.notes.epoch.evidence_is_fresh:
            return self.notes.evidence
        if not self.is_active:
            return None
        is_blending = self.stage is not SeedStage.TRAINING
        measured = self.owner.measure(self, self.notes.host_losses if is_blending else None)
        if measured is None:
            return None
        evidence, host_losses = measured
        self.notes.evidence = evidence
        self.notes.epoch.evidence_is_fresh = True
        self.notes.stage.gains.append(evidence.gain)
        if not is_blending:
            self.notes.host_losses = host_losses
        return evidence

    def measure_once(self) -> Evidence | None:
        """Measure for a gate; if that fails, every check of the epoch gets the failure, without another pass.

        Raises:
            KasminaError: If it failed before in this epoch; the first call raises what failed.
        """
        if self.notes.epoch.failure and not self.notes.epoch.evidence_is_fresh:
            raise KasminaError(f"the measurement of this epoch failed: {self.notes.epoch.failure}")
        try:
            return self.measure()
        except Exception as error:
            self.notes.epoch.failure = f"{type(error).__name__}: {error!s:.1000}"
            raise

    def _begin_notes(self) -> None:
        # A new object, not a cleared one: a load that fails puts the old one back.
        self.notes = SeedNotes()
        self.forget_training_deviation()

    def _freeze(self, names: list[str]) -> None:
        named = dict(cast("nn.Module", self.seed).named_parameters())
        for name in names:
            named[name].requires_grad_(False)
            named[name].grad = None  # an optimiser steps a frozen parameter that still has a gradient
        self.notes.frozen_by_pause = names

    def _thaw(self) -> None:
        if self.seed is not None:
            named = dict(self.seed.named_parameters())
            for name in self.notes.frozen_by_pause:
                named[name].requires_grad_(True)
        self.notes.frozen_by_pause = []

    def _emit(self, kind: Callable[..., TelemetryEvent], **details: Any) -> None:
        if self.state is not None:
            self.owner.emit(kind(slot=self.name, seed_id=self.state.seed_id, **details))

    def _emit_result(self, result: GateResult) -> None:
        gate = result.gate.name if result.gate is not None else "unknown"
        checks = tuple(check.to_dict() for check in result.checks)
        said = {"passed": result.passed, "verdict": result.verdict.value, "reason": result.reason}
        self._emit(GateEvaluated, gate=gate, checks=checks, **said)

    def another(self, point: InjectionPoint) -> SeedSlot:
        """Return an empty slot like this one, at a point with the same features; `MorphogeneticModel.open_slot` hangs it."""
        dtype, device = self.alpha_buffer.dtype, self.device
        return SeedSlot(point, self.shape, self.config, self.maker, self.judge, dtype=dtype, device=device)

    def clear(self) -> None:
        """Remove the seed without a trace: no event, no cooldown. For a load that begins anew or fails."""
        if self.seed is not None:
            self.owner.seed_removed(self, self.seed_parameters())
        self.seed, self.state, self.schedule, self.options = None, None, None, {}
        self._begin_notes()
        self.alpha_buffer.zero_()
        self.refresh_mode()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"owned_by": None}


def _plain_result(name: str, passed: bool, state: SeedState, detail: str = "") -> GateResult:
    verdict = CheckVerdict.PASSED if passed else CheckVerdict.FAILED
    check = GateCheck(name, float(passed), verdict, minimum=1.0, detail=detail)
    return GateResult(None, (check,), state.metrics.epochs_total)
