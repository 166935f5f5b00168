"""What the user asks of discovery, in the environment or as arguments, and what becomes of the packs."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from fake_packs import GOOD, SEEDS, Site

from kasmina_core import (
    HostSpec,
    PackReason,
    PackRecord,
    PackState,
    PluginError,
    PluginRegistry,
    SwitchError,
    Switches,
    Topology,
    UnknownNameError,
    default_registry,
    hookimpl,
    list_packs,
)

BOMB = "raise SystemExit(7)"
TWO = SEEDS + '@hookimpl\ndef kasmina_blueprints():\n    return [scale("one"), scale("two")]\n'


def loaded(**options: Any) -> PluginRegistry:
    registry = PluginRegistry(checks=False, **options)
    registry.load_installed()
    return registry


def states(site: Site, records: list[PackRecord]) -> dict[str, tuple[str, str | None]]:
    return {r.distribution: (r.state.value, r.reason and r.reason.value) for r in site.mine(records)}


# -- block and allow --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["bomb", "fake-bomb", "Fake_Bomb"])
def test_a_blocked_pack_is_not_imported_by_whichever_name_it_is_blocked(site: Site, entry: str) -> None:
    site.install("Fake.Bomb", "bomb = fake_bomb", version="0.3", fake_bomb="raise KeyboardInterrupt")
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    registry = loaded(block=[entry])
    assert states(site, registry.packs) == {
        "Fake.Bomb": ("blocked", "blocked"),
        "fake-good": ("active", None),
    }
    assert registry.pack("bomb").version == "0.3"
    with pytest.raises(
        PluginError, match=r"Fake\.Bomb 0\.3(?s:.*)'bomb' is blocked(?s:.*)KASMINA_PLUGINS_BLOCK"
    ):
        registry.blueprints.get("bomb:thing")


@pytest.mark.parametrize("allow", [["good"], ["fake-good"], ["good:scale"]])
def test_what_is_not_allowed_is_not_imported(site: Site, allow: list[str]) -> None:
    site.install("fake-bomb", "bomb = fake_bomb", fake_bomb="raise KeyboardInterrupt")
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    registry = loaded(allow=allow)
    assert states(site, registry.packs) == {
        "fake-bomb": ("blocked", "not_allowed"),
        "fake-good": ("active", None),
    }
    assert "good:scale" in registry.blueprints
    with pytest.raises(PluginError, match="not among those allowed"):
        registry.blueprints.get("bomb:thing")


def test_an_empty_allow_list_allows_nothing(site: Site) -> None:
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    assert states(site, loaded(allow=[]).packs) == {"fake-good": ("blocked", "not_allowed")}


def test_what_is_blocked_is_blocked_though_it_is_allowed(site: Site) -> None:
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    registry = loaded(allow=["good"], block=["fake-good"])
    assert states(site, registry.packs) == {"fake-good": ("blocked", "blocked")}


def test_a_single_blueprint_can_be_blocked(site: Site) -> None:
    site.install("fake-two", "two = fake_two", fake_two=TWO)
    registry = loaded(block=["two:one"])
    record = registry.pack("two")
    assert (record.state, record.blueprints, record.withheld) == (
        PackState.ACTIVE,
        ("two:two",),
        ("two:one",),
    )
    assert [b.id for b in registry.blueprints.list_all() if b.pack == "two"] == ["two:two"]
    for name in ("two:one", "one"):
        with pytest.raises(PluginError, match=r"'two:one' \(fake-two 1\.0\) is left out"):
            registry.blueprints.get(name)


def test_a_single_blueprint_can_be_allowed(site: Site) -> None:
    site.install("fake-two", "two = fake_two", fake_two=TWO)
    registry = loaded(allow=["two:one"])
    assert registry.pack("two").blueprints == ("two:one",)
    assert registry.pack("two").withheld == ("two:two",)


def test_a_blocked_blueprint_is_not_checked(site: Site) -> None:
    bad = TWO.replace('scale("one")', 'scale("one", param_estimate=lambda dim: 7)')
    site.install("fake-two", "two = fake_two", fake_two=bad)
    registry = PluginRegistry(block=["two:one", "kasmina"])
    registry.load_installed()
    assert registry.pack("two").state is PackState.ACTIVE
    assert registry.report("two:one") is None


def test_every_kind_of_thing_can_be_blocked_by_its_id_also_in_a_pack_registered_by_hand() -> None:
    class Pack:
        @hookimpl
        def kasmina_hosts(self) -> list[HostSpec]:
            return [HostSpec(name, "m:h", Topology.CNN) for name in ("h", "kept")]

        @hookimpl
        def kasmina_policies(self) -> dict[str, Any]:
            return {"p": print, "kept": print}

        @hookimpl
        def kasmina_sinks(self, config: Any) -> dict[str, Any]:
            return {"s": print, "kept": print}

    registry = PluginRegistry(checks=False, block=["mine:h", "mine:p", "mine:s"])
    registry.register_pack("mine", Pack())
    assert registry.hosts.ids() == list(registry.policies()) == list(registry.sinks()) == ["mine:kept"]
    for ask in (registry.hosts.get, registry.policies().__getitem__):
        with pytest.raises(PluginError, match="left out"):
            ask("mine:h" if ask == registry.hosts.get else "mine:p")
    registry.unregister_pack("mine")
    with pytest.raises(UnknownNameError, match="No host 'mine:h'"):
        registry.hosts.get("mine:h")


def test_a_pack_registered_by_hand_can_be_blocked() -> None:
    registry = PluginRegistry(checks=False, block=["mine"])
    with pytest.raises(PluginError, match="'mine' is blocked"):
        registry.register_pack("mine", object())


# -- prefer -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rivals(site: Site) -> Site:
    site.install("fake-a", "same = fake_a", version="1.1", fake_a=GOOD)
    site.install("fake-b", "same = fake_b", version="2.2", fake_b=GOOD)
    return site


def test_of_two_claims_the_preferred_wins_and_the_other_says_why(rivals: Site) -> None:
    registry = loaded(prefer=["Fake_B"])
    assert states(rivals, registry.packs) == {
        "fake-a": ("conflict", "duplicate_pack"),
        "fake-b": ("active", None),
    }
    loser = next(r for r in registry.packs if r.distribution == "fake-a")
    assert "fake-a 1.1 (fake_a)\n  fake-b 2.2 (fake_b)\n'fake-b' is preferred." in loser.cause
    assert registry.blueprints.get("same:scale").distribution == "fake-b"
    assert registry.pack("same").distribution == "fake-b"


def test_two_preferences_decide_nothing_and_none_is_loaded(rivals: Site) -> None:
    registry = loaded(prefer=["fake-a", "fake-b"])
    assert [r.state for r in rivals.mine(registry.packs)] == [PackState.CONFLICT] * 2
    assert "More than one of them is in prefer" in registry.pack("same").cause


def test_blocking_one_distribution_ends_a_conflict_too(rivals: Site) -> None:
    assert states(rivals, loaded(block=["fake-a"]).packs) == {
        "fake-a": ("blocked", "blocked"),
        "fake-b": ("active", None),
    }


def test_the_cause_of_a_conflict_names_the_switch_that_ends_it(rivals: Site) -> None:
    assert "KASMINA_PLUGINS_PREFER" in loaded().pack("same").cause


@pytest.mark.parametrize(
    "switches",
    [{"prefer": ["intruder"]}, {"block": ["kasmina"]}, {"allow": ["intruder"]}],
    ids=["preferred", "with the bundled one blocked", "allowed alone"],
)
def test_no_switch_lets_a_bundled_name_be_taken_over(site: Site, switches: dict[str, Any]) -> None:
    (site.root / "kasmina-0.0.dist-info" / "entry_points.txt").write_text(
        "[kasmina.plugins]\ncnn = fake_own\n"
    )
    (site.root / "fake_own.py").write_text(GOOD)
    site.install("intruder", "cnn = fake_intruder", fake_intruder=BOMB)
    registry = loaded(**switches)
    (record,) = site.mine(registry.packs)
    assert (record.state, record.reason) == (PackState.CONFLICT, PackReason.BUNDLED_NAME)
    assert "kasmina 0.0 (fake_own)\n  intruder 1.0 (fake_intruder)" in record.cause


# -- autoload ---------------------------------------------------------------------------------------------------------


def test_without_autoload_the_bundled_packs_are_loaded_and_others_wait_until_they_are_asked_for(
    site: Site,
) -> None:
    (site.root / "kasmina-0.0.dist-info" / "entry_points.txt").write_text(
        "[kasmina.plugins]\nown = fake_own\n"
    )
    (site.root / "fake_own.py").write_text(GOOD)
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    site.install("fake-bomb", "bomb = fake_bomb", fake_bomb="raise KeyboardInterrupt")
    registry = loaded(autoload=False)
    assert states(site, registry.packs) == {
        "fake-good": ("discovered", "autoload_off"),
        "fake-bomb": ("discovered", "autoload_off"),
    }
    assert registry.pack("own").state is PackState.ACTIVE
    with pytest.raises(PluginError, match=r"load_pack\('good'\)"):
        registry.blueprints.get("good:scale")
    assert registry.load_pack("good").state is PackState.ACTIVE
    assert registry.blueprints.get("good:scale").distribution == "fake-good"
    registry.load_installed()
    assert states(site, registry.packs)["fake-good"] == ("active", None)
    assert registry.load_pack("good") is registry.pack("good")


def test_asking_for_a_bad_pack_raises_its_cause_and_for_none_an_unknown_name(site: Site) -> None:
    site.install("fake-bomb", "bomb = fake_bomb", fake_bomb=BOMB)
    registry = loaded(autoload=False)
    with pytest.raises(PluginError, match="SystemExit: 7") as caught:
        registry.load_pack("bomb")
    assert isinstance(caught.value.__cause__, SystemExit)
    assert registry.pack("bomb").state is PackState.FAILED
    with pytest.raises(UnknownNameError, match="Did you mean 'bomb'"):
        registry.load_pack("bom")


def test_a_pack_that_was_installed_anew_can_be_asked_for_again_and_the_old_claim_is_forgotten(
    site: Site,
) -> None:
    info = site.install("fake-old", "same = fake_old")
    registry = loaded(autoload=False)
    with pytest.raises(PluginError, match="No module named 'fake_old'"):
        registry.load_pack("same")
    shutil.rmtree(info)
    site.install("fake-new", "same = fake_new", fake_new=GOOD)
    assert registry.load_pack("same").distribution == "fake-new"
    assert states(site, registry.packs) == {"fake-new": ("active", None)}


def test_a_blocked_pack_is_not_loaded_though_it_is_asked_for(site: Site) -> None:
    site.install("fake-bomb", "bomb = fake_bomb", fake_bomb="raise KeyboardInterrupt")
    with pytest.raises(PluginError, match="blocked"):
        loaded(block=["bomb"]).load_pack("bomb")


# -- strict -----------------------------------------------------------------------------------------------------------


def test_strict_names_every_bad_pack_and_still_loads_the_good_ones(site: Site) -> None:
    site.install("fake-bomb", "bomb = fake_bomb", version="0.3", fake_bomb=BOMB)
    site.install("fake-empty", "empty = fake_empty", fake_empty="")
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    registry = PluginRegistry(checks=False, strict=True)
    with pytest.raises(PluginError, match=r"2 of \d+ packs cannot be used") as caught:
        registry.load_installed()
    for text in ("bomb (fake-bomb 0.3", "SystemExit: 7", "empty (fake-empty 1.0", "no hook"):
        assert text in str(caught.value)
    assert isinstance(caught.value.__cause__, SystemExit)
    assert "good:scale" in registry.blueprints


def test_strict_does_not_mind_packs_that_the_user_keeps_out(site: Site) -> None:
    site.install("fake-bomb", "bomb = fake_bomb", fake_bomb=BOMB)
    site.install("fake-waiting", "waiting = fake_waiting", fake_waiting=BOMB)
    loaded(strict=True, block=["bomb"], autoload=False)


# -- the environment --------------------------------------------------------------------------------------------------


def test_the_environment_sets_every_switch() -> None:
    environ = {
        "KASMINA_PLUGINS_ALLOW": "cnn, vision:eca\nmy-dist,",
        "KASMINA_PLUGINS_BLOCK": "cnn:norm",
        "KASMINA_PLUGINS_AUTOLOAD": "0",
        "KASMINA_PLUGINS_PREFER": "some.dist other_dist",
        "KASMINA_PLUGINS_STRICT": "True",
    }
    assert Switches.from_environment(environ) == Switches(
        allow=["cnn", "vision:eca", "my-dist"],
        block=["cnn:norm"],
        autoload=False,
        prefer=["some.dist", "other_dist"],
        strict=True,
    )
    assert Switches.from_environment(environ).in_force() == {
        "allow": ["cnn", "my-dist", "vision:eca"],
        "block": ["cnn:norm"],
        "autoload": False,
        "prefer": ["other_dist", "some.dist"],
        "strict": True,
    }


def test_an_empty_variable_is_as_good_as_none() -> None:
    empty = {f"KASMINA_PLUGINS_{name}": " " for name in ("ALLOW", "BLOCK", "AUTOLOAD", "PREFER", "STRICT")}
    assert Switches.from_environment(empty) == Switches()
    assert Switches().in_force() == {}


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AUTOLOAD", "maybe", "KASMINA_PLUGINS_AUTOLOAD='maybe' is neither yes nor no. Set it to 1 or 0."),
        ("STRICT", "2", "KASMINA_PLUGINS_STRICT='2' is neither"),
        (
            "BLOCK",
            "ok,n@me",
            "KASMINA_PLUGINS_BLOCK: 'n@me' is not the name of a pack, a distribution, or an id",
        ),
        ("ALLOW", "a:b:c", "KASMINA_PLUGINS_ALLOW: 'a:b:c' is not"),
        ("PREFER", "cnn:norm", "KASMINA_PLUGINS_PREFER: 'cnn:norm' is not a distribution"),
    ],
)
def test_a_variable_that_cannot_be_read_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, fresh_default_registry: None, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"KASMINA_PLUGINS_{variable}", value)
    for ask in (Switches.from_environment, list_packs, default_registry):
        with pytest.raises(SwitchError) as caught:
            ask()
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": "cnn"}, "block='cnn': give a collection of names, such as ['cnn']"),
        ({"allow": 3}, "allow=3"),
        ({"prefer": [None]}, "prefer: None is not a distribution"),
        ({"autoload": 0}, "autoload=0: give True or False"),
    ],
)
def test_an_argument_that_cannot_be_used_is_an_error_that_names_it(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(SwitchError) as caught:
        PluginRegistry(**arguments)
    assert message in str(caught.value)


def test_the_registry_of_the_process_and_the_listing_heed_the_environment(
    site: Site, monkeypatch: pytest.MonkeyPatch, fresh_default_registry: None
) -> None:
    site.install("fake-bomb", "bomb = fake_bomb", fake_bomb="raise KeyboardInterrupt")
    monkeypatch.setenv("KASMINA_PLUGINS_BLOCK", "bomb")
    assert states(site, list_packs()) == {"fake-bomb": ("blocked", "blocked")}
    assert states(site, default_registry().packs) == {"fake-bomb": ("blocked", "blocked")}
    assert states(site, list_packs(Switches())) == {"fake-bomb": ("discovered", None)}


def test_a_strict_environment_raises_each_time_the_registry_is_asked_for(
    site: Site, monkeypatch: pytest.MonkeyPatch, fresh_default_registry: None
) -> None:
    site.install("fake-bomb", "bomb = fake_bomb", fake_bomb=BOMB)
    monkeypatch.setenv("KASMINA_PLUGINS_STRICT", "1")
    for _ in range(2):
        with pytest.raises(PluginError, match="strict is on"):
            default_registry()
    monkeypatch.setenv("KASMINA_PLUGINS_STRICT", "0")
    assert default_registry().pack("bomb").state is PackState.FAILED
