"""What a user names on the command line: ``module:callable`` or ``file.py:callable``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from kasmina_core.errors import KasminaError, did_you_mean


class NamedObjectError(KasminaError):
    """A module, file or callable that was named cannot be imported or called; the cause is chained."""


def is_reference(name: str, offered: Container[str] = ()) -> bool:
    """Whether a name is ``file.py:callable`` or ``module:callable``, and not the id of something that is offered.

    Nothing is imported but the packages that the module lies in.

    >>> is_reference("mine.py:task"), is_reference("json:loads"), is_reference("cnn:cnn", ["cnn:cnn"])
    (True, True, False)
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute or name in offered:
        return False
    if place.endswith(".py"):
        return True
    if not all(part.isidentifier() for part in place.split(".")):
        return False
    _let_import_from(Path.cwd())
    try:
        return importlib.util.find_spec(place) is not None
    except (ImportError, ValueError):
        return False


def named_object(what: str, name: str) -> Any:
    """Import a module or file, relative to the working directory, and return what it has of the name.

    The folder of the file, or the working directory, joins the end of ``sys.path``, so that it may import its
    neighbours and hides nothing that is installed.

    Args:
        what: What it is for, for messages.
        name: ``module:callable`` or ``file.py:callable``.

    Raises:
        NamedObjectError: If there is no such file or name, or its import fails.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise NamedObjectError(
            f"The {what} '{name}' cannot be imported: {type(error).__name__}: {error}"
        ) from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [one for one in vars(module) if not one.startswith("_")]
            raise NamedObjectError(
                f"'{place}' has no '{attribute}' to be the {what}.{did_you_mean(attribute, known)}"
            )
        found = getattr(found, part)
    return found


def called(what: str, function: Callable[..., Any], offered: Mapping[str, Any]) -> Any:
    """Call a user's function with those keywords that it takes.

    Raises:
        NamedObjectError: If it raises; an error of this library is passed on as it is.
    """
    taken = accepted_keywords(function)
    keywords = {key: value for key, value in offered.items() if taken is not None and key in taken}
    try:
        return function(**keywords)
    except KasminaError:
        raise
    except Exception as error:
        at = inspect.getsourcefile(function) or "" if inspect.isroutine(function) else ""
        raise NamedObjectError(
            f"{what} could not be made: {type(error).__name__}: {error}\n"
            f"  called: {getattr(function, '__qualname__', function)}({', '.join(keywords)}){f' of {at}' * bool(at)}"
        ) from error


def accepted_keywords(factory: Callable[..., Any]) -> set[str] | None:
    """Return the keywords a factory takes, or ``None`` if it takes any."""
    parameters = inspect.signature(factory).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}


def _import_file(path: Path) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"_kasmina_file_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded  # the task and the host of one file share its classes
    _let_import_from(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file has both  # noqa: PT018
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _let_import_from(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
