"""``kasmina plugins doctor``: what is wrong, what to do, and an exit code that says whether anything is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import importlib_metadata
import pytest
from click.testing import CliRunner, Result
from fake_packs import Site

from kasmina_core import PackReason, PackState, list_packs
from kasmina_core.cli import main
from kasmina_core.packs.diagnosis import ADVICE, Diagnosis, Severity, diagnose
from kasmina_core.packs.probe import probe
from kasmina_core.packs.scanning import GROUP, PackRecord

LIGHT = """
from kasmina_core import BlueprintSpec, Topology, hookimpl

@hookimpl
def kasmina_blueprints():
    return [BlueprintSpec("scale", Topology.CNN, "fake_seeds:Scale", lambda dim: dim)]
"""


SCALE = """
import torch

class Scale(torch.nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(dim, 1, 1))

    def forward(self, x):
        return x * (1 + self.weight)
"""


@pytest.fixture
def site(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The folder, with no other pack in sight."""
    every = importlib_metadata.distributions

    def only_here() -> Iterator[Any]:
        for distribution in every():
            try:
                elsewhere = bool(distribution.entry_points.select(group=GROUP))
            except Exception:
                elsewhere = False
            if str(site.root) in str(distribution.locate_file("")) or not elsewhere:
                yield distribution

    monkeypatch.setattr(importlib_metadata, "distributions", only_here)
    return site


def kasmina(*arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(main, ["plugins", "doctor", *arguments], env=environ)


def found(diagnosis: Diagnosis) -> list[tuple[str, str, str]]:
    return [(finding.severity.value, finding.code, finding.subject) for finding in diagnosis.findings]


# -- healthy --------------------------------------------------------------------------------------------------------


def test_a_healthy_environment_exits_with_0_and_shows_what_imports_cost(site: Site) -> None:
    site.install("fake-light", "light = fake_light", version="1.4", fake_light=LIGHT)
    done = kasmina()
    assert done.exit_code == 0, done.output
    assert "switches in force: none" in done.stdout
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("light")]
    assert row[:4] == ["light", "fake-light", "1.4", "discovered"]
    assert row[5] == "ms"
    assert "0 problems, 0 pieces of advice without the registration checks, which did not run" in done.stdout


def test_the_report_as_json_is_only_json_though_packs_print(site: Site) -> None:
    noisy = "import os\nprint('noise')\nos.write(1, b'more noise')\n" + LIGHT
    site.install("fake-noisy", "noisy = fake_noisy", fake_noisy=noisy)
    done = kasmina("--json")
    report = json.loads(done.stdout)
    assert set(report) == {"healthy", "switches", "packs", "findings"}
    assert (report["healthy"], report["findings"]) == (True, [])
    (pack,) = report["packs"]
    assert pack["import_seconds"] > 0
    assert pack["imports_torch"] is False


@pytest.mark.parametrize("arguments", [("--nope",), ("--slow", "0"), ("--slow", "fast"), ("pack",)])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert kasmina(*arguments).exit_code == 2


def test_help_documents_the_exit_codes() -> None:
    text = kasmina("--help").output
    for line in ("0  healthy", "1  problems were found", "2  wrong usage"):
        assert line in text


# -- packs ----------------------------------------------------------------------------------------------------------


def test_metadata_whose_module_is_gone_is_stale(site: Site) -> None:
    site.install("fake-gone", "gone = fake_gone.plugin:pack", version="2.1")
    diagnosis = diagnose()
    assert found(diagnosis) == [("problem", "stale_metadata", "gone")]
    assert (
        "'fake-gone 2.1' names the module fake_gone.plugin:pack, which does not exist"
        in diagnosis.findings[0].what
    )
    assert "pip uninstall fake-gone" in diagnosis.findings[0].todo
    assert not diagnosis.is_healthy


