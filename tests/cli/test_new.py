"""``kasmina new``: what it writes is complete at once, and what it cannot write leaves nothing behind."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import kasmina_pytest
import pytest
from click.testing import CliRunner, Result

import kasmina_core
from kasmina_core.cli import main, new

HOMES = [str(Path(module.__file__).parents[1]) for module in (kasmina_core, kasmina_pytest)]
CHECKOUT = Path(kasmina_core.__file__).parents[1]

MADE = {
    "acme-seeds": ("pack", "acme-seeds", "--topology", "cnn"),
    "acme_words": ("pack", "acme_words", "--topology", "transformer"),
    "acme-rows": ("pack", "acme-rows", "--topology", "vector"),
    "acme-waves": ("pack", "acme-waves", "--topology", "signal"),
    "acme-scans": ("pack", "acme-scans", "--topology", "volume"),
    "tiny-net": ("host", "tiny-net"),
}


def kasmina(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one package of each kind, and the metadata that installing them would write."""
    folder = tmp_path_factory.mktemp("made")
    site = folder / "site"
    for name, arguments in MADE.items():
        done = kasmina("new", *arguments, "--out", folder)
        assert done.exit_code == 0, done.output
        project = tomllib.loads((folder / f"kasmina-{name}" / "pyproject.toml").read_text())["project"]
        info = site / f"kasmina_{name.replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        required = "".join(f"Requires-Dist: {needed}\n" for needed in project["dependencies"])
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n{required}"
        )
        groups = project["entry-points"].items()
        rows = [
            line
            for group, entries in groups
            for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(rows) + "\n")
    return folder


def run_where_they_are_installed(made: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(made / "site"), *(str(made / f"kasmina-{name}") for name in MADE), *HOMES])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=made,
        env=os.environ
        | {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


# -- what is written -------------------------------------------------------------------------------------------------


def test_every_package_passes_its_own_tests(made: Path) -> None:
    done = run_where_they_are_installed(
        made, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib",
        *(f"kasmina-{name}" for name in MADE)
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout[-3000:]


def test_every_package_is_found_and_usable(made: Path) -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom kasmina_core.cli import main\n"
        "for name in sys.argv[1:]:\n"
        "    done = CliRunner().invoke(main, ['plugins', 'info', name])\n"
        "    print(done.exit_code, done.output)\n"
    )
    done = run_where_they_are_installed(made, "-c", code, *MADE)
    assert [line[0] for line in done.stdout.splitlines() if line[:1].isdigit()] == ["0"] * len(MADE), (
        done.stdout + done.stderr
    )
    for offered in (
        "acme-seeds:edges",
        "acme-seeds:mixer",
        "acme_words:context",
        "acme-waves:scale",
        "tiny-net:net",
    ):
        assert offered in done.stdout


@pytest.mark.parametrize("name", MADE)
def test_no_name_of_a_template_is_left(made: Path, name: str) -> None:
    for path in (made / f"kasmina-{name}").rglob("*"):
        assert "template" not in str(path.relative_to(made)).lower()
        if path.is_file() and path.suffix != ".pyc":
            text = path.read_text(encoding="utf-8")
            assert "template" not in text.lower(), path
            if path.suffix == ".py":
                ast.parse(text)


@pytest.mark.parametrize("name", MADE)
def test_a_package_has_all_that_a_package_needs(made: Path, name: str) -> None:
    folder = made / f"kasmina-{name}"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    module = f"kasmina_{name.replace('-', '_')}"
    assert {"pyproject.toml", "README.md", "LICENSE", f"{module}/__init__.py", f"{module}/py.typed"} <= files
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["license"]) == (f"kasmina-{name}", "MIT")
    assert project["entry-points"]["kasmina.plugins"] == {name: module}
    assert "MIT License" in (folder / "LICENSE").read_text()


def test_a_host_gets_a_class_of_its_name(made: Path) -> None:
    assert (
        "class TinyNetHost(HookedHost, nn.Module):"
        in (made / "kasmina-tiny-net" / "kasmina_tiny_net" / "host.py").read_text()
    )


def test_the_next_steps_are_shown(tmp_path: Path) -> None:
    done = kasmina("new", "pack", "acme-more", "--topology", "cnn", "--out", tmp_path / "a" / "b c")
    assert done.exit_code == 0
    steps = [line.strip() for line in done.output.splitlines() if line.startswith("  ")]
    assert steps == [
        f"cd '{tmp_path}/a/b c/kasmina-acme-more'",
        'pip install --editable ".[test]"',
        "kasmina plugins info acme-more",
        "pytest",
    ]


def test_a_topology_without_a_template_is_refused_with_those_that_have_one(tmp_path: Path) -> None:
    done = kasmina("new", "pack", "acme-more", "--topology", "graph", "--out", tmp_path)
    assert done.exit_code == 2
    assert "'graph' is not one of 'cnn', 'transformer', 'vector', 'signal', 'volume'" in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_empty_is_filled(tmp_path: Path) -> None:
    (tmp_path / "kasmina-acme").mkdir()
    assert kasmina("new", "host", "acme", "--out", tmp_path).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kasmina-acme"]


