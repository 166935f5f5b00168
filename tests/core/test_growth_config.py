"""The settings of growth: what they accept, and the recommended ones."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from enum import Enum
from pathlib import Path

import pytest
from state_helpers import make_model

from kasmina_core import (
    CheckpointError,
    GateCheckSpec,
    GateLevel,
    GateProfile,
    GateThresholds,
    GrowthConfig,
    Incubation,
    QualityGates,
    RampUnit,
    Topology,
)


def test_thresholds_stand_for_gates_that_have_them():
    thresholds = GateThresholds.proof_in_probation()
    config = GrowthConfig(gates=thresholds)
    assert isinstance(config.gates, QualityGates)
    assert config.gates.profile is GateProfile.EVIDENCE
    assert config.gates.thresholds == thresholds
    model, _ = make_model(config)
    assert model.growth_config.gates.thresholds == thresholds


@pytest.mark.parametrize("gates", [None, "G2", GateThresholds])
def test_what_is_neither_gates_nor_thresholds_is_refused_at_once(gates):
    with pytest.raises(TypeError, match=r"QualityGates or GateThresholds, not"):
        GrowthConfig(gates=gates)


def test_the_recommended_ramp_moves_with_every_step_of_which_it_knows_the_number():
    config = GrowthConfig.recommended(steps_per_epoch=10, ramp_epochs=1.5)
    assert (config.ramp_unit, config.ramp_steps) == (RampUnit.STEP, 15)
    assert (GrowthConfig.recommended().ramp_unit, GrowthConfig.recommended().ramp_steps) == (
        RampUnit.EPOCH,
        4,
    )


def test_the_recommended_settings_can_be_changed_one_by_one():
    config = GrowthConfig.recommended(incubation="straight-through", embargo_epochs=1)
    assert config.incubation is Incubation.STRAIGHT_THROUGH
    assert config.embargo_epochs == 1
    assert config.keep_snapshot
    assert config.gates.thresholds == GateThresholds.proof_in_probation()


@pytest.mark.parametrize("kind", [GrowthConfig, GateThresholds])
def test_the_docs_list_every_field_with_its_default(kind):
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    table = text.split(f"\n## {kind.__name__}\n")[1].split("\n## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| `?(.*?)`? \| .{10,} \|$", table, re.MULTILINE))
    assert list(listed) == [f.name for f in fields(kind)]
    for name, shown in listed.items():
        value = getattr(kind(), name)
        if name not in ("straight", "gates", "gradient_policies"):
            assert shown == str(value.value if isinstance(value, Enum) else value), name


def test_settings_come_back_from_json_as_they_were():
    config = GrowthConfig.recommended(steps_per_epoch=7, seed=3, gradient_policies={})
    again = GrowthConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.gates.thresholds == config.gates.thresholds
    default = GrowthConfig.from_dict(GrowthConfig().to_dict())
    assert default.gradient_policies == GrowthConfig().gradient_policies
    assert default.gradient_policies.keys() == set(Topology)
    thresholds = GateThresholds.report()
    assert GateThresholds.from_dict(thresholds.to_dict()) == thresholds


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ramp_steps": "5"}, "ramp_steps must be a whole number, not '5'"),
        ({"embargo_epochs": -1}, "embargo_epochs must not be negative"),
        ({"ramps": 3}, "unknown: ramps"),
        ({"gates": {"profile": "evidence", "thresholds": {}}}, "missing: .*min_gain"),
        ({"gates": {"profile": "hope"}}, "evidence, report"),
    ],
)
def test_settings_that_cannot_be_read_say_which(change, words):
    with pytest.raises(CheckpointError, match=words):
        GrowthConfig.from_dict(GrowthConfig().to_dict() | change)


def test_checks_that_are_functions_are_not_written():
    check = GateCheckSpec("mine", (GateLevel.G5,), lambda evidence: 1.0, minimum=1.0)
    with pytest.raises(ValueError, match="mine"):
        GrowthConfig(gates=QualityGates(extra_checks=[check])).to_dict()