def test_a_wrong_module_in_an_entry_point_is_told_with_the_modules_there_are(site: Site) -> None:
    info = site.install("fake-typo", "typo = fake_tyop", fake_typo=LIGHT)
    (info / "RECORD").write_text("fake_typo.py,,\nfake_typo_gone.py,,\nfake_typo-1.0.dist-info/METADATA,,\n")
    diagnosis = diagnose()
    assert found(diagnosis) == [("problem", "stale_metadata", "typo")]
    assert diagnosis.findings[0].what.endswith("does not exist. The distribution holds fake_typo.")
    assert "Did you mean 'fake_typo'?" in diagnosis.findings[0].todo
    assert "uninstall" not in diagnosis.findings[0].todo


@pytest.mark.parametrize("group", ["kasmina.plugin", "kasmina_plugins", "Kasmina.Plugins", "kasmina"])
def test_a_group_that_nothing_reads_is_a_problem(site: Site, group: str) -> None:
    site.install("fake-near", f"[{group}]\nnear = fake_near\n".encode())
    diagnosis = diagnose()
    assert found(diagnosis) == [("problem", "misspelt_group", "fake-near")]
    assert "Did you mean 'kasmina.plugins'?" in diagnosis.findings[0].todo


@pytest.mark.parametrize(
    ("requirement", "told"),
    [
        ("kasmina", [("advice", "offers_nothing", "fake-none")]),
        ("Kasmina>=0.1,<1", [("advice", "offers_nothing", "fake-none")]),
        ("kasmina ; extra == 'growth'", []),
        ("kasmina-vision", []),
        ("torch", []),
    ],
)
def test_a_distribution_that_requires_kasmina_and_offers_nothing_is_advice(
    site: Site, requirement: str, told: list[tuple[str, str, str]]
) -> None:
    metadata = f"Metadata-Version: 2.1\nName: fake-none\nVersion: 1\nRequires-Dist: {requirement}\n"
    site.install("fake-none", b"[console_scripts]\nfake = fake_none\n", metadata=metadata.encode())
    assert found(diagnose()) == told


def test_what_an_interrupted_upgrade_left_takes_no_pack_out(site: Site) -> None:
    site.install("fake-scale", "scale = fake_scale", version="0.2", fake_scale=LIGHT)
    left = site.install("fake-scale", "scale = fake_scale", version="0.1")
    left.rename(left.with_name("~ake_scale-0.1.dist-info"))
    assert [(r.version, r.state.value) for r in site.mine(list_packs())] == [("0.2", "discovered")]
    diagnosis = diagnose()
    assert found(diagnosis) == [("advice", "left_over_metadata", "fake-scale")]
    assert "~ake_scale-0.1.dist-info" in diagnosis.findings[0].what
    assert "keep the distribution" in diagnosis.findings[0].todo


def test_a_module_that_lacks_another_is_not_called_stale(site: Site) -> None:
    site.install("fake-lacking", "lacking = fake_lacking", fake_lacking="import fake_lacking_more")
    diagnosis = diagnose()
    assert found(diagnosis) == [("problem", "import_failed", "lacking")]
    assert "fake_lacking_more" in diagnosis.findings[0].what
    assert "KASMINA_PLUGINS_BLOCK=lacking" in diagnosis.findings[0].todo


def test_a_pack_that_imports_torch_is_heavy_and_that_is_advice(site: Site) -> None:
    site.install("fake-heavy", "heavy = fake_heavy", fake_heavy="import torch\n" + LIGHT, torch="")
    diagnosis = diagnose()
    assert found(diagnosis) == [("advice", "imports_torch", "heavy")]
    assert diagnosis.is_healthy


