"""Declarations of seeds and the registry that finds them again."""

from __future__ import annotations

import re
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from state_helpers import PerToken, Scale
from torch import nn

from kasmina_core import (
    AmbiguousNameError,
    BlueprintError,
    BlueprintRegistry,
    BlueprintSpec,
    NameConflictError,
    PluginError,
    Topology,
    UnknownNameError,
)
from kasmina_core.errors import did_you_mean

CNN, TRANSFORMER = Topology.CNN, Topology.TRANSFORMER


def spec(name="scale", topology=CNN, factory=Scale, **more) -> BlueprintSpec:
    return BlueprintSpec(name, topology, factory, **{"param_estimate": lambda dim: 2 * dim, **more})


def registry_of(*ids: str, topology=CNN) -> BlueprintRegistry:
    registry = BlueprintRegistry()
    for full in ids:
        pack, _, name = full.partition(":")
        registry.register(spec(name, topology), pack=pack)
    return registry


# -- declarations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "Scale", "1x", "a b", "a:b", "a.b", "-a", "a-", "a--b", "ä", None, 5, "a\n"]
)
def test_a_name_that_could_not_be_asked_for_is_refused(name):
    with pytest.raises(BlueprintError, match="is not a blueprint name: use lower case letters"):
        spec(name)


@pytest.mark.parametrize("name", ["a", "conv-3x3", "low_rank", "x2"])
def test_a_plain_name_is_accepted(name):
    assert spec(name).name == name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"topology": "cnn"}, "Blueprint 'scale': topology must be a Topology, not 'cnn'"),
        ({"factory": "scale"}, "factory 'scale' must read 'package.module:attribute'"),
        ({"factory": ":Scale"}, "must read 'package.module:attribute'"),
        ({"factory": 5}, "factory 5 is neither callable nor text"),
        ({"param_estimate": 129}, "param_estimate=129 is a number, so say at which width"),
        ({"param_estimate": "many"}, "must be an int or a function of the width, not 'many'"),
        ({"param_estimate": None}, "must be an int or a function of the width, not None"),
    ],
)
def test_a_declaration_that_cannot_be_used_says_what_to_do(changes, says):
    with pytest.raises(BlueprintError, match=re.escape(says)):
        spec(**changes)


def test_an_estimate_is_a_function_of_the_width_or_a_number_at_one():
    assert spec().declared_params(64) == 128
    measured = spec(param_estimate=129, estimate_dim=64)
    assert measured.declared_params(64) == 129
    assert measured.declared_params(32) is None


def test_a_width_is_refused_with_a_reason():
    picky = spec(accepts_width=lambda dim: None if dim % 8 == 0 else f"{dim} is not a multiple of 8")
    assert picky.refusal(16) is None
    assert picky.refusal(12) == "12 is not a multiple of 8"
    assert spec().refusal(12) is None
    registry = BlueprintRegistry()
    registry.register(picky, pack="mine")
    with pytest.raises(
        BlueprintError, match="'mine:scale' does not take width 12: 12 is not a multiple of 8"
    ):
        registry.create("scale", 12)


def test_a_factory_may_be_text():
    assert spec(factory="torch.nn:Conv2d").load_factory() is nn.Conv2d
    assert spec(factory="torch:nn.Conv2d").load_factory() is nn.Conv2d


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("no_such_package.seeds:Scale", "ModuleNotFoundError"),
        ("torch.nn:Conv99d", "AttributeError"),
        ("torch:__version__", "is not callable"),
    ],
)
def test_a_factory_that_cannot_be_imported_gives_the_cause(factory, says):
    with pytest.raises(PluginError, match=says) as caught:
        spec(factory=factory).load_factory()
    assert f"Blueprint 'scale': '{factory}'" in str(caught.value)
    registry = BlueprintRegistry()
    registry.register(spec(factory=factory), pack="mine")
    with pytest.raises(PluginError, match=says):
        registry.create("scale", 4)


# -- the registry ----------------------------------------------------------------------------------------------------


def test_an_id_is_pack_and_name_and_a_unique_short_name_resolves():
    registry = registry_of("mine:scale", "yours:shift")
    assert registry.get("mine:scale") is registry.get("scale")
    assert registry.get("shift").id == "yours:shift"
    assert [e.id for e in registry.list_all()] == ["mine:scale", "yours:shift"]
    assert len(registry) == 2
    assert "mine:scale" in registry
    assert "scale" not in registry


