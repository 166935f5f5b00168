"""The room of experiments is a library: it needs nothing of the command."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

from kasmina_core import experiments


def test_no_module_needs_the_command() -> None:
    names = [f"{experiments.__name__}.{module.name}" for module in pkgutil.iter_modules(experiments.__path__)]
    assert len(names) >= 8
    code = (
        f"import sys, {', '.join(names)}\n"
        "assert not [name for name in sys.modules if name == 'click' or name.startswith('kasmina_core.cli')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
