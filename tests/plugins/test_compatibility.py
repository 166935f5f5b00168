"""A pack for another plugin API, or whose requirements are not met, is told from its metadata and never imported."""

from __future__ import annotations

import platform

import pytest
from fake_packs import GOOD, Site, run_python

import kasmina_core
from kasmina_core import PackReason, PackState, PluginError, PluginRegistry, list_packs

PLUGINS = "[kasmina.plugins]\nmine = fake_mine\n"


def metadata(*lines: str) -> bytes:
    return "\n".join(["Metadata-Version: 2.1", "Name: fake-mine", "Version: 1.2", *lines, ""]).encode()


def install(site: Site, *lines: str, entry_points: str = PLUGINS, source: str = GOOD) -> None:
    site.install("fake-mine", entry_points.encode(), "1.2", metadata(*lines), fake_mine=source)


def install_other(site: Site, version: str, name: str = "fake-other") -> None:
    site.install(name, b"", version)


@pytest.mark.parametrize(
    ("declared", "todo"),
    [
        ("mine = v2", "Upgrade kasmina"),
        ("mine = v0", "cannot be read"),
        ("mine = one", "cannot be read"),
        ("mine = v1\nmine = v2", "cannot be read"),
    ],
)
def test_a_pack_for_another_api_is_incompatible_and_not_imported(
    site: Site, declared: str, todo: str
) -> None:
    install(site, entry_points=f"{PLUGINS}[kasmina.api]\n{declared}\n", source="raise KeyboardInterrupt")
    (listed,) = site.mine(list_packs())
    assert (listed.state, listed.reason) == (PackState.INCOMPATIBLE, PackReason.API_VERSION)
    assert (listed.distribution, listed.version) == ("fake-mine", "1.2")
    said = ", ".join(line.partition(" = ")[2] for line in declared.splitlines())
    assert f"  declared:  {said}\n  supported: v1 (kasmina {kasmina_core.__version__})" in listed.cause
    assert todo in listed.cause
    registry = PluginRegistry(checks=False)
    registry.load_installed()
    with pytest.raises(PluginError, match=r"fake-mine 1\.2(?s:.*)supported: v1"):
        registry.blueprints.get("mine:scale")


@pytest.mark.parametrize("declared", ["", "[kasmina.api]\nmine = v1\n", "[kasmina.api]\nother = v7\n"])
def test_a_pack_for_this_api_or_that_declares_none_is_loaded(site: Site, declared: str) -> None:
    install(site, entry_points=PLUGINS + declared)
    registry = PluginRegistry(checks=False)
    registry.load_installed()
    assert registry.pack("mine").state is PackState.ACTIVE


UNMET = {
    "not installed": ("fake-absent>=2", "required:  fake-absent>=2", "installed: nothing"),
    "installed in another version": ("fake-other>=2,<3", "required:  fake-other<3,>=2", "installed: 1.5"),
    "a newer kasmina": ("kasmina>=99", "required:  kasmina>=99", f"installed: {kasmina_core.__version__}"),
    "a url, and not installed": (
        "fake-absent @ https://example.org/x.whl",
        "required:  fake-absent",
        "nothing",
    ),
    "a marker that applies": ('fake-absent; python_version > "3"', "required:  fake-absent", "nothing"),
}


@pytest.mark.parametrize(("requirement", "required", "installed"), UNMET.values(), ids=list(UNMET))
def test_an_unmet_requirement_is_told_with_both_versions_and_nothing_is_imported(
    site: Site, requirement: str, required: str, installed: str
) -> None:
    install_other(site, "1.5")
    install(site, f"Requires-Dist: {requirement}", "Requires-Dist: pluggy", source="raise KeyboardInterrupt")
    registry = PluginRegistry(checks=False)
    registry.load_installed()
    record = registry.pack("mine")
    assert (record.state, record.reason) == (PackState.INCOMPATIBLE, PackReason.UNMET_REQUIREMENT)
    assert "'fake-mine 1.2' requires what is not installed." in record.cause
    assert required in record.cause
    assert installed in record.cause
    assert "\nInstall '" in record.cause
    assert "pluggy" not in record.cause


