"""What an installed pack declares takes effect wherever the core is used: in the library and in the command."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from fake_packs import SEEDS, Site

from kasmina_core import (
    GateChecksJoined,
    GateCheckSpec,
    GateLevel,
    GateResult,
    GerminationError,
    GrowthConfig,
    MorphogeneticModel,
    PluginRegistry,
    SeedStage,
    TelemetryEvent,
    default_registry,
    hookimpl,
    reset_default_registry,
)
from kasmina_core.cli import main
from kasmina_core.telemetry import JsonLinesSink

PACK = (
    SEEDS
    + """
from kasmina_core import GateCheckSpec, GateLevel

@hookimpl
def kasmina_blueprints():
    return [scale("scale")]

@hookimpl
def kasmina_gate_checks():
    return [GateCheckSpec("veto", (GateLevel.G1,), lambda context: 0.0, minimum=1.0)]
"""
)


@pytest.fixture
def pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_default_registry: None
) -> Iterator[PluginRegistry]:
    """The registry of the process, with the pack ``mine`` beside those that are installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    Site(tmp_path).install("fake-mine", "mine = fake_mine", fake_mine=PACK)
    yield default_registry()
    torch.set_num_threads(1)  # the command set as many as it liked


def grow(folder: Path, *arguments: str) -> Result:
    short = ("--out", str(folder), "--epochs", "3", "--batch-size", "512")
    eager = ("--policy-option", "patience=1", "--policy-option", "min_delta=1e9")
    return CliRunner().invoke(main, ["grow", *short, *eager, *arguments])


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[TelemetryEvent] = []

    def emit(self, event: TelemetryEvent) -> None:
        self.events.append(event)

    @property
    def joined(self) -> list[tuple[str, ...]]:
        """The gate checks that were said to judge a seed, for each seed."""
        return [event.checks for event in self.events if isinstance(event, GateChecksJoined)]


def make_model(**arguments: Any) -> tuple[MorphogeneticModel, Recorder]:
    recorder = Recorder()
    host = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
    example = torch.zeros(2, 1, 8, 8)
    return MorphogeneticModel(host, ["0"], example=example, telemetry=recorder, **arguments), recorder


# -- gate checks ------------------------------------------------------------------------------------------------------


def names(result: GateResult) -> list[str]:
    return [check.name for check in result.checks]


@pytest.mark.parametrize("given", ["the registry", "its blueprints", "nothing"])
def test_a_check_of_an_installed_pack_vetoes_in_every_model(pack: PluginRegistry, given: str) -> None:
    registry: dict[str, Any] = {"the registry": pack, "its blueprints": pack.blueprints, "nothing": None}
    model, recorder = make_model(registry=registry[given])
    model.germinate("0", "mine:scale")
    result = model.advance_stage("0")
    assert (result.gate, result.passed) == (GateLevel.G1, False)
    assert "mine:veto failed: 0" in result.reason
    assert recorder.joined == [("mine:veto",)]
    again = copy.deepcopy(model)
    again.step_epoch()
    assert model.slots["0"].stage is again.slots["0"].stage is SeedStage.GERMINATED


def test_a_model_can_leave_the_checks_of_packs_out(pack: PluginRegistry) -> None:
    model, recorder = make_model(config=GrowthConfig(pack_gate_checks=False))
    model.germinate("0", "mine:scale")
    result = model.advance_stage("0")
    assert result.passed
    assert "mine:veto" not in names(result)
    assert recorder.joined == []


def test_a_blocked_check_judges_nobody(pack: PluginRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KASMINA_PLUGINS_BLOCK", "mine:veto")
    reset_default_registry()
    model, recorder = make_model()
    model.germinate("0", "mine:scale")
    assert model.advance_stage("0").passed
    assert recorder.joined == []


class Checks:
    """A pack of gate checks."""

    def __init__(self, *checks: GateCheckSpec) -> None:
        self.checks = checks

    @hookimpl
    def kasmina_gate_checks(self) -> tuple[GateCheckSpec, ...]:
        return self.checks


def test_a_check_of_a_pack_passes_nothing_that_another_refuses(pack: PluginRegistry) -> None:
    eager = GateCheckSpec("eager", tuple(GateLevel), lambda context: 1e9, minimum=1.0)
    pack.register_pack("eager", Checks(eager))
    model, _ = make_model()
    model.germinate("0", "mine:scale")
    result = model.advance_stage("0")
    assert not result.passed
    assert {"mine:veto", "eager:eager"} < {*names(result)}
    pack.unregister_pack("mine")
    model.step_epoch()
    assert model.slots["0"].stage is SeedStage.TRAINING
    assert not model.advance_stage("0").passed  # G2 has never measured anything


def test_a_check_of_a_pack_can_refuse_a_germination(pack: PluginRegistry) -> None:
    pack.register_pack("full", Checks(GateCheckSpec("quota", (GateLevel.G0,), lambda c: 0.0, minimum=1.0)))
    model, recorder = make_model()
    with pytest.raises(GerminationError, match="full:quota failed: 0"):
        model.germinate("0", "mine:scale")
    assert model.slots["0"].seed is None
    assert recorder.events == []


def test_the_command_asks_the_checks_of_packs_and_says_so(pack: PluginRegistry, tmp_path: Path) -> None:
    result = grow(tmp_path / "run", "--blueprint", "mine:scale")
    assert result.exit_code == 0, result.stderr
    events = list(JsonLinesSink.read(tmp_path / "run" / "events.jsonl"))
    assert ["mine:veto"] in [e["checks"] for e in events if e["type"] == "gate_checks_joined"]
    first = [e["reason"] for e in events if e["type"] == "gate_evaluated" and e["gate"] == "G1"]
    assert first
    assert all("mine:veto failed" in reason for reason in first)
    shown = CliRunner().invoke(main, ["plugins", "info", "mine"]).stdout
    assert "Its gate checks join the gates of every model" in shown
    assert "KASMINA_PLUGINS_BLOCK=mine:veto" in shown
