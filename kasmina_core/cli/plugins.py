"""``kasmina plugins``: which packs are installed, and what one of them, a blueprint or a host declares and does."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from kasmina_core.blueprints.foreign import cleaned
from kasmina_core.cli import LazyGroup, options
from kasmina_core.errors import UnknownNameError, did_you_mean
from kasmina_core.packs.scanning import PackRecord, PackState, list_packs

if TYPE_CHECKING:
    from kasmina_core.packs.discovery import PluginRegistry

SHOWN_WIDTHS: Final = (16, 64, 256)
"""Feature widths at which ``info`` shows the declared number of parameters."""


_LATER: Final = {
    "check": ("kasmina_core.cli.check:check", "Run the registration checks of packs or blueprints."),
    "doctor": ("kasmina_core.cli.doctor:doctor", "Find out what is wrong with the installed packs."),
}
"""Subcommands that are imported when they are run."""


@click.group(cls=LazyGroup, later=_LATER)
def plugins() -> None:
    """Show the installed packs and what they offer.

    Variables in the environment decide which packs may be loaded. Their entries are separated by commas; each names a
    pack, a distribution, or one thing by its id, such as cnn:norm.

    \b
      KASMINA_PLUGINS_ALLOW       only these are loaded
      KASMINA_PLUGINS_BLOCK       these are not loaded, nor is their code imported
      KASMINA_PLUGINS_AUTOLOAD=0  only the bundled packs are loaded by themselves
      KASMINA_PLUGINS_PREFER      distributions that win where two claim one name
      KASMINA_PLUGINS_STRICT=1    any pack that cannot be used is an error

    \b
    Exit code (more in the help of each command):
      0  done
      1  not done, or a pack cannot be used; the message says why
      2  wrong usage, such as an unknown name
    """


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_command(as_json: bool) -> None:
    """List the installed packs.

    Only their metadata is read: neither their code nor torch is imported, so the state is "discovered", or "blocked",
    "incompatible", "conflict" and "invalid" where switches and metadata alone tell.

    \b
    Whether a pack loads:            kasmina plugins info PACK
    What to do if one does not:      kasmina plugins doctor

    \b
    Exit code:
      0  listed, whatever the states
      1  a switch in the environment cannot be read
      2  wrong usage
    """
    records = list_packs()
    if as_json:
        options.print_json({"packs": [record.to_dict() for record in records]})
        return
    if not records:
        click.echo("No packs are installed.")
        return
    print_table(
        ("pack", "distribution", "version", "module", "state"),
        [(r.name, r.distribution, r.version, r.module, r.state.value) for r in records],
    )
    for record in records:
        if record.cause:
            click.echo(f"\n{record.name} ({record.origin}): {record.cause}")


@plugins.command("info")
@click.argument("name", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def info_command(name: str, as_json: bool) -> None:
    """Show a pack, a blueprint or a host.

    ID is the name of a pack, a full id such as cnn:norm, or a short name that only one pack offers. All installed
    packs are loaded and their blueprints checked.

    \b
    Exit code:
      0  shown
      1  its pack cannot be used: the cause is shown
      2  wrong usage, such as an unknown name
    """
    with contextlib.redirect_stdout(sys.stderr):  # what a pack prints while it loads is not our output
        from kasmina_core.packs.discovery import default_registry

        registry = default_registry()
        with options.reading_request():
            facts = _facts(registry, name)
    if as_json:
        options.print_json({key: value for key, value in facts.items() if key != "report_text"})
    else:
        _print_facts(facts)
    if facts["kind"] == "pack" and facts["state"] != PackState.ACTIVE.value:
        raise click.exceptions.Exit(1)


def _facts(registry: PluginRegistry, name: str) -> dict[str, Any]:
    """Return what is known of a pack, blueprint or host as plain data; raise what asking for it raises."""
    packs = [record for record in registry.packs if record.name == name]
    if packs:
        record = registry.pack(name)
        others = [other.to_dict() for other in packs if other is not record]
        return {"kind": "pack"} | record.to_dict() | {"other_claims": others}
    for facts_of in (_blueprint_facts, _host_facts):
        try:
            return facts_of(registry, name)
        except UnknownNameError as unknown:
            if type(unknown) is not UnknownNameError:  # ambiguous: that message is the better one
                raise
    blueprints = [entry.id for entry in registry.blueprints.list_all()]
    known = [*(r.name for r in registry.packs), *blueprints, *registry.hosts.ids()]
    short = [full.partition(":")[2] for full in known if ":" in full]
    raise UnknownNameError(f"No pack, blueprint or host '{name}'.{did_you_mean(name, [*known, *short])}")


def _blueprint_facts(registry: PluginRegistry, name: str) -> dict[str, Any]:
    entry = registry.blueprints.get(name)
    spec, report = entry.spec, registry.report(entry.id)
    declared: list[dict[str, Any]] = []
    for width in dict.fromkeys((*SHOWN_WIDTHS, *([spec.estimate_dim] if spec.estimate_dim else []))):
        refused = spec.refusal(width)
        parameters = None if refused is not None else spec.declared_params(width)
        declared.append({"dim": width, "parameters": parameters, "refused": refused})
    return {
        "kind": "blueprint",
        "id": entry.id,
        "description": spec.description,
        "topology": spec.topology.value,
        "pack": entry.pack,
        "distribution": entry.distribution,
        "version": entry.version,
        "factory": _named(spec.factory),
        "takes_causal": spec.takes_causal,
        "options": {key: _plain(value) for key, value in spec.options.items()},
        "source": spec.source,
        "declared_parameters": declared,
        "registration": report.to_dict() if report is not None else None,
        "report_text": str(report) if report is not None else "registration checks: not run",
    }


def _host_facts(registry: PluginRegistry, name: str) -> dict[str, Any]:
    full = registry.hosts.resolve(name)
    spec, pack = registry.hosts.get(full), registry.pack(full.partition(":")[0])
    return {
        "kind": "host",
        "id": full,
        "description": spec.description,
        "topology": spec.topology.value,
        "pack": pack.name,
        "distribution": pack.distribution,
        "version": pack.version,
        "factory": _named(spec.factory),
    }


def _named(factory: object) -> str:
    if isinstance(factory, str):
        return factory
    module = getattr(factory, "__module__", type(factory).__module__)
    return f"{module}:{getattr(factory, '__qualname__', type(factory).__qualname__)}"


def _plain(value: object) -> object:
    """Return ``value`` if JSON has it, else its repr."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return repr(value)
    return value


