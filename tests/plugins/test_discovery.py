"""Listing and loading of installed packs: order, names, nothing imported before its time, nothing left changed."""

from __future__ import annotations

import random
import threading
from typing import Any

import importlib_metadata
import pytest
import torch
from fake_packs import GOOD, SEEDS, Site, run_python

from kasmina_core import (
    AmbiguousNameError,
    BlueprintSpec,
    HostError,
    HostSpec,
    NameConflictError,
    PackReason,
    PackState,
    PluginError,
    PluginRegistry,
    Topology,
    UnknownNameError,
    default_registry,
    hookimpl,
    list_packs,
)


def loaded(**options: Any) -> PluginRegistry:
    registry = PluginRegistry(**options)
    registry.load_installed()
    return registry


# -- listing ------------------------------------------------------------------------------------------------------


def test_listing_imports_neither_torch_nor_any_pack(site: Site) -> None:
    site.install("fake-explosive", "explosive = fake_explosive", fake_explosive="raise SystemExit(7)")
    done = run_python(
        "import sys, kasmina_core\n"
        "records = kasmina_core.list_packs()\n"
        "print([(r.name, r.state.value) for r in records if r.name == 'explosive'])\n"
        "print([m for m in ('torch', 'numpy', 'fvcore', 'fake_explosive', 'kasmina_cnn') if m in sys.modules])",
        site.root,
    )
    assert done.stdout.splitlines() == ["[('explosive', 'discovered')]", "[]"], done.stderr


def test_listing_names_distribution_version_and_module(site: Site) -> None:
    site.install("Fake.Pack", "mine = fake_mine:plugin", version="2.5")
    (record,) = site.mine(list_packs())
    assert (record.name, record.distribution, record.version, record.module) == (
        "mine",
        "Fake.Pack",
        "2.5",
        "fake_mine:plugin",
    )
    assert record.state is PackState.DISCOVERED
    assert record.to_dict()["state"] == "discovered"


