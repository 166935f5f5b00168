"""``kasmina doctor``, or ``kasmina plugins doctor``: what is wrong with the installed packs, and what to do."""

from __future__ import annotations

import contextlib
import sys

import click

from kasmina_core.cli import options
from kasmina_core.cli.plugins import print_table
from kasmina_core.packs.diagnosis import SLOW, Diagnosis, Severity, diagnose
from kasmina_core.packs.switches import ENVIRONMENT

EXIT_PROBLEMS = 1


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option(
    "--checks", is_flag=True, help="Load the packs here too, with the registration checks (imports torch)."
)
@click.option(
    "--slow",
    default=SLOW,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Time of import from which a pack is called slow.",
)
def doctor(as_json: bool, checks: bool, slow: float) -> None:
    """Find out what is wrong with the installed packs, and what to do.

    Shows which switches are in force; packs that conflict, do not fit, or cannot be imported; metadata that is damaged,
    stale or duplicated; and packs that are slow or import torch. Each pack is imported in a process of its own, except
    those that a switch keeps out. State "discovered" means that it was imported and its hooks answered.

    \b
    Exit code:
      0  healthy; there may be advice
      1  problems were found
      2  wrong usage
    """
    # What a pack prints while it loads is not our output.
    with contextlib.redirect_stdout(sys.stderr), options.progress("importing", plain=False) as progress:
        diagnosis = diagnose(checks=checks, slow=slow, progress=progress)
    if as_json:
        options.print_json(diagnosis.to_dict())
    else:
        _print(diagnosis, checks)
    if not diagnosis.is_healthy:
        raise click.exceptions.Exit(EXIT_PROBLEMS)


def _print(diagnosis: Diagnosis, checks: bool) -> None:
    in_force = diagnosis.switches.in_force()
    click.echo("switches in force" + ("" if in_force else ": none"))
    for name, value in in_force.items():
        shown = (
            {True: "on", False: "off"}[value] if isinstance(value, bool) else ", ".join(value) or "nothing"
        )
        click.echo(f"  {name:<8}  {shown}  ({ENVIRONMENT[name]})")
    click.echo("")
    print_table(
        ("pack", "distribution", "version", "state", "reason", "import", "torch"),
        [
            (
                record.name,
                record.distribution,
                record.version,
                record.state.value,
                record.reason.value if record.reason is not None else "",
                f"{result.seconds * 1000:.0f} ms"
                if result is not None and result.seconds is not None
                else "not tried",
                "imported" if result is not None and result.imports_torch else "",
            )
            for record, result in diagnosis.packs
        ],
    )
    for finding in diagnosis.findings:
        click.echo(f"\n{finding.severity.value}: {finding.code}: {finding.subject}")
        for line in finding.what.splitlines():
            click.echo(f"  {line}")
        click.echo(f"  What to do: {finding.todo}")
    problems = sum(finding.severity is Severity.PROBLEM for finding in diagnosis.findings)
    advice = len(diagnosis.findings) - problems
    found = f"{options.counted(problems, 'problem')}, {options.counted(advice, 'piece')} of advice"
    if checks:
        click.echo(f"\n{found}.")
    else:
        click.echo(
            f"\n{found} without the registration checks, which did not run: kasmina doctor --checks runs them."
        )
