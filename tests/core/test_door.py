"""The door: what is public, that it is there, and what opening it costs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kasmina
import kasmina_core
from kasmina_core import errors, events
from kasmina_core.policies import protocol

DOOR = Path(kasmina_core.__file__).with_suffix(".pyi")
HEAVY = ["torch", "fvcore", "matplotlib", "click", "rich", "numpy", "sklearn", "pluggy"]
MODULES = sorted(m.name for m in pkgutil.walk_packages(kasmina_core.__path__, "kasmina_core."))
LIGHT = [
    "blueprints.declarations",
    "errors",
    "events",
    "hosts",
    "lifecycle",
    "policies.protocol",
    "topology",
]

PROMISED = [
    "AlphaSchedule",
    "BlueprintRegistry",
    "BlueprintSpec",
    "GateLevel",
    "GateResult",
    "GradientIsolationMonitor",
    "HostProtocol",
    "InjectionPoint",
    "MorphogeneticModel",
    "QualityGates",
    "SeedMetrics",
    "SeedSlot",
    "SeedStage",
    "SeedState",
    "TelemetryEvent",
    "TelemetryEventType",
    "Topology",
    "VALID_TRANSITIONS",
    "blend_with_isolation",
    "hookimpl",
    "hookspec",
    "is_active_stage",
    "is_failure_stage",
    "is_terminal_stage",
    "is_valid_transition",
    "straight_through",
]


def names_for_type_checkers():
    """The ``from .module import Name as Name`` lines beside the door: name to module."""
    found = {}
    for node in ast.parse(DOOR.read_text()).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            assert alias.name == alias.asname, "type checkers export only 'X as X'"
            assert alias.name not in found
            found[alias.name] = f"kasmina_core.{node.module}"
    return found


def test_all_is_sorted_and_without_repeats():
    assert kasmina_core.__all__ == sorted(set(kasmina_core.__all__))


def test_every_promised_name_is_public():
    assert set(PROMISED) <= set(kasmina_core.__all__)


@pytest.mark.parametrize("name", kasmina_core.__all__)
def test_every_public_name_can_be_imported_and_has_a_docstring(name):
    value = getattr(kasmina_core, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__name__ == name
        assert inspect.getdoc(value), f"{name} has no docstring"


def test_type_checkers_see_the_names_that_a_program_sees():
    seen = names_for_type_checkers()
    assert sorted(seen) == kasmina_core.__all__
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(kasmina_core, name)


def test_errors_events_and_commands_are_all_public():
    def own(module):
        return {
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
        }

    public = set(kasmina_core.__all__)
    assert own(errors) <= public
    assert own(events) <= public
    assert own(protocol) <= public


def test_every_error_is_a_kasmina_error():
    kinds = [
        v
        for v in vars(errors).values()
        if inspect.isclass(v) and issubclass(v, Exception) and not issubclass(v, Warning)
    ]
    assert len(kinds) > 8
    assert all(issubclass(kind, kasmina_core.KasminaError) for kind in kinds)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No kasmina_core attribute Nonsense"):
        kasmina_core.Nonsense  # noqa: B018
    assert set(kasmina_core.__all__) < set(dir(kasmina_core))


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_opening_the_door_imports_nothing_heavy():
    code = f"import sys, kasmina_core; dir(kasmina_core); print([m for m in {HEAVY} if m in sys.modules])"
    assert run(code) == "[]\n"


def test_kasmina_is_kasmina_core_by_another_name():
    assert (kasmina.__all__, kasmina.__version__) == (kasmina_core.__all__, kasmina_core.__version__)
    assert all(getattr(kasmina, name) is getattr(kasmina_core, name) for name in kasmina_core.__all__)
    assert dir(kasmina) == sorted(dir(kasmina_core))
    with pytest.raises(AttributeError, match="No kasmina attribute Nonsense"):
        kasmina.Nonsense  # noqa: B018


def test_importing_kasmina_imports_nothing_heavy():
    code = f"import sys, kasmina; dir(kasmina); print([m for m in {HEAVY} if m in sys.modules])"
    assert run(code) == "[]\n"


def test_type_checkers_see_the_names_of_kasmina():
    stub = Path(kasmina.__file__).with_suffix(".pyi").read_text()
    assert "from kasmina_core import *" in stub
    assert "__all__" not in DOOR.read_text(), "with a list of its own a stub hands on those names alone"


def test_data_modules_need_no_torch():
    imports = "; ".join(f"import kasmina_core.{name}" for name in LIGHT)
    code = f"import sys; {imports}; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(code) == "[]\n"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    if name.rpartition(".")[2] == "__main__":
        assert "__name__" in Path(importlib.util.find_spec(name).origin).read_text()
        return
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0


def test_there_are_examples_to_run():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {
        name: sum(len(test.examples) for test in finder.find(importlib.import_module(name)))
        for name in MODULES
        if not name.endswith("__main__")
    }
    assert sum(found.values()) >= 20
    assert all(
        found[f"kasmina_core.{name}"]
        for name in ("lifecycle", "topology", "blueprints.declarations", "gates.gates")
    )
