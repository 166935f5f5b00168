"""``kasmina plugins`` as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result
from fake_packs import GOOD, SEEDS, Site, run_python

import kasmina_core
from kasmina_core import PackRecord
from kasmina_core.cli import main, plugins

pytestmark = pytest.mark.usefixtures("fresh_default_registry")

RICH = (
    SEEDS
    + """
print("noise on stdout")

@hookimpl
def kasmina_blueprints():
    return [
        scale("scale", description="A scale per channel", source="https://example.org/paper",
              options={}, accepts_width=lambda dim: None if dim < 200 else "too wide", param_estimate=48, estimate_dim=48),
    ]

@hookimpl
def kasmina_hosts():
    return [HostSpec("tiny", "fake_rich:Tiny", Topology.CNN, "A small host")]
"""
)


def kasmina(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


# -- list -----------------------------------------------------------------------------------------------------------


def test_list_shows_packs_in_aligned_columns_without_shortening_ids(site: Site) -> None:
    long = "a-rather-long-pack-name-that-does-not-fit-in-a-narrow-terminal"
    site.install("fake-long", f"{long} = fake_module.{'sub.' * 20}plugin", version="1.2.3")
    site.install("fake-short", "ab = fake_ab")
    done = kasmina("plugins", "list")
    assert done.exit_code == 0
    header, *rows = [line for line in done.stdout.splitlines() if line.startswith(("pack", "ab ", long))]
    assert header.split() == ["pack", "distribution", "version", "module", "state"]
    assert [row.split() for row in rows] == [
        [long, "fake-long", "1.2.3", f"fake_module.{'sub.' * 20}plugin", "discovered"],
        ["ab", "fake-short", "1.0", "fake_ab", "discovered"],
    ]
    assert (
        len({line.index(word) for line, word in zip([header, *rows], ["dist", "fake", "fake"], strict=True)})
        == 1
    )


def test_list_as_json_is_only_json(site: Site) -> None:
    site.install("fake-ab", "ab = fake_ab")
    site.install("fake-broken", b"[kasmina.plugins]\nnothing here\n")
    done = kasmina("plugins", "list", "--json")
    packs = {pack["distribution"]: pack for pack in json.loads(done.stdout)["packs"]}
    assert packs["fake-ab"] == PackRecord("ab", "fake_ab", "fake-ab", "1.0").to_dict()
    assert (packs["fake-broken"]["state"], packs["fake-broken"]["reason"]) == ("invalid", "damaged_metadata")


NASTY = "\x1b]0;owned\x07\x1b[2J\u202e"


def test_nothing_in_metadata_acts_on_the_terminal_or_floods_it(site: Site) -> None:
    metadata = f"Metadata-Version: 2.1\nName: fake-nasty\nVersion: 1{NASTY}\n".encode()
    points = (
        f"[kasmina.plugins]\nnasty{NASTY} = fake_nasty\nlong = {'m' * 10_000}\n{'p' * 10_000} = fake_nasty\n"
    )
    site.install("fake-nasty", points.encode(), metadata=metadata)
    requires = f"[console_scripts]\nx = y\n[kasmina.plugin{NASTY}]\nx = y\n"
    site.install("fake-near", requires.encode(), metadata=metadata.replace(b"nasty", b"near"))
    for arguments in (
        ("list",),
        ("list", "--json"),
        ("info", "long"),
        ("doctor",),
        ("check",),
        ("info", f"nasty{NASTY}"),
    ):
        done = kasmina("plugins", *arguments)
        said = done.output.replace("\n", "")
        assert said.isprintable(), [char for char in said if not char.isprintable()]
        assert max(map(len, done.output.splitlines())) < 5_000
        assert not isinstance(done.exception, Exception) or isinstance(done.exception, SystemExit)


def test_nothing_that_a_pack_declares_or_raises_acts_on_the_terminal(site: Site) -> None:
    blueprints = f"[scale('a', description={NASTY!r}, source={NASTY!r}, options={{'x': {NASTY!r}}}, accepts_width=odd)]"
    source = f"{SEEDS}\ndef odd(dim): return {NASTY!r} if dim > 200 else None\n"
    site.install(
        "fake-a", "a = fake_a", fake_a=f"{source}@hookimpl\ndef kasmina_blueprints(): return {blueprints}\n"
    )
    raises = f"def own(dim): raise ValueError({NASTY!r})\n"
    bad = f"{SEEDS}{raises}@hookimpl\ndef kasmina_blueprints(): return [scale('b', factory=own)]\n"
    site.install("fake-b", "b = fake_b", fake_b=bad)
    for arguments in (("info", "a:a"), ("info", "b"), ("check", "b"), ("doctor",)):
        said = kasmina("plugins", *arguments).output.replace("\n", "")
        assert said.isprintable(), [char for char in said if not char.isprintable()]


def test_list_tells_conflicts(site: Site) -> None:
    site.install("fake-a", "same = fake_a")
    site.install("fake-b", "same = fake_b")
    done = kasmina("plugins", "list")
    assert done.exit_code == 0
    assert "fake-a 1.0 (fake_a)\n  fake-b 1.0 (fake_b)" in done.stdout


def test_list_runs_without_torch_and_without_pack_code(site: Site) -> None:
    site.install("fake-bomb", "bomb = fake_bomb", fake_bomb="raise SystemExit(9)")
    done = run_python(
        "import sys\nfrom kasmina_core.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "print([m for m in ('torch', 'fake_bomb') if m in sys.modules], code)",
        site.root,
        arguments=("plugins", "list"),
    )
    assert "bomb" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_list_help_says_that_the_state_is_not_a_load_state() -> None:
    done = kasmina("plugins", "list", "--help")
    assert "discovered" in done.output
    assert "kasmina plugins info" in done.output


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_a_narrow_terminal_shortens_no_id(site: Site) -> None:
    name = "a-pack-name-that-is-wider-than-the-terminal-of-twenty-columns"
    site.install("fake-long", f"{name} = fake_long")
    ours, theirs = os.openpty()
    code = "from kasmina_core.cli import main; main(['plugins', 'list'])"
    home = os.path.dirname(os.path.dirname(kasmina_core.__file__))
    path = os.pathsep.join([str(site.root), home, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "20", "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0
    assert name in shown.decode()
    assert "┃" in shown.decode()


# -- info -----------------------------------------------------------------------------------------------------------


def test_info_of_a_pack_shows_what_it_offers(site: Site) -> None:
    site.install("fake-rich", "rich = fake_rich", version="4.5", fake_rich=RICH)
    done = kasmina("plugins", "info", "rich")
    assert done.exit_code == 0, done.output
    for text in ("fake-rich", "4.5", "active", "rich:scale", "rich:tiny"):
        assert text in done.stdout
    assert "noise" not in done.stdout


@pytest.mark.parametrize("name", ["rich:scale", "scale"])
def test_info_of_a_blueprint_shows_its_declaration_and_its_report(site: Site, name: str) -> None:
    site.install("fake-rich", "rich = fake_rich", version="4.5", fake_rich=RICH)
    done = kasmina("plugins", "info", name)
    assert done.exit_code == 0, done.output
    for text in (
        "rich:scale",
        "A scale per channel",
        "https://example.org/paper",
        "fake-rich",
        "fake_rich:Scale",
        "48   48",
        "16   not declared",
        "256  refused: too wide",
        "scale: passed on cpu",
        "param_estimate at dim=48",
    ):
        assert text in done.stdout, text


def test_info_as_json_is_only_json_though_the_pack_prints(site: Site) -> None:
    site.install("fake-rich", "rich = fake_rich", fake_rich=RICH)
    done = kasmina("plugins", "info", "rich:scale", "--json")
    data = json.loads(done.stdout)
    assert data["kind"] == "blueprint"
    assert data["registration"]["verdict"] == "passed"
    assert {"dim": 48, "parameters": 48, "refused": None} in data["declared_parameters"]
    assert {"dim": 256, "parameters": None, "refused": "too wide"} in data["declared_parameters"]
    assert "noise" in done.stderr


def test_info_of_a_host(site: Site) -> None:
    site.install("fake-rich", "rich = fake_rich", fake_rich=RICH)
    done = kasmina("plugins", "info", "tiny", "--json")
    assert json.loads(done.stdout) == {
        "kind": "host",
        "id": "rich:tiny",
        "description": "A small host",
        "topology": "cnn",
        "pack": "rich",
        "distribution": "fake-rich",
        "version": "1.0",
        "factory": "fake_rich:Tiny",
    }


def test_info_of_a_bad_pack_shows_the_cause_and_exits_with_1(site: Site) -> None:
    site.install("fake-bad", "bad = fake_bad", version="0.9", fake_bad="import no_such_thing")
    done = kasmina("plugins", "info", "bad")
    assert done.exit_code == 1
    for text in ("fake-bad", "0.9", "failed", "import_failed", "No module named 'no_such_thing'"):
        assert text in done.stdout
    asked = kasmina("plugins", "info", "bad:thing")
    assert asked.exit_code == 1
    assert asked.stdout == ""
    assert asked.stderr.startswith("Error: Pack 'bad' (fake-bad 0.9, module fake_bad) is not available")
    assert "Traceback" not in asked.stderr
    as_json = kasmina("plugins", "info", "bad", "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)["state"]) == (1, "failed")


def test_info_of_a_pack_with_several_bad_blueprints_shows_a_fault_of_each(site: Site) -> None:
    two = SEEDS + (
        "\n@hookimpl\ndef kasmina_blueprints():\n"
        "    return [BlueprintSpec(name, Topology.CNN, Scale, lambda dim: 2 * dim) for name in ('one', 'two')]\n"
    )
    site.install("fake-two", "two = fake_two", fake_two=two)
    done = kasmina("plugins", "info", "two")
    assert done.exit_code == 1
    for name in ("one", "two"):
        assert re.search(f"Blueprint '{name}' .* does not have the size it declares", done.stdout)


def test_info_shows_every_claim_to_a_name(site: Site) -> None:
    site.install("fake-a", "same = fake_a", fake_a=GOOD)
    site.install("fake-b", "same = fake_b", fake_b=GOOD)
    done = kasmina("plugins", "info", "same")
    assert done.exit_code == 1
    assert "Also claimed by fake-b 1.0 (fake_b): conflict" in done.stdout


# -- errors ---------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_one_message_on_stderr(site: Site) -> None:
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    done = kasmina("plugins", "info", "scalee")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "Error: No pack, blueprint or host 'scalee'. Did you mean 'scale'?\n"


def test_a_short_name_of_two_packs_lists_the_full_ids(site: Site) -> None:
    site.install("fake-one", "one = fake_one", fake_one=GOOD)
    site.install("fake-two", "two = fake_two", fake_two=GOOD)
    done = kasmina("plugins", "info", "scale")
    assert done.exit_code == 2
    assert done.stderr == "Error: 'scale' is offered more than once. Use one of: one:scale, two:scale.\n"


@pytest.mark.parametrize("arguments", [("plugins", "info"), ("plugins", "list", "--nope"), ("nothing",)])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    done = kasmina(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plugins, "list_packs", interrupted)
    done = kasmina("plugins", "list")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_version_and_help_need_no_subcommand() -> None:
    assert kasmina("--version").stdout == f"kasmina, version {kasmina_core.__version__}\n"
    shown = kasmina("--help").stdout
    assert "grow" in shown
    assert "plugins" in shown
