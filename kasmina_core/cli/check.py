"""``kasmina plugins check``: run every check of packs or blueprints."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Final

import click

from kasmina_core.checks.reports import CheckStatus, ValidationReport, ValidationVerdict, worst
from kasmina_core.cli import options
from kasmina_core.errors import UnknownNameError, did_you_mean
from kasmina_core.packs.checking import (
    GIB,
    PackReport,
    check_pack_apart,
    check_pack_here,
    default_memory,
    installed_packs,
)

EXIT_CODES: Final = {
    ValidationVerdict.PASSED: 0,
    ValidationVerdict.FAILED: 1,
    ValidationVerdict.INCOMPLETE: 3,
}
"""Exit codes; 2 is wrong usage."""

_PATIENCE: Final = 2.0  # seconds after which progress is shown


@click.command()
@click.argument("names", metavar="[PACK_OR_ID]...", nargs=-1)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where modules run; auto is the CPU and, where there is one, CUDA.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown instead of text.")
@click.option("--isolate", is_flag=True, help="Check each pack in a process of its own.")
@click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="With --isolate: how long a pack may take.",
)
@click.option(
    "--memory-limit",
    metavar="GIB",
    type=click.FloatRange(min=0, min_open=True),
    help="With --isolate: how much memory a pack may use.  [default: 3/4 of the machine's]",
)
def check(
    names: tuple[str, ...],
    device: str,
    as_json: bool,
    as_markdown: bool,
    isolate: bool,
    timeout: float,
    memory_limit: float | None,
) -> None:
    """Run the checks of packs or blueprints.

    PACK_OR_ID is the name of a pack or the full id of a blueprint, such as cnn:norm; the default is every installed
    pack. These checks cover more than those at loading: more sizes, precisions, memory formats, both modes, copies, and
    the number of operations.

    With --isolate a pack that crashes, never ends or exceeds the memory limit is a failure in the report. Without it
    such a pack ends this process.

    \b
    Exit code:
      0  everything passed
      1  a check failed, or a pack cannot be used
      2  wrong usage, such as an unknown name
      3  nothing failed, but something that was asked for did not run
    """
    if as_json and as_markdown:
        raise click.UsageError("--json and --markdown: give one of them.")
    memory = round(memory_limit * GIB) if memory_limit is not None else default_memory()
    outcomes: list[PackReport] = []
    try:
        # What a pack prints is not our output.
        with contextlib.redirect_stdout(sys.stderr), options.progress("checking", _PATIENCE) as tell:
            for name, ids in _chosen(names).items():
                asked = {"named": bool(names), "device": None if device == "auto" else device, "tell": tell}
                if isolate:
                    outcomes += check_pack_apart(name, ids, **asked, timeout=timeout, memory=memory)  # type: ignore[arg-type]  # one dict for both
                else:
                    outcomes += check_pack_here(name, ids, **asked)  # type: ignore[arg-type]  # likewise
    except UnknownNameError as error:
        raise click.UsageError(str(error)) from error
    verdict = worst({outcome.verdict for outcome in outcomes if not outcome.is_skipped})
    if as_json:
        options.print_json({"verdict": verdict.value, "packs": [outcome.to_dict() for outcome in outcomes]})
    else:
        options.print_text((markdown_text if as_markdown else plain_report)(outcomes, verdict))
    raise click.exceptions.Exit(EXIT_CODES[verdict])


def _chosen(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the packs to check, each with the ids of the chosen blueprints; an empty list means all.

    Raises:
        UnknownNameError: If no installed pack has a name.
    """
    installed = sorted({record.name for record in installed_packs()})
    if not names:
        return {name: [] for name in installed}
    chosen: dict[str, list[str] | None] = {}
    for name in names:
        pack, colon, _ = name.partition(":")
        if pack not in installed:
            hint = "" if colon else " A blueprint is named by its full id, pack:name."
            raise UnknownNameError(f"No pack '{pack}' is installed.{did_you_mean(pack, installed)}{hint}")
        if not colon:
            chosen[pack] = None
        elif (ids := chosen.setdefault(pack, [])) is not None and name not in ids:
            ids.append(name)
    return {pack: ids or [] for pack, ids in chosen.items()}


