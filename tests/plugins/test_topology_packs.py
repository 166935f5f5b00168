"""Packs that add topologies: names that appear and go with them, clashes, and what the commands tell."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fake_packs import Site
from projects import ROOT, install_project

from kasmina_core import (
    BlueprintSpec,
    CheckpointError,
    InjectionPoint,
    MorphogeneticModel,
    NameConflictError,
    PackReason,
    PackRecord,
    PackState,
    PluginError,
    PluginRegistry,
    Topology,
    TopologyError,
    graft_seeds,
    hookimpl,
    load_checkpoint,
    save_checkpoint,
    save_seeds,
)
from kasmina_core.cli import main


class Adds:
    """A pack with topologies, and blueprints for some."""

    def __init__(self, *topologies: Any, blueprints: tuple[Topology | str, ...] = ()) -> None:
        self.topologies, self.blueprints = topologies, blueprints

    @hookimpl
    def kasmina_topologies(self) -> Any:
        return self.topologies

    @hookimpl
    def kasmina_blueprints(self) -> Any:
        return [
            BlueprintSpec(f"seed{i}", Topology(t), "torch.nn:Identity", lambda dim: 0)
            for i, t in enumerate(self.blueprints)
        ]


def grid(value: str, **row: Any) -> Topology:
    return Topology.declare(value, "bnf", **{"width": "f"} | row)


def registry(**packs: Any) -> PluginRegistry:
    """Register packs by hand; one that is refused leaves its record."""
    made = PluginRegistry(checks=False)
    for name, pack in packs.items():
        try:
            made.register_pack(name, pack)
        except PluginError:
            assert made.pack(name).state is not PackState.ACTIVE
    return made


def test_a_name_is_known_while_its_pack_is_active() -> None:
    topology = grid("known-while")
    made = registry(mine=Adds(topology))
    assert made.pack("mine").topologies == ("known-while",)
    assert Topology("known-while") is topology
    assert topology in list(Topology)
    made.unregister_pack("mine")
    with pytest.raises(
        TopologyError, match=r"'known-while' is not a topology.*Valid: cnn, .*A pack can add others"
    ):
        Topology("known-while")


def test_the_other_hooks_of_a_pack_may_ask_by_name() -> None:
    made = registry(mine=Adds(grid("by-name"), blueprints=("by-name",)))
    assert [entry.id for entry in made.blueprints.list_for_topology(grid("by-name"))] == ["mine:seed0"]


def test_a_pack_that_is_refused_adds_no_name() -> None:
    made = registry(mine=Adds(grid("of-refused"), blueprints=("nobodys",)))
    assert made.pack("mine").reason is PackReason.HOOK_FAILED
    assert made.pack("mine").topologies == ("of-refused",)
    with pytest.raises(TopologyError):
        Topology("of-refused")


def test_two_packs_that_add_one_name_are_told_with_both() -> None:
    made = registry(first=Adds(grid("twice")), second=Adds(grid("twice", sequence="n")))
    refused = made.pack("second")
    assert refused.reason is PackReason.DUPLICATE_ID
    assert isinstance(refused.error, NameConflictError)
    assert "2 topologies are named 'twice'" in refused.cause
    assert "pack 'first' (module test_topology_packs.Adds)" in refused.cause
    assert "pack 'second' (module test_topology_packs.Adds)" in refused.cause
    assert Topology("twice") is grid("twice")


def test_two_packs_that_add_the_same_row_are_told_with_both() -> None:
    made = registry(first=Adds(grid("same-row")), second=Adds(grid("same-row")))
    assert made.pack("second").reason is PackReason.DUPLICATE_ID
    assert "2 packs add the topology 'same-row':\n  first (" in made.pack("second").cause
    assert Topology("same-row") is grid("same-row")
    made.unregister_pack("first")
    assert made.register_pack("second", Adds(grid("same-row"))).topologies == ("same-row",)


@pytest.mark.parametrize("order", [("adds", "uses"), ("uses", "adds")])
def test_another_pack_may_have_blueprints_for_it_whatever_is_loaded_first(order: tuple[str, str]) -> None:
    topology = grid("shared")
    packs = {"adds": Adds(topology), "uses": Adds(blueprints=(topology,))}
    made = registry(**{name: packs[name] for name in order})
    assert [record.state for record in made.packs] == [PackState.ACTIVE] * 2
    made.unregister_pack("adds")
    assert Topology("shared") is topology  # a blueprint is still for it


def test_a_bundled_name_stays_the_bundled_one() -> None:
    refused = registry(mine=Adds(grid("cnn"))).pack("mine")
    assert refused.reason is PackReason.DUPLICATE_ID
    assert "bundled with kasmina" in refused.cause
    assert Topology("cnn") is Topology.CNN


def test_a_registry_that_is_gone_holds_no_name() -> None:
    made = registry(mine=Adds(grid("of-a-test")))
    del made
    gc.collect()
    other = grid("of-a-test", sequence="n")
    assert registry(mine=Adds(other)).pack("mine").state is PackState.ACTIVE
    assert Topology("of-a-test") is other


@pytest.mark.parametrize("odd", ["graph", {"graph": 1}, None, 3])
def test_what_is_no_topology_is_refused(odd: Any) -> None:
    refused = registry(mine=Adds(odd)).pack("mine")
    assert refused.reason is PackReason.WRONG_TYPE
    assert "kasmina_topologies must return only Topology" in refused.cause


# -- files ------------------------------------------------------------------------------------------------------------


def model_of(topology: Topology, registry: PluginRegistry) -> MorphogeneticModel:
    shape = topology.shape(4, 2, (3,) * (topology.ndim - 2))
    point = InjectionPoint("only", "0", 4, topology)
    return MorphogeneticModel(
        torch.nn.Sequential(torch.nn.Identity()),
        [point],
        example=torch.ones(shape),
        registry=registry.blueprints,
    )


def test_a_file_whose_topology_is_not_known_names_the_pack_to_install(tmp_path: Path) -> None:
    with_pack, without = PluginRegistry(checks=False), PluginRegistry()
    pack = Adds(grid("only-saved"), blueprints=("only-saved",))
    with_pack.register_pack("saved", pack, "kasmina-saved", "1.0")
    model = model_of(Topology("only-saved"), with_pack)
    model.germinate("only", "saved:seed0")
    save_checkpoint(tmp_path / "run", model)
    save_seeds(tmp_path / "seeds", model)
    with_pack.unregister_pack("saved")
    other = model_of(Topology.CNN, without)
    says = (
        r"No pack that is loaded here has the topology 'only-saved'\. The seed is from pack 'saved': "
        r"install kasmina-saved==1\.0 from where you have the pack\."
    )
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(tmp_path / "run", other)
    with pytest.raises(CheckpointError, match=says):
        graft_seeds(tmp_path / "seeds", other)


# -- an installed pack ------------------------------------------------------------------------------------------------


@pytest.fixture
def stations(site: Site) -> PackRecord:
    site.distributions.add(install_project(site.root, ROOT / "tests" / "topology_pack"))
    loaded = PluginRegistry()
    loaded.load_installed()
    return loaded.pack("stations")


def kasmina(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_an_installed_pack_is_found_checked_and_active(stations: PackRecord) -> None:
    assert (stations.state, stations.origin) == (PackState.ACTIVE, "kasmina-stations 1.0")
    assert stations.topologies == ("stations",)
    assert stations.blueprints == ("stations:bottleneck", "stations:conv", "stations:norm")


@pytest.mark.usefixtures("stations", "fresh_default_registry")
def test_the_commands_tell_of_its_topology() -> None:
    assert "stations" in kasmina("plugins", "list").stdout
    shown = kasmina("plugins", "info", "stations")
    assert shown.exit_code == 0
    assert "  topologies    stations\n" in shown.stdout
    told = json.loads(kasmina("plugins", "info", "stations", "--json").stdout)
    assert told["topologies"] == ["stations"]
    assert json.loads(kasmina("plugins", "info", "stations:conv", "--json").stdout)["topology"] == "stations"


@pytest.mark.usefixtures("stations")
def test_plugins_check_runs_every_check_of_it() -> None:
    done = kasmina("plugins", "check", "stations", "--device", "cpu")
    assert (done.exit_code, "3 blueprints of 1 pack, 3 passed" in done.stdout) == (0, True), done.stdout
