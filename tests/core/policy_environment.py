"""A growing model in a few lines: it takes commands, refuses what is not allowed, and shows observations."""

from __future__ import annotations

import random
from dataclasses import replace

from kasmina_core import (
    VALID_TRANSITIONS,
    Advance,
    Cull,
    Germinate,
    Observation,
    Pause,
    Regerminate,
    Resume,
    SeedStage,
    SlotObservation,
    Topology,
)

S = SeedStage
ALIVE = range(S.GERMINATED, S.PROBATIONARY + 1)


class IllegalCommandError(Exception):
    """A policy said what no model would do."""


class FakeGrowth:
    """Slots whose seeds have true gains; a gate lets pass what gains more than nothing.

    Args:
        gains: Gain by (slot, blueprint); what is not there is refused by G0.
        sizes: Parameters by blueprint.
        noise: Standard deviation of a measured gain.
        metrics: The metric of each epoch; the last one goes on for ever.
        stops: Seeds of these blueprints are stopped in incubation.
    """

    def __init__(self, gains, sizes=None, *, noise=0.0, metrics=(1.0,), stops=(), embargo=2, dwell=2, seed=0):
        self.gains, self.sizes, self.noise, self.metrics, self.stops = (
            gains,
            sizes or {},
            noise,
            metrics,
            stops,
        )
        self.embargo, self.dwell = embargo, dwell
        self.random = random.Random(seed)
        self.epoch = 0
        self.counts = {}
        self.commands = []
        names = sorted({slot for slot, _ in gains})
        self.slots = {
            name: SlotObservation(name, Topology.CNN, 4, S.DORMANT, shape=(2, 4, 5, 5)) for name in names
        }

    def observe(self):
        metric = self.metrics[min(self.epoch, len(self.metrics) - 1)]
        used = sum(s.parameters for s in self.slots.values() if s.stage in ALIVE or s.stage is S.FOSSILIZED)
        return Observation(self.epoch, metric, False, 100, used, tuple(self.slots.values()))

    def change(self, slot, **changes):
        self.slots[slot] = replace(self.slots[slot], **changes)

    def move(self, slot, stage):
        if stage not in VALID_TRANSITIONS[self.slots[slot].stage]:
            raise IllegalCommandError(f"{slot}: {self.slots[slot].stage.name} to {stage.name}")
        self.change(slot, stage=stage, epochs_in_stage=0, gate_passed=None)
        if stage is S.DORMANT:
            kept = self.slots[slot].kept_seed
            self.slots[slot] = SlotObservation(
                slot, Topology.CNN, 4, S.DORMANT, shape=(2, 4, 5, 5), kept_seed=kept
            )

    def execute(self, command):
        self.commands.append(command)
        match command:
            case Germinate(slot, blueprint):
                if self.slots[slot].stage is not S.DORMANT:
                    raise IllegalCommandError(command)
                if (slot, blueprint) in self.gains:
                    self._germinate(slot, blueprint)
            case Regerminate(slot):
                if not self.slots[slot].kept_seed or self.slots[slot].stage is not S.DORMANT:
                    raise IllegalCommandError(command)
                blueprint = self.slots[slot].kept_seed.partition("/")[0]
                self.change(slot, kept_seed="")
                self._germinate(slot, blueprint)
            case Cull(slot, _, revert, keep):
                now = self.slots[slot]
                if revert and not now.can_revert:
                    raise IllegalCommandError(command)
                self.move(slot, S.CULLED)
                self.change(slot, is_paused=False, is_stopped=False, gain=None, alpha=0.0, parameters=0)
                if keep:
                    self.change(slot, kept_seed=now.seed_id)
            case Advance(slot):
                now = self.slots[slot]
                if now.stage is S.PROBATIONARY and now.gate_passed:
                    self.move(slot, S.FOSSILIZED)
                elif now.stage not in ALIVE:
                    raise IllegalCommandError(command)
            case Pause(slot):
                self.change(slot, is_paused=True)
            case Resume(slot):
                self.change(slot, is_paused=False)
            case _:
                raise IllegalCommandError(command)

    def _germinate(self, slot, blueprint):
        self.counts[slot] = self.counts.get(slot, 0) + 1
        self.move(slot, S.GERMINATED)
        self.change(
            slot,
            blueprint=blueprint,
            seed_id=f"{blueprint}/{slot}-{self.counts[slot]}",
            parameters=self.sizes.get(blueprint, 10),
        )

    def tick(self):
        """Let an epoch pass, as a model's `step_epoch` does."""
        self.epoch += 1
        for name in self.slots:
            slot = self.slots[name]
            if slot.stage in (S.DORMANT, S.FOSSILIZED) or slot.is_paused:
                continue
            self.change(name, epochs_in_stage=slot.epochs_in_stage + 1, epochs_total=slot.epochs_total + 1)
            slot = self.slots[name]
            if slot.stage in (S.CULLED, S.RESETTING):
                self.move(name, VALID_TRANSITIONS[slot.stage][0])
            elif slot.stage is S.EMBARGOED:
                if slot.epochs_in_stage >= self.embargo:
                    self.move(name, S.RESETTING)
            elif slot.stage is S.GERMINATED:
                self.move(name, S.TRAINING)
            else:
                self._judge(name, slot)

    def _judge(self, name, slot):
        if slot.stage is S.TRAINING and slot.blueprint in self.stops:
            self.change(name, is_stopped=True, is_paused=True, deviation=1e3)
            return
        if slot.epochs_in_stage < self.dwell and slot.stage is not S.BLENDING:
            self.change(name, gate_passed=False, gate_reason="too early")
            return
        gain = self.gains[name, slot.blueprint] + self.random.gauss(0.0, self.noise)
        passed = gain > 0
        self.change(name, gain=gain, gate_passed=passed, gate_reason="gain")
        if slot.stage is S.PROBATIONARY or not passed:
            return
        if slot.stage is S.BLENDING and slot.epochs_in_stage < 2:
            self.change(name, alpha=0.5, can_revert=True)
            return
        self.move(name, VALID_TRANSITIONS[slot.stage][0])
        self.change(name, alpha=0.0 if self.slots[name].stage is S.BLENDING else 1.0)
        if self.slots[name].stage is S.BLENDING:
            self.change(name, ramp_progress=0.0, can_revert=True)
        else:
            self.change(name, ramp_progress=1.0)

    def follow(self, policy, epochs=1):
        for _ in range(epochs):
            self.tick()
            for command in policy.decide(self.observe()):
                self.execute(command)
        return self

    def kept(self):
        return {s.slot: s.blueprint for s in self.slots.values() if s.stage is S.FOSSILIZED}

    def grown(self):
        """Blueprints in the order in which they were germinated."""
        return [c.blueprint for c in self.commands if isinstance(c, Germinate)]
