"""Laying out a project's packages and metadata as an installer would, without one."""

from __future__ import annotations

import importlib
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
BROKEN = ROOT / "tests" / "broken_packs"


def install_project(site: Path, project: Path, *, packages: bool = True) -> str:
    """Write ``dist-info`` as ``pyproject.toml`` says, copy the packages of the wheel, and return the distribution.

    A folder ``dist-info`` in the project holds files that are written over, for damage that no build makes.
    """
    config = tomllib.loads((project / "pyproject.toml").read_text())
    about = config["project"]
    info = site / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.4", f"Name: {about['name']}", f"Version: {about['version']}"]
    lines += [f"Requires-Python: {about['requires-python']}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in about.get("dependencies", [])]
    (info / "METADATA").write_text("\n".join([*lines, ""]))
    groups = about.get("entry-points", {}).items()
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
            for group, entries in groups
        )
    )
    for file in (project / "dist-info").glob("*"):
        shutil.copy(file, info)
    if packages:
        for package in config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(project / package, site / Path(package).name, ignore=skipped)
    importlib.invalidate_caches()
    return about["name"]
