"""``kasmina plugins check`` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from fake_packs import GOOD, SEEDS, Site, run_python

from kasmina_core import ValidationReport
from kasmina_core.cli import main
from kasmina_core.cli.check import EXIT_CODES
from kasmina_core.packs.checking import default_memory

FAILS = (
    SEEDS
    + """
print("noise on stdout")

class Far(Scale):
    def forward(self, x):
        return 3 * super().forward(x)

@hookimpl
def kasmina_blueprints():
    return [scale("good"), scale("far", factory=Far), scale("wrong", param_estimate=lambda dim: 2 * dim)]
"""
)
INCOMPLETE = (
    SEEDS
    + """
@hookimpl
def kasmina_blueprints():
    return [scale("narrow", accepts_width=lambda dim: None if dim == 8 else "only 8")]
"""
)
HOSTS = (
    SEEDS
    + """
@hookimpl
def kasmina_hosts():
    return [HostSpec("good", "fake_hosts:Scale", Topology.CNN), HostSpec("bad", "fake_hosts:Nobody", Topology.CNN)]
"""
)


def check(*arguments: str) -> Result:
    return CliRunner().invoke(main, ("plugins", "check", *arguments), catch_exceptions=False)


def found(*arguments: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(check(*arguments, "--json").stdout)
    return data


# -- verdicts and exit codes ------------------------------------------------------------------------------------------


def test_a_good_pack_passes_with_exit_code_0(site: Site) -> None:
    site.install("fake-good", "good = fake_good", version="1.2", fake_good=GOOD)
    done = check("good", "--device", "cpu")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "good (fake-good 1.2)",
        "  passed      good:scale  26 checks on cpu",
        "",
        "Not run on cuda: not asked for.",
        "passed: 1 blueprint of 1 pack, 1 passed",
    ]


def test_a_failing_check_is_explained_with_exit_code_1(site: Site) -> None:
    site.install("fake-bad", "bad = fake_bad", fake_bad=FAILS)
    done = check("bad", "--device", "cpu")
    assert done.exit_code == 1
    assert "noise" not in done.stdout
    assert "  passed      bad:good" in done.stdout
    assert "is far from the identity at birth.\n      expected: an output within 0.5" in done.stdout
    assert "      declared:  128 parameters at dim=64\n" in done.stdout
    assert "      ratio:    0.50\n" in done.stdout
    assert "    Set param_estimate=lambda dim: dim.\n" in done.stdout
    assert done.stdout.endswith("failed: 3 blueprints of 1 pack, 1 passed, 2 failed\n")


@pytest.mark.parametrize(
    ("entry_points", "modules", "told"),
    [
        (
            "odd = fake_odd",
            {"fake_odd": "raise RuntimeError('boom')"},
            "Its import raised RuntimeError: boom",
        ),
        ("odd = fake_odd", {"fake_odd": "x = 1"}, "is not available (invalid)"),
        ("cnn = fake_odd", {"fake_odd": GOOD}, "A bundled name cannot be taken over"),
    ],
)
def test_a_pack_that_cannot_be_used_is_a_failure(
    site: Site, entry_points: str, modules: dict[str, str], told: str
) -> None:
    if entry_points.startswith("cnn"):
        site.install("kasmina", "cnn = fake_own", version="0.1", folder="own", fake_own=GOOD)
        sys.path.insert(0, str(site.root / "own"))
    try:
        site.install("fake-odd", entry_points, **modules)  # type: ignore[arg-type]  # modules only
        done = check(entry_points.partition(" ")[0], "--device", "cpu")
    finally:
        if entry_points.startswith("cnn"):
            sys.path.remove(str(site.root / "own"))
    assert done.exit_code == 1
    assert told in done.stdout


def test_what_did_not_run_is_incomplete_with_exit_code_3(site: Site) -> None:
    site.install("fake-narrow", "narrow = fake_narrow", fake_narrow=INCOMPLETE)
    done = check("narrow", "--device", "cpu")
    assert done.exit_code == 3
    assert "  incomplete  narrow:narrow" in done.stdout
    assert (
        "    not run: param_estimate: only one width could be counted, and two are asked for" in done.stdout
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_where_there_is_none_is_incomplete_and_auto_is_not(site: Site) -> None:
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    assert check("good", "--device", "cuda").exit_code == 3
    done = check("good")
    assert done.exit_code == 0
    assert "Not run on cuda: this machine has no CUDA device." in done.stdout
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("goood",), "No pack 'goood' is installed. Did you mean 'good'?"),
        (("good:scal",), "No blueprint 'good:scal' is registered. Did you mean 'good:scale'?"),
        (("scale",), "A blueprint is named by its full id, pack:name."),
        (("good", "--device", "tpu"), "'tpu' is not one of"),
        (("good", "--json", "--markdown"), "give one of them"),
    ],
)
def test_wrong_usage_is_exit_code_2(site: Site, arguments: tuple[str, ...], told: str) -> None:
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    done = check(*arguments)
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())


def test_every_exit_code_is_documented() -> None:
    text = check("--help").output
    assert sorted({0, 1, 2, 3}) == sorted({*EXIT_CODES.values(), 2})
    for code in (0, 1, 2, 3):
        assert f"\n    {code}  " in text


# -- what is checked --------------------------------------------------------------------------------------------------


def test_without_a_name_every_pack_is_checked_and_a_blocked_one_is_left_out(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    site.install("fake-narrow", "narrow = fake_narrow", fake_narrow=INCOMPLETE)
    site.install("fake-shut", "shut = fake_shut", fake_shut="raise SystemExit(9)")
    monkeypatch.setenv("KASMINA_PLUGINS_BLOCK", "shut")
    data = found("--device", "cpu")
    states = {pack["pack"]: (pack["state"], pack["verdict"]) for pack in data["packs"]}
    assert states["good"] == ("active", "passed")
    assert states["narrow"] == ("active", "incomplete")
    assert states["shut"] == ("blocked", "incomplete")
    monkeypatch.setenv("KASMINA_PLUGINS_BLOCK", "shut,narrow")
    done = check("--device", "cpu")
    assert done.exit_code == 0
    assert "2 packs left out by a switch" in done.stdout


def test_a_blocked_pack_that_is_asked_for_is_incomplete(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("fake-shut", "shut = fake_shut", fake_shut="raise SystemExit(9)")
    monkeypatch.setenv("KASMINA_PLUGINS_BLOCK", "shut")
    assert check("shut").exit_code == 3


def test_only_the_ids_that_are_named_are_checked(site: Site) -> None:
    site.install("fake-bad", "bad = fake_bad", fake_bad=FAILS)
    data = found("bad:good", "--device", "cpu")
    assert list(data["packs"][0]["blueprints"]) == ["bad:good"]
    assert data["verdict"] == "passed"
    both = found("bad:good", "bad", "--device", "cpu")
    assert list(both["packs"][0]["blueprints"]) == ["bad:far", "bad:good", "bad:wrong"]


def test_a_blueprint_that_a_switch_withholds_is_not_called_passed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("fake-bad", "bad = fake_bad", fake_bad=FAILS)
    monkeypatch.setenv("KASMINA_PLUGINS_BLOCK", "bad:far")
    done = check("bad:far", "--device", "cpu")
    assert done.exit_code == 3
    assert "is left out" in done.stdout


def test_hosts_are_imported(site: Site) -> None:
    site.install("fake-hosts", "hosts = fake_hosts", fake_hosts=HOSTS)
    done = check("hosts", "--device", "cpu")
    assert done.exit_code == 1
    assert "offers a host that cannot be built" in done.stdout
    assert "hosts:bad" in done.stdout


def test_a_check_changes_nothing_in_the_program(site: Site) -> None:
    site.install("fake-good", "good = fake_good", fake_good="import torch; torch.manual_seed(5)\n" + GOOD)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    check("good", "--device", "cpu")
    assert torch.equal(torch.get_rng_state(), before)


# -- formats ----------------------------------------------------------------------------------------------------------


def test_json_is_only_json_and_holds_the_reports(site: Site) -> None:
    site.install("fake-bad", "bad = fake_bad", fake_bad=FAILS)
    data = found("bad", "--device", "cpu")
    assert data["verdict"] == "failed"
    (pack,) = data["packs"]
    assert (pack["origin"], pack["state"], pack["verdict"]) == ("fake-bad 1.0", "active", "failed")
    report = ValidationReport.from_dict(pack["blueprints"]["bad:far"])
    assert [failure.name for failure in report.failures] == ["identity_at_birth"]


def test_markdown_has_a_row_and_a_section_for_each_blueprint(site: Site) -> None:
    site.install("fake-bad", "bad = fake_bad", fake_bad=FAILS)
    text = check("bad", "--device", "cpu", "--markdown").stdout
    assert text.startswith("# kasmina plugins check\n\nfailed: 3 blueprints of 1 pack, 1 passed, 2 failed\n")
    assert "| bad | fake-bad 1.0 | bad:far | failed | 1 of 26 checks on cpu |" in text
    assert "\n## bad:far: failed on cpu\n" in text


# -- a process of its own ---------------------------------------------------------------------------------------------

CRASHES = (
    SEEDS
    + """