def plain_report(outcomes: Sequence[PackReport], verdict: ValidationVerdict) -> str:
    """Return what was found as text: a line per blueprint, with its failures below."""
    lines: list[str] = []
    wide = max((len(full) for outcome in outcomes for full in outcome.blueprints), default=0)
    for outcome in outcomes:
        lines.append(f"{outcome.pack} ({outcome.origin})" + ("" if outcome.blueprints else _without(outcome)))
        for check_ in outcome.checks:
            if check_.status is CheckStatus.FAILED:
                lines += _indented(check_.explain(outcome.subject), 2)
            elif check_.status is CheckStatus.NOT_RUN:
                lines += _indented(f"not run: {check_.hint}", 2)
        for full, report in outcome.blueprints.items():
            lines.append(f"  {report.verdict.value:<10}  {full:<{wide}}  {_counts(report)}".rstrip())
            if report.failures:
                lines += _indented(report.failure_message, 4)
            for reason, checks in report.not_run_by_reason().items():
                if needed := [check_.label for check_ in checks if check_.needed]:
                    lines += _indented(f"not run: {', '.join(needed)}: {reason}", 4)
        lines.append("")
    lines += [*_absences(outcomes), _summary(outcomes, verdict)]
    return "\n".join(lines)


def _without(outcome: PackReport) -> str:
    return f": {outcome.state.value}" if outcome.state.value != "active" else ": offers no blueprint"


def _indented(text: str, by: int) -> list[str]:
    return [(" " * by + line).rstrip() for line in text.splitlines()]


def _counts(report: ValidationReport) -> str:
    ran = [c for c in report.checks if c.status in (CheckStatus.PASSED, CheckStatus.FAILED)]
    bad = f"{len(report.failures)} of " if report.failures else ""
    return f"{bad}{len(ran)} checks on {', '.join(report.devices) or 'no device'}"


def _absences(outcomes: Sequence[PackReport]) -> list[str]:
    """Return, each once, why optional checks did not run on a device."""
    reports = [report for outcome in outcomes for report in outcome.blueprints.values()]
    absent = [c for report in reports for c in report.not_run if c.device and not c.needed]
    return list(dict.fromkeys(f"Not run on {c.device}: {c.hint}." for c in absent))


def _summary(outcomes: Sequence[PackReport], verdict: ValidationVerdict) -> str:
    reports = [report for outcome in outcomes for report in outcome.blueprints.values()]
    packs = [outcome for outcome in outcomes if not outcome.is_skipped]
    counts = [
        f"{sum(report.verdict is each for report in reports)} {each.value}"
        for each in ValidationVerdict
        if any(report.verdict is each for report in reports)
    ]
    text = f"{verdict.value}: {options.counted(len(reports), 'blueprint')} of {options.counted(len(packs), 'pack')}"
    if counts:
        text += f", {', '.join(counts)}"
    if bad := sum(bool(outcome.failures) for outcome in packs):
        text += f"; {options.counted(bad, 'pack')} with a failure of its own"
    if skipped := len(outcomes) - len(packs):
        text += f"; {options.counted(skipped, 'pack')} left out by a switch"
    return text


def markdown_text(outcomes: Sequence[PackReport], verdict: ValidationVerdict) -> str:
    """Return what was found as a Markdown page."""
    from kasmina_core.checks.formats import fenced, markdown, table

    parts = ["# kasmina plugins check", _summary(outcomes, verdict)]
    rows = [
        (outcome.pack, outcome.origin, full, report.verdict.value, _counts(report))
        for outcome in outcomes
        for full, report in outcome.blueprints.items()
    ]
    if rows:
        parts.append(table(("pack", "from", "blueprint", "verdict", "what ran"), rows))
    for outcome in outcomes:
        for check_ in outcome.checks:
            if check_.status is CheckStatus.FAILED:
                parts.append(fenced(check_.explain(outcome.subject)))
            elif check_.status is CheckStatus.NOT_RUN:
                parts.append(fenced(f"{outcome.subject} was not checked.\n{check_.hint}"))
    sections = [markdown(report, full) for outcome in outcomes for full, report in outcome.blueprints.items()]
    return "\n\n".join([*parts, *(section.rstrip() for section in sections)])