def test_an_ambiguous_short_name_lists_the_ids():
    registry = registry_of("yours:scale", "mine:scale")
    with pytest.raises(
        AmbiguousNameError, match=r"'scale' is offered more than once. Use one of: mine:scale, yours:scale\."
    ):
        registry.get("scale")
    assert registry.get("yours:scale").pack == "yours"


def test_a_topology_narrows_a_short_name():
    registry = registry_of("mine:norm")
    registry.register(spec("norm", TRANSFORMER, PerToken), pack="yours")
    assert registry.get("norm", CNN).id == "mine:norm"
    assert registry.get("norm", TRANSFORMER).id == "yours:norm"
    with pytest.raises(AmbiguousNameError, match="mine:norm, yours:norm"):
        registry.get("norm")


def test_a_unique_name_of_the_other_topology_is_found_so_that_the_gate_can_say_why():
    assert registry_of("mine:norm").get("norm", TRANSFORMER).id == "mine:norm"


@pytest.mark.parametrize(
    ("asked", "topology", "says"),
    [
        ("scala", None, "No blueprint 'scala' is registered. Did you mean 'scale'?"),
        ("scala", CNN, "No blueprint 'scala' is registered for cnn. Did you mean 'scale'?"),
        ("zzzzz", CNN, "No blueprint 'zzzzz' is registered for cnn. Known: scale, shift."),
        ("mine:scal", None, "No blueprint 'mine:scal' is registered. Did you mean 'mine:scale'?"),
        ("zzzzz", TRANSFORMER, "No blueprint 'zzzzz' is registered for transformer."),
    ],
)
def test_an_unknown_name_suggests_a_near_one(asked, topology, says):
    with pytest.raises(UnknownNameError) as caught:
        registry_of("mine:scale", "mine:shift").get(asked, topology)
    assert str(caught.value) == says
    assert isinstance(caught.value, KeyError)


def test_two_claims_to_one_id_name_both_claimants():
    registry = BlueprintRegistry()
    registry.register(spec(), pack="mine", distribution="kasmina-mine", version="1.0")
    before = registry.list_all()
    with pytest.raises(NameConflictError) as caught:
        registry.register(spec(), pack="mine", distribution="other-mine", version="2.1")
    assert "Two blueprints claim the id 'mine:scale'" in str(caught.value)
    assert "first:  kasmina-mine 1.0\n  second: other-mine 2.1" in str(caught.value)
    assert registry.list_all() == before
    with pytest.raises(NameConflictError, match="second: pack 'mine'"):
        registry.register(spec(), pack="mine")


@pytest.mark.parametrize("pack", ["", "My pack", "a:b", "A"])
def test_a_pack_needs_a_usable_name(pack):
    with pytest.raises(BlueprintError, match="is not a pack name"):
        BlueprintRegistry().register(spec(), pack=pack)


def test_what_was_unregistered_is_gone_and_may_come_again():
    registry = registry_of("mine:scale")
    assert registry.unregister("scale").id == "mine:scale"
    assert len(registry) == 0
    with pytest.raises(UnknownNameError):
        registry.unregister("scale")
    registry.register(spec(), pack="mine")


def test_lists_are_sorted_by_id_and_topology():
    registry = registry_of("b:x", "a:y", "a:x")
    registry.register(spec("t", TRANSFORMER), pack="a")
    assert [e.id for e in registry.list_for_topology(CNN)] == ["a:x", "a:y", "b:x"]
    assert [e.id for e in registry.list_for_topology(TRANSFORMER)] == ["a:t"]
    assert [e.id for e in registry.list_all()] == ["a:t", "a:x", "a:y", "b:x"]


@pytest.mark.parametrize(
    ("mark", "asked"),
    [("broken", "broken:scale"), ("broken:scale", "broken:scale"), ("broken:scale", "scale")],
)
def test_what_could_not_be_loaded_raises_its_cause_when_asked_for(mark, asked):
    registry = registry_of("mine:shift")
    cause = PluginError("pack 'broken' needs scipy")
    registry.mark_unavailable(mark, cause)
    for _ in range(2):
        with pytest.raises(PluginError) as caught:
            registry.get(asked)
        assert caught.value is cause
    assert registry.get("shift").id == "mine:shift"
    assert len(traceback.format_exception(cause)) < 50


