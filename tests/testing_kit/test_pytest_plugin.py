"""What pytest gets from the library: three fixtures, and nothing imported for tests that use none."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import kasmina_pytest
import pytest

import kasmina_core
from kasmina_core import PackState, PluginRegistry, default_registry, list_packs

HOMES = [str(Path(module.__file__).parents[1]) for module in (kasmina_core, kasmina_pytest)]

HOOK = """
from kasmina_core import HostSpec, Topology, hookimpl

@hookimpl
def kasmina_hosts():
    return [HostSpec("net", "fake_net:Net", Topology.CNN)]
"""


def test_the_registry_is_new_and_empty(kasmina_registry: PluginRegistry) -> None:
    assert isinstance(kasmina_registry, PluginRegistry)
    assert kasmina_registry.packs == []
    assert len(kasmina_registry.blueprints) == len(kasmina_registry.hosts) == 0


def test_the_device_is_cuda_where_there_is_one(kasmina_device: Any) -> None:
    import torch

    assert kasmina_device == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.zeros(1, device=kasmina_device).device.type == kasmina_device.type


@pytest.fixture
def after_the_test(request: pytest.FixtureRequest) -> Any:
    """Runs when the other fixtures of the test are gone."""
    checks: list[Any] = []
    yield checks.append
    for check in checks:
        check()


def test_a_fake_distribution_looks_installed_until_the_test_ends(
    monkeypatch: pytest.MonkeyPatch, after_the_test: Any, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("KASMINA_PLUGINS_ALLOW", "net")  # the others need not be loaded for this
    before = default_registry()
    install = request.getfixturevalue("kasmina_fake_distribution")
    info = install("fake-net", {"net": "fake_net"}, {"fake_net": HOOK}, version="3.1")
    assert (info.parent / "fake_net.py").is_file()
    (record,) = [record for record in list_packs() if record.name == "net"]
    assert (record.distribution, record.version, record.module) == ("fake-net", "3.1", "fake_net")
    registry = default_registry()
    assert registry is not before
    assert registry.pack("net").state is PackState.ACTIVE
    assert "fake_net" in sys.modules

    @after_the_test
    def gone() -> None:
        assert "fake_net" not in sys.modules
        assert str(info.parent) not in sys.path
        assert "net" not in [record.name for record in list_packs()]
        assert default_registry() is not registry
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("fake_net")


def test_a_fake_distribution_takes_further_metadata(kasmina_fake_distribution: Any) -> None:
    import importlib_metadata

    kasmina_fake_distribution(
        "fake-net", {}, metadata="Requires-Dist: torch", entry_points='[other.group]\nx = "y"\n'
    )
    found = importlib_metadata.distribution("fake-net")
    assert found.requires == ["torch"]
    assert [entry.group for entry in found.entry_points] == ["other.group"]


# -- a run of somebody else's tests ----------------------------------------------------------------------------------


def foreign_run(folder: Path, *arguments: str, start: str = "") -> subprocess.CompletedProcess[str]:
    """Run pytest in a new process in which the library is installed with its plugin."""
    info = folder / "site" / "kasmina-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kasmina\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[pytest11]\nkasmina = kasmina_pytest\n")
    packages = ("kasmina_core", "kasmina_cnn", "kasmina_layers", "kasmina_transformer", "kasmina_pytest")
    (info / "RECORD").write_text("".join(f"{package}/__init__.py,,\n" for package in packages))
    path = os.pathsep.join([str(info.parent), *HOMES])
    return subprocess.run(
        [sys.executable, "-c", f"{start}\nimport sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )  # fmt: skip


def test_a_run_that_uses_no_fixture_imports_neither_torch_nor_the_library(tmp_path: Path) -> None:
    (tmp_path / "test_foreign.py").write_text(
        dedent(
            """
            import sys

            def test_nothing_of_ours_but_the_plugin():
                assert "kasmina_pytest" in sys.modules
                assert [name for name in ("torch", "kasmina_core") if name in sys.modules] == []
            """
        )
    )
    done = foreign_run(tmp_path, "-W", "error")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_a_repeatable_test_draws_the_same_and_puts_back_what_was(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nusefixtures = kasmina_repeatable\n")
    (tmp_path / "test_foreign.py").write_text(
        dedent(
            """
            import torch

            DRAWN = []

            def test_one():
                DRAWN.append(torch.rand(2).tolist())
                assert torch.get_num_threads() == 1

            def test_two():
                assert DRAWN == [torch.rand(2).tolist()]
            """
        )
    )
    (tmp_path / "conftest.py").write_text(
        dedent(
            """
            import torch

            def pytest_sessionstart(session):
                torch.set_num_threads(2)
                torch.manual_seed(7)
                session.before = torch.get_rng_state()

            def pytest_sessionfinish(session):
                assert torch.equal(torch.get_rng_state(), session.before)
                assert torch.get_num_threads() == 2
            """
        )
    )
    done = foreign_run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_fixtures_are_found_by_name_and_documented(tmp_path: Path) -> None:
    done = foreign_run(tmp_path, "--fixtures")
    for name, sentence in (
        ("kasmina_registry", "nothing is registered"),
        ("kasmina_fake_distribution", "fake installed distributions"),
        ("kasmina_device", "else the CPU"),
        ("kasmina_repeatable", "one torch thread"),
    ):
        assert name in done.stdout
        assert sentence in done.stdout
    assert sorted(kasmina_pytest.__all__) == [
        "FakeDistribution",
        "kasmina_device",
        "kasmina_fake_distribution",
        "kasmina_registry",
        "kasmina_repeatable",
    ]


def test_pytest_started_by_a_program_that_uses_the_library_gives_no_warning(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings =\n    error\n")
    (tmp_path / "test_foreign.py").write_text(
        "def test_it(kasmina_registry):\n    assert kasmina_registry.packs == []\n"
    )
    done = foreign_run(
        tmp_path, start="import kasmina_core, kasmina_cnn, kasmina_transformer, kasmina_pytest"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_plugin_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "test_foreign.py").write_text(
        "import sys\ndef test_it():\n    assert 'kasmina_pytest' not in sys.modules\n"
    )
    done = foreign_run(tmp_path, "-p", "no:kasmina")
    assert done.returncode == 0, done.stdout + done.stderr
