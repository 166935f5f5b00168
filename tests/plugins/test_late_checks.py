"""Packs of the default registry are checked when something of them is first asked for, and given out whole or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_packs import GOOD, SEEDS, Site, run_python

from kasmina_core import PackReason, PackState, PluginError, PluginRegistry, Topology, default_registry

WRONG = (
    SEEDS
    + """
from kasmina_core import GateCheckSpec, GateLevel

@hookimpl
def kasmina_blueprints():
    return [scale("scale"), scale("wrong", param_estimate=lambda dim: dim + 1)]

@hookimpl
def kasmina_hosts():
    return [HostSpec("host", "collections:OrderedDict", Topology.CNN)]

@hookimpl
def kasmina_policies():
    return {"policy": object}

@hookimpl
def kasmina_tasks():
    return {"task": object}

@hookimpl
def kasmina_gate_checks():
    return [GateCheckSpec("veto", (GateLevel.G1,), lambda context: 1.0, minimum=0.5)]
"""
)
NOTED = GOOD.replace('scale("scale")', 'scale("NAME", factory=build)') + (
    "\nbuilt = []\ndef build(dim):\n    built.append(dim)\n    return Scale(dim)\n"
)


def test_germinating_a_seed_checks_its_pack_and_no_other(site: Site) -> None:
    for name in ("one", "other"):
        module = f"fake_{name}"
        site.install(f"fake-{name}", f"{name} = {module}", **{module: NOTED.replace("NAME", f"scale-{name}")})
    done = run_python(
        "from kasmina_cnn import CNNHost\nfrom kasmina_core import MorphogeneticModel, default_registry\n"
        "MorphogeneticModel(CNNHost(base_channels=2)).germinate('block2', 'scale-one')\n"
        "import fake_one, fake_other, sys\n"
        "print(bool(fake_one.built), bool(fake_other.built), 'kasmina_transformer.attention' in sys.modules)\n"
        "default_registry().blueprints.list_all()\n"
        "print(bool(fake_other.built))\n",
        site.root,
    )
    assert done.stdout.splitlines() == ["True False False", "True"], done.stderr


ASKED: dict[str, Callable[[PluginRegistry], object]] = {
    "a blueprint": lambda registry: registry.blueprints.get("bad:scale"),
    "a host": lambda registry: registry.hosts.get("bad:host"),
    "a policy": lambda registry: registry.policies()["bad:policy"],
    "a task": lambda registry: registry.tasks()["task"],
    "something it does not offer": lambda registry: registry.blueprints.get("bad:nothing"),
}


@pytest.mark.parametrize("what", ASKED)
def test_whatever_is_asked_for_first_of_a_pack_that_fails_raises_the_cause(
    site: Site, fresh_default_registry: None, what: str
) -> None:
    site.install("fake-bad", "bad = fake_bad", fake_bad=WRONG)
    registry = default_registry()
    with pytest.raises(PluginError, match="declared:   65 parameters at dim=64"):
        ASKED[what](registry)
    record = registry.pack("bad")
    assert (record.state, record.reason) == (PackState.INVALID, PackReason.CHECK_FAILED)
    for ask in ASKED.values():
        with pytest.raises(PluginError, match="declared:   65"):
            ask(registry)


def test_a_pack_that_fails_is_in_no_listing_no_gate_and_no_event(
    site: Site, fresh_default_registry: None
) -> None:
    listings: dict[str, Callable[[PluginRegistry], object]] = {
        "blueprints": lambda r: "bad:scale" in [e.id for e in r.blueprints.list_for_topology(Topology.CNN)],
        "all blueprints": lambda r: "bad:scale" in r.blueprints,
        "hosts": lambda r: "bad:host" in r.hosts.ids(),
        "gate checks": lambda r: "bad:veto" in [check.name for check in r.gate_checks()],
        "gate checks of models": lambda r: "bad:veto" in list(r.blueprints.gate_checks),
        "packs": lambda r: r.pack("bad").state is PackState.ACTIVE,
        "causes": lambda r: "bad:scale" not in r.blueprints.unavailable,
        "events": lambda r: "bad:scale" in [event.blueprint_id for event in r.events],
        "reports": lambda r: r.report("bad:wrong").verdict.value == "passed",  # type: ignore[union-attr]
    }
    site.install("fake-bad", "bad = fake_bad", fake_bad=WRONG)
    for name, is_there in listings.items():
        registry = PluginRegistry()
        registry.declare_installed()
        assert not is_there(registry), name


def test_a_short_name_is_that_of_the_pack_that_passes(site: Site, fresh_default_registry: None) -> None:
    site.install("fake-bad", "bad = fake_bad", fake_bad=WRONG)
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    assert default_registry().blueprints.get("scale", Topology.CNN).id == "good:scale"


def test_events_tell_the_verdict_of_every_blueprint(site: Site, fresh_default_registry: None) -> None:
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    registry = default_registry()
    registry.blueprints.get("good:scale")
    events = registry.events
    assert [event.sequence for event in events] == list(range(len(registry.blueprints)))
    assert {event.verdict for event in events} <= {"passed", "incomplete"}
    report = registry.report("good:scale")
    assert report is not None
    assert ("good:scale", report.verdict.value) in [(e.blueprint_id, e.verdict) for e in events]


def test_a_pack_that_asks_for_itself_while_it_is_checked_fails_alone(
    site: Site, fresh_default_registry: None
) -> None:
    recursive = GOOD.replace('scale("scale")', 'scale("scale", factory=build)') + (
        "\nimport kasmina_core\ndef build(dim):\n"
        "    kasmina_core.default_registry().blueprints.get('eager:scale')\n    return Scale(dim)\n"
    )
    site.install("fake-eager", "eager = fake_eager", fake_eager=recursive)
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    registry = default_registry()
    assert "is being checked" in registry.pack("eager").cause
    assert "good:scale" in registry.blueprints


def test_under_strict_every_pack_is_checked_at_once(
    site: Site, fresh_default_registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KASMINA_PLUGINS_STRICT", "1")
    site.install("fake-bad", "bad = fake_bad", fake_bad=WRONG)
    with pytest.raises(PluginError, match="strict is on"):
        default_registry()