def test_a_slow_pack_is_told_with_its_time(site: Site) -> None:
    site.install("fake-slow", "slow = fake_slow", fake_slow="import time\ntime.sleep(0.3)\n" + LIGHT)
    site.install("fake-light", "light = fake_light", fake_light=LIGHT)
    diagnosis = diagnose(slow=0.25)
    assert found(diagnosis) == [("advice", "slow_import", "slow")]
    assert "takes 0." in diagnosis.findings[0].what


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import os\nos._exit(3)", "ended the process, exit status 3"),
        (
            "import os, sys\nprint('goodbye', file=sys.stderr, flush=True)\nos.abort()",
            "ended the process, exit status -6",
        ),
        ("raise KeyboardInterrupt('now')", "KeyboardInterrupt: now"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_pack_that_ends_its_process_is_told_and_ends_no_other(site: Site, source: str, cause: str) -> None:
    site.install("fake-deadly", "deadly = fake_deadly", fake_deadly=source)
    diagnosis = diagnose()
    assert found(diagnosis) == [("problem", "import_failed", "deadly")]
    assert cause in diagnosis.findings[0].what


def test_a_pack_that_ends_its_process_is_not_loaded_here_for_the_checks(site: Site) -> None:
    site.install("fake-deadly", "deadly = fake_deadly", fake_deadly="import os\nos._exit(3)")
    diagnosis = diagnose(checks=True)
    ((record, _),) = diagnosis.packs
    assert (record.state, record.reason) == (PackState.FAILED, PackReason.IMPORT_FAILED)


def test_an_import_that_does_not_end_is_given_up(site: Site) -> None:
    site.install("fake-stuck", "stuck = fake_stuck", fake_stuck="import time\ntime.sleep(60)")
    diagnosis = diagnose(timeout=0.5)
    assert "did not end within 0.5 seconds" in diagnosis.findings[0].what


def test_without_checks_a_wrong_size_is_not_seen_and_with_them_it_is(site: Site) -> None:
    wrong = LIGHT.replace("lambda dim: dim", "lambda dim: 7")
    site.install("fake-wrong", "wrong = fake_wrong", fake_wrong=wrong, fake_seeds=SCALE)
    assert found(diagnose()) == []
    diagnosis = diagnose(checks=True)
    assert found(diagnosis) == [("problem", "check_failed", "wrong")]
    assert "declared:    7 parameters" in diagnosis.findings[0].what


def test_two_claims_are_one_finding_that_names_both(site: Site) -> None:
    site.install("fake-a", "same = fake_a", fake_a="raise SystemExit")
    site.install("fake-b", "same = fake_b", fake_b="raise SystemExit")
    diagnosis = diagnose()
    assert found(diagnosis) == [("problem", "duplicate_pack", "same")]
    for text in ("fake-a 1.0 (fake_a)", "fake-b 1.0 (fake_b)"):
        assert text in diagnosis.findings[0].what
    assert "KASMINA_PLUGINS_PREFER" in diagnosis.findings[0].todo


def test_packs_that_a_switch_keeps_out_are_imported_nowhere(site: Site, tmp_path: Path) -> None:
    trace = tmp_path / "imported"
    site.install("fake-out", "out = fake_out", fake_out=f"open({str(trace)!r}, 'w')\n{LIGHT}")
    for environ in ({"KASMINA_PLUGINS_BLOCK": "out"}, {"KASMINA_PLUGINS_AUTOLOAD": "0"}):
        done = kasmina("--json", **environ)
        assert (done.exit_code, trace.exists()) == (0, False)
        assert json.loads(done.stdout)["packs"][0]["import_seconds"] is None
    assert kasmina().exit_code == 0
    assert trace.exists()


def test_every_reason_that_is_not_the_users_wish_has_advice() -> None:
    wishes = {PackReason.BLOCKED, PackReason.NOT_ALLOWED, PackReason.AUTOLOAD_OFF}
    assert set(ADVICE) == set(PackReason) - wishes
    for text in ADVICE.values():
        assert text.format(distribution="d", name="n", module="m")


# -- distributions --------------------------------------------------------------------------------------------------


def test_a_distribution_found_in_two_places_is_told_with_both(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("second", "first"):
        site.install("fake-twice", "twice = fake_twice", folder=folder, fake_twice=LIGHT)
        monkeypatch.syspath_prepend(str(site.root / folder))
    diagnosis = diagnose()
    assert found(diagnosis) == [("advice", "duplicate_distribution", "fake-twice")]
    first, second = diagnosis.findings[0].what.splitlines()[1:]
    assert "first" in first
    assert "second" in second
    assert diagnosis.is_healthy


def test_metadata_left_over_in_one_folder_is_a_problem(site: Site) -> None:
    site.install("fake-left", "left = fake_left", version="1.0", fake_left=LIGHT)
    site.install("fake-left", "left = fake_left", version="2.0")
    assert ("problem", "left_over_metadata", "fake-left") in found(diagnose())


def test_a_finder_that_raises_is_told_because_it_hides_packs(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        yield from ()
        raise OSError("no such disk")

    monkeypatch.setattr(importlib_metadata, "distributions", broken)
    codes = [code for _, code, _ in found(diagnose())]
    assert codes == ["unreadable_place", "no_own_metadata"]


# -- switches ---------------------------------------------------------------------------------------------------------


def test_switches_in_force_are_shown(site: Site) -> None:
    site.install("fake-light", "light = fake_light", fake_light=LIGHT)
    done = kasmina(KASMINA_PLUGINS_BLOCK="light:scale,light", KASMINA_PLUGINS_STRICT="1")
    assert "  block     light, light:scale  (KASMINA_PLUGINS_BLOCK)" in done.stdout
    assert "  strict    on  (KASMINA_PLUGINS_STRICT)" in done.stdout
    assert done.exit_code == 0


def test_a_switch_that_cannot_be_read_is_a_problem_and_the_rest_is_still_told(site: Site) -> None:
    site.install("fake-gone", "gone = fake_gone")
    done = kasmina("--json", KASMINA_PLUGINS_AUTOLOAD="maybe")
    assert done.exit_code == 1
    codes = [finding["code"] for finding in json.loads(done.stdout)["findings"]]
    assert codes == ["bad_switch", "stale_metadata"]


@pytest.mark.parametrize(
    "variable", ["KASMINA_PLUGINS_BLOCKED", "KASMINA_PLUGIN_BLOCK", "kasmina_plugins_block"]
)
def test_a_misspelt_switch_is_a_problem_because_it_does_nothing(site: Site, variable: str) -> None:
    diagnosis = diagnose(environ={variable: "x"})
    assert found(diagnosis) == [("problem", "misspelt_switch", variable)]
    assert "KASMINA_PLUGINS_BLOCK?" in diagnosis.findings[0].todo


def test_a_switch_that_names_nothing_is_advice(site: Site) -> None:
    site.install("fake-light", "light = fake_light", fake_light=LIGHT)
    site.install("fake-other", b"")
    environ = {"KASMINA_PLUGINS_BLOCK": "ligt, fake-other, gone:x", "KASMINA_PLUGINS_PREFER": "light"}
    diagnosis = diagnose(environ=environ)
    assert found(diagnosis) == [
        ("advice", "switch_names_nothing", name) for name in ("fake-other", "gone:x", "ligt", "light")
    ]
    assert "Did you mean 'light'" in diagnosis.findings[2].todo


def test_an_id_in_a_switch_is_compared_once_the_pack_is_loaded(site: Site) -> None:
    site.install("fake-light", "light = fake_light", fake_light=LIGHT, fake_seeds=SCALE)
    environ = {"KASMINA_PLUGINS_BLOCK": "light:scale, light:none"}
    diagnosis = diagnose(environ=environ, checks=True)
    named = [subject for _, code, subject in found(diagnosis) if code == "switch_names_nothing"]
    assert named == ["light:none"]


# -- the probe --------------------------------------------------------------------------------------------------------


def test_the_probe_leaves_this_process_as_it_was(site: Site) -> None:
    site.install("fake-light", "light = fake_light", fake_light=LIGHT)
    tried = probe(PackRecord("light", "fake_light"), timeout=60)
    assert (tried.state, tried.reason) == (PackState.DISCOVERED, None)
    assert "fake_light" not in sys.modules


def test_problems_come_before_advice(site: Site) -> None:
    site.install("fake-gone", "gone = fake_gone")
    severities = [
        finding.severity for finding in diagnose(environ={"KASMINA_PLUGINS_BLOCK": "nothing"}).findings
    ]
    assert severities == [Severity.PROBLEM, Severity.ADVICE]
