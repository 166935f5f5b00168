"""Settings and random numbers of the whole program, kept as they were while foreign code runs."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

STREAMS: Final = ("random numbers of Python", "random numbers of numpy")
"""Settings that are the state of a generator: they say nothing to people."""


@contextmanager
def preserved_global_state() -> Iterator[None]:
    """Run the block, then put back what foreign code may not change.

    That is the random numbers of Python, numpy and torch, and torch's default dtype, default device, number of
    threads, gradient mode, deterministic mode, precision of matrix products and cuDNN benchmark mode. What has not
    been imported is not touched, and CUDA is not initialised.
    """
    torch = sys.modules.get("torch")
    streams = _read_streams()
    settings = read_settings() if torch is not None else {}
    torch_state = torch.get_rng_state() if torch is not None else None
    cuda_states = (
        torch.cuda.get_rng_state_all() if torch is not None and torch.cuda.is_initialized() else None
    )
    waiting = _cuda_seeds(torch)
    before = dict(waiting)
    try:
        yield
    finally:
        for name, state in streams.items():
            _set_stream(name, state)
        if torch is not None:
            restore_settings(settings)
            torch.set_rng_state(torch_state)
            if cuda_states is not None:
                torch.cuda.set_rng_state_all(cuda_states)
            elif not torch.cuda.is_initialized():
                waiting.update(before)


def read_settings() -> dict[str, Any]:
    """Return torch's settings of the whole program and the random numbers of Python and numpy, by name."""
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
        "precision of matrix products": torch.get_float32_matmul_precision(),
        "cuDNN benchmark mode": torch.backends.cudnn.benchmark,
        "seed of the random numbers": torch.initial_seed(),
    } | _read_streams()


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
        "precision of matrix products": torch.set_float32_matmul_precision,
        "cuDNN benchmark mode": set_benchmark,
        "seed of the random numbers": set_seed,
    }
    found = read_settings()
    # A generator that was imported since then has no state to be put back.
    changed = {name: value for name, value in found.items() if value != settings.get(name, value)}
    for name in changed:
        if name in STREAMS:
            _set_stream(name, settings[name])
        else:
            setters[name](settings[name])
    return changed


class SharedParts:
    """What all modules share, as it was: classes, methods and functions of ``torch.nn``, Tensor's methods, global hooks.

    Functions of ``torch`` itself are left out: libraries such as lightning and peft wrap some when they are imported.
    """

    def __init__(self) -> None:
        import torch

        classes = {
            f"torch.nn.{name}": thing for name, thing in vars(torch.nn).items() if isinstance(thing, type)
        }
        holders: dict[str, Any] = classes | {
            "torch.nn": torch.nn,
            "torch.nn.functional": torch.nn.functional,
            "torch.nn.init": torch.nn.init,
            "torch.Tensor": torch.Tensor,
        }
        self._members = [(name, holder, dict(vars(holder))) for name, holder in holders.items()]
        self._hooks = [
            (name, hooks, dict(hooks))
            for name, hooks in vars(torch.nn.modules.module).items()
            if name.startswith("_global_") and isinstance(hooks, dict)
        ]

    def put_back(self) -> list[str]:
        """Put back what was changed since, and return its names."""
        changed = []
        for name, holder, own in self._members:
            now = dict(vars(holder))
            for key in [key for key, value in own.items() if callable(value) and now.get(key) is not value]:
                setattr(holder, key, own[key])
                changed.append(f"{name}.{key}")
            bases = holder.__mro__[1:] if isinstance(holder, type) else ()
            for key in now.keys() - own.keys():
                if callable(now[key]) and any(key in vars(base) for base in bases):  # it hides the base's
                    delattr(holder, key)
                    changed.append(f"{name}.{key}")
        for name, hooks, kept in self._hooks:
            if hooks != kept:
                hooks.clear()
                hooks.update(kept)
                changed.append(name.strip("_").replace("_", " "))
        return changed


def _cuda_seeds(torch: Any) -> dict[str, Any]:
    """Return what keeps the seeds that wait for CUDA to be initialised; torch has no public name for it."""
    tracker = getattr(torch.cuda, "_lazy_seed_tracker", None) if torch is not None else None
    return vars(tracker) if tracker is not None else {}


def _read_streams() -> dict[str, Any]:
    """Return the state of Python's random numbers, and of numpy's if it has been imported, as values that compare."""
    states: dict[str, Any] = {STREAMS[0]: random.getstate()}
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        kind, keys, *rest = numpy_random.get_state()
        states[STREAMS[1]] = (kind, keys.tobytes(), *rest)
    return states


def _set_stream(name: str, state: Any) -> None:
    if name == STREAMS[0]:
        random.setstate(state)
        return
    import numpy

    kind, keys, *rest = state
    numpy.random.set_state((kind, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
