"""Reports as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from kasmina_core.checks.reports import CheckStatus, ValidationReport, plain_text

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
        (c.label, c.status.value, plain_text(c.expected), plain_text(c.measured), c.tolerance)
        for c in report.checks
        if c.status is not CheckStatus.NOT_RUN
    ]
    if rows:
        parts.append(table(("check", "status", "expected", "measured", "tolerance"), rows))
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
