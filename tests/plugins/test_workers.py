"""Packs in worker processes, forked and spawned: they are found, checked and built there as in the parent."""

from __future__ import annotations

import multiprocessing
import os
import threading

import pytest
import torch
from fake_packs import GOOD, Site

from kasmina_core import PackState, PluginRegistry, default_registry, list_packs
from kasmina_core.packs import discovery

METHODS = [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()]


def work(
    answers: multiprocessing.SimpleQueue[object],
) -> None:  # at the top, so that a spawned process finds it
    torch.set_num_threads(1)
    registry = default_registry()
    module = registry.blueprints.create("good:scale", 4)
    answers.put(
        (
            os.getpid(),
            [(r.name, r.state.value) for r in list_packs() if r.distribution.startswith("fake")],
            [(r.name, r.state.value) for r in registry.packs if r.distribution.startswith("fake")],
            tuple(module(torch.ones(1, 4, 2, 2)).shape),
        )
    )


def in_worker(method: str) -> object:
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    process = context.Process(target=work, args=(answers,))
    process.start()
    try:
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()  # if it still runs; else the end of the tests would wait for it
        process.join()
    return answers.get()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("method", "loaded_before"), [("fork", False), ("fork", True), ("spawn", False)]
)  # a spawned process inherits nothing that was loaded
def test_a_worker_finds_loads_and_builds_what_its_parent_does(
    site: Site, fresh_default_registry: None, method: str, loaded_before: bool
) -> None:
    if method not in METHODS:
        pytest.skip(f"this system cannot {method}")
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    site.install("fake-bomb", "bomb = fake_bomb", fake_bomb="raise SystemExit(7)")
    if loaded_before:
        assert default_registry().pack("good").state is PackState.ACTIVE
    process, listed, loaded, shape = in_worker(method)
    assert process != os.getpid()
    assert listed == [("bomb", "discovered"), ("good", "discovered")]
    assert loaded == [("bomb", "failed"), ("good", "active")]
    assert shape == (1, 4, 2, 2)


@pytest.mark.skipif("fork" not in METHODS, reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_worker_forked_while_another_thread_loads_the_packs_does_not_wait_for_ever(
    site: Site, fresh_default_registry: None
) -> None:
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    held, release = threading.Event(), threading.Event()

    def load_slowly() -> None:
        with discovery._default_lock:
            discovery._default_is_loading = True
            held.set()
            release.wait()
            discovery._default_is_loading = False

    thread = threading.Thread(target=load_slowly)
    thread.start()
    held.wait()
    try:
        _, _, loaded, _ = in_worker("fork")
    finally:
        release.set()
        thread.join()
    assert loaded == [("good", "active")]


@pytest.mark.skipif("fork" not in METHODS, reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_worker_forked_while_another_thread_checks_a_pack_does_not_wait_for_ever(
    site: Site, fresh_default_registry: None
) -> None:
    slow = GOOD.replace('scale("scale")', 'scale("scale", factory=build)') + (
        "\nimport os, threading\nparent, held, release = os.getpid(), threading.Event(), threading.Event()\n"
        "def build(dim):\n    held.set()\n    if os.getpid() == parent:\n        release.wait()\n    return Scale(dim)\n"
    )
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    site.install("fake-slow", "slow = fake_slow", fake_slow=slow)
    registry = default_registry()
    thread = threading.Thread(target=registry.blueprints.get, args=("slow:scale",))
    thread.start()
    import fake_slow  # type: ignore[import-not-found]  # written by this test

    fake_slow.held.wait()
    try:
        _, _, loaded, _ = in_worker("fork")
    finally:
        fake_slow.release.set()
        thread.join()
    assert loaded == [("good", "active"), ("slow", "active")]


# -- CUDA -----------------------------------------------------------------------------------------------------------


def touched(name: str) -> None:
    raise AssertionError(f"torch.cuda.{name} was called: a later fork could not use CUDA any more")


@pytest.fixture
def untouchable_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a CUDA device, not used so far; asking for it in a way that spoils a fork is an error."""
    for name in ("is_available", "device_count", "current_device", "init", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: touched(name))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)


@pytest.mark.usefixtures("untouchable_cuda")
def test_listing_and_loading_with_checks_leave_cuda_alone(site: Site) -> None:
    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    assert [r.state for r in site.mine(list_packs())] == [PackState.DISCOVERED]
    registry = PluginRegistry()
    registry.load_installed()
    assert registry.pack("good").state is PackState.ACTIVE, registry.pack("good").cause
    report = registry.report("good:scale")
    assert report is not None
    assert report.devices == ("cpu",)
    assert {check.device for check in report.not_run} >= {"cuda"}


def test_where_cuda_is_in_use_already_the_checks_use_it_too(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def checks(spec: object, device: object, **_: object) -> None:
        asked.append(device)
        raise KeyboardInterrupt  # what the checks would find is not the question

    site.install("fake-good", "good = fake_good", fake_good=GOOD)
    monkeypatch.setattr("kasmina_core.checks.blueprints.check_blueprint_spec", checks)
    for in_use in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda in_use=in_use: in_use)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", list)
        for device in (None, "cpu", "cuda"):
            with pytest.raises(KeyboardInterrupt):
                PluginRegistry(device=device).load_installed()
    assert asked == ["cpu", "cpu", "cuda", None, "cpu", "cuda"]
