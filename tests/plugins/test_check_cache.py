"""Passes kept on disk: what is used again, what is not, and that nothing in the folder can do harm."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_packs import SEEDS, Site

from kasmina_core import (
    BlueprintSpec,
    CheckStatus,
    PassCache,
    Topology,
    ValidationReport,
    ValidationVerdict,
    check_blueprint_spec,
)
from kasmina_core.checks.cache import cache_folder
from kasmina_core.checks.devices import device_check_names

SOURCE = (
    SEEDS
    + """
RUNS = []

class Counted(Scale):
    def forward(self, x):
        RUNS.append(tuple(x.shape))
        return super().forward(x)

class Dead(Counted):
    def forward(self, x):
        return x + self.weight**2
"""
)


class Bench:
    """A pack on disk, its blueprint, and a folder for the cache; what is measured on the CPU is kept too."""

    def __init__(self, site: Site, folder: Path) -> None:
        self.site, self.folder = site, folder
        site.install("fake-kept", "kept = fake_kept", fake_kept=SOURCE)
        self.load()

    def load(self) -> None:
        sys.modules.pop("fake_kept", None)
        importlib.invalidate_caches()
        self.module = importlib.import_module("fake_kept")

    def spec(self, **changes: Any) -> BlueprintSpec:
        return BlueprintSpec(
            **{
                "name": "scale",
                "topology": Topology.CNN,
                "factory": "fake_kept:Counted",
                "param_estimate": lambda dim: dim,
            }
            | changes
        )

    def cache(self, **changes: Any) -> PassCache:
        given: dict[str, Any] = {
            "module": "fake_kept",
            "distribution": "fake-kept",
            "version": "1.0",
            "folder": self.folder,
            "devices": ["cpu"],
        }
        return PassCache(**given | changes)

    def check(
        self, spec: BlueprintSpec | None = None, cache: PassCache | None = None, **options: Any
    ) -> ValidationReport:
        self.module.RUNS.clear()
        return check_blueprint_spec(
            spec or self.spec(),
            **{"device": "cpu", "full": False, "cache": cache or self.cache()} | options,
        )

    @property
    def ran(self) -> bool:
        return bool(self.module.RUNS)

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def bench(site: Site, tmp_path: Path) -> Bench:
    return Bench(site, tmp_path / "cache")


QUICK = set(device_check_names(Topology.CNN, full=False))


def cached(report: ValidationReport) -> set[str]:
    return {check.name for check in report.cached}


# -- what is used again -----------------------------------------------------------------------------------------------


def test_a_pass_is_not_run_again_and_is_called_cached_with_the_time(bench: Bench) -> None:
    first = bench.check()
    assert bench.ran
    assert (cached(first), first.devices) == (set(), ("cpu",))
    second = bench.check()
    assert not bench.ran
    assert cached(second) == QUICK
    assert second.devices == ()
    assert second.verdict is ValidationVerdict.PASSED
    assert all(
        check.status is CheckStatus.CACHED and check.measured_at.endswith("Z") for check in second.cached
    )
    assert second.headline == "scale: passed on cpu (cached)"


def test_size_and_declaration_are_measured_every_time(bench: Bench) -> None:
    bench.check()
    again = {check.name: check.status for check in bench.check().checks}
    for name in ("declaration", "factory", "param_estimate", "independent_builds", "global_state"):
        assert again[name] is CheckStatus.PASSED


def test_the_full_checks_are_kept_apart_from_those_of_registration(bench: Bench) -> None:
    bench.check()
    full = bench.check(full=True)
    assert cached(full) == set()
    assert cached(bench.check(full=True)) == set(device_check_names(Topology.CNN, full=True))


def test_failures_are_measured_every_time(bench: Bench) -> None:
    dead = bench.spec(factory="fake_kept:Dead")
    for _ in range(2):
        report = bench.check(dead)
        assert {check.name for check in report.failures} == {"gradient_at_birth"}
        assert report.cached == ()
    assert bench.files == []


def test_what_did_not_run_is_not_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_up(self: Any, x: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench.module.Counted, "forward", full_up)
    assert bench.check().verdict is ValidationVerdict.INCOMPLETE
    assert bench.files == []


def test_without_a_cache_everything_runs_and_nothing_is_kept(bench: Bench) -> None:
    bench.check()
    kept = bench.files
    bench.module.RUNS.clear()
    report = check_blueprint_spec(bench.spec(), device="cpu", full=False)
    assert bench.ran
    assert report.cached == ()
    assert bench.files == kept


def test_passes_on_the_cpu_are_kept_only_where_that_is_asked_for(bench: Bench) -> None:
    for _ in range(2):
        assert bench.check(cache=bench.cache(devices=["cuda"])).cached == ()
        assert bench.ran
    assert bench.files == []
    assert (
        PassCache("fake_kept", folder=bench.folder).key(bench.spec(), [8], torch.device("cpu"), True) is None
    )


# -- what a pass depends on -------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Bench, pytest.MonkeyPatch], dict[str, Any]]] = {
    "version": lambda bench, patch: {"cache": bench.cache(version="1.1")},
    "distribution": lambda bench, patch: {"cache": bench.cache(distribution="other")},
    "name": lambda bench, patch: {"spec": bench.spec(name="other")},
    "options": lambda bench, patch: {"spec": bench.spec(options={"gain": 1})},
    "widths": lambda bench, patch: {"widths": [8, 16]},
    "torch": lambda bench, patch: patch.setattr(torch, "__version__", "9.9") or {},
    "CUDA": lambda bench, patch: patch.setattr(torch.version, "cuda", "99") or {},
    "fvcore": lambda bench, patch: (
        patch.setattr("kasmina_core.checks.cache._version", lambda name: f"{name} 9") or {}
    ),
    "Python": lambda bench, patch: patch.setattr("platform.python_version", lambda: "3.99") or {},
    "device": lambda bench, patch: (
        patch.setattr("kasmina_core.checks.cache._device_facts", lambda device: ["another"]) or {}
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_pass_counts_only_for_what_it_was_measured_with(
    bench: Bench, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.check()
    assert cached(bench.check()) == QUICK
    changed = CHANGES[what](bench, monkeypatch)
    assert bench.check(**changed).cached == ()


def test_another_source_is_measured_anew(bench: Bench) -> None:
    bench.check()
    file = bench.site.root / "fake_kept.py"
    file.write_text(file.read_text() + "\n# another comment\n")
    os.utime(file, (0, 0))  # its time says nothing
    bench.load()
    assert bench.check().cached == ()
    assert cached(bench.check()) == QUICK


def test_another_version_of_a_requirement_is_measured_anew(bench: Bench) -> None:
    info = next(bench.site.root.glob("fake_kept-*.dist-info"))
    metadata = info / "METADATA"
    metadata.write_text(metadata.read_text() + "Requires-Dist: needed-dist>=1\n")
    bench.check()
    assert cached(bench.check()) == QUICK
    bench.site.install("needed-dist", b"", version="2.0")
    assert bench.check().cached == ()


@pytest.mark.parametrize("kind", ["closure", "object", "main", "namesake"])
def test_a_factory_that_no_file_shows_is_measured_every_time(bench: Bench, kind: str) -> None:
    counted = bench.module.Counted

    def closure(dim: int) -> Any:
        return counted(dim)

    class Factory:
        def __call__(self, dim: int) -> Any:
            return counted(dim)

    factory: Any = {"closure": closure, "object": Factory()}.get(kind, lambda dim: counted(dim))
    if kind == "main":
        factory.__module__, factory.__qualname__ = "__main__", "factory"
    if kind == "namesake":
        factory.__module__, factory.__qualname__ = "fake_kept", "Counted"
    for _ in range(2):
        assert bench.check(bench.spec(factory=factory)).cached == ()
        assert bench.ran
    assert bench.files == []


def test_a_class_of_a_module_is_as_good_as_its_name(bench: Bench) -> None:
    bench.check(bench.spec(factory=bench.module.Counted))
    assert cached(bench.check()) == QUICK


# -- what lies in the folder ------------------------------------------------------------------------------------------


def rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def apply(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return apply


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "binary": lambda path: path.write_bytes(b"\xff\x00\xfe" * 9),
    "a list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "huge": lambda path: path.write_bytes(b" " * (1 << 21) + path.read_bytes()),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another key": rewrite(lambda data: data["key"].update(distribution=["other", "1.0"])),
    "a failure": rewrite(lambda data: data["checks"][0].update(status="failed")),
    "called cached": rewrite(lambda data: data["checks"][0].update(status="passed (cached)")),
    "not run": rewrite(lambda data: data["checks"][0].update(status="not run")),
    "another device": rewrite(lambda data: data["checks"][0].update(device="cuda:0")),
    "a check too few": rewrite(lambda data: data["checks"].pop()),
    "another check": rewrite(lambda data: data["checks"][0].update(name="flops")),
    "no time": rewrite(lambda data: data.update(measured_at="soon")),
    "an impossible time": rewrite(lambda data: data.update(measured_at="0001-01-01T00:00:00+14:00")),
    "no checks": rewrite(lambda data: data.update(checks=None)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_as_good_as_none(bench: Bench, damage: str) -> None:
    bench.check()
    (path,) = bench.files
    DAMAGE[damage](path)
    report = bench.check()
    assert bench.ran
    assert (report.verdict, report.cached) == (ValidationVerdict.PASSED, ())


def test_a_damaged_file_is_replaced_by_the_next_pass(bench: Bench) -> None:
    bench.check()
    (path,) = bench.files
    path.write_bytes(b"damaged")
    bench.check()
    assert cached(bench.check()) == QUICK
    assert bench.files == [path]


def test_a_folder_that_cannot_be_written_is_no_error(bench: Bench) -> None:
    bench.folder.write_text("a file is here")
    report = bench.check()
    assert report.verdict is ValidationVerdict.PASSED
    assert bench.folder.read_text() == "a file is here"


def test_a_write_that_fails_leaves_the_file_that_was_there_and_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.check()
    (path,) = bench.files
    path.write_bytes(b"damaged")

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    assert bench.check().verdict is ValidationVerdict.PASSED
    assert bench.files == [path]
    assert path.read_bytes() == b"damaged"


# -- where it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"KASMINA_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/shared"}, "/own"),
        ({"XDG_CACHE_HOME": "/shared"}, "/shared/kasmina"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/kasmina"),
        ({"KASMINA_CACHE_DIR": ""}, "/home/me/.cache/kasmina"),
    ],
)
def test_the_folder_is_named_by_the_environment_or_the_home(
    environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KASMINA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | environment).items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_without_a_home_nothing_is_kept_and_nothing_fails(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kasmina_core.checks.cache.cache_folder", lambda: None)
    assert bench.check(cache=bench.cache(folder=None)).verdict is ValidationVerdict.PASSED
