"""``kasmina new``: write a package to start from, copied from a template that the library's tests cover."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shlex
import shutil
import symtable
import tempfile
from pathlib import Path
from typing import Final

import click

from kasmina_core.blueprints.declarations import NAME_PATTERN
from kasmina_core.cli import options
from kasmina_core.errors import KasminaError
from kasmina_core.packs.scanning import list_packs
from kasmina_core.topology import Topology

TEMPLATES: Final = {
    "cnn": "template-cnn-pack",
    "transformer": "template-transformer-pack",
    "vector": "template-vector-pack",
    "signal": "template-vector-pack",
    "volume": "template-vector-pack",
    "host": "template-host",
}
"""Kinds of package, and the folder of each template."""

_TEMPLATE_CLASS: Final = "TemplateHost"
_LITTER: Final = ("__pycache__", "build", "dist")

_out = click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    show_default="the current folder",
    help="Where it is made.",
)


@click.group()
def new() -> None:
    """Write what to start from: a package of seeds or of a host, or the file of a task.

    A package is complete: it installs, its tests pass, and kasmina finds it.
    """


@new.command("pack")
@click.argument("name")
@click.option(
    "--topology",
    type=click.Choice([topology.value for topology in Topology if topology.value in TEMPLATES]),
    required=True,
    help="What the features mean that its seeds work on: "
    f"{', '.join(f'{topology.value} {topology}' for topology in Topology if topology.value in TEMPLATES)}. For one "
    "that a pack adds, begin with vector and change the topology that the package declares.",
)
@_out
def pack_command(name: str, topology: str, out: Path) -> None:
    """Write a pack of seeds.

    NAME becomes the pack: `kasmina new pack acme --topology cnn` offers acme:edges, from the package kasmina_acme of the
    distribution kasmina-acme, in a folder of that name.
    """
    _report(write_package(topology, name, out), name, "seeds.py")


@new.command("host")
@click.argument("name")
@_out
def host_command(name: str, out: Path) -> None:
    """Write a host: a network with places where seeds can grow.

    NAME becomes the pack: `kasmina new host acme` offers the host acme:net, of the class AcmeHost in the package
    kasmina_acme of the distribution kasmina-acme, in a folder of that name.
    """
    _report(write_package("host", name, out), name, "host.py")


@new.command("task")
@click.argument("name")
@_out
def task_command(name: str, out: Path) -> None:
    """Write a task: data, a loss and a host of your own, in one file of twenty lines.

    NAME becomes the file and the function: `kasmina new task mine` writes mine.py with mine(). The name
    of a module, or one that the file itself uses, is refused.
    """
    module = module_name(name)
    if not NAME_PATTERN.fullmatch(name) or keyword.iskeyword(module):
        raise click.BadParameter(f"'{name}' is no name of a function.", param_hint="'NAME'")
    path = out / f"{module}.py"
    source = (Path(__file__).parents[1] / "experiments" / "example_task.py").read_text(encoding="utf-8")
    if not path.exists():
        _demand_free_task(module, source)
    text = source.replace("def rings", f"def {module}").replace('"rings"', f'"{name}"')
    try:
        out.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise options.WrongRequestError(
            f"'{path}' is there already: nothing was written. Give another name."
        ) from error
    except OSError as error:
        raise KasminaError(f"'{path}' could not be written: {error}") from error
    click.echo(f"Wrote {path}. Put your data and your host into it.\n\nNext:")
    click.echo(f"  kasmina grow --task {shlex.quote(str(path))}:{module}")


def _report(folder: Path, name: str, source: str) -> None:
    click.echo(f"Wrote {folder}. Its code is in {Path(module_name(folder.name)) / source}.\n\nNext:")
    for line in (
        f"cd {shlex.quote(str(folder))}",
        'pip install --editable ".[test]"',
        f"kasmina plugins info {pack_name(name)}",
        "pytest",
    ):
        click.echo(f"  {line}")


def write_package(kind: str, name: str, out: Path) -> Path:
    """Write a package from a template and return its folder, ``out / "kasmina-name"``.

    It is written to a temporary folder and then moved, so a failure leaves nothing behind.

    Args:
        kind: A key of `TEMPLATES`.
        name: Name of the pack; a ``kasmina-`` before it says nothing more.
        out: Where to make the folder; made if it is not there.

    Raises:
        click.BadParameter: If the name cannot be used, or belongs to something that is installed.
        WrongRequestError: If the folder is there and not empty.
        KasminaError: If it cannot be written.
    """
    name = pack_name(name)
    _demand_free_name(name)
    target = out / f"kasmina-{name}"
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise options.WrongRequestError(
            f"'{target}' is there already{'' if target.is_file() else ', and not empty'}: nothing was written.\n"
            "Give another name, or another folder with --out."
        )
    template = _templates() / TEMPLATES[kind]
    try:
        out.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=out))
        try:
            made = workshop / target.name
            _copy(template, made, name, kind)
            if target.is_dir():  # empty, or this fails
                target.rmdir()
            os.rename(made, target)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    except OSError as error:
        raise KasminaError(f"'{target}' could not be written: {error}") from error
    return target


def pack_name(name: str) -> str:
    """Return the name of a pack without the word that its distribution begins with.

    >>> pack_name("acme"), pack_name("kasmina-acme")
    ('acme', 'acme')
    """
    return re.sub("^kasmina[-_](?=.)", "", name)


def module_name(name: str) -> str:
    """Return a name as Python may import it.

    >>> module_name("kasmina-acme")
    'kasmina_acme'
    """
    return name.replace("-", "_")


def class_name(name: str) -> str:
    """Return the class of a host package.

    >>> class_name("acme-net"), class_name("tiny-host")
    ('AcmeNetHost', 'TinyHost')
    """
    joined = "".join(part.capitalize() for part in re.split("[-_]", name))
    return joined if joined.endswith("Host") else f"{joined}Host"


def _copy(template: Path, made: Path, name: str, kind: str) -> None:
    """Copy a template, with its names, and the topology that it is written for, replaced in paths and text."""
    old = template.name
    words = {old: name, module_name(old): module_name(name), _TEMPLATE_CLASS: class_name(name)}
    if old == TEMPLATES[Topology.VECTOR.value]:
        words |= {"Topology.VECTOR": f"Topology.{kind.upper()}", str(Topology.VECTOR): str(Topology(kind))}
    pattern = re.compile("|".join(map(re.escape, words)))

    def renamed(text: str) -> str:
        return pattern.sub(lambda match: words[match[0]], text)

    for source in sorted(template.rglob("*")):
        parts = source.relative_to(template).parts
        folders = parts if source.is_dir() else parts[:-1]
        if any(part in _LITTER or part.startswith(".") or part.endswith(".egg-info") for part in folders):
            continue
        if source.is_file() and source.suffix != ".pyc":
            goal = made.joinpath(*map(renamed, parts))
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.write_text(renamed(source.read_text(encoding="utf-8")), encoding="utf-8")


def _templates() -> Path:
    """Return the folder of the templates: next to this file in a wheel, ``blueprint_kits`` in a checkout."""
    here = Path(__file__).resolve()
    places = (here.parent / "templates", here.parents[2] / "blueprint_kits")
    for place in places:
        if all((place / folder).is_dir() for folder in TEMPLATES.values()):
            return place
    raise KasminaError(
        "The templates are not where they were installed.\n  looked in: "
        + "\n             ".join(map(str, places))
        + "\nInstall kasmina again."
    )


def _demand_free_name(name: str) -> None:
    if not NAME_PATTERN.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").lstrip("0123456789-")
        advice = f" Such as '{near}'." if NAME_PATTERN.fullmatch(near) else ""
        raise click.BadParameter(
            f"'{name}' is not a pack name: use lower case letters, digits, '_' and '-', a letter first.{advice}",
            param_hint="'NAME'",
        )
    module = f"kasmina_{module_name(name)}"
    taken = ""
    if origin := _origin_of(module):
        taken = f"the module '{module}' is installed, in {origin}"
    else:
        for record in list_packs():
            if record.name == name:
                taken = f"'{record.origin}' has a pack of that name"
    if taken:
        raise click.BadParameter(f"'{name}' cannot be used: {taken}. Choose another.", param_hint="'NAME'")


def _demand_free_task(module: str, source: str) -> None:
    """Refuse the name of a task that would hide what its file needs.

    Args:
        module: Name of the file and the function.
        source: Of the template.

    Raises:
        click.BadParameter: If so.
    """
    table = symtable.symtable(source, "template", "exec")
    used = {
        symbol.get_name()
        for scope in (table, *table.get_children())
        for symbol in scope.get_symbols()
        if scope is table or symbol.is_global()
    }
    taken = ""
    if origin := _origin_of(module):
        taken = f"'{module}.py' would hide a module that Python imports by this name ({origin})"
    elif module in used - {"rings"}:
        taken = f"the file uses '{module}' itself, and a function of that name would hide it"
    if taken:
        raise click.BadParameter(f"'{module}' cannot be used: {taken}. Choose another.", param_hint="'NAME'")


def _origin_of(module: str) -> str:
    """Return the file of a top-level module without importing it; empty if it has none."""
    spec = importlib.util.find_spec(module)
    return str(spec.origin) if spec is not None and spec.origin is not None else ""
