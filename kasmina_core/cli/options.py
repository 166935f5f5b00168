"""Options and output shared by several commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from kasmina_core.blueprints.foreign import cleaned
from kasmina_core.errors import KasminaError, PluginError, SwitchError

if TYPE_CHECKING:
    from kasmina_core.experiments.tasks import Task

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class RunFolderError(KasminaError):
    """The folder for a run cannot be written."""


class WrongRequestError(click.ClickException):
    """What was asked for cannot be done as it was typed; nothing was run and nothing written."""

    exit_code = click.UsageError.exit_code


@contextmanager
def reading_request() -> Iterator[None]:
    """Give errors of the library the exit code of wrong usage; not those of packs and of the environment."""
    try:
        yield
    except (PluginError, SwitchError):
        raise
    except KasminaError as error:
        raise WrongRequestError(cleaned(str(error), 20_000, lines=True)) from error


task: Final = click.option(
    "--task",
    default="digits",
    show_default=True,
    help="digits, mnist5k, chars, code, mnist, cifar10, one of a pack, or your own: module:callable or file.py:callable.",
)


def many(flag: str, name: str, metavar: str, what: str) -> _Decorator:
    """Return an option that may be given more than once; ``what`` is its help."""
    return click.option(flag, name, multiple=True, metavar=metavar, help=what)


slots: Final = many(
    "--slots",
    "slots",
    "NAME",
    "Injection point, path or glob, such as 'layers.*'. Default: all of the host's.",
)
lr: Final = click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate. Default: the task's."
)


def host(what: str) -> _Decorator:
    """Return the option that names a host; ``what`` is its help."""
    return click.option(
        "--host",
        help=f"{what}, such as cnn:cnn, or your own: module:callable or file.py:callable. Default: the task's.",
    )


def surroundings(name: str, what: str) -> _Decorator:
    """Return the options on where and how to compute, and where to write.

    Args:
        name: Of the folder of files.
        what: What ``--json`` prints.
    """
    those = [
        click.option(
            "--seed",
            default=0,
            show_default=True,
            type=click.IntRange(min=0),
            help="Decides every random number.",
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where to compute.",
        ),
        click.option(
            "--threads",
            default=1,
            show_default=True,
            type=click.IntRange(min=1),
            help="CPU threads; models this small are fastest with one.",
        ),
        click.option(
            "--data", "data_dir", type=click.Path(path_type=Path), help="Folder of the torchvision data sets."
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            help=f"Folder for the files. Default: runs/{name}-DATE-TIME.",
        ),
        click.option("--json", "as_json", is_flag=True, help=f"Print {what} as JSON, and nothing else."),
    ]
    return lambda command: reduce(lambda made, option: option(made), reversed(those), command)


def prepare(task: str, seed: int, device: str, threads: int, data_dir: Path | None) -> tuple[Task, str]:
    """Return the task and the device of a run; a missing device, package or data set is an error now, not later."""
    import torch

    from kasmina_core.experiments.report import require_plots
    from kasmina_core.experiments.tasks import load_task
    from kasmina_core.packs.discovery import default_registry

    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no CUDA device here. Use --device auto or cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    with reading_request():
        require_plots()
        offered = default_registry().tasks()
        return load_task(task, seed, device, data_dir=data_dir, offered=offered), device


def choose_folder(out: Path | None, name: str) -> Path:
    """Return the folder for files, by default ``runs/NAME-DATE-TIME``; it must be new or empty."""
    folder = out or Path("runs") / f"{name.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WrongRequestError(
            f"--out {folder}: it holds something already. Name a folder that is new or empty."
        )
    return folder


def make_folder(out: Path | None, name: str) -> Path:
    """Make the folder that `choose_folder` returns."""
    folder = choose_folder(out, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out {folder}: {error.strerror}.") from error
    return folder


@contextmanager
def progress(verb: str, patience: float = 0.0, *, plain: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows on standard error what is being done, once ``patience`` seconds have passed.

    A terminal has one line, which is cleared at the end. Elsewhere each is a line, or nothing without ``plain``.
    """
    begun, is_terminal, is_shown = time.monotonic(), sys.stderr.isatty(), False

    def show(name: str) -> None:
        nonlocal is_shown
        if time.monotonic() - begun < patience:
            return
        if is_terminal:
            click.echo(f"\r\033[K{verb} {name}", err=True, nl=False)
            is_shown = True
        elif plain:
            click.echo(f"{verb} {name}", err=True)

    try:
        yield show
    finally:
        if is_shown:
            click.echo("\r\033[K", err=True, nl=False)


def print_text(text: str) -> None:
    """Print text that may hold anything."""
    # Half of a surrogate pair in a foreign message would end in an error; in JSON its escape is the same text.
    click.echo(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def print_json(data: Any) -> None:
    """Print plain data as JSON for people and programs."""
    print_text(json.dumps(data, indent=2, ensure_ascii=False))


def counted(number: int, thing: str) -> str:
    """Return a number of things.

    >>> counted(2, "pack")
    '2 packs'
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"
