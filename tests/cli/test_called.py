"""How the command is called: by its name, as a module, and by what people type first."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from kasmina_core import __version__
from kasmina_core.cli import main


@pytest.mark.parametrize("module", ["kasmina", "kasmina_core"])
def test_python_m_is_the_command(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "-V"], capture_output=True, text=True, check=True)
    assert done.stdout == f"kasmina, version {__version__}\n"


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version_is_shown(option: str) -> None:
    assert CliRunner().invoke(main, [option]).output == f"kasmina, version {__version__}\n"


def test_doctor_is_found_at_the_top_and_under_plugins() -> None:
    shown, under = (
        CliRunner().invoke(main, [*names, "--help"], prog_name="kasmina")
        for names in (["doctor"], ["plugins", "doctor"])
    )
    assert shown.exit_code == 0
    assert shown.output == under.output.replace("kasmina plugins doctor", "kasmina doctor")
    assert "doctor " in CliRunner().invoke(main, ["--help"]).output