def _print_facts(facts: Mapping[str, Any]) -> None:
    if facts["kind"] == "pack":
        _print_pack(facts)
        return
    hidden = ("kind", "declared_parameters", "registration", "report_text", "options")
    rows = [(key, _shown(value)) for key, value in facts.items() if key not in hidden and value != ""]
    if facts["kind"] == "host":
        _print_pairs("host", rows)
        return
    options = ", ".join(f"{key}={value!r}" for key, value in facts["options"].items())
    _print_pairs("blueprint", [*rows, ("options", options or "none")])
    click.echo("")
    print_table(
        ("dim", "declared parameters"),
        [(str(row["dim"]), _declared(row)) for row in facts["declared_parameters"]],
    )
    click.echo(f"\n{facts['report_text']}")


def _declared(row: Mapping[str, Any]) -> str:
    if row["refused"] is not None:
        return f"refused: {row['refused']}"
    return "not declared" if row["parameters"] is None else f"{row['parameters']:,}"


def _print_pack(facts: Mapping[str, Any]) -> None:
    plain = ("name", "distribution", "version", "module", "state", "reason")
    rows = [(key, _shown(facts[key])) for key in plain if facts[key]]
    rows += [
        (key, "\n".join(facts[key]))
        for key in ("topologies", "blueprints", "hosts", "gate_checks", "policies", "tasks", "withheld")
        if facts[key]
    ]
    _print_pairs("pack", rows)
    if facts["gate_checks"] and facts["state"] == PackState.ACTIVE.value:
        click.echo(
            "\nIts gate checks join the gates of every model that grows from this registry. To leave them out, set "
            f"GrowthConfig(pack_gate_checks=False) or KASMINA_PLUGINS_BLOCK={','.join(facts['gate_checks'])}."
        )
    if facts["cause"]:
        click.echo(f"\n{facts['cause']}")
    for other in facts["other_claims"]:
        claimant = PackRecord(other["name"], other["module"], other["distribution"], other["version"])
        click.echo(f"\nAlso claimed by {claimant.origin} ({claimant.module}): {other['state']}")


def _shown(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _print_pairs(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values, the values aligned, each line of a value on its own line."""
    wide = max(len(name) for name, _ in rows)
    click.echo(title)
    for name, value in rows:
        for number, line in enumerate(cleaned(value, 4000, lines=True).split("\n")):
            click.echo(f"  {name.replace('_', ' ') if number == 0 else '':<{wide}}  {line}".rstrip())


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, aligned text elsewhere. Cells are never shortened."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table
        from rich.text import Text

        table = Table(*header)
        for row in rows:
            table.add_row(*(Text(cell, no_wrap=True) for cell in row))
        console = Console()
        needed = Measurement.get(console, console.options.update(max_width=100_000), table).maximum
        Console(width=max(console.width, needed)).print(table, no_wrap=True, crop=False)
        return
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo("  ".join(f"{cell:<{wide}}" for cell, wide in zip(row, widths, strict=True)).rstrip())
