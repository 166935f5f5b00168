"""What README and docs say is so: their code runs, their commands are those that are tested."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from kasmina_core import MorphogeneticModel, PluginRegistry

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", _documents(), ids=lambda path: path.name)
def test_code_blocks_run_one_after_the_other(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    text = document.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match.group(1), str(document), "exec"), names)


def test_the_pack_of_contributing_registers_and_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["kasmina_scale/__init__.py", "kasmina_scale/seeds.py"]
    for name, code in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = PluginRegistry()
    record = registry.register_pack("scale", importlib.import_module("kasmina_scale"))
    assert record.blueprints == ("scale:scale",)
    model = MorphogeneticModel(
        nn.Sequential(nn.Conv2d(1, 4, 1)),
        ["0"],
        example=torch.zeros(1, 1, 2, 2),
        registry=registry.blueprints,
    )
    model.germinate("0", "scale")
    assert model.advance_stage("0").passed


def test_readme_has_code_that_runs() -> None:
    assert len(BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))) >= 4


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