def test_a_broken_pack_does_not_hide_another_offer_of_the_name():
    registry = registry_of("mine:scale")
    registry.mark_unavailable("broken:scale", PluginError("no"))
    assert registry.get("scale").id == "mine:scale"


def test_what_comes_back_is_available_again():
    registry = BlueprintRegistry()
    registry.mark_unavailable("mine:scale", PluginError("no"))
    registry.register(spec(), pack="mine")
    registry.unregister("mine:scale")
    with pytest.raises(UnknownNameError):
        registry.get("mine:scale")


# -- building --------------------------------------------------------------------------------------------------------


def test_options_reach_the_factory():
    registry = BlueprintRegistry()
    registry.register(spec(options={"gain": 0.1}), pack="mine")
    module = registry.create("scale", 5, options={"gain": 0.0})
    assert isinstance(module, Scale)
    assert module.weight.flatten().tolist() == [1.0] * 5


def test_an_unknown_option_is_refused_with_a_near_one():
    registry = BlueprintRegistry()
    registry.register(spec(options={"gain": 0.1}), pack="mine")
    with pytest.raises(BlueprintError, match=r"'mine:scale' has no option 'gian'. Did you mean 'gain'"):
        registry.create("scale", 5, options={"gian": 0.0})
    with pytest.raises(BlueprintError, match=r"'mine:scale' has no option 'dim'. Known: gain"):
        registry.create("scale", 5, options={"dim": 0})


@pytest.mark.parametrize("error", [ValueError("gain must be positive"), TypeError("gain must be a number")])
def test_a_value_that_the_factory_refuses_names_width_and_options(error):
    def refuses(dim, gain=1.0):
        raise error

    registry = BlueprintRegistry()
    registry.register(spec(factory=refuses, options={"gain": 1.0}), pack="mine")
    with pytest.raises(BlueprintError) as caught:
        registry.create("scale", 5, options={"gain": -1.0})
    assert (
        str(caught.value)
        == f"Blueprint 'mine:scale' could not be built at width 5 with {{'gain': -1.0}}: {error}"
    )
    assert caught.value.__cause__ is error
    with pytest.raises(BlueprintError, match="at width 5 with its defaults"):
        registry.create("scale", 5)


def test_only_factories_that_want_it_are_told_whether_the_host_is_causal():
    heard = []

    def factory(dim, **options):
        heard.append(options)
        return nn.Identity()

    registry = BlueprintRegistry()
    registry.register(spec("asks", factory=factory, takes_causal=True), pack="mine")
    registry.register(spec("does-not", factory=factory), pack="mine")
    registry.create("asks", 4, causal=True)
    registry.create("asks", 4)
    registry.create("does-not", 4, causal=True)
    assert heard == [{"causal": True}, {"causal": False}, {}]


# -- names in general ------------------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "scale", "low-rank", "low_rank", "x2"])


@given(st.lists(st.tuples(names, names, st.sampled_from(list(Topology))), max_size=8))
def test_every_id_resolves_and_a_short_name_exactly_when_it_is_unique(offers):
    registry = BlueprintRegistry()
    taken = {}
    for pack, name, topology in offers:
        full = f"{pack}:{name}"
        if full in taken:
            with pytest.raises(NameConflictError, match=f"'{full}'"):
                registry.register(spec(name, topology), pack=pack)
            continue
        taken[full] = registry.register(spec(name, topology), pack=pack)
    assert [e.id for e in registry.list_all()] == sorted(taken)
    for full, entry in taken.items():
        assert registry.get(full) is entry
        name = entry.spec.name
        same = [e for e in taken.values() if e.spec.name == name]
        fitting = [e for e in same if e.spec.topology is entry.spec.topology]
        for topology, offered in ((None, same), (entry.spec.topology, fitting)):
            if len(offered) == 1:
                assert registry.get(name, topology) is offered[0]
            else:
                with pytest.raises(AmbiguousNameError) as caught:
                    registry.get(name, topology)
                assert all(e.id in str(caught.value) for e in offered)


@given(st.text(max_size=10), st.lists(st.text(min_size=1, max_size=10), max_size=5))
def test_a_suggestion_is_always_a_known_name(name, known):
    said = did_you_mean(name, known)
    if not known:
        assert said == ""
    else:
        assert said.startswith((" Did you mean '", " Known: "))
        assert any(one in said for one in known)
