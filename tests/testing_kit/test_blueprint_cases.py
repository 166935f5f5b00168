"""`check_blueprint`, and `parametrize_blueprints`: one test case a blueprint and check, expected failures strict."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import kasmina_cnn
import kasmina_transformer
import pytest
import torch
from torch import Tensor, nn

from kasmina_core import BlueprintSpec, PluginError, Topology, UnknownNameError, ValidationVerdict, hookimpl
from kasmina_core.checks.blueprints import CHECK_NAMES
from kasmina_core.testing import check_blueprint, parametrize_blueprints


class Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight)


class Narrow(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 1:]


class Pack:
    """A pack as an object."""

    @hookimpl
    def kasmina_blueprints(self) -> list[BlueprintSpec]:
        return [SCALE, NARROW]


SCALE = BlueprintSpec("scale", Topology.CNN, Scale, lambda dim: dim)
NARROW = BlueprintSpec("narrow", Topology.CNN, Narrow, lambda dim: dim)
WRONG_SIZE = BlueprintSpec("wrong-size", Topology.CNN, Scale, lambda dim: 2 * dim)


def cases(*given: Any, **options: Any) -> dict[str, Any]:
    """The cases of a mark by id."""
    mark = parametrize_blueprints(*given, device="cpu", **options)
    names, parameters = mark.args
    assert names == ("blueprint", "check")
    return {parameter.id: parameter for parameter in parameters}


# -- one report ------------------------------------------------------------------------------------------------------


def test_a_blueprint_is_checked_by_declaration_or_by_id() -> None:
    assert check_blueprint(SCALE, device="cpu").verdict is ValidationVerdict.PASSED
    report = check_blueprint("cnn:norm", device="cpu", widths=[8, 12])
    assert (report.verdict, report.blueprint) == (ValidationVerdict.PASSED, "norm")
    assert report.origin.startswith("kasmina ")


def test_an_id_that_is_not_one_is_answered() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'cnn:norm'"):
        check_blueprint("cnn:nrom")
    with pytest.raises(UnknownNameError, match="write 'pack:name'"):
        check_blueprint("norm")
    with pytest.raises(UnknownNameError, match="No pack 'cnm' is installed"):
        check_blueprint("cnm:norm")


def test_a_bad_blueprint_of_an_installed_pack_gets_a_report(kasmina_fake_distribution: Any) -> None:
    """Its registration would be refused; an author wants to see all that is wrong."""
    source = """
    from kasmina_core import BlueprintSpec, Topology, hookimpl

    @hookimpl
    def kasmina_blueprints():
        from torch import nn
        return [BlueprintSpec("wide", Topology.CNN, lambda dim: nn.Conv2d(dim, 2 * dim, 1), lambda dim: 1)]
    """
    kasmina_fake_distribution("fake-wide", {"wide": "fake_wide"}, {"fake_wide": dedent(source)})
    report = check_blueprint("wide:wide", device="cpu", widths=[2, 4])
    assert {"param_estimate", "output_shape"} <= {check.name for check in report.failures}
    assert report.origin == "fake-wide 1.0"


# -- one case a check ------------------------------------------------------------------------------------------------


def test_there_is_a_case_for_each_blueprint_and_check_that_says_something_of_it() -> None:
    everywhere = [name for name in CHECK_NAMES if name not in ("param_count", "options", "channels_last")]
    found = cases(kasmina_transformer)
    names = [spec.name for spec in kasmina_transformer.kasmina_blueprints()]
    assert {f"{name}-{check}" for name in names for check in everywhere} <= set(found)
    assert {"attention-options", "block-options", "lora-options", "mlp-options"} == {
        id for id in found if id.endswith("options")
    }
    assert {id.rpartition("-")[2] for id in cases(kasmina_cnn)} == set(CHECK_NAMES) - {
        "param_count",
        "positions",
    }


@pytest.mark.parametrize("given", [SCALE, [SCALE], "cnn:norm", ["cnn:norm", SCALE]])
def test_every_case_of_a_good_blueprint_passes_or_says_why_it_did_not_run(given: Any) -> None:
    for parameter in cases(given).values():
        spec, check = parameter.values
        check(spec)


@pytest.mark.parametrize("module", [kasmina_cnn, kasmina_transformer], ids=lambda module: module.__name__)
def test_no_case_is_about_a_check_that_a_blueprint_never_gets(module: Any) -> None:
    for spec in module.kasmina_blueprints():
        reported = {check.name for check in check_blueprint(spec, device="cpu", widths=[8, 12]).checks}
        assert {parameter.values[1].name for parameter in cases(spec).values()} == reported - {"param_count"}


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (Pack(), ["scale", "narrow"]),
        (SimpleNamespace(kasmina_blueprints=None, __name__="x"), PluginError),
        ("transformer", [f"transformer:{name}" for name in ("attention", "block", "lora", "mlp", "norm")]),
        (["cnn:norm", SCALE], ["cnn:norm", "scale"]),
        ([], ValueError),
        (3, TypeError),
    ],
)
def test_what_names_blueprints(given: Any, ids: Any) -> None:
    if isinstance(ids, list):
        assert {id.rpartition("-")[0] for id in cases(given)} == set(ids)
    else:
        with pytest.raises(ids):
            cases(given)


def test_the_case_of_a_failed_check_raises_what_failed_and_no_other_does() -> None:
    found = cases(WRONG_SIZE)
    spec, check = found["wrong-size-param_estimate"].values
    with pytest.raises(AssertionError, match=r"declared: +\d+ parameters"):
        check(spec)
    spec, check = found["wrong-size-output_shape"].values
    check(spec)


def test_the_exception_behind_a_failure_is_chained() -> None:
    broken = BlueprintSpec("broken", Topology.CNN, lambda dim: 1 / 0, lambda dim: dim)  # type: ignore[arg-type,return-value]
    spec, check = cases(broken)["broken-factory"].values
    with pytest.raises(AssertionError) as caught:
        check(spec)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_check_that_did_not_run_is_skipped_with_the_reason() -> None:
    broken = BlueprintSpec("broken", Topology.CNN, lambda dim: 1 / 0, lambda dim: dim)  # type: ignore[arg-type,return-value]
    spec, check = cases(broken)["broken-output_shape"].values
    with pytest.raises(pytest.skip.Exception, match="no module was built"):
        check(spec)


def test_collecting_cases_builds_nothing() -> None:
    built: list[int] = []

    def factory(dim: int) -> nn.Module:
        built.append(dim)
        return Scale(dim)

    found = cases(BlueprintSpec("seen", Topology.CNN, factory, lambda dim: dim))
    assert not built
    spec, check = found["seen-factory"].values
    check(spec)
    once = len(built)
    assert once > 0
    for parameter in found.values():
        parameter.values[1](spec)
    assert len(built) == once, "the report is made once for all cases"


# -- expected failures -----------------------------------------------------------------------------------------------


def test_an_expected_failure_marks_its_case_alone_and_strictly() -> None:
    found = cases(WRONG_SIZE, expected_failures={"param_estimate": "counted by hand"})
    marked = {id: parameter.marks for id, parameter in found.items() if parameter.marks}
    assert list(marked) == ["wrong-size-param_estimate"]
    (mark,) = marked["wrong-size-param_estimate"]
    assert mark.name == "xfail"
    assert mark.kwargs == {"reason": "counted by hand", "strict": True, "raises": AssertionError}


def test_a_function_says_which_failures_of_which_blueprint_are_expected() -> None:
    def expected(spec: BlueprintSpec) -> dict[str, str]:
        return {"output_shape": "it crops"} if spec.name == "narrow" else {}

    found = cases(Pack(), expected_failures=expected)
    assert [id for id, parameter in found.items() if parameter.marks] == ["narrow-output_shape"]


@pytest.mark.parametrize(
    ("expected", "error", "text"),
    [
        ({"output_shape": ""}, ValueError, "say why 'output_shape' fails"),
        ({"output_shape": "  "}, ValueError, "say why"),
        ({"output_shape": None}, ValueError, r"given: 'output_shape': None"),
        ({"output_shap": "typo"}, UnknownNameError, "Did you mean 'output_shape'"),
        ({"options": "it has none"}, ValueError, "options says nothing of any"),
    ],
)
def test_an_expected_failure_needs_a_check_and_a_reason(expected: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        cases(SCALE, expected_failures=expected)


def test_pytest_shows_and_reports_cases_by_name_and_an_expected_failure_that_passes_as_an_error(
    tmp_path: Path,
) -> None:
    (tmp_path / "test_them.py").write_text(
        dedent(
            """
            from kasmina_core import BlueprintSpec, Topology
            from kasmina_core.testing import parametrize_blueprints

            def scale(dim):
                import torch
                from torch import nn

                class Scale(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.weight = nn.Parameter(torch.zeros(dim, 1, 1))

                    def forward(self, x):
                        return x * (1 + self.weight)

                return Scale()

            SPEC = BlueprintSpec("scale", Topology.CNN, scale, lambda dim: 2 * dim)
            EXPECTED = {"param_estimate": "counted by hand", "output_shape": "it may crop one day"}

            @parametrize_blueprints(SPEC, expected_failures=EXPECTED, device="cpu")
            def test_blueprint(blueprint, check):
                check(blueprint)
            """
        )
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", "param_estimate or output_shape or factory", "--junitxml=report.xml", "test_them.py"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    shown = {
        line.split()[0].partition("::")[2]: line for line in done.stdout.splitlines() if "::test_" in line
    }
    assert "XFAIL" in shown["test_blueprint[scale-param_estimate]"], done.stdout + done.stderr
    assert "FAILED" in shown["test_blueprint[scale-output_shape]"]
    assert "PASSED" in shown["test_blueprint[scale-factory]"]
    assert "[XPASS(strict)] it may crop one day" in done.stdout
    assert done.returncode == 1
    written = {case.get("name"): case for case in ElementTree.parse(tmp_path / "report.xml").iter("testcase")}
    failed = written["test_blueprint[scale-output_shape]"].find("failure")
    assert failed is not None
    assert "it may crop one day" in (failed.get("message") or "")
    assert not list(written["test_blueprint[scale-factory]"])


def test_the_decorated_test_takes_the_declaration_and_the_check() -> None:
    ran: list[str] = []

    @parametrize_blueprints(SCALE, device="cpu")
    def test_blueprint(blueprint: BlueprintSpec, check: Callable[[BlueprintSpec], None]) -> None:
        ran.append(blueprint.name)

    (mark,) = test_blueprint.pytestmark  # type: ignore[attr-defined]  # set by pytest
    assert mark.name == "parametrize"
    assert not ran
