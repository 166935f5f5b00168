"""Passes of the checks on a device, kept on disk so that a pack is not measured again where nothing has changed.

Only a device on which every check passed is kept, never a failure. What is read back counts only if it was written for
exactly this code, declaration, device and these versions; anything else in the folder is as good as absent, and a folder
that cannot be read or written is no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import importlib_metadata

from kasmina_core.checks.reports import CheckResult, CheckStatus

if TYPE_CHECKING:
    import torch

    from kasmina_core.blueprints.declarations import BlueprintSpec

VARIABLE: Final = "KASMINA_CACHE_DIR"
"""Environment variable that names the folder to use."""

_FORMAT: Final = 1
_LARGEST_FILE: Final = 1 << 20
_LARGEST_SOURCE: Final = 64 << 20

Key = dict[str, Any]
"""All that a pass depends on, as plain data."""


def cache_folder() -> Path | None:
    """Return the folder of the cache: ``$KASMINA_CACHE_DIR``, ``$XDG_CACHE_HOME/kasmina``, or ``~/.cache/kasmina``.

    ``None`` if there is no home folder.

    Source: https://specifications.freedesktop.org/basedir-spec/latest/ (a relative path is to be ignored)
    """
    if own := os.environ.get(VARIABLE):
        return Path(own)
    if (shared := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return shared / "kasmina"
    try:
        return Path.home() / ".cache" / "kasmina"
    except RuntimeError:
        return None


@final
class PassCache:
    """The kept passes of one pack.

    What runs on the CPU is quick and always runs; passes on other devices are kept.

    Args:
        module: What the pack's entry point names, such as ``"my_pack.plugin:pack"``.
        distribution: The distribution that installed the pack; empty if none did.
        version: Version of that distribution.
        folder: Where to keep them; that of `cache_folder` if ``None``.
        devices: Kinds of device whose passes are kept.
    """

    def __init__(
        self,
        module: str,
        distribution: str = "",
        version: str = "",
        *,
        folder: Path | None = None,
        devices: Collection[str] = ("cuda",),
    ) -> None:
        self._module = module
        self._distribution = distribution
        self._version = version
        self._folder = folder if folder is not None else cache_folder()
        self._devices = frozenset(devices)
        self._sources: dict[str, str | None] = {}

    def key(self, spec: BlueprintSpec, widths: Sequence[int], device: torch.device, full: bool) -> Key | None:
        """Return all that a pass on ``device`` depends on, or ``None`` where that cannot be told.

        It cannot for a factory that is no function or class of a module's own, because a closure may hold anything.

        Args:
            spec: The declaration.
            widths: The widths at which modules run.
            device: Where they run; CUDA is initialised by asking which it is, so it must be in use.
            full: Whether all checks are asked for.
        """
        if self._folder is None or device.type not in self._devices:
            return None
        factory = _written_factory(spec)
        if factory is None:
            return None
        sources = {}
        for module in (self._module, factory):
            root = module.partition(":")[0].partition(".")[0]
            if root not in self._sources:
                self._sources[root] = source_hash(root)
            if (digest := self._sources[root]) is None:
                return None
            sources[root] = digest
        try:
            declared = {str(width): spec.declared_params(width) for width in widths}
        except (Exception, SystemExit):  # a check says so
            return None
        return {
            "format": _FORMAT,
            "distribution": [self._distribution, self._version],
            "requirements": self._requirements,
            "sources": sources,
            "declaration": {
                "name": spec.name,
                "topology": spec.topology.value,
                "factory": factory,
                "declared_params": declared,
                "takes_causal": spec.takes_causal,
                "options": sorted(map(repr, spec.options.items())),
            },
            "full": full,
            "device": _device_facts(device),
            "versions": self._versions,
        }

    def recall(self, key: Key | None, names: Sequence[str], device: str) -> list[CheckResult] | None:
        """Return what was kept under a key, each check with the time when it passed; ``None`` if nothing usable was.

        Args:
            key: What `key` returned.
            names: The checks that are asked for: all of them, or none, are returned.
            device: The device they have to be of.
        """
        if key is None:
            return None
        try:
            with open(self._path(key), "rb") as file:
                data = json.loads(file.read(_LARGEST_FILE))
            when = datetime.fromisoformat(data["measured_at"]).astimezone(UTC)
            checks = [CheckResult.from_dict(check) for check in data["checks"]]
            if data["key"] != key or [check.name for check in checks] != list(names):
                return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            return None
        if any(c.status is not CheckStatus.PASSED or _kind(c.device) != _kind(device) for c in checks):
            return None
        return [
            replace(check, status=CheckStatus.CACHED, device=device, measured_at=_text(when))
            for check in checks
        ]

    def keep(self, key: Key | None, checks: Sequence[CheckResult]) -> None:
        """Keep the checks of a device, if all of them passed now; an existing file is replaced whole or not at all."""
        if key is None or not checks or any(check.status is not CheckStatus.PASSED for check in checks):
            return
        data = {
            "key": key,
            "measured_at": _text(datetime.now(UTC)),
            "checks": [check.to_dict() for check in checks],
        }
        path = self._path(key)
        with contextlib.suppress(OSError, ValueError, TypeError):
            text = json.dumps(data, indent=1, sort_keys=True)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise

    def _path(self, key: Key) -> Path:
        assert self._folder is not None  # there is no key without a folder
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self._folder / "checks" / f"{digest}.json"

    @cached_property
    def _requirements(self) -> dict[str, str]:
        """The installed versions of what the distribution requires."""
        try:
            asked = importlib_metadata.requires(self._distribution) or [] if self._distribution else []
        except Exception:  # damaged metadata
            return {}
        names = {match.group() for text in asked if (match := re.match(r"[\w.-]+", text))}
        return {name: _version(name) for name in sorted(names)}

    @cached_property
    def _cudnn(self) -> str:
        import torch

        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # untyped in torch
            return ""
        return str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]  # untyped in torch

    @cached_property
    def _versions(self) -> dict[str, str]:
        import torch

        return {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "platform": f"{platform.system()} {platform.machine()}",
            "torch": str(torch.__version__),
            "cuda": str(torch.version.cuda),
            "cudnn": self._cudnn,
            "fvcore": _version("fvcore"),
            "kasmina": _version("kasmina"),
            "checks": _hash_files(
                Path(__file__).parent,
                [Path(__file__).with_name(f"{name}.py") for name in _OWN_FILES],
            )
            or "",
        }


_OWN_FILES: Final = ("findings", "blueprints", "devices")


def source_hash(module: str) -> str | None:
    """Return a digest of a top-level module's or package's files; ``None`` if they cannot be read as files."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not folders:
        return _hash_files(Path(), [Path(spec.origin)]) if spec.has_location and spec.origin else None
    digests = []
    for folder in sorted(folders):
        files = (path for path in folder.rglob("*") if "__pycache__" not in path.parts and path.is_file())
        if (digest := _hash_files(folder, files)) is None:
            return None
        digests.append(digest)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _hash_files(folder: Path, files: Iterable[Path]) -> str | None:
    digest, size = hashlib.sha256(), 0
    try:
        for path in sorted(files):
            size += path.stat().st_size
            if size > _LARGEST_SOURCE:
                return None
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            name = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
            digest.update(f"{name.as_posix()}\0{content}\n".encode("utf-8", "surrogateescape"))
    except OSError:
        return None
    return digest.hexdigest() if size else None


def _written_factory(spec: BlueprintSpec) -> str | None:
    """Return where the factory is written, as ``module:attribute``, or ``None`` if nothing there is that factory."""
    if isinstance(spec.factory, str):
        return spec.factory
    module, name = getattr(spec.factory, "__module__", None), getattr(spec.factory, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return None
    try:
        found: object = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit):
        return None
    return f"{module}:{name}" if found is spec.factory else None


def _device_facts(device: torch.device) -> list[str]:
    import torch

    if device.type != "cuda":
        return [device.type]
    properties = torch.cuda.get_device_properties(device)
    return ["cuda", properties.name, f"{properties.major}.{properties.minor}", str(properties.total_memory)]


def _version(distribution: str) -> str:
    try:
        return str(importlib_metadata.version(distribution))
    except Exception:  # not installed, or damaged metadata
        return ""


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _text(when: datetime) -> str:
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")
