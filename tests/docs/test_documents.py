"""What README and docs say is so: their code runs, their commands are those that are tested."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kasmina_core import MorphogeneticModel, PluginRegistry, Topology, __version__

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SECTIONS_APART = {"trainers.md", "trackers.md"}
"""Documents whose sections are for different readers: the code of each runs alone."""

SECTIONS_NEED = {
    "## TensorBoard": "tensorboard",
    "## Weights & Biases": "wandb",
    "## MLflow": "mlflow",
    "## Seeds as artefacts": "mlflow",
}
"""What a section needs to be installed; its code runs where that is."""


def _documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# Lightning's own use of a name that torch deprecates, and its advice on loaders that take no time.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
# MLflow's own use of SQLAlchemy.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
@pytest.mark.parametrize("document", _documents(), ids=lambda path: path.name)
def test_code_blocks_run_one_after_the_other(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    text = document.read_text(encoding="utf-8")
    section = None
    for match in BLOCK.finditer(text):
        here = text.rfind("\n## ", 0, match.start()) if document.name in SECTIONS_APART else 0
        if here != section:
            names, section = {"__name__": "__main__"}, here
        needed = SECTIONS_NEED.get(text[here:].strip().partition("\n")[0])
        if needed is not None and importlib.util.find_spec(needed) is None:
            continue
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match.group(1), str(document), "exec"), names)


@pytest.fixture
def contributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files of CONTRIBUTING.md in a folder, as a reader would have written them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(
        r"<!-- file: (\S+) -->\n```(?:python|toml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    assert len(files) == len(re.findall(r"^```(?:python|toml)$", text, re.MULTILINE)) == 6
    for name, code in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "kasmina_scale"]:
        del sys.modules[name]


def test_the_pack_of_contributing_grows(contributed: Path) -> None:
    declared = tomllib.loads((contributed / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "entry-points"
    ]
    assert declared["kasmina.api"].keys() == declared["kasmina.plugins"].keys()
    ((pack, module),) = declared["kasmina.plugins"].items()
    registry = PluginRegistry()
    record = registry.register_pack(pack, importlib.import_module(module))
    assert record.blueprints == ("scale:scale",)
    model = MorphogeneticModel(registry.hosts.create("two-layers"), registry=registry.blueprints)
    model.germinate("between", "scale")
    assert model.advance_stage("between").passed


def test_the_topology_of_contributing_is_added(contributed: Path) -> None:
    registry = PluginRegistry()
    record = registry.register_pack("sensors", importlib.import_module("kasmina_scale.sensors"))
    assert record.topologies == ("sensors",)
    assert str(Topology("sensors")) == "(b, n, f, t)"
    registry.unregister_pack("sensors")


def test_the_pack_of_contributing_passes_its_own_tests(contributed: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "tests"],
        cwd=contributed,
        env=os.environ | {"PYTHONPATH": str(contributed)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


def test_the_task_of_the_docs_is_the_one_that_the_command_writes() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- file: rings.py -->\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    source = ROOT / "kasmina_core" / "experiments" / "example_task.py"
    assert shown == source.read_text(encoding="utf-8")
    assert len(shown.split("import Task\n")[1].strip().splitlines()) <= 20


def test_the_tree_of_contributing_names_every_module_of_the_core() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("kasmina_core/ ") : text.index("plugins/ ")]
    core = ROOT / "kasmina_core"
    assert set(re.findall(r"\w+\.py\b(?!i)", tree)) == {path.name for path in core.glob("*.py")}
    rooms = dict(re.findall(r"^  (\w+)/ .*\n((?:      \S.*\n)*)", tree, re.MULTILINE))
    assert rooms.keys() == {path.parent.name for path in core.glob("*/__init__.py")}
    for room, modules in rooms.items():
        found = [path.relative_to(core / room) for path in (core / room).rglob("*.py")]
        named = {path.with_suffix("").as_posix() for path in found if path.name != "__init__.py"}
        assert set(modules.split()) == named, room


def test_the_files_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_/]+\.py)`", text)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / "kasmina_core" / name).exists()] == []


def test_readme_has_code_that_runs() -> None:
    assert len(BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))) >= 2


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = next(line for line in script.splitlines() if line.startswith("readme_command()"))
    found = subprocess.run(
        ["bash", "-c", f"{function}\nreadme_command test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert found.startswith("python3 -m venv .venv &&")
    assert found.endswith("-m pytest")
    assert f"```sh\n{found}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'bash -ec "$(readme_command test)"' in script


def test_links_between_documents_lead_somewhere() -> None:
    for document in _documents():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), (
                f"{document.name} links to {target}, which is not there"
            )


def test_no_text_installs_by_a_name_what_is_on_no_index() -> None:
    """A checkout, a wheel or a folder can be installed; a name of ours on an index could be anybody's."""
    folders = ("kasmina", "kasmina_core", "plugins", "blueprint_kits", "docs", "benchmarks")
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    paths += [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".md", ".toml", ".html"}
    ]
    by_name = re.compile(
        r"pip install [^`\n]*?(?<![\w./-])['\"]?(kasmina(?:[_-]\w+)?|\{(?:origin|distribution|then)\})(?![\w/.])"
    )
    assert by_name.search("pip install -U 'kasmina[grow]'")
    assert not by_name.search("pip install ./kasmina-vision")
    assert not by_name.search("pip install '/path/to/kasmina[grow]'")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in paths
        for match in by_name.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_hints_name_what_the_extras_name() -> None:
    """``pip install 'lightning>=2.6'`` in a message is the requirement in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {need for extra in project["optional-dependencies"].values() for need in extra}
    named = {
        need
        for path in (ROOT / "kasmina_core").rglob("*.py")
        for line in re.findall(r"pip install ((?:'[^'{]+>=[^'{]+' ?)+)", path.read_text(encoding="utf-8"))
        for need in re.findall(r"'([^']+)'", line)
    }
    assert len(named) >= 6
    assert named <= wanted


def test_the_version_is_the_same_wherever_it_stands() -> None:
    def first(pattern: str, name: str) -> str:
        found = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert found is not None, name
        return found[1]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__
    assert first(r"^version: (\S+)$", "CITATION.cff") == __version__
    assert first(r"^## (\S+)", "CHANGELOG.md") == __version__
