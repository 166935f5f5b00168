"""A report as text, JSON and Markdown, whatever is in it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kasmina_core import (
    BlueprintError,
    CheckpointError,
    CheckResult,
    CheckStatus,
    ValidationReport,
    ValidationVerdict,
)

any_text = st.text(st.characters(exclude_categories=[]), max_size=30)
values = st.one_of(
    st.none(),
    st.integers(),
    any_text,
    st.lists(st.integers(), max_size=4),
    st.dictionaries(any_text, any_text, max_size=3),
)
results = st.builds(
    CheckResult,
    name=any_text,
    status=st.sampled_from(CheckStatus),
    device=any_text,
    where=any_text,
    expected=values,
    measured=values,
    tolerance=any_text,
    hint=any_text,
    claim=any_text,
    needed=st.booleans(),
)
reports = st.builds(
    ValidationReport,
    blueprint=any_text,
    origin=any_text,
    devices=st.lists(any_text, max_size=2).map(tuple),
    asked=st.lists(any_text, max_size=2).map(tuple),
    checks=st.lists(results, max_size=4).map(tuple),
)


def check(name: str = "output_shape", status: CheckStatus = CheckStatus.PASSED, **facts: Any) -> CheckResult:
    return CheckResult(name, status, **facts)


def report(*checks: CheckResult, **facts: Any) -> ValidationReport:
    given = {"blueprint": "norm", "origin": "my-pack 1.0", "devices": ("cpu",), "asked": ("cpu",)}
    return ValidationReport(**given | facts, checks=checks)


PASSED = check(device="cpu", measured="9 inputs")
FAILED = check(
    "identity_at_birth",
    CheckStatus.FAILED,
    device="cpu",
    where="dim=64",
    expected="near",
    measured="1.2 away",
    tolerance="0.5",
    hint="Start at zero.",
    claim="is far from the identity",
)
MISSING = check("flops", CheckStatus.NOT_RUN, device="cpu", hint="no memory")
LEFT_OUT = check("flops", CheckStatus.NOT_RUN, device="cuda", hint="no such device", needed=False)


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [
        ([PASSED], "passed"),
        ([PASSED, LEFT_OUT], "passed"),
        ([PASSED, MISSING], "incomplete"),
        ([PASSED, MISSING, FAILED], "failed"),
        ([], "incomplete"),
    ],
)
def test_the_verdict_is_the_worst_of_what_was_asked_for(checks: list[CheckResult], verdict: str) -> None:
    assert report(*checks).verdict is ValidationVerdict(verdict)
    assert report(*checks).to_dict()["verdict"] == verdict


def test_incomplete_comes_with_the_checks_that_did_not_run_and_why() -> None:
    found = report(PASSED, MISSING, LEFT_OUT)
    assert found.missing == (MISSING,)
    assert found.to_dict()["not_run"] == [
        {"name": "flops", "device": "cpu", "where": "", "why": "no memory", "needed": True},
        {"name": "flops", "device": "cuda", "where": "", "why": "no such device", "needed": False},
    ]
    assert "not run  flops on cpu: no memory" in str(found)


def test_a_failure_is_told_with_both_values_the_tolerance_and_what_to_do() -> None:
    message = (
        "Blueprint 'norm' from pack 'my-pack 1.0' is far from the identity.\n"
        "  expected: near at dim=64, on cpu\n"
        "  measured: 1.2 away\n"
        "  tolerance: 0.5\n"
        "Start at zero."
    )
    found = report(PASSED, FAILED)
    assert found.failure_message == message
    assert message in found.to_markdown()
    with pytest.raises(BlueprintError, match=r"1\.2 away"):
        found.raise_if_failed()


def test_markdown_has_a_table_of_what_ran_and_a_list_of_what_did_not() -> None:
    assert report(PASSED, LEFT_OUT).to_markdown() == (
        "## norm: passed on cpu\n\n"
        "From my-pack 1.0.\n\n"
        "| check | status | measured | tolerance |\n"
        "| --- | --- | --- | --- |\n"
        "| output_shape on cpu | passed | 9 inputs | none |\n\n"
        "Not run:\n\n"
        "- flops on cuda: no such device (not asked for)\n"
    )


@given(st.lists(results, min_size=1, max_size=4))
def test_any_text_stays_in_its_cell_of_the_markdown_table(checks: list[CheckResult]) -> None:
    passed = [replace(c, name=f"n{c.name}", status=CheckStatus.PASSED) for c in checks]
    text = report(*passed).to_markdown()
    text.encode("utf-8")
    rows = [line for line in text.split("\n") if line.startswith("| ")]
    assert len(rows) == len(passed) + 2
    bars = {row.replace("\\\\", "").replace("\\|", "").count("|") for row in rows}
    assert len(bars) == 1
    assert "<" not in text.replace("<br>", "")


@given(any_text.map(lambda text: f"``{text}```` {text}"))
def test_any_failure_stays_in_its_code_block(claim: str) -> None:
    lines = report(replace(FAILED, claim=claim)).to_markdown().split("\n")
    fence = next(line for line in lines if line.startswith("```")).removesuffix("text")
    assert set(fence) == {"`"}
    assert [line for line in lines if line.startswith(fence)] == [f"{fence}text", fence]


@given(reports)
def test_json_and_back_is_the_same_report(found: ValidationReport) -> None:
    assert ValidationReport.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@given(reports)
def test_any_report_can_be_printed(found: ValidationReport) -> None:
    assert found.verdict.value in str(found)


@pytest.mark.parametrize(
    "broken",
    [{}, {"status": "fine"}, {"needed": "yes"}, {"name": 3}, {"hint": None}],
)
def test_data_that_is_no_check_is_refused(broken: dict[str, Any]) -> None:
    data = PASSED.to_dict() | broken if broken else {}
    with pytest.raises(CheckpointError, match="CheckResult cannot be read"):
        CheckResult.from_dict(data)
