"""Fixtures for tests of packs and hosts. pytest finds this module by itself; ``-p no:kasmina`` leaves it out.

It is imported in every test run where the library is installed, so it imports neither torch nor the library before a
fixture is asked for. PYTEST_DONT_REWRITE: it holds no asserts, and may be imported before pytest could rewrite it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    import torch

    from kasmina_core import PluginRegistry

__all__ = [
    "FakeDistribution",
    "kasmina_device",
    "kasmina_fake_distribution",
    "kasmina_registry",
    "kasmina_repeatable",
]


class FakeDistribution(Protocol):
    """Makes a distribution that looks installed until the test ends."""

    def __call__(
        self,
        name: str,
        packs: Mapping[str, str],
        modules: Mapping[str, str] | None = None,
        *,
        version: str = "1.0",
        metadata: str = "",
        entry_points: str = "",
    ) -> Path:
        """Write the distribution and return its metadata folder.

        Args:
            name: Name of the distribution, such as ``"acme-seeds"``.
            packs: Entry points of the group ``kasmina.plugins``: the name of a pack, and its module.
            modules: Source of top-level modules, by name.
            version: Version of the distribution.
            metadata: Further lines of its METADATA, such as ``"Requires-Dist: torch"``.
            entry_points: Further text of its ``entry_points.txt``.
        """
        ...


@pytest.fixture
def kasmina_registry() -> PluginRegistry:
    """A `PluginRegistry` in which nothing is registered and nothing installed was loaded."""
    from kasmina_core import PluginRegistry

    return PluginRegistry()


@pytest.fixture
def kasmina_device() -> torch.device:
    """The CUDA device where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kasmina_repeatable() -> Iterator[None]:
    """Makes a test repeatable: one torch thread, and random numbers of torch from one seed. Both are put back.

    For every test of a package: ``usefixtures = ["kasmina_repeatable"]`` in ``[tool.pytest.ini_options]``.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def kasmina_fake_distribution(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDistribution]:
    """A function that makes fake installed distributions; see `FakeDistribution`.

    They lie in a new folder at the head of ``sys.path``. When the test ends, the folder is taken off, what was imported
    from it is forgotten, and so is the registry of the process.
    """
    site = tmp_path_factory.mktemp("kasmina-site")
    before = set(sys.modules)

    def install(
        name: str,
        packs: Mapping[str, str],
        modules: Mapping[str, str] | None = None,
        *,
        version: str = "1.0",
        metadata: str = "",
        entry_points: str = "",
    ) -> Path:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(head + (f"{metadata.strip()}\n" if metadata else ""), encoding="utf-8")
        rows = "".join(f"{pack} = {module}\n" for pack, module in packs.items())
        (info / "entry_points.txt").write_text(f"[kasmina.plugins]\n{rows}{entry_points}", encoding="utf-8")
        for module, source in (modules or {}).items():
            (site / f"{module}.py").write_text(source, encoding="utf-8")
        _forget_the_default_registry()
        importlib.invalidate_caches()
        return info

    _forget_the_default_registry()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        yield install
    for name in set(sys.modules) - before:
        if str(site) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    importlib.invalidate_caches()
    _forget_the_default_registry()


def _forget_the_default_registry() -> None:
    discovery = sys.modules.get("kasmina_core.packs.discovery")
    if discovery is not None:  # else nobody has loaded it
        discovery.reset_default_registry()
