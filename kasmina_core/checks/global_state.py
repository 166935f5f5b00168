"""Settings and random numbers of the whole program, kept as they were while foreign code runs."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import TYPE_CHECKING, Any, Final, final

if TYPE_CHECKING:
    import torch

STREAMS: Final = ("random numbers of Python", "random numbers of numpy")
"""Settings that are the state of a generator, which no report prints."""


@contextmanager
def preserved_global_state() -> Iterator[None]:
    """Run the block, then put back what foreign code may not change.

    That is the random numbers of Python, numpy and torch, and torch's default dtype, default device, number of
    threads, gradient mode, deterministic mode, precision of matrix products and cuDNN benchmark mode. What has not
    been imported is not touched, and CUDA is not initialised.
    """
    torch = sys.modules.get("torch")
    settings = Settings()
    torch_state = torch.get_rng_state() if torch is not None else None
    cuda_states = (
        torch.cuda.get_rng_state_all() if torch is not None and torch.cuda.is_initialized() else None
    )
    waiting = _cuda_seeds(torch)
    before = dict(waiting)
    try:
        yield
    finally:
        settings.put_back()
        if torch is not None:
            torch.set_rng_state(torch_state)
            if cuda_states is not None:
                torch.cuda.set_rng_state_all(cuda_states)
            elif not torch.cuda.is_initialized():
                waiting.update(before)


def _settings() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Return by name how each setting is read, as a value that compares, and how it is put back."""
    streams: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        STREAMS[0]: (random.getstate, random.setstate)
    }
    if (numpy_random := sys.modules.get("numpy.random")) is not None:

        def numpy_state() -> tuple[Any, ...]:
            kind, keys, *rest = numpy_random.get_state()
            return (kind, keys.tobytes(), *rest)

        def set_numpy_state(state: tuple[Any, ...]) -> None:
            kind, keys, *rest = state
            numpy_random.set_state((kind, sys.modules["numpy"].frombuffer(keys, "uint32"), *rest))

        streams[STREAMS[1]] = (numpy_state, set_numpy_state)
    if "torch" not in sys.modules:
        return streams
    import torch

    def set_deterministic(value: tuple[bool, bool]) -> None:
        torch.use_deterministic_algorithms(value[0], warn_only=value[1])

    def set_device(value: torch.device) -> None:
        torch.set_default_device(None if value.type == "cpu" else value)

    deterministic = (
        torch.are_deterministic_algorithms_enabled,
        torch.is_deterministic_algorithms_warn_only_enabled,
    )
    cudnn = torch.backends.cudnn
    return {
        "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "default device": (torch.get_default_device, set_device),
        "number of threads": (torch.get_num_threads, torch.set_num_threads),
        "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
        "deterministic mode": (lambda: tuple(read() for read in deterministic), set_deterministic),
        "precision of matrix products": (
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
        "cuDNN benchmark mode": (lambda: cudnn.benchmark, partial(setattr, cudnn, "benchmark")),
        "seed of the random numbers": (torch.initial_seed, torch.default_generator.manual_seed),
        **streams,
    }


@final
class Settings:
    """The random numbers of Python and numpy, and torch's settings of the whole program if it is imported, as they are.

    A generator that is imported later is not among them: it has no state to be put back.
    """

    def __init__(self) -> None:
        self._kept = [(name, read, put_back, read()) for name, (read, put_back) in _settings().items()]

    def __getitem__(self, name: str) -> Any:
        return next(value for kept, _, _, value in self._kept if kept == name)

    def put_back(self) -> dict[str, Any]:
        """Put back those that were changed since, and return them with the values found."""
        changed = {}
        for name, read, put_back, value in self._kept:
            if (found := read()) != value:
                changed[name] = found
                put_back(value)
        return changed


class SharedParts:
    """Snapshot of what all modules share: classes, methods and functions of ``torch.nn``, Tensor's methods, global hooks.

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
            if now.keys() == own.keys() and all(map(is_, now.values(), own.values())):
                continue
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
