"""The command ``kasmina``. A subcommand is imported when it is run, so that listing plugins needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final, final

import click

from kasmina_core._version import __version__
from kasmina_core.blueprints.foreign import cleaned
from kasmina_core.errors import KasminaError

_COMMANDS: Final = {
    "calibrate": ("kasmina_core.cli.calibrate:calibrate", "Measure the noise floor of a task's gates."),
    "doctor": ("kasmina_core.cli.doctor:doctor", "Find out what is wrong with the installed packs."),
    "grow": ("kasmina_core.cli.grow:grow", "Train a host and grow it with seeds."),
    "new": ("kasmina_core.cli.new:new", "Write what to start from: seeds, a host or a task."),
    "plugins": ("kasmina_core.cli.plugins:plugins", "Show the installed packs and what they offer."),
    "watch": ("kasmina_core.cli.watch:watch", "Follow runs on a page, while they go on."),
}

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT."""


class LazyGroup(click.Group):
    """A group with commands that are imported when they are run.

    Args:
        later: Name of each such command: where it is, ``module:attribute``, and its short help.
    """

    def __init__(self, *args: Any, later: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.later = later

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self.later})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.later:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.later[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = {name: command.get_short_help_str(100) for name, command in self.commands.items()}
        rows |= {name: text for name, (_, text) in self.later.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows.items()))


@final
class _Main(LazyGroup):
    """The command; an error of the library is one message, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KasminaError as error:
            raise click.ClickException(cleaned(str(error), 20_000, lines=True)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Main, later=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="kasmina")
def main() -> None:
    """Grow PyTorch networks while they train."""
