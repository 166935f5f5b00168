"""What an installed pack declares takes effect wherever the core is used: in the library and in the command."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from fake_packs import SEEDS, Site, run_python

from kasmina_core import (
    GateChecksJoined,
    GateCheckSpec,
    GateLevel,
    GateResult,
    GerminationError,
    GrowthConfig,
    MorphogeneticModel,
    PluginError,
    PluginRegistry,
    SeedStage,
    TelemetryEvent,
    UnknownNameError,
    default_registry,
    hookimpl,
    reset_default_registry,
)
from kasmina_core.cli import main
from kasmina_core.telemetry import JsonLinesSink, MemorySink, Telemetry

PACK = (
    SEEDS
    + """
from kasmina_core import GateCheckSpec, GateLevel

@hookimpl
def kasmina_blueprints():
    return [scale("scale")]

@hookimpl
def kasmina_hosts():
    return [HostSpec("tiny", "fake_mine:tiny", Topology.CNN)]

def tiny(in_channels=1, num_classes=2):
    return Tiny(in_channels, num_classes)

from kasmina_core import HookedHost, InjectionPoint

class Tiny(HookedHost, nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.stem, self.head = nn.Conv2d(in_channels, 4, 3), nn.Linear(4, num_classes)

    def injection_points(self):
        return [InjectionPoint("stem", "stem", 4, Topology.CNN)]

    def example_inputs(self):
        return torch.zeros(2, self.stem.in_channels, 8, 8)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))

@hookimpl
def kasmina_policies():
    from kasmina_core import PlateauPolicy
    return {"eager": lambda **options: PlateauPolicy(patience=1, min_delta=1e9, **options)}

SEEN = []

@hookimpl
def kasmina_sinks(config):
    def broken():
        raise OSError("no network")
    return {"list": lambda: lambda event: SEEN.append((dict(config), event)), "broken": broken, "none": lambda: 3}

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
    del sys.modules["fake_mine"]
    torch.set_num_threads(1)  # the command set as many as it liked


def grow(folder: Path, *arguments: str) -> Result:
    short = ("--out", str(folder), "--epochs", "2", "--batch-size", "512")
    return CliRunner().invoke(main, ["grow", *short, "--policy", "mine:eager", *arguments])


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


# -- blueprints, hosts and policies -----------------------------------------------------------------------------------


def test_a_host_a_policy_and_a_blueprint_of_a_pack_make_a_model(pack: PluginRegistry) -> None:
    host = pack.hosts.create("mine:tiny", in_channels=3)
    model = MorphogeneticModel(host, config=GrowthConfig(pack_gate_checks=False))
    policy = pack.policies()["mine:eager"](blueprints=lambda slot: ["mine:scale"])
    for _ in range(4):
        model.step_epoch(1.0)
        model.follow(policy)
    state = model.slots["stem"].state
    assert state is not None
    assert state.blueprint_id == "mine:scale"


def test_the_command_grows_a_host_of_a_pack_from_its_blueprint_by_its_policy(
    pack: PluginRegistry, tmp_path: Path
) -> None:
    result = grow(tmp_path / "run", "--host", "mine:tiny", "--blueprint", "mine:scale", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert (record["host"], record["config"]["policy"]) == ("mine:tiny", "mine:eager")
    assert [seed["blueprint"] for seed in record["seeds"]] == ["mine:scale"]


# -- sinks ------------------------------------------------------------------------------------------------------------


def seen_by_the_pack() -> list[tuple[dict[str, Any], TelemetryEvent]]:
    seen: list[tuple[dict[str, Any], TelemetryEvent]] = sys.modules["fake_mine"].SEEN
    return seen


@pytest.mark.parametrize("name", ["mine:list", "list"])
def test_a_sink_of_a_pack_is_named_beside_ones_own(pack: PluginRegistry, name: str) -> None:
    own = MemorySink()
    with Telemetry([name, own], sink_config={"project": "x"}) as telemetry:
        model, _ = make_model()
        model.emit_to(telemetry)
        model.germinate("0", "mine:scale")
    assert [event for _, event in seen_by_the_pack()] == own.events != []
    assert seen_by_the_pack()[0][0] == {"project": "x"}


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("mine:lost", UnknownNameError, "No sink 'mine:lost' is registered. Did you mean 'mine:list'?"),
        ("zzz", UnknownNameError, "No sink 'zzz' is registered. Known: broken, list, none."),
        ("mine:broken", PluginError, "Sink 'mine:broken' could not be made: OSError('no network')"),
        ("mine:none", PluginError, "Sink 'mine:none' could not be made: TypeError"),
    ],
)
def test_a_sink_that_cannot_be_made_is_an_error_at_once(
    pack: PluginRegistry, tmp_path: Path, name: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        Telemetry([name], registry=pack)
    result = grow(tmp_path / "run", "--sink", name)
    assert result.exit_code == (2 if error is UnknownNameError else 1)
    assert f"'{name}'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_no_sink_of_a_pack_is_made_or_loaded_unless_it_is_named() -> None:
    code = "import sys, kasmina_core.telemetry as t; t.Telemetry([print]); print([m for m in sys.modules if 'packs' in m])"
    assert run_python(code).stdout == "[]\n"


def test_the_command_sends_its_events_to_a_sink_of_a_pack(pack: PluginRegistry, tmp_path: Path) -> None:
    result = grow(tmp_path / "run", "--blueprint", "mine:scale", "--sink", "mine:list")
    assert result.exit_code == 0, result.stderr
    kept = [event["type"] for event in JsonLinesSink.read(tmp_path / "run" / "events.jsonl")]
    assert [event.type.value for _, event in seen_by_the_pack()] == kept
    assert seen_by_the_pack()[0][0] == {"task": "digits", "seed": 0, "folder": str(tmp_path / "run")}


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
    result = grow(tmp_path / "run", "--blueprint", "mine:scale", "--epochs", "3")
    assert result.exit_code == 0, result.stderr
    events = list(JsonLinesSink.read(tmp_path / "run" / "events.jsonl"))
    assert ["mine:veto"] in [e["checks"] for e in events if e["type"] == "gate_checks_joined"]
    first = [e["reason"] for e in events if e["type"] == "gate_evaluated" and e["gate"] == "G1"]
    assert first
    assert all("mine:veto failed" in reason for reason in first)
    shown = CliRunner().invoke(main, ["plugins", "info", "mine"]).stdout
    assert "Its gate checks join the gates of every model" in shown
    assert "KASMINA_PLUGINS_BLOCK=mine:veto" in shown