def test_the_name_of_the_distribution_means_the_same_package(tmp_path: Path) -> None:
    for name in ("acme", "kasmina-acme"):
        assert kasmina("new", "host", name, "--out", tmp_path / name).exit_code == 0

    def written(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }

    assert written(tmp_path / "acme") == written(tmp_path / "kasmina-acme")


def test_a_package_may_be_named_for_something_that_python_has(tmp_path: Path) -> None:
    for name in ("json", "torch", "class", "tests"):
        assert kasmina("new", "host", name, "--out", tmp_path).exit_code == 0
        ast.parse((tmp_path / f"kasmina-{name}" / f"kasmina_{name}" / "host.py").read_text())


def test_a_shipped_template_is_used_before_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "kasmina_core" / "cli" / "templates"
    for folder in new.TEMPLATES.values():
        (shipped / folder).mkdir(parents=True, exist_ok=True)
    (shipped / "template-host" / "__pycache__").mkdir()
    (shipped / "template-host" / "__pycache__" / "x.pyc").write_bytes(b"\xff")
    (shipped / "template-host" / "template_host.txt").write_text(
        "kasmina-template-host kasmina_template_host template-host TemplateHost"
    )
    monkeypatch.setattr(new, "__file__", str(shipped.parent / "new.py"))
    assert kasmina("new", "host", "acme-net", "--out", tmp_path / "out").exit_code == 0
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written == [tmp_path / "out" / "kasmina-acme-net" / "acme_net.txt"]
    assert written[0].read_text() == "kasmina-acme-net kasmina_acme_net acme-net AcmeNetHost"


def test_templates_that_are_nowhere_are_an_error_that_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new, "__file__", str(tmp_path / "a" / "b" / "new.py"))
    done = kasmina("new", "host", "acme", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert str(tmp_path / "a" / "b" / "templates") in done.output
    assert str(tmp_path / "blueprint_kits") in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not (CHECKOUT / "pyproject.toml").is_file(), reason="no checkout: this is an installed library"
)
def test_the_wheel_ships_every_template() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    shipped = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert shipped == {
        f"blueprint_kits/{folder}": f"kasmina_core/cli/templates/{folder}"
        for folder in new.TEMPLATES.values()
    }
    assert all((CHECKOUT / folder).is_dir() for folder in shipped)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Acme.Seeds", "Such as 'acme-seeds'."),
        ("9lives", "Such as 'lives'."),
        ("acme--seeds", "a letter first. Such as 'acme-seeds'."),
        ("../acme", "is not a pack name"),
        ("", "is not a pack name"),
        ("core", "the module 'kasmina_core' is installed"),
        ("kasmina-core", "the module 'kasmina_core' is installed"),
        ("cnn", "the module 'kasmina_cnn' is installed"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, name: str, text: str) -> None:
    done = kasmina("new", "host", "--out", tmp_path, "--", name)
    assert done.exit_code == 2
    assert text in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_an_installed_pack_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "other-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kasmina.plugins]\nacme = other_seeds\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    done = kasmina("new", "host", "acme", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "'other 1.0' has a pack of that name" in done.output
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kasmina-acme").mkdir()
    (tmp_path / "kasmina-acme" / "thesis.txt").write_text("years of work")
    done = kasmina("new", "host", "acme", "--out", tmp_path)
    assert done.exit_code == 2
    assert "is there already, and not empty: nothing was written" in done.output
    assert [path.name for path in tmp_path.rglob("*")] == ["kasmina-acme", "thesis.txt"]


def test_a_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kasmina-acme").write_text("a file")
    done = kasmina("new", "host", "acme", "--out", tmp_path)
    assert done.exit_code == 2
    assert "is there already: nothing was written" in done.output
    assert (tmp_path / "kasmina-acme").read_text() == "a file"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full disk", "interrupt"])
def test_a_failure_midway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write = Path.write_text

    def fails_at_the_readme(path: Path, *arguments: object, **options: object) -> int:
        if path.name == "README.md":
            raise error
        return write(path, *arguments, **options)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(Path, "write_text", fails_at_the_readme)
    done = kasmina("new", "host", "acme", "--out", tmp_path)
    assert done.exit_code in (1, 130)
    assert isinstance(error, KeyboardInterrupt) or "disk full" in done.output
    assert list(tmp_path.iterdir()) == []


def test_the_topology_of_a_pack_has_to_be_said(tmp_path: Path) -> None:
    for arguments in ((), ("--topology", "rnn")):
        done = kasmina("new", "pack", "acme", *arguments, "--out", tmp_path)
        assert done.exit_code == 2
        assert "cnn" in done.output
        assert "transformer" in done.output


def test_writing_a_package_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom kasmina_core.cli import main\n"
        "main(['new', 'host', 'acme', '--out', sys.argv[1]], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(HOMES)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr
