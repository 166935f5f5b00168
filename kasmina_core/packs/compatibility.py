"""Compatibility of a pack with this version and environment, from its metadata before its code is imported.

A pack may declare a version of the plugin API (see `kasmina_core.packs.hookspecs`); without one it counts as ``v1``.
Its requirements are those of its distribution: ``dependencies`` and ``requires-python``.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final, final

import importlib_metadata

from kasmina_core._version import __version__
from kasmina_core.packs.switches import normalized

if TYPE_CHECKING:
    from packaging.requirements import Requirement

API_GROUP: Final = "kasmina.api"
"""The entry-point group in which a pack declares the version of the plugin API it is written for."""

API_VERSION: Final = 1
"""Version of the plugin API: of the hooks and of what they return. It grows when an older pack could break."""

SUPPORTED_API_VERSIONS: Final = (1,)


class UnreadableRequirementError(Exception):
    """A requirement in the metadata that does not parse."""


def api_problem(origin: str, declared: Sequence[str]) -> str | None:
    """Return why a pack of that declared API version is not taken, or ``None``.

    Args:
        origin: Distribution and version, for the message.
        declared: The versions in its metadata; empty counts as ``["v1"]``.
    """
    supported = [f"v{version}" for version in SUPPORTED_API_VERSIONS]
    if not declared or (len(set(declared)) == 1 and declared[0] in supported):
        return None
    said = ", ".join(sorted(set(declared)))
    ours = f"{', '.join(supported)} (kasmina {__version__})"
    if not re.fullmatch(r"v[1-9][0-9]*", said):
        what = "declares a plugin API version that cannot be read"
        todo = f"Declare one, such as {supported[-1]!r}."
    elif int(said[1:]) > API_VERSION:
        what = "is written for a newer plugin API"
        todo = "Upgrade kasmina, or install an older release of the pack."
    else:
        what, todo = "is written for a plugin API that is gone", "Install a newer release of the pack."
    return f"{origin} {what}.\n  declared:  {said}\n  supported: {ours}\n{todo}"


@final
class Environment:
    """The distributions that are installed, each looked up once, when a requirement names it.

    Args:
        version_of: A quicker way to the version of a distribution; where it gives ``None``, importlib_metadata is asked.
    """

    def __init__(self, version_of: Callable[[str], str | None] = lambda name: None) -> None:
        self._version_of = version_of
        # Ours is known also in a checkout, or where the metadata is stale.
        self._versions: dict[str, str | None] = {"kasmina": __version__}

    def requirement_problem(
        self, origin: str, requirements: Iterable[str], requires_python: str | None = None
    ) -> str | None:
        """Return which requirements of a distribution are not met, or ``None``.

        Its own requirements are compared, not those of what it requires.

        Args:
            origin: Distribution and version, for the message.
            requirements: Its ``Requires-Dist``.
            requires_python: Its ``Requires-Python``.

        Raises:
            UnreadableRequirementError: If one does not parse; the message quotes it.

        Source: https://packaging.python.org/en/latest/specifications/dependency-specifiers/
        """
        unmet: list[tuple[str, str, str]] = []
        if requires_python:
            running = platform.python_version().rstrip("+")
            if not _plainly_contains(requires_python, running) and not _contains(
                _python(requires_python), running
            ):
                unmet.append((f"Python {requires_python}", running, ""))
        for text in requirements:
            name, versions = _plain(text)
            if name == "" or (name and _plainly_contains(versions, self._version(name) or "")):
                continue
            requirement = _parsed(text)
            if requirement is None:
                continue
            installed = self._version(requirement.name)
            if installed == "":  # installed, with an unreadable version: the import decides
                continue
            if installed is None or not _contains(requirement, installed):
                wanted = f"{requirement.name}{requirement.specifier}"
                unmet.append((wanted, installed or "nothing", f"'{wanted}'"))
        if not unmet:
            return None
        rows = "".join(f"\n  required:  {wanted}\n  installed: {found}" for wanted, found, _ in unmet)
        missing = " ".join(argument for *_, argument in unmet if argument)
        todo = f"Install {missing}" if missing else "Install a release of the pack for this Python"
        return f"{origin} requires what is not installed.{rows}\n{todo}, or uninstall the pack."

    def _version(self, name: str) -> str | None:
        """Return the version installed, ``""`` if that cannot be read, ``None`` if it is not installed."""
        key = normalized(name)
        if key not in self._versions:
            try:
                self._versions[key] = self._version_of(name) or importlib_metadata.version(name) or ""
            except importlib_metadata.PackageNotFoundError:
                self._versions[key] = None
            except Exception:  # damaged metadata of somebody else's
                self._versions[key] = ""
        return self._versions[key]


# Most requirements are a name and a few numbers. Those are compared here, because importing `packaging` and parsing
# with it takes longer than all the rest; whatever is not plainly met is left to it.
_RELEASE_NUMBERS: Final = r"[0-9]{1,9}(?:\.[0-9]{1,9})*(?:\.post[0-9]{1,9})?"
_ONE: Final = rf"(?:>=|<=|==|!=|<|>) ?{_RELEASE_NUMBERS}"
_CLAUSE: Final = re.compile(rf"(>=|<=|==|!=|<|>) ?({_RELEASE_NUMBERS})")
_REQUIREMENT: Final = re.compile(
    rf"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?) ?((?:{_ONE}(?:, ?{_ONE})*)?)"
    r"""( ?; ?extra == (?:"[A-Za-z0-9]+"|'[A-Za-z0-9]+'))?"""
)
_RELEASE: Final = re.compile(rf"({_RELEASE_NUMBERS})(?:\+[a-z0-9]+(?:\.[a-z0-9]+)*)?")


@lru_cache(maxsize=1024)
def _plain(text: str) -> tuple[str | None, str]:
    """Return name and versions of a plain requirement; name ``""`` if it holds for an extra alone, ``None`` if not plain."""
    if (match := _REQUIREMENT.fullmatch(text)) is None:
        return None, ""
    name, versions, extra = match.groups()
    return ("" if extra else name), versions


@lru_cache(maxsize=1024)
def _plainly_contains(specifier: str, version: str) -> bool:
    """Return whether a version is plainly among those specified; if not, `_contains` must decide."""
    release = _RELEASE.fullmatch(version)
    if release is None:
        return False
    found = _numbers(release[1])
    for clause in specifier.split(",") if specifier else ():
        if (match := _CLAUSE.fullmatch(clause.lstrip(" "))) is None:
            return False
        operator, wanted = match[1], _numbers(match[2])
        if operator in "<>" and (found[1], wanted[1]) != (
            _FINAL,
            _FINAL,
        ):  # post-releases have rules of their own
            return False
        if not {
            ">=": found >= wanted,
            "<=": found <= wanted,
            "==": found == wanted,
            "!=": found != wanted,
            "<": found < wanted,
            ">": found > wanted,
        }[operator]:
            return False
    return True


_FINAL: Final = -1


def _numbers(release: str) -> tuple[list[int], int]:
    """Return the numbers of a release without zeros at its end, which mean nothing, and that of its post-release."""
    final, _, post = release.partition(".post")
    numbers = [int(part) for part in final.split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers, int(post) if post else _FINAL


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Requirement | None:
    """Return a requirement, or ``None`` if its marker leaves it out here."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    except (InvalidRequirement, ValueError) as error:  # ValueError: a marker that cannot be evaluated
        raise UnreadableRequirementError(f"the requirement {text!r} cannot be read") from error
    return requirement if applies else None


@lru_cache(maxsize=64)
def _python(specifier: str) -> Requirement:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(f"python{specifier}")
    except InvalidRequirement as error:
        raise UnreadableRequirementError(f"Requires-Python {specifier!r} cannot be read") from error


@lru_cache(maxsize=1024)
def _contains(requirement: Requirement, version: str) -> bool:
    from packaging.version import InvalidVersion

    try:
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return not requirement.specifier
