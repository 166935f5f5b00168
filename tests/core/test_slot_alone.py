"""The slot of the small core by itself: who makes and judges its seeds is given, and no room is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from kasmina_core.blending import AlphaSchedule
from kasmina_core.errors import GerminationError
from kasmina_core.growth.config import GrowthConfig
from kasmina_core.hosts import InjectionPoint
from kasmina_core.lifecycle import SeedStage
from kasmina_core.slots.forward import ForwardMode, Slot
from kasmina_core.slots.owner import Trial
from kasmina_core.slots.slot import SeedSlot
from kasmina_core.topology import Topology
from kasmina_core.verdicts import CheckVerdict, GateCheck, GateLevel, GateResult

POINT = InjectionPoint("a", "a", 4, Topology.CNN)
SHAPE = (1, 4, 5, 5)
ROOMS = [
    "blueprints",
    "checks",
    "gates",
    "policies",
    "evidence",
    "packs",
    "growth",
    "training",
    "checkpoints",
    "parallel",
    "telemetry",
]


class OneSeed:
    """Makes the same kind of seed from every name."""

    def find(self, blueprint_id, topology):
        return f"mine:{blueprint_id}"

    def describe(self, blueprint_id):
        return blueprint_id

    def make(self, blueprint_id, point, options, like, random_seed, may_draw):
        return Trial(nn.Conv2d(point.dim, point.dim, 1))


class Verdict:
    """Says the same at every gate."""

    joined = ()

    def __init__(self, verdict):
        self.verdict = verdict

    def judge_trial(self, state, trial):
        return GateResult(GateLevel.G0, (GateCheck("any", 1.0, CheckVerdict.PASSED, minimum=1.0),))

    def judge(self, slot, gate):
        return GateResult(GateLevel(gate), (GateCheck("any", 1.0, self.verdict, minimum=1.0),))

    def foresee(self, slot, gate):
        return self.verdict is CheckVerdict.PASSED


def make_slot(verdict):
    return SeedSlot(POINT, SHAPE, GrowthConfig(ramp_steps=2), OneSeed(), Verdict(verdict))


def test_a_slot_lives_through_its_stages_with_seeds_and_verdicts_from_anybody():
    slot, seen = make_slot(CheckVerdict.PASSED), []
    assert slot.germinate("thing").blueprint_id == "mine:thing"
    while slot.stage is not SeedStage.FOSSILIZED:
        seen.append((slot.stage.name, ForwardMode(slot.mode).name))
        slot.advance_stage()
    assert seen == [
        ("GERMINATED", "PASS"),
        ("TRAINING", "STRAIGHT_THROUGH"),
        ("BLENDING", "STRAIGHT_THROUGH"),  # at alpha 0 it goes on as in TRAINING
        ("SHADOWING", "SEED"),
        ("PROBATIONARY", "SEED"),
    ]
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(slot(x), slot.seed(x))


def test_without_a_model_a_seed_is_never_measured_and_what_stops_a_gate_stops_the_seed():
    slot = make_slot(CheckVerdict.NEVER_MEASURED)
    slot.germinate("thing")
    assert not slot.advance_stage()
    assert slot.stage is SeedStage.GERMINATED
    assert slot.measure() is None
    assert slot.check_isolation() is None
    with pytest.raises(GerminationError, match="is not dormant but GERMINATED"):
        slot.germinate("thing")


def test_modes_need_no_stage():
    slot = Slot(POINT, SHAPE, max_deviation=0.1)
    slot.seed, x = nn.Conv2d(4, 4, 1), torch.randn(2, 4, 5, 5)
    assert slot(x) is x
    with slot.forced(ForwardMode.STRAIGHT_THROUGH):
        assert torch.equal(slot(x), x)
        assert slot.has_training_deviation
    with slot.forced(ForwardMode.MEASURE):
        assert torch.equal(slot(x), slot.seed(x))
    assert slot.deviation > 0
    assert not slot.ran_compiled
    slot.begin_measurement()
    assert slot.deviation == 0
    with slot.forced(ForwardMode.BLEND), slot.blend_weight(AlphaSchedule(2)(1)):
        assert torch.allclose(slot(x), torch.lerp(x, slot.seed(x), 0.5))


def test_the_slot_of_the_core_imports_no_room():
    code = "import sys, kasmina_core.slots.slot, kasmina_core.slotted; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {f"kasmina_core.{room}" for room in ROOMS} & set(found)
