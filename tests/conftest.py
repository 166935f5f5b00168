"""Settings of every test: repeatable examples, one torch thread per process, a whole run on all cores."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

# Processes that tests start inherit it. Two processes of two threads each on two cores wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return one worker per core, at most four, for all tests; none for files that were named or under ``-s``."""
    if config.option.file_or_dir or config.option.capture == "no":
        return 0
    has_affinity = hasattr(os, "sched_getaffinity")
    return min(4, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """Take what is imported out of the heap: a walk over it, one per germination and cull, takes 50 ms otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    import torch

    torch.set_num_threads(1)