def test_a_distribution_found_twice_counts_once_as_the_first_on_the_path(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("fake-dup", "dup = fake_dup", version="2.0", folder="first", fake_dup=GOOD)
    site.install("Fake_Dup", "dup = fake_dup\nold = fake_dup", version="1.0", folder="second")
    monkeypatch.syspath_prepend(str(site.root / "second"))
    monkeypatch.syspath_prepend(str(site.root / "first"))
    monkeypatch.syspath_prepend(str(site.root / "first"))
    assert [(r.name, r.version, r.state) for r in site.mine(list_packs())] == [
        ("dup", "2.0", PackState.DISCOVERED)
    ]


def test_a_pack_whose_distribution_is_shadowed_by_one_without_it_is_not_listed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("fake-moved", "", version="2.0", folder="first")
    site.install("fake-moved", "moved = fake_moved", version="1.0", folder="second")
    monkeypatch.syspath_prepend(str(site.root / "second"))
    monkeypatch.syspath_prepend(str(site.root / "first"))
    assert site.mine(list_packs()) == []


DAMAGED = {
    "entry points that are not text": (b"[kasmina.plugins\nx = y\n\xff\xfe", b""),
    "entry points that do not parse": (b"[kasmina.plugins]\nno value here\n", b""),
    "no METADATA": (b"[kasmina.plugins]\nbroken = fake_broken\n", None),
    "METADATA that is not text": (b"[kasmina.plugins]\nbroken = fake_broken\n", b"\xff\xfe\x00"),
    "METADATA without a name": (b"[kasmina.plugins]\nbroken = fake_broken\n", b"Version: 1.0\n"),
    "METADATA without a version": (b"[kasmina.plugins]\nbroken = fake_broken\n", b"Name: fake-broken\n"),
}


@pytest.mark.parametrize(("entry_points", "metadata"), DAMAGED.values(), ids=list(DAMAGED))
def test_damaged_metadata_is_listed_and_hides_no_other_pack(
    site: Site, entry_points: bytes, metadata: bytes | None
) -> None:
    site.install("fake-broken", entry_points, metadata=metadata)
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    records = [r for r in list_packs() if "fake" in r.distribution]
    broken = [r for r in records if r.state is PackState.INVALID]
    assert [r.distribution.replace("_", "-") for r in broken] == ["fake-broken"]
    assert broken[0].reason is PackReason.DAMAGED_METADATA
    assert "damaged" in broken[0].cause
    assert [r.name for r in records if r.state is PackState.DISCOVERED] == ["good"]
    assert loaded().blueprints.get("good:scale").distribution == "fake-good"


def test_damage_in_a_distribution_that_is_no_pack_is_not_listed(site: Site) -> None:
    site.install("fake-other", b"[console_scripts\n\xff")
    site.install("fake-good", "good = fake_good")
    assert [r.name for r in site.mine(list_packs())] == ["good"]


def test_a_name_that_cannot_be_a_pack_is_said_so(site: Site) -> None:
    site.install("fake-shouting", "Shouting = fake_good", fake_good=GOOD)
    (record,) = site.mine(list_packs())
    assert (record.state, record.reason) == (PackState.INVALID, PackReason.BAD_NAME)
    assert "'Shouting' is not a pack name" in record.cause


# -- two claims to one name -----------------------------------------------------------------------------------------


def test_two_packs_that_claim_one_name_are_both_a_conflict_that_names_both(site: Site) -> None:
    site.install("fake-a", "same = fake_a", version="1.1", fake_a=GOOD)
    site.install("fake-b", "same = fake_b", version="2.2", fake_b=GOOD)
    registry = loaded()
    records = site.mine(registry.packs)
    assert [(r.state, r.reason) for r in records] == [(PackState.CONFLICT, PackReason.DUPLICATE_PACK)] * 2
    for record in records:
        assert "fake-a 1.1 (fake_a)" in record.cause
        assert "fake-b 2.2 (fake_b)" in record.cause
    with pytest.raises(PluginError, match=r"fake-a 1\.1(?s:.*)fake-b 2\.2") as caught:
        registry.blueprints.get("same:scale")
    assert isinstance(caught.value.__cause__, NameConflictError)
    assert [r.state for r in site.mine(list_packs())] == [PackState.CONFLICT] * 2


def test_one_distribution_that_claims_a_name_twice_is_a_conflict(site: Site) -> None:
    site.install("fake-twice", "same = fake_a\nsame = fake_b", fake_a=GOOD, fake_b=GOOD)
    assert [(r.module, r.state) for r in site.mine(list_packs())] == [
        ("fake_a", PackState.CONFLICT),
        ("fake_b", PackState.CONFLICT),
    ]


@pytest.mark.parametrize("intruder", ["aaa-intruder", "zzz-intruder"])
def test_a_bundled_name_cannot_be_taken_over(site: Site, intruder: str) -> None:
    (site.root / "kasmina-0.0.dist-info" / "entry_points.txt").write_text(
        "[kasmina.plugins]\ncnn = fake_own\n"
    )
    (site.root / "fake_own.py").write_text(GOOD)
    site.install(
        intruder, "cnn = fake_intruder", fake_intruder=GOOD.replace('scale("scale")', 'scale("stolen")')
    )
    registry = loaded()
    (record,) = site.mine(registry.packs)
    assert (record.state, record.reason) == (PackState.CONFLICT, PackReason.BUNDLED_NAME)
    assert f"{intruder} 1.0 (fake_intruder)" in record.cause
    assert "kasmina 0.0 (fake_own)" in record.cause
    assert registry.blueprints.get("cnn:scale").distribution == "kasmina"
    assert registry.pack("cnn").distribution == "kasmina"
    with pytest.raises(UnknownNameError, match="cnn:stolen"):
        registry.blueprints.get("cnn:stolen")


def test_a_damaged_pack_takes_no_name_from_a_healthy_one(site: Site) -> None:
    site.install("aaa-damaged", b"[kasmina.plugins]\nsame = fake_x\n", metadata=b"Name: aaa-damaged\n")
    site.install("fake-healthy", "same = fake_healthy", fake_healthy=GOOD)
    registry = loaded()
    assert {r.distribution: r.state for r in site.mine(registry.packs)} == {
        "aaa-damaged": PackState.INVALID,
        "fake-healthy": PackState.ACTIVE,
    }
    with pytest.raises(UnknownNameError):
        registry.blueprints.get("same:nothing")


def test_one_module_named_by_two_entry_points_is_loaded_once(site: Site) -> None:
    site.install("fake-twin", "one = fake_twin\ntwo = fake_twin", fake_twin=GOOD)
    registry = loaded()
    assert [(r.name, r.state) for r in site.mine(registry.packs)] == [
        ("one", PackState.ACTIVE),
        ("two", PackState.CONFLICT),
    ]
    assert "two:scale" not in registry.blueprints
    with pytest.raises(PluginError, match="loaded already under another name"):
        registry.blueprints.get("two:scale")


# -- order ----------------------------------------------------------------------------------------------------------


def test_order_of_installation_changes_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("delta", "alpha", "echo", "bravo"):
        source = (
            SEEDS
            + f'@hookimpl\ndef kasmina_blueprints():\n    return [scale("z-{name}"), scale("a-{name}")]\n'
        )
        site.install(f"fake-{name}", f"{name} = fake_{name}", **{f"fake_{name}": source})
    site.install("fake-bad", "bad = fake_bad", fake_bad="raise ImportError('no')")
    found = list(importlib_metadata.distributions())
    seen = set()
    for seed in range(4):
        shuffled = random.Random(seed).sample(found, len(found))
        monkeypatch.setattr(importlib_metadata, "distributions", lambda shuffled=shuffled: iter(shuffled))
        registry = loaded(checks=False)
        seen.add(
            (
                tuple((r.name, r.state) for r in site.mine(registry.packs)),
                tuple((e.sequence, e.blueprint_id) for e in registry.events),
                tuple(b.id for b in registry.blueprints.list_all()),
            )
        )
    ((packs, events, ids),) = seen
    assert [name for name, _ in packs] == ["alpha", "bad", "bravo", "delta", "echo"]
    assert [sequence for sequence, _ in events] == list(range(len(ids)))
    assert [name for _, name in events if "fake" not in name][:2] == ["alpha:a-alpha", "alpha:z-alpha"]
    assert [name for _, name in events] == list(ids)


# -- nothing is left changed ------------------------------------------------------------------------------------------


def test_loading_leaves_random_numbers_and_settings_as_they_were(site: Site) -> None:
    meddling = (
        "import random, torch\nrandom.seed(1)\ntorch.manual_seed(1)\ntorch.set_default_dtype(torch.float64)\n"
        "torch.set_num_threads(torch.get_num_threads() + 1)\ntorch.backends.cudnn.benchmark = True\n"
    )
    site.install("fake-meddling", "meddling = fake_meddling", fake_meddling=meddling + GOOD)
    site.install(
        "fake-wrong", "wrong = fake_wrong", fake_wrong=GOOD.replace("lambda dim: dim", "lambda dim: 1")
    )

    def state() -> tuple[Any, ...]:
        return (
            torch.get_rng_state().tolist(),
            torch.initial_seed(),
            random.getstate(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.backends.cudnn.benchmark,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )

    with torch.inference_mode():
        before = state()
        registry = loaded()
        assert state() == before
    assert "meddling:scale" in registry.blueprints


def test_a_refused_pack_leaves_nothing_and_can_be_tried_again() -> None:
    class HalfBad:
        @hookimpl
        def kasmina_blueprints(self) -> list[BlueprintSpec]:
            return [spec("thing")]

        @hookimpl
        def kasmina_hosts(self, no_such_argument: int) -> list[HostSpec]:
            return []

    registry = PluginRegistry(checks=False)
    with pytest.raises(PluginError, match="no_such_argument"):
        registry.register_pack("mine", HalfBad())
    assert len(registry.blueprints) == 0
    assert registry.events == []
    assert registry.pack("mine").state is PackState.INCOMPATIBLE
    with pytest.raises(PluginError, match="no_such_argument"):
        registry.blueprints.get("mine:thing")

    record = registry.register_pack("mine", Offers(blueprints=[spec("thing")]))
    assert record.state is PackState.ACTIVE
    assert [r.state for r in registry.packs] == [PackState.ACTIVE]
    assert registry.blueprints.get("thing").id == "mine:thing"


def test_a_blocked_pack_is_not_imported(site: Site) -> None:
    site.install("fake-bomb", "bomb = fake_bomb", fake_bomb="raise SystemExit(7)")
    registry = loaded(block=["bomb"])
    (record,) = site.mine(registry.packs)
    assert (record.state, record.error) == (PackState.BLOCKED, None)
    with pytest.raises(PluginError, match="'bomb' is blocked"):
        registry.blueprints.get("bomb:thing")


def test_ctrl_c_while_a_pack_is_loaded_is_the_users(site: Site) -> None:
    site.install("fake-slow", "slow = fake_slow", fake_slow="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        loaded()


def test_a_pack_that_does_not_end_is_named(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kasmina_core.packs.discovery.SLOW_LOAD", 0.05)
    wait = "import sys, time\nwhile 'pack \\'slow\\'' not in sys.stderr.getvalue(): time.sleep(0.01)\n"
    site.install("fake-slow", "slow = fake_slow", fake_slow=wait + GOOD)
    assert loaded(checks=False).pack("slow").state is PackState.ACTIVE
    said = capsys.readouterr().err
    assert said.startswith(
        "kasmina: pack 'slow' (fake-slow 1.0, module fake_slow) has been loading for 0.05 seconds"
    )
    assert "KASMINA_PLUGINS_BLOCK=slow" in said


@pytest.mark.parametrize("at_import", [True, False])
def test_what_one_pack_does_to_torch_harms_no_other(site: Site, at_import: bool) -> None:
    meddle = "import torch\nadd, torch.nn.Linear = torch.Tensor.add, torch.nn.Identity\n"
    meddle += "torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)\n"
    meddle += "torch.Tensor.add = lambda *a, **k: add(*a, **k)\n"
    meddle += "torch.nn.ReLU.forward = lambda self, x: x\n"
    if not at_import:
        meddle = "def meddle():\n" + "".join(f"    {line}\n" for line in meddle.splitlines())
        meddle += "    return []\nfrom kasmina_core import hookimpl\n@hookimpl\ndef kasmina_hosts(): return meddle()\n"
    linear, add, relu = torch.nn.Linear, torch.Tensor.add, torch.nn.ReLU.forward
    site.install("fake-a", "a = fake_a", fake_a=meddle + GOOD)
    site.install("fake-b", "b = fake_b", fake_b=GOOD)
    registry = loaded()
    bad = registry.pack("a")
    assert (bad.state, bad.reason) == (PackState.INVALID, PackReason.GLOBAL_STATE)
    for name in ("torch.nn.Linear", "torch.nn.ReLU.forward", "torch.Tensor.add", "global forward pre hooks"):
        assert name in bad.cause
    assert registry.pack("b").state is PackState.ACTIVE
    assert (torch.nn.Linear, torch.Tensor.add, torch.nn.ReLU.forward) == (linear, add, relu)


# -- packs registered by hand ------------------------------------------------------------------------------------------


class Offers:
    """A pack whose hooks return what it was given."""

    def __init__(self, **offers: Any) -> None:
        self.offers = offers

    @hookimpl
    def kasmina_blueprints(self) -> Any:
        return self.offers.get("blueprints", [])

    @hookimpl
    def kasmina_hosts(self) -> Any:
        return self.offers.get("hosts", [])

    @hookimpl
    def kasmina_gate_checks(self) -> Any:
        return self.offers.get("gate_checks", [])

    @hookimpl
    def kasmina_policies(self) -> Any:
        return self.offers.get("policies", {})

    @hookimpl
    def kasmina_sinks(self, config: Any) -> Any:
        return self.offers.get("sinks", lambda config: {})(config)


def identity(dim: int) -> torch.nn.Module:
    layer = torch.nn.Conv2d(dim, dim, 1)
    torch.nn.init.dirac_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


def spec(name: str, **changes: Any) -> BlueprintSpec:
    return BlueprintSpec(
        **{
            "name": name,
            "topology": Topology.CNN,
            "factory": identity,
            "param_estimate": lambda dim: dim * dim + dim,
        }
        | changes
    )


def test_a_registered_pack_is_found_by_full_and_by_short_name_and_announced() -> None:
    registry = PluginRegistry()
    record = registry.register_pack("mine", Offers(blueprints=[spec("b"), spec("a")]), "my-dist", "3.1")
    assert (record.state, record.blueprints) == (PackState.ACTIVE, ("mine:a", "mine:b"))
    assert registry.blueprints.get("a").origin == "my-dist 3.1"
    assert [(e.blueprint_id, e.distribution, e.verdict, e.sequence) for e in registry.events] == [
        ("mine:a", "my-dist", "passed", 0),
        ("mine:b", "my-dist", "passed", 1),
    ]
    report = registry.report("mine:a")
    assert report is not None
    assert report.verdict == "passed"


def test_checks_that_were_not_run_are_not_called_passed() -> None:
    registry = PluginRegistry(checks=False)
    registry.register_pack("mine", Offers(blueprints=[spec("a")]))
    assert [e.verdict for e in registry.events] == ["not run"]
    assert registry.report("mine:a") is None


def test_a_taken_name_stays_with_its_pack_and_the_error_names_both() -> None:
    registry = PluginRegistry(checks=False)
    registry.register_pack("mine", Offers(blueprints=[spec("old")]), "first-dist", "1.0")
    with pytest.raises(PluginError, match=r"first-dist 1\.0(?s:.*)second-dist 2\.0") as caught:
        registry.register_pack("mine", Offers(blueprints=[spec("new")]), "second-dist", "2.0")
    assert isinstance(caught.value.__cause__, NameConflictError)
    assert [b.id for b in registry.blueprints.list_all()] == ["mine:old"]


def test_an_id_that_is_taken_refuses_the_whole_pack_and_stays_with_its_owner() -> None:
    registry = PluginRegistry(checks=False)
    by_hand = registry.blueprints.register(spec("b"), pack="mine", distribution="by-hand", version="0")
    with pytest.raises(PluginError, match=r"by-hand 0(?s:.*)my-dist 1\.0") as caught:
        registry.register_pack("mine", Offers(blueprints=[spec("a"), spec("b"), spec("c")]), "my-dist", "1.0")
    assert isinstance(caught.value.__cause__, NameConflictError)
    assert registry.blueprints.list_all() == [by_hand]
    assert registry.events == []
    assert registry.pack("mine").state is PackState.CONFLICT
    registry.blueprints.unregister("mine:b")
    assert (
        len(registry.register_pack("mine", Offers(blueprints=[spec("b")]), "my-dist", "1.0").blueprints) == 1
    )


def test_unregistering_a_pack_removes_all_that_it_offered() -> None:
    registry = PluginRegistry(checks=False)
    pack = Offers(
        blueprints=[spec("a")], hosts=[HostSpec("h", "m:h", Topology.CNN)], policies={"p": lambda: None}
    )
    registry.register_pack("mine", pack)
    assert registry.unregister_pack("mine").name == "mine"
    assert (len(registry.blueprints), len(registry.hosts), len(registry.policies())) == (0, 0, 0)
    assert registry.packs == []
    registry.register_pack("mine", pack)
    assert registry.hosts.ids() == ["mine:h"]
    with pytest.raises(UnknownNameError, match="Did you mean 'mine'"):
        registry.unregister_pack("minee")


def test_short_names_that_two_packs_offer_are_ambiguous_in_every_kind() -> None:
    registry = PluginRegistry(checks=False)
    for name in ("one", "two"):
        registry.register_pack(
            name,
            Offers(
                blueprints=[spec("x")],
                hosts=[HostSpec("x", "m:h", Topology.CNN)],
                policies={"x": print},
                sinks=lambda config: {"x": print},
            ),
        )
    for look_up in (
        registry.blueprints.get,
        registry.hosts.get,
        registry.policies().__getitem__,
        registry.sinks({}).__getitem__,
    ):
        with pytest.raises(AmbiguousNameError, match="one:x, two:x"):
            look_up("x")
        assert look_up("two:x") is not None


def test_a_host_is_made_with_its_options_and_a_wrong_option_is_an_error() -> None:
    registry = PluginRegistry(checks=False)

    def host(width: int = 3) -> torch.nn.Module:
        return torch.nn.Linear(width, width)

    registry.register_pack(
        "mine",
        Offers(hosts=[HostSpec("h", host, Topology.CNN), HostSpec("gone", "no_such_module:H", Topology.CNN)]),
    )
    made = registry.hosts.create("h", width=5)
    assert isinstance(made, torch.nn.Linear)
    assert made.in_features == 5
    with pytest.raises(HostError, match=r"'mine:h' could not be built with \{'wide': 5\}"):
        registry.hosts.create("h", wide=5)
    with pytest.raises(PluginError, match="no_such_module") as caught:
        registry.hosts.create("mine:gone")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(UnknownNameError, match="Did you mean 'gone'"):
        registry.hosts.get("gonee")


def test_gate_checks_bear_the_name_of_their_pack() -> None:
    from kasmina_core import GateCheckSpec, GateLevel

    registry = PluginRegistry(checks=False)
    for name in ("two", "one"):
        check = GateCheckSpec("same", (GateLevel.G5,), lambda context: 1.0, minimum=1.0)
        registry.register_pack(name, Offers(gate_checks=[check]))
    assert [check.name for check in registry.gate_checks()] == ["one:same", "two:same"]
    assert [check.gates for check in registry.gate_checks()] == [(GateLevel.G5,)] * 2


def test_sinks_see_the_config_and_a_bad_pack_of_sinks_stops_no_other() -> None:
    registry = PluginRegistry(checks=False)

    def broken(config: Any) -> Any:
        raise RuntimeError("no network")

    registry.register_pack("good", Offers(sinks=lambda config: {"file": lambda: config["path"]}))
    registry.register_pack("bad", Offers(sinks=broken), "bad-dist", "0.3")
    sinks = registry.sinks({"path": "x.jsonl"})
    assert list(sinks) == ["good:file"]
    assert sinks["file"]() == "x.jsonl"
    with pytest.raises(PluginError, match=r"bad-dist 0\.3(?s:.*)no network") as caught:
        sinks["bad:anything"]
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert registry.pack("bad").state is PackState.ACTIVE


# -- the registry of the process --------------------------------------------------------------------------------------


def test_threads_share_one_default_registry_that_loads_each_pack_once(
    site: Site, fresh_default_registry: None
) -> None:
    counting = GOOD.replace("    return [", "    calls.append(1)\n    return [") + "\ncalls = []\n"
    site.install("fake-counting", "counting = fake_counting", fake_counting=counting)
    barrier, seen = threading.Barrier(4), []

    def ask() -> None:
        barrier.wait()
        seen.append(default_registry())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    import fake_counting  # type: ignore[import-not-found]  # written by this test

    assert len(seen) == 4
    assert all(registry is seen[0] for registry in seen)
    assert fake_counting.calls == [1]
    assert "counting:scale" in seen[0].blueprints


def test_a_pack_that_asks_for_the_registry_in_its_import_fails_alone(
    site: Site, fresh_default_registry: None
) -> None:
    site.install(
        "fake-eager",
        "eager = fake_eager",
        fake_eager="import kasmina_core\nkasmina_core.default_registry()\n",
    )
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    registry = default_registry()
    assert "being loaded" in registry.pack("eager").cause
    assert "good:scale" in registry.blueprints


def test_packs_installed_later_are_added_and_loaded_ones_stay(site: Site) -> None:
    site.install("fake-first", "first = fake_first", fake_first=GOOD)
    registry = loaded(checks=False)
    site.install("fake-second", "second = fake_second", fake_second=GOOD)
    registry.load_installed()
    assert [(r.name, r.state) for r in site.mine(registry.packs)] == [
        ("first", PackState.ACTIVE),
        ("second", PackState.ACTIVE),
    ]
