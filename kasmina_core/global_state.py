"""Settings and random numbers of the whole program, kept as they were while foreign code runs."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def preserved_global_state() -> Iterator[None]:
    """Run the block, then put back what foreign code may not change.

    That is the random numbers of Python, numpy and torch, and torch's default dtype, default device, number of
    threads, gradient mode, deterministic mode and cuDNN benchmark mode. What has not been imported is not touched.
    """
    torch = sys.modules.get("torch")
    numpy_random = sys.modules.get("numpy.random")
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    settings = read_settings() if torch is not None else {}
    torch_state = torch.get_rng_state() if torch is not None else None
    cuda_states = (
        torch.cuda.get_rng_state_all() if torch is not None and torch.cuda.is_initialized() else None
    )
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
        if torch is not None:
            restore_settings(settings)
            torch.set_rng_state(torch_state)
            if cuda_states is not None:
                torch.cuda.set_rng_state_all(cuda_states)


def read_settings() -> dict[str, Any]:
    """Return torch's settings of the whole program, by name."""
    import torch

    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic mode": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "cuDNN benchmark mode": torch.backends.cudnn.benchmark,
        "seed of the random numbers": torch.initial_seed(),
    }


def restore_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put the settings back and return those that had been changed, with the values found."""
    import torch

    def set_deterministic(value: tuple[bool, bool]) -> None:
        torch.use_deterministic_algorithms(value[0], warn_only=value[1])

    def set_benchmark(value: bool) -> None:
        torch.backends.cudnn.benchmark = value

    def set_device(value: torch.device) -> None:
        torch.set_default_device(None if value.type == "cpu" else value)

    def set_grad(value: bool) -> None:
        torch.set_grad_enabled(value)

    def set_seed(value: int) -> None:
        torch.default_generator.manual_seed(value)

    setters: dict[str, Callable[[Any], None]] = {
        "default dtype": torch.set_default_dtype,
        "default device": set_device,
        "number of threads": torch.set_num_threads,
        "gradient mode": set_grad,
        "deterministic mode": set_deterministic,
        "cuDNN benchmark mode": set_benchmark,
        "seed of the random numbers": set_seed,
    }
    found = read_settings()
    changed = {name: value for name, value in found.items() if value != settings[name]}
    for name in changed:
        setters[name](settings[name])
    return changed
