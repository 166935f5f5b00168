"""What is legal is what a model carries out: random lives, every command tried at every moment."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from state_helpers import FIRST, SECOND, bring_to, make_model, open_config, train_once

from kasmina_core import (
    Advance,
    Continue,
    Cull,
    Germinate,
    Observation,
    Pause,
    Regerminate,
    Resume,
    SeedStage,
    SetAlpha,
    SlotObservation,
    Topology,
    legal_commands,
    tie_optimizer,
)

BLUEPRINTS = {Topology.CNN: ["mine:scale", "mine:normed"]}
ALPHAS = (0.0, 0.5, 1.0)


class Script:
    def __init__(self, *commands):
        self.commands = commands

    def decide(self, observation):
        return self.commands


def every_command(slots):
    yield Continue()
    for slot in slots:
        names = BLUEPRINTS[Topology.CNN]
        yield from (Germinate(slot, name, straight=way) for name in names for way in (False, True))
        yield from (Regerminate(slot), Advance(slot), Pause(slot), Resume(slot))
        yield from (Cull(slot, "asked to", revert=revert) for revert in (False, True))
        yield from (SetAlpha(slot, alpha) for alpha in ALPHAS)


def legal_now(model):
    return legal_commands(model.observe(), BLUEPRINTS, alphas=ALPHAS, straight=True)


def carries_out(model, command):
    model.follow(Script(command))
    (outcome,) = model.outcomes
    return outcome.done


def live(seed, epochs=25):
    """Try, in every epoch, all commands that are not legal, then one that is; return what was seen."""
    model, _ = make_model(open_config(keep_snapshot=True, embargo_epochs=seed % 3))
    optimizer = tie_optimizer(model, torch.optim.Adam(model.parameters(), 1e-3))
    dice, seen = random.Random(seed), set()
    for _ in range(epochs):
        for _ in range(dice.choice([0, 1, 1, 3])):
            legal = legal_now(model)
            for command in every_command(model.slots):
                if command not in legal:
                    assert not carries_out(model, command), (command, model.observe())
            onward = [command for command in legal if isinstance(command, Advance)]
            chosen = dice.choice(onward if onward and dice.random() < 0.5 else legal)
            if isinstance(chosen, Cull):
                chosen = dataclasses.replace(chosen, reason="no use", keep=dice.random() < 0.5)
            assert carries_out(model, chosen), (chosen, model.outcomes)
            seen |= {type(chosen), *(slot.stage for slot in model.slots.values())}
        train_once(model, optimizer)
        model.step_epoch(dice.random())
    return seen


@pytest.mark.filterwarnings("ignore::kasmina_core.MisuseWarning")
def test_every_legal_command_is_carried_out_and_every_other_is_refused():
    seen = set.union(*(live(seed) for seed in range(4)))
    assert {type(command) for command in every_command([FIRST])} <= seen
    assert set(SeedStage) - {SeedStage.UNKNOWN} <= seen


def test_waiting_comes_first_and_candidates_in_their_order():
    model, _ = make_model()
    assert legal_now(model) == (
        Continue(),
        *(Germinate(slot, name) for slot in (FIRST, SECOND) for name in BLUEPRINTS[Topology.CNN]),
    )


def test_candidates_may_depend_on_the_slot():
    model, _ = make_model()
    found = legal_commands(model.observe(), lambda slot: ["scale"] if slot.slot == FIRST else [])
    assert found == (Continue(), Germinate(FIRST, "scale"))
    with pytest.raises(TypeError, match="blueprints must map topologies"):
        legal_commands(model.observe(), ["scale"])


def test_a_gate_that_only_a_measurement_could_answer_may_be_asked():
    slot = SlotObservation("a", Topology.CNN, 4, SeedStage.TRAINING)
    seen = Observation(1, None, False, 0, 0, (slot, dataclasses.replace(slot, slot="b", can_advance=False)))
    assert [command.slot for command in legal_commands(seen, {}) if isinstance(command, Advance)] == ["a"]


def test_looking_at_a_model_asks_no_gate_and_measures_nothing():
    model, recorder = make_model()
    bring_to(model, SeedStage.TRAINING)
    model.slots[FIRST].pause()
    model.slots[FIRST].resume()
    before, calls = len(recorder.events), model.growth.evaluator.calls
    model.observe()
    assert (len(recorder.events), model.growth.evaluator.calls) == (before, calls)
