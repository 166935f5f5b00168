"""Reports for other programs' eyes: Markdown for a page, JUnit XML for a build server."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final
from xml.etree.ElementTree import Element, SubElement, tostring

from kasmina_core.checks.reports import CheckResult, CheckStatus, ValidationReport, plain_text

_NOT_XML: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_UNPRINTABLE: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def markdown(report: ValidationReport, name: str = "") -> str:
    """Return a section with the verdict, what failed, why checks did not run, and a table of the others.

    Args:
        report: What was found.
        name: What to call the blueprint, instead of its short name.
    """
    headline = replace(report, blueprint=name).headline if name else report.headline
    parts = [f"## {_cell(headline)}"]
    if report.origin:
        parts.append(f"From {_cell(report.origin)}.")
    for check in report.failures:
        parts.append(fenced(check.explain(report.subject)))
    rows = [
        (c.label, c.status.value, plain_text(c.expected), plain_text(c.measured), c.tolerance, c.measured_at)
        for c in report.checks
        if c.status is not CheckStatus.NOT_RUN
    ]
    if rows:
        parts.append(table(("check", "status", "expected", "measured", "tolerance", "measured at"), rows))
    reasons = report.not_run_by_reason()
    if reasons:
        lines = ["Not run:", ""]
        for why, checks in reasons.items():
            needed = "" if any(check.needed for check in checks) else " (not asked for)"
            lines.append(f"- {', '.join(_cell(check.label) for check in checks)}: {_cell(why)}{needed}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a column that is empty in every row is left out, and any text fits a cell."""
    rows = [tuple(map(_cell, row)) for row in rows]
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[header[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str) -> str:
    """Return text as a code block whose fence is longer than any in the text."""
    text = _UNPRINTABLE.sub(_escaped, text.replace("\r", "\n"))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _cell(text: str) -> str:
    """Return text that stays in its table cell and means nothing to Markdown or HTML."""
    text = _UNPRINTABLE.sub(_escaped, text.strip()).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*|\[\]#~])", r"\\\1", text).replace("\t", " ")
    return "<br>".join(text.splitlines())


def _escaped(match: re.Match[str]) -> str:
    return f"\\x{ord(match.group()):02x}"


# -- JUnit ----------------------------------------------------------------------------------------------------------


def junit_suite(report: ValidationReport, name: str = "") -> Element:
    """Return a report as a test suite.

    A check that did not run is skipped, with the reason; one that passed earlier says so in its output.

    Args:
        report: What was found.
        name: Name of the suite; that of the blueprint if empty.

    Source: https://github.com/testmoapp/junitxml
    """
    name = name or report.blueprint
    suite = new_suite(name)
    properties = SubElement(suite, "properties")
    for key, value in (
        ("verdict", report.verdict.value),
        ("origin", report.origin),
        ("devices", ", ".join(report.devices)),
    ):
        SubElement(properties, "property", name=key, value=xml_text(value))
    for check in report.checks:
        add_case(suite, name, check, report.subject)
    return suite


def new_suite(name: str) -> Element:
    """Return an empty test suite."""
    return Element("testsuite", name=xml_text(name), tests="0", failures="0", errors="0", skipped="0")


def add_case(suite: Element, class_name: str, check: CheckResult, subject: str) -> None:
    """Add a check to a suite as a test case."""
    case = SubElement(suite, "testcase", classname=xml_text(class_name), name=xml_text(check.label))
    _count(suite, "tests")
    if check.status is CheckStatus.FAILED:
        message = check.explain(subject)
        first = message.partition("\n")[0]
        failure = SubElement(case, "failure", message=xml_text(first), type=xml_text(check.name))
        failure.text = xml_text(message)
        _count(suite, "failures")
    elif check.status is CheckStatus.NOT_RUN:
        SubElement(case, "skipped", message=xml_text(check.hint))
        _count(suite, "skipped")
    else:
        SubElement(case, "system-out").text = xml_text(f"{check.status.value}: {check.detail}")


def junit(suites: Sequence[Element]) -> str:
    """Return a JUnit XML document of test suites."""
    root = Element("testsuites", name="kasmina plugins check")
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in suites)))
    root.extend(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def xml_text(text: str) -> str:
    r"""Return text that XML can hold: other characters are written as their number.

    >>> xml_text("a\x00b")
    'a\\x00b'
    """
    return _NOT_XML.sub(_escaped, text)


def _count(suite: Element, key: str) -> None:
    suite.set(key, str(int(suite.get(key, "0")) + 1))