import ctypes

class Crash(Scale):
    def forward(self, x):
        ctypes.string_at(0)

@hookimpl
def kasmina_blueprints():
    return [scale("a-good"), scale("b-crash", factory=Crash)]
"""
)


def test_a_crash_is_a_failure_of_its_pack_and_the_others_are_checked(site: Site) -> None:
    site.install("fake-crash", "crash = fake_crash", fake_crash=CRASHES)
    site.install("fake-quiet", "quiet = fake_quiet", fake_quiet="import os; os._exit(0)")
    site.install("fake-good", "good = fake_good", fake_good=GOOD + "\nprint('{\"end\": true}')\n")
    done = check("crash", "good", "quiet", "--isolate", "--json", "--device", "cpu")
    assert done.exit_code == 1
    crash, good, quiet = json.loads(done.stdout)["packs"]
    assert (good["verdict"], list(good["blueprints"])) == ("passed", ["good:scale"])
    assert crash["verdict"] == "failed"
    assert crash["blueprints"]["crash:a-good"]["verdict"] == "passed"
    (life,) = crash["checks"]
    assert (life["name"], life["status"]) == ("own_process", "failed")
    assert life["measured"] == "killed by SIGSEGV while checking crash:b-crash"
    assert "Segmentation fault" in life["hint"]
    assert quiet["checks"][0]["measured"] == "exit status 0 while checking quiet"


HUNGRY = (
    SEEDS
    + """
