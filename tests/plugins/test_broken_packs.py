"""One environment with the core, two good packs and one broken pack for every reason: each is told, none stops another."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from fake_packs import run_python
from projects import BROKEN, ROOT, install_project
from torch import nn

from kasmina_core import (
    EveryPosition,
    GateThresholds,
    GrowthConfig,
    InjectionPoint,
    MorphogeneticModel,
    PackReason,
    PackRecord,
    PackState,
    PluginError,
    PluginRegistry,
    QualityGates,
    SeedStage,
    Switches,
    Topology,
    __version__,
    reset_default_registry,
)
from kasmina_core.cli import main

GOOD = ("template-cnn-pack", "template-transformer-pack")
DISTRIBUTIONS = tuple(f"kasmina-{pack}" for pack in GOOD)
FOLDERS = sorted(folder.name for folder in BROKEN.iterdir() if folder.is_dir())
BLOCKED = "broken-blocked"


class Told(NamedTuple):
    pack: str
    state: PackState
    reason: PackReason
    cause: str


def two_claims(pack: str, *claims: str) -> str:
    return f"2 claims to the pack name '{pack}':" + "".join(f"\n  {claim}" for claim in claims)


ALSO = two_claims(
    "broken-duplicate-pack",
    "broken-duplicate-pack-one 6.4 (broken_duplicate_pack_one)",
    "broken-duplicate-pack-two 6.5 (broken_duplicate_pack_two)",
)
EXPECTED = {
    "api_version": Told(
        "broken-api-version",
        PackState.INCOMPATIBLE,
        PackReason.API_VERSION,
        f"  declared:  v99\n  supported: v1 (kasmina {__version__})\nUpgrade kasmina",
    ),
    "unmet_requirement": Told(
        "broken-unmet-requirement",
        PackState.INCOMPATIBLE,
        PackReason.UNMET_REQUIREMENT,
        "  required:  kasmina-no-such-distribution>=7.1\n  installed: nothing\n",
    ),
    "damaged_metadata": Told(
        "broken-damaged-metadata",
        PackState.INVALID,
        PackReason.DAMAGED_METADATA,
        "entry_points.txt cannot be read",
    ),
    "bad_name": Told(
        "Broken Name", PackState.INVALID, PackReason.BAD_NAME, "'Broken Name' is not a pack name"
    ),
    "duplicate_pack_one": Told("broken-duplicate-pack", PackState.CONFLICT, PackReason.DUPLICATE_PACK, ALSO),
    "duplicate_pack_two": Told("broken-duplicate-pack", PackState.CONFLICT, PackReason.DUPLICATE_PACK, ALSO),
    "bundled_name": Told(
        "cnn",
        PackState.CONFLICT,
        PackReason.BUNDLED_NAME,
        two_claims(
            "cnn", f"kasmina {__version__} (kasmina_cnn)", "broken-bundled-name 6.6 (broken_bundled_name)"
        ),
    ),
    "blocked": Told("broken-blocked", PackState.BLOCKED, PackReason.BLOCKED, "Take it out of block"),
    "import_failed": Told(
        "broken-import-failed",
        PackState.FAILED,
        PackReason.IMPORT_FAILED,
        "ModuleNotFoundError: No module named 'kasmina_no_such_module'",
    ),
    "no_hook": Told(
        "broken-no-hook", PackState.INVALID, PackReason.NO_HOOK, "kasmina_blueprints lacks the mark @hookimpl"
    ),
    "unknown_hook": Told(
        "broken-unknown-hook", PackState.INCOMPATIBLE, PackReason.UNKNOWN_HOOK, "'kasmina_blueprint'"
    ),
    "hook_failed": Told(
        "broken-hook-failed",
        PackState.FAILED,
        PackReason.HOOK_FAILED,
        "kasmina_blueprints raised OSError: the list of seeds is on a disk that is full",
    ),
    "wrong_type": Told(
        "broken-wrong-type",
        PackState.INVALID,
        PackReason.WRONG_TYPE,
        "kasmina_blueprints must return only BlueprintSpec.\n  found: 'scale', of type str",
    ),
    "duplicate_id": Told(
        "broken-duplicate-id",
        PackState.CONFLICT,
        PackReason.DUPLICATE_ID,
        "kasmina_blueprints declares the name 'scale' more than once",
    ),
    "global_state": Told(
        "broken-global-state",
        PackState.INVALID,
        PackReason.GLOBAL_STATE,
        "It changes what all modules share: torch.nn.Linear, global forward hooks. That was put back.",
    ),
    "check_failed": Told(
        "broken-check-failed",
        PackState.INVALID,
        PackReason.CHECK_FAILED,
        "  declared:  128 parameters at dim=64\n  counted:    64 parameters at dim=64 (fvcore)",
    ),
}
BY_METADATA = {
    "api_version",
    "unmet_requirement",
    "damaged_metadata",
    "bad_name",
    "bundled_name",
    "blocked",
} | {
    "duplicate_pack_one",
    "duplicate_pack_two",
}


@dataclass
class Installed:
    """The environment, and what was loaded from it."""

    path: Path
    registry: PluginRegistry
    broken: dict[str, str]

    def record(self, folder: str) -> PackRecord:
        (record,) = [r for r in self.registry.packs if r.distribution == self.broken[folder]]
        return record


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    path = tmp_path_factory.mktemp("site-packages")
    install_project(path, ROOT, packages=False)
    for name in GOOD:
        install_project(path, ROOT / "blueprint_kits" / name)
    broken = {folder: install_project(path, BROKEN / folder) for folder in FOLDERS}
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        patch.setenv("KASMINA_PLUGINS_BLOCK", f"{BLOCKED}, transformer")
        reset_default_registry()
        registry = PluginRegistry(block=[BLOCKED, "transformer"], allow=[*GOOD, *broken.values(), "kasmina"])
        registry.load_installed()
        yield Installed(path, registry, broken)
        reset_default_registry()
    for name in set(sys.modules) - before:
        if str(path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_there_is_a_broken_pack_for_every_reason_that_is_not_the_users_wish() -> None:
    assert sorted(EXPECTED) == FOLDERS
    told = {expected.reason for expected in EXPECTED.values()}
    assert told == set(PackReason) - {PackReason.NOT_ALLOWED, PackReason.AUTOLOAD_OFF}
    assert len(told) > 12


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_broken_pack_is_told_with_state_reason_distribution_version_and_cause(
    installed: Installed, folder: str
) -> None:
    record, expected = installed.record(folder), EXPECTED[folder]
    assert (record.name, record.state, record.reason) == (expected.pack, expected.state, expected.reason)
    assert expected.cause in record.cause
    assert record.distribution == f"broken-{folder.replace('_', '-')}"
    assert record.version.startswith("6.")
    if expected.pack != "cnn":
        with pytest.raises(PluginError) as caught:
            installed.registry.blueprints.get(f"{expected.pack}:scale")
        assert expected.cause in str(caught.value)


def test_no_broken_pack_registers_anything_or_takes_the_bundled_name(installed: Installed) -> None:
    owners = {entry.distribution for entry in installed.registry.blueprints.list_all()}
    assert owners == {*DISTRIBUTIONS, "kasmina"}
    assert installed.registry.pack("cnn").distribution == "kasmina"
    assert "cnn:norm" in installed.registry.blueprints
    told_alone = {f"broken_{folder}" for folder in BY_METADATA}
    assert not told_alone & set(sys.modules), "packs that metadata alone refuses are not imported"


def test_the_listing_is_right_and_imports_neither_torch_nor_any_pack(installed: Installed) -> None:
    done = run_python(
        "import sys\nfrom kasmina_core.cli import main\n"
        "try:\n    main(['plugins', 'list', '--json'])\nexcept SystemExit as end:\n    code = end.code\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('torch', 'kasmina_cnn') "
        "or m.startswith(('broken_', 'kasmina_template_'))], code, file=sys.stderr)",
        installed.path,
    )
    assert done.stderr == "[] 0\n"
    listed = {
        pack["distribution"]: pack
        for pack in json.loads(done.stdout)["packs"]
        if pack["name"] != "transformer"
    }
    for folder, distribution in installed.broken.items():
        expected, pack = EXPECTED[folder], listed[distribution]
        told = (expected.state, expected.reason) if folder in BY_METADATA else ("discovered", None)
        assert (pack["state"], pack["reason"]) == told, folder
        assert pack["version"] == installed.record(folder).version
    assert {listed[name]["state"] for name in (*DISTRIBUTIONS, "kasmina")} == {"discovered"}


# -- the good packs grow a model ------------------------------------------------------------------------------------

EASY = QualityGates(
    thresholds=GateThresholds(
        min_training_epochs=0,
        min_shadowing_epochs=0,
        min_probation_epochs=0,
        max_isolation_violations=10**9,
        min_samples=2,
        min_gain=-1e9,
        min_t=-1e9,
        max_harm_t=1e9,
        max_output_deviation=1e9,
    )
)


def host(pack: str) -> tuple[nn.Module, list[str | InjectionPoint], torch.Tensor]:
    torch.manual_seed(0)
    if "cnn" in pack:
        layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(2)]
        return nn.Sequential(*layers, nn.Linear(25, 3)), ["0"], torch.randn(4, 1, 5, 5)
    # Each position by itself: nothing shows which axis is the batch, so the point states it.
    point = InjectionPoint("0", "0", 8, Topology.TRANSFORMER)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), [point], torch.randn(4, 6, 5)


@pytest.mark.parametrize("pack", GOOD)
def test_a_good_pack_among_broken_ones_grows_a_model_through_a_whole_life(
    installed: Installed, pack: str
) -> None:
    record = installed.registry.pack(pack)
    assert (record.state, record.cause) == (PackState.ACTIVE, "")
    bare, slot, x = host(pack)
    expected = bare(x)
    model = MorphogeneticModel(
        bare,
        slot,
        example=x,
        registry=installed.registry.blueprints,
        config=GrowthConfig(gates=EASY),
        context=EveryPosition(),
    )
    model.evaluate_with(lambda: model(x).flatten(1).square().mean(1))
    slot = next(iter(model.slots))
    model.germinate(slot, record.blueprints[0])
    place = model.slots[slot]
    seen = [place.stage]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    while place.stage is not SeedStage.FOSSILIZED:
        if place.stage is SeedStage.TRAINING:
            assert torch.equal(model(x), expected)
        if place.stage is SeedStage.BLENDING:
            place.set_alpha(1.0)
        if place.stage is SeedStage.PROBATIONARY:
            place.step_epoch()
            model(x).square().mean().backward()
            optimizer.step()
        assert (result := model.advance_stage(slot)), str(result)
        seen.append(place.stage)
    assert [int(stage) for stage in seen] == [2, 3, 4, 5, 6, 7]
    assert torch.isfinite(model(x)).all()


# -- the command line says so -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doctors_report(installed: Installed) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(main, ["plugins", "doctor", "--json", "--checks"])
    return done.exit_code, json.loads(done.stdout)


def test_the_doctor_explains_every_broken_pack_and_its_exit_code_says_that_there_are_problems(
    installed: Installed, doctors_report: tuple[int, dict[str, Any]]
) -> None:
    exit_code, report = doctors_report
    assert (exit_code, report["healthy"]) == (1, False)
    assert report["switches"] == {"block": [BLOCKED, "transformer"]}
    problems = {
        finding["subject"]: finding for finding in report["findings"] if finding["severity"] == "problem"
    }
    states = {pack["distribution"]: (pack["state"], pack["reason"]) for pack in report["packs"]}
    for folder, expected in EXPECTED.items():
        assert states[installed.broken[folder]] == (expected.state, expected.reason), folder
        if expected.state is PackState.BLOCKED:
            continue
        found = problems.pop(expected.pack) if folder != "duplicate_pack_one" else problems[expected.pack]
        assert found["code"] == expected.reason
        assert expected.cause in found["what"]
        assert installed.broken[folder] in found["what"]
        assert found["todo"]
    assert not {subject for subject in problems if subject in GOOD}


def test_the_doctor_imports_a_blocked_pack_nowhere_and_measures_the_good_ones(
    doctors_report: tuple[int, dict[str, Any]],
) -> None:
    packs = {
        pack["distribution"]: pack for pack in doctors_report[1]["packs"] if pack["name"] != "transformer"
    }
    assert packs[BLOCKED]["import_seconds"] is None
    for name in DISTRIBUTIONS:
        assert packs[name]["state"] == "active"
        assert packs[name]["import_seconds"] > 0
        assert packs[name]["imports_torch"] is False


def test_blocking_what_is_broken_makes_the_environment_healthy(installed: Installed) -> None:
    switches = Switches(block=installed.broken.values())
    registry = PluginRegistry(
        checks=False, block=switches.block, allow=[*GOOD, *switches.block, "kasmina"], strict=True
    )
    registry.load_installed()
    assert {r.state for r in registry.packs if r.distribution in installed.broken.values()} == {
        PackState.BLOCKED
    }