def test_a_python_that_is_too_old_is_told(site: Site) -> None:
    install(site, "Requires-Python: >=4")
    (record,) = site.mine(list_packs())
    assert record.reason is PackReason.UNMET_REQUIREMENT
    assert f"required:  Python >=4\n  installed: {platform.python_version()}" in record.cause


MET = {
    "this kasmina, whatever its metadata says": "kasmina>=0.1",
    "a prerelease": "fake-other>=1.4",
    "an extra": 'fake-absent; extra == "test"',
    "another platform": 'fake-absent; sys_platform == "nowhere"',
    "another spelling": "Fake.Other",
}


@pytest.mark.parametrize("requirement", MET.values(), ids=list(MET))
def test_a_requirement_that_is_met_or_does_not_apply_stops_nothing(site: Site, requirement: str) -> None:
    install_other(site, "1.5rc1")
    install(site, f"Requires-Dist: {requirement}")
    (record,) = site.mine(list_packs())
    assert (record.state, record.cause) == (PackState.DISCOVERED, "")


def test_a_requirement_on_a_distribution_with_damaged_metadata_is_left_to_the_import(site: Site) -> None:
    site.install("fake-other", b"", metadata=b"\xff\xfe")
    install(site, "Requires-Dist: fake-other>=3")
    assert [r.state for r in site.mine(list_packs()) if r.name == "mine"] == [PackState.DISCOVERED]


@pytest.mark.parametrize(
    "line", ["Requires-Dist: ???", "Requires-Python: about 3", "Requires-Dist: x; nonsense"]
)
def test_a_requirement_that_does_not_parse_is_damaged_metadata(site: Site, line: str) -> None:
    install(site, line)
    (record,) = site.mine(list_packs())
    assert (record.state, record.reason) == (PackState.INVALID, PackReason.DAMAGED_METADATA)
    assert line.partition(": ")[2] in record.cause


def test_requirements_that_setuptools_keeps_in_a_file_of_their_own_count_as_well(site: Site) -> None:
    info = site.root / "fake_mine.egg-info"
    info.mkdir()
    (info / "PKG-INFO").write_bytes(metadata())
    (info / "entry_points.txt").write_text(PLUGINS)
    (info / "requires.txt").write_text("fake-absent>=2\n\n[test]\nfake-absent-too\n")
    site.distributions.add("fake-mine")
    (record,) = site.mine(list_packs())
    assert (record.state, record.reason) == (PackState.INCOMPATIBLE, PackReason.UNMET_REQUIREMENT)
    assert "fake-absent-too" not in record.cause


def test_a_blocked_pack_is_not_called_incompatible(site: Site) -> None:
    install(site, "Requires-Dist: fake-absent")
    registry = PluginRegistry(checks=False, block=["mine"])
    registry.load_installed()
    assert registry.pack("mine").reason is PackReason.BLOCKED


def test_an_incompatible_pack_takes_no_name_from_one_that_fits(site: Site) -> None:
    install(site, "Requires-Dist: fake-absent")
    site.install("fake-rival", "mine = fake_rival", fake_rival=GOOD)
    registry = PluginRegistry(checks=False)
    registry.load_installed()
    assert registry.pack("mine").distribution == "fake-rival"
    assert registry.blueprints.get("mine:scale").distribution == "fake-rival"


def test_comparing_requirements_imports_no_torch(site: Site) -> None:
    install(site, "Requires-Dist: torch>=99", source="raise SystemExit(7)")
    done = run_python(
        "import sys, kasmina_core\nprint([r.state.value for r in kasmina_core.list_packs() if r.name == 'mine'])\n"
        "print([m for m in ('torch', 'numpy', 'fake_mine') if m in sys.modules])",
        site.root,
    )
    assert done.stdout.splitlines() == ["['incompatible']", "[]"], done.stderr