def hungry(dim):
    kept = [torch.ones(1 << 24) for _ in range(48)]  # 3 GiB
    return Scale(dim)

@hookimpl
def kasmina_blueprints():
    return [scale("hungry", factory=hungry)]
"""
)
ENDLESS = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\nwhile True: time.sleep(1)"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited there")
def test_want_of_memory_is_a_failure_of_its_pack(site: Site) -> None:
    site.install("fake-hungry", "hungry = fake_hungry", fake_hungry=HUNGRY)
    done = check("hungry", "--isolate", "--memory-limit", "1.5", "--device", "cpu")
    assert done.exit_code == 1
    assert "hungry:hungry" in done.stdout
    assert "memory" in done.stdout


def test_a_pack_that_never_ends_is_ended_with_what_it_started(site: Site) -> None:
    site.install("fake-endless", "endless = fake_endless", fake_endless=ENDLESS)
    done = check("endless", "--isolate", "--timeout", "3")
    assert done.exit_code == 1
    assert "ended by us after 3 seconds while checking endless" in done.stdout


def test_an_unknown_id_is_wrong_usage_in_a_child_too(site: Site) -> None:
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    done = check("good:scal", "--isolate")
    assert done.exit_code == 2
    assert "Did you mean 'good:scale'?" in done.stderr


def test_the_default_limit_is_below_the_memory_of_the_machine() -> None:
    assert 0 < default_memory() < 1 << 50


# -- progress and cost ------------------------------------------------------------------------------------------------


def test_progress_of_a_long_job_goes_to_standard_error_in_plain_lines(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    assert "checking" not in check("good", "--device", "cpu").stderr
    monkeypatch.setattr("kasmina_core.cli.check._PATIENCE", 0.0)
    done = check("good", "--device", "cpu", "--json")
    assert done.stderr.splitlines() == ["checking good", "checking good:scale"]
    json.loads(done.stdout)


def test_help_needs_no_torch() -> None:
    done = run_python(
        "import sys\nfrom kasmina_core.cli import main\n"
        "try:\n    main(['plugins', 'check', '--help'])\nexcept SystemExit as end:\n    code = end.code\n"
        "print([m for m in ('torch', 'fvcore') if m in sys.modules], code)"
    )
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_progress_on_a_terminal_is_one_line_that_is_cleared(site: Site) -> None:
    for name in ("fake-one", "fake-two"):
        site.install(name, "odd = fake_odd")
    ours, theirs = os.openpty()
    code = (
        "import kasmina_core.cli.check as c; c._PATIENCE = 0.0\n"
        "from kasmina_core.cli import main; main(['plugins', 'check', 'odd', '--device', 'cpu'])"
    )
    home = str(Path(sys.modules["kasmina_core"].__file__ or "").parents[1])
    path = os.pathsep.join([str(site.root), home, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=False,
    )
    os.close(theirs)
    shown = os.read(ours, 65536)
    os.close(ours)
    assert done.returncode == 1
    assert shown == b"\r\x1b[Kchecking odd\r\x1b[K"
