"""The command ``kasmina``. A subcommand is imported when it is run, so that listing plugins needs no torch."""

from __future__ import annotations

import importlib
from typing import Any, Final, final

import click

from kasmina_core._version import __version__
from kasmina_core.blueprints.foreign import cleaned
from kasmina_core.errors import KasminaError

_COMMANDS: Final = {
    "calibrate": ("kasmina_core.cli.calibrate:calibrate", "Measure the noise floor of a task's gates."),
    "grow": ("kasmina_core.cli.grow:grow", "Train a host and grow it with seeds."),
    "new": ("kasmina_core.cli.new:new", "Write a package to start from: seeds, or a host."),
    "plugins": ("kasmina_core.cli.plugins:plugins", "Show the installed packs and what they offer."),
}

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT."""


@final
class _Commands(click.Group):
    """Subcommands by name, imported when needed. An error of the library is one message, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KasminaError as error:
            raise click.ClickException(cleaned(str(error), 20_000, lines=True)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kasmina")
def main() -> None:
    """Grow PyTorch networks while they train."""
