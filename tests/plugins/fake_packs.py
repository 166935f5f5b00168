"""Fake distributions: a folder with metadata and a module, put on ``sys.path``."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import kasmina_core
from kasmina_core import PackRecord

SEEDS = """
import torch
from torch import nn
from kasmina_core import BlueprintSpec, HostSpec, Topology, hookimpl

class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 1, 1))

    def forward(self, x):
        return x * (1 + self.weight)

def scale(name, **changes):
    return BlueprintSpec(**{"name": name, "topology": Topology.CNN, "factory": Scale, "param_estimate": lambda dim: dim} | changes)
"""

GOOD = (
    SEEDS
    + """
@hookimpl
def kasmina_blueprints():
    return [scale("scale")]
"""
)


@dataclass
class Site:
    """A folder that stands for ``site-packages``."""

    root: Path
    distributions: set[str] = field(default_factory=set)

    def install(
        self,
        distribution: str,
        entry_points: str | bytes,
        version: str = "1.0",
        metadata: bytes | None = b"",
        folder: str = "",
        **modules: str,
    ) -> Path:
        """Write a distribution with entry points, ``name = module`` a line, and the source of its modules."""
        where = self.root / folder
        where.mkdir(exist_ok=True)
        info = where / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        if metadata == b"":
            metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n".encode()
        if metadata is not None:
            (info / "METADATA").write_bytes(metadata)
        if isinstance(entry_points, str):
            entry_points = f"[kasmina.plugins]\n{dedent(entry_points)}".encode()
        (info / "entry_points.txt").write_bytes(entry_points)
        for name, source in modules.items():
            (where / f"{name}.py").write_text(source)
        self.distributions.add(distribution)
        importlib.invalidate_caches()
        return info

    def mine(self, records: list[PackRecord]) -> list[PackRecord]:
        """Leave out packs that happen to be installed where the tests run."""
        return [record for record in records if record.distribution in self.distributions]


def run_python(code: str, *paths: Path, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that finds the library and, before it, ``paths``."""
    home = Path(kasmina_core.__file__).parents[1]
    path = os.pathsep.join([*map(str, paths), str(home), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
