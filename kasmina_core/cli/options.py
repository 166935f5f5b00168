"""Options that several commands have in common, and what they are turned into."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from kasmina_core.errors import KasminaError

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class RunFolderError(KasminaError):
    """The folder for a run is already used or cannot be written."""


task: Final = click.option(
    "--task", default="digits", show_default=True, help="digits, chars, mnist or cifar10."
)
slots: Final = click.option(
    "--slots", multiple=True, metavar="NAME", help="Injection point or glob. Default: all of the host's."
)
lr: Final = click.option(
    "--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate. Default: the task's."
)
seed: Final = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Decides every random number."
)
device: Final = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
threads: Final = click.option(
    "--threads",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="CPU threads; models this small are fastest with one.",
)
data: Final = click.option(
    "--data", "data_dir", type=click.Path(path_type=Path), help="Folder of the torchvision data sets."
)


def host(what: str) -> _Decorator:
    """Return the option that names a host; ``what`` says what it is for."""
    return click.option(
        "--host", help=f"{what}, such as cnn:cnn. Default: the bundled one of the task's topology."
    )


def out(name: str) -> _Decorator:
    """Return the option that names the folder of a run."""
    return click.option(
        "--out",
        type=click.Path(path_type=Path),
        help=f"Folder for the files. Default: runs/{name}-DATE-TIME.",
    )


def as_json(what: str) -> _Decorator:
    """Return the option that asks for JSON."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {what} as JSON, and nothing else.")


def pick_device(wanted: str) -> str:
    """Return the device to compute on; CUDA that is not there is a usage error."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no CUDA device here. Use --device auto or cpu.")
    return wanted


def make_folder(out: Path | None, name: str) -> Path:
    """Make a folder for files, by default ``runs/NAME-DATE-TIME``; one that holds something already is refused."""
    folder = out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(
            f"--out {folder}: there is something already. Name a folder that is new or empty."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out {folder}: {error.strerror}.") from error
    return folder
