"""Events tell what happened: each once, in order, without gaps, in agreement with the slots."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import pytest
import torch
from state_helpers import FIRST, SECOND, Scale, bring_to, make_model, make_registry, open_config, train_once

import kasmina_core.events as events
from kasmina_core import (
    Advance,
    AlphaChanged,
    BlueprintRegistered,
    BlueprintSpec,
    CommandDone,
    CommandRefused,
    Continue,
    Cull,
    EpochEnded,
    GateEvaluated,
    Germinate,
    GerminationError,
    IsolationViolation,
    MemorySink,
    MisuseWarning,
    RampUnit,
    SeedCulled,
    SeedFossilized,
    SeedGerminated,
    SeedStage,
    SlotReading,
    StageChanged,
    Telemetry,
    TelemetryEvent,
    TelemetryEventType,
    Topology,
    is_valid_transition,
    tie_optimizer,
)

S = SeedStage


def told(recorder, slot=FIRST):
    """The events of a slot as short text."""
    short = []
    for e in recorder.events:
        if e.slot != slot:
            continue
        if isinstance(e, StageChanged):
            short.append(f"{e.before}>{e.after}")
        elif isinstance(e, GateEvaluated):
            short.append(f"{e.gate}{'+' if e.passed else '-'}")
        elif isinstance(e, AlphaChanged):
            short.append(f"alpha {e.alpha:.2f}")
        else:
            short.append(e.type.value)
    return short


def test_a_whole_life_is_told_in_order_each_event_once():
    model, recorder = make_model(open_config(ramp_steps=2))
    bring_to(model, S.FOSSILIZED)
    assert told(recorder) == [
        "seed_germinated",
        "G0+",
        "DORMANT>GERMINATED",
        "G1+",
        "GERMINATED>TRAINING",
        "G2-",
        "G2+",
        "TRAINING>BLENDING",
        "alpha 0.50",
        "G3-",
        "alpha 1.00",
        "G3+",
        "BLENDING>SHADOWING",
        "G4+",
        "SHADOWING>PROBATIONARY",
        "G5-",
        "G5+",
        "PROBATIONARY>FOSSILIZED",
        "seed_fossilized",
    ]


def test_a_cull_and_its_cooldown_are_told_in_order():
    model, recorder = make_model(open_config(embargo_epochs=2))
    bring_to(model, S.TRAINING)
    recorder.events.clear()
    model.cull(FIRST, "no use")
    for _ in range(6):
        model.step_epoch(1.0)
    assert told(recorder) == [
        "TRAINING>CULLED",
        "seed_culled",
        "CULLED>EMBARGOED",
        "EMBARGOED>RESETTING",
        "RESETTING>DORMANT",
    ]


def test_a_paused_or_dormant_slot_tells_nothing():
    model, recorder = make_model()
    model.step_epoch(1.0)
    assert told(recorder) == told(recorder, SECOND) == []
    bring_to(model, S.TRAINING)
    model.slots[FIRST].pause()
    recorder.events.clear()
    for _ in range(3):
        model.step_epoch(1.0)
        model.advance_stage(FIRST)
    assert told(recorder) == []


@pytest.mark.parametrize("unit", RampUnit)
def test_the_sequence_has_no_gaps_and_stages_agree_with_the_slots(unit):
    model, recorder = make_model(open_config(ramp_unit=unit))
    optimizer = tie_optimizer(model, torch.optim.SGD(model.host_parameters(), lr=0.01))
    model.germinate(FIRST, "scale")
    stages = {FIRST: "DORMANT", SECOND: "DORMANT"}
    for epoch in range(25):
        if epoch == 2:
            model.germinate(SECOND, "normed")
        if epoch == 9:
            model.cull(SECOND, "no use")
        for _ in range(2):
            train_once(model, optimizer)
        model.step_epoch(1.0)
    for e in recorder.events:
        if isinstance(e, StageChanged):
            assert e.before == stages[e.slot]
            assert is_valid_transition(S[e.before], S[e.after])
            stages[e.slot] = e.after
    assert stages == {name: slot.stage.name for name, slot in model.slots.items()}
    assert [e.sequence for e in recorder.events] == list(range(len(recorder.events)))
    epochs = [e.epoch for e in recorder.events]
    assert epochs == sorted(epochs)
    assert epochs[-1] <= model.epoch


def test_the_sequence_counts_also_what_nobody_heard():
    model, recorder = make_model()
    model.emit_to(None)
    bring_to(model, S.TRAINING)
    assert recorder.events == []
    model.emit_to(recorder)
    model.cull(FIRST)
    # germinated, G0, GERMINATED, G1, TRAINING and an epoch came before
    assert [e.sequence for e in recorder.events] == [6, 7]


def test_a_germination_tells_what_it_added():
    model, recorder = make_model()
    model.germinate(FIRST, "scale", "my-seed")
    assert recorder.events[0] == SeedGerminated(
        slot=FIRST, seed_id="my-seed", epoch=0, sequence=0, blueprint_id="mine:scale", parameters=8
    )


def test_a_refused_germination_tells_nothing():
    model, recorder = make_model()
    with pytest.raises(GerminationError):
        model.germinate(FIRST, "picky")
    assert recorder.events == []
    model.germinate(FIRST, "scale")
    assert recorder.events[0].sequence == 0


def test_a_fossil_tells_its_worth():
    model, recorder = make_model()
    bring_to(model, S.PROBATIONARY)
    model.step_epoch(0.5)
    model.step_epoch(0.25)
    gain = model.slots[FIRST].last_evidence.gain
    model.advance_stage(FIRST)
    event = recorder.events[-1]
    assert isinstance(event, SeedFossilized)
    assert (event.parameters, event.gain, event.total_improvement) == (8, gain, 0.75)
    assert event.type.is_terminal


def test_a_cull_tells_why_and_from_where():
    model, recorder = make_model()
    bring_to(model, S.TRAINING)
    model.cull(FIRST, "no use")
    event = recorder.events[-1]
    assert isinstance(event, SeedCulled)
    assert (event.reason, event.stage, event.blueprint_id, event.gain) == (
        "no use",
        "TRAINING",
        "mine:scale",
        None,
    )
    bring_to(model, S.SHADOWING, SECOND)
    gain = model.slots[SECOND].last_evidence.gain
    model.cull(SECOND)
    assert recorder.events[-1].gain == gain


def test_an_epoch_tells_the_whole_model_and_every_slot():
    model, recorder = make_model()
    bring_to(model, S.SHADOWING)
    model.germinate(SECOND, "normed")
    model.step_epoch(0.5, flops=3e9)
    event = recorder.events[-1]
    seen = model.observe()
    assert isinstance(event, EpochEnded)
    assert (event.epoch, event.metric, event.flops, event.lost_epochs) == (model.epoch, 0.5, 3e9, 0)
    assert event.host_parameters == seen.host_parameters == sum(p.numel() for p in model.host_parameters())
    assert event.seed_parameters == sum(p.numel() for p in model.seed_parameters())
    assert [reading.slot for reading in event.slots] == list(model.slots)
    for reading, slot in zip(event.slots, seen.slots, strict=True):
        for name in ("seed_id", "blueprint", "alpha", "parameters", "is_paused", "gain", "deviation"):
            assert getattr(reading, name) == getattr(slot, name), name
        assert (reading.stage, reading.epochs_in_stage) == (slot.stage.name, slot.epochs_in_stage)
    assert event.slots[0].gain == model.slots[FIRST].last_evidence.gain


def test_an_epoch_of_empty_slots_says_so_and_what_was_not_given_is_none():
    model, recorder = make_model()
    model.step_epoch()
    (event,) = recorder.events
    assert (event.metric, event.flops, event.seed_parameters) == (None, None, 0)
    assert event.slots == (SlotReading(FIRST, "DORMANT"), SlotReading(SECOND, "DORMANT"))


def test_commands_of_a_policy_are_told_done_or_refused_with_what_they_asked():
    class Asks:
        def decide(self, observation):
            return [Continue(), Germinate(FIRST, "scale"), Advance(FIRST), Cull(SECOND, "why not")]

    model, recorder = make_model()
    with pytest.warns(MisuseWarning, match="Cull was refused"):
        model.follow(Asks())
    told_of = [e for e in recorder.events if isinstance(e, CommandDone | CommandRefused)]
    assert [(type(e), e.slot, e.command, dict(e.arguments)) for e in told_of] == [
        (CommandDone, FIRST, "Germinate", {"blueprint": "scale", "options": {}, "straight": False}),
        (CommandDone, FIRST, "Advance", {}),
        (CommandRefused, SECOND, "Cull", {"reason": "why not", "revert": False, "keep": False}),
    ]
    assert told_of[2].reason == model.outcomes[-1].refusal
    assert all(json.dumps(e.to_dict()) for e in told_of)


def test_a_gate_tells_every_check():
    model, recorder = make_model()
    bring_to(model, S.TRAINING)
    result = model.advance_stage(FIRST)
    event = recorder.events[-1]
    assert isinstance(event, GateEvaluated)
    assert (event.gate, event.passed, event.reason) == ("G2", False, result.reason)
    assert [c["name"] for c in event.checks] == [c.name for c in result.checks]
    assert event.checks[0]["verdict"] == event.verdict == "waiting"


def leaky_model(every):
    registry = make_registry()
    shared = []

    class Leaks(Scale):
        def __init__(self, dim):
            super().__init__(dim)
            object.__setattr__(self, "outside", shared)

        def forward(self, x):
            return super().forward(x) * self.outside[0].view(1, -1, 1, 1)

    registry.register(BlueprintSpec("leaks", Topology.CNN, Leaks, lambda dim: 2 * dim), pack="p")
    model, recorder = make_model(open_config(isolation_every=every), registry=registry)
    shared.append(model.host[1].weight)
    return model, recorder


def test_a_leak_is_counted_told_and_fails_g2():
    model, recorder = leaky_model(every=0)
    bring_to(model, S.TRAINING, blueprint="leaks")
    for epoch in range(1, 4):
        model.step_epoch(1.0)
        assert model.slots[FIRST].state.metrics.isolation_violations == epoch
    result = model.slots[FIRST].last_gate
    assert result.reason == "isolation violations failed: 3 (needs <= 0)"
    leaks = [e for e in recorder.events if isinstance(e, IsolationViolation)]
    assert [e.tensors for e in leaks] == [("1.weight",)] * 3
    assert all(e.leak > e.threshold for e in leaks)


def test_a_leak_is_looked_for_every_few_steps():
    model, recorder = leaky_model(every=2)
    optimizer = tie_optimizer(model, torch.optim.SGD(model.host_parameters(), lr=0.01))
    bring_to(model, S.TRAINING, blueprint="leaks")
    for _ in range(6):
        train_once(model, optimizer)
    assert sum(isinstance(e, IsolationViolation) for e in recorder.events) == 3
    model, recorder = make_model(open_config(isolation_every=2))
    optimizer = tie_optimizer(model, torch.optim.SGD(model.host_parameters(), lr=0.01))
    bring_to(model, S.TRAINING)
    for _ in range(6):
        train_once(model, optimizer)
    assert not any(isinstance(e, IsolationViolation) for e in recorder.events)


# -- through sinks ---------------------------------------------------------------------------------------------------


class Raises:
    def write(self, batch):
        raise OSError("disk full")

    def close(self):
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_sink_that_raises_changes_nothing_for_the_model_or_the_others(monkeypatch, caplog):
    monkeypatch.setattr("kasmina_core.telemetry.delivery.RETRY_WAITS", ())
    heard, recorder = make_model()
    deaf, _ = make_model()
    sink = MemorySink()
    telemetry = Telemetry([Raises(), sink])
    deaf.emit_to(telemetry)
    for model in (heard, deaf):
        bring_to(model, S.FOSSILIZED)
        bring_to(model, S.CULLED, SECOND)
    telemetry.close()
    assert list(sink.events) == recorder.events
    assert {n: s.stage for n, s in heard.slots.items()} == {n: s.stage for n, s in deaf.slots.items()}
    assert "Raises raised" in caplog.text


# -- as data ---------------------------------------------------------------------------------------------------------

KINDS = [
    kind
    for _, kind in inspect.getmembers(events, inspect.isclass)
    if issubclass(kind, TelemetryEvent) and kind is not TelemetryEvent
]
VALUES = {
    "str": "text",
    "int": 3,
    "float": 0.5,
    "bool": True,
    "float | None": None,
    "tuple[str, ...]": ("a", "b"),
    "Mapping[str, Any]": {"lr": 0.5},
    "Annotated[Mapping[str, Any], Mark.LATER]": {"torch": "2"},
    "tuple[SlotReading, ...]": (events.SlotReading("a", "DORMANT"),),
    "tuple[Mapping[str, Any], ...]": ({"name": "gain", "value": None},),
}


def example(kind):
    return kind(**{f.name: VALUES[str(f.type)] for f in dataclasses.fields(kind)})


def test_every_type_has_one_event_and_two_end_a_life():
    assert sorted(kind.type.name for kind in KINDS) == sorted(member.name for member in TelemetryEventType)
    assert [t.name for t in TelemetryEventType if t.is_terminal] == ["SEED_FOSSILIZED", "SEED_CULLED"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_is_frozen_and_becomes_json(kind):
    event = example(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.slot = "other"
    assert not hasattr(event, "__dict__")
    data = json.loads(json.dumps(event.to_dict()))
    assert data["type"] == kind.type.value
    assert set(data) == {"type", *(f.name for f in dataclasses.fields(kind))}


def test_a_registration_is_an_event_without_a_slot():
    event = BlueprintRegistered(blueprint_id="p:b", distribution="d 1.0", verdict="passed")
    assert (event.slot, event.seed_id, event.sequence) == ("", "", -1)


def test_records_of_all_seeds_are_plain_data():
    model, _ = make_model()
    assert model.telemetry_records() == []
    bring_to(model, S.SHADOWING)
    model.germinate(SECOND, "normed")
    first, second = model.telemetry_records()
    assert (first.slot, first.stage, first.alpha, first.epoch) == (FIRST, "SHADOWING", 1.0, model.epoch)
    assert (second.slot, second.stage, second.gain, second.gradient_norm) == (
        SECOND,
        "GERMINATED",
        None,
        None,
    )
    assert first.gain == model.slots[FIRST].last_evidence.gain
    assert not math.isnan(json.loads(json.dumps(first.to_dict()))["metric"])
