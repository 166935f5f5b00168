"""The settings of growth: what they accept, and the recommended ones."""

from __future__ import annotations

import pytest
from state_helpers import make_model

from kasmina_core import (
    GateProfile,
    GateThresholds,
    GrowthConfig,
    Incubation,
    QualityGates,
    RampUnit,
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
