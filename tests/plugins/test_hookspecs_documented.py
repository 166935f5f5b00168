"""The hooks are few, and each is documented with an example that runs and its exact signature."""

from __future__ import annotations

import ast
import doctest
import inspect

import pytest

from kasmina_core.packs import hookspecs

HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("kasmina_")}


def test_the_hooks_are_these_seven() -> None:
    assert {name: list(inspect.signature(hook).parameters) for name, hook in HOOKS.items()} == {
        "kasmina_topologies": [],
        "kasmina_blueprints": [],
        "kasmina_hosts": [],
        "kasmina_gate_checks": [],
        "kasmina_policies": [],
        "kasmina_tasks": [],
        "kasmina_sinks": ["config"],
    }


@pytest.mark.parametrize("name", HOOKS)
def test_the_example_of_a_hook_implements_it_with_its_exact_arguments(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(HOOKS[name]) or "")
    functions = [
        node
        for example in examples
        for node in ast.walk(ast.parse(example.source))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert len(functions) == 1
    wanted = list(inspect.signature(HOOKS[name]).parameters)
    assert [argument.arg for argument in functions[0].args.args] == wanted
    assert [ast.unparse(mark) for mark in functions[0].decorator_list] == ["hookimpl"]


def test_the_examples_run() -> None:
    failures, tried = doctest.testmod(hookspecs)
    assert (failures, tried > len(HOOKS) - 1) == (0, True)
