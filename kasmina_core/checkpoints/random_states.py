"""States of the global random number generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor

from kasmina_core.errors import CheckpointError, warn_caller

SOURCES: Final = ("torch", "python", "numpy")
"""Whose global generators can be taken. ``torch`` is the CPU's and the accelerator's."""


class InexactResume(UserWarning):
    """What was saved cannot all be restored here, so the run goes on with other random numbers."""


def random_states(sources: Collection[str]) -> dict[str, Any]:
    """Return the states of global generators, some of `SOURCES`, as plain data and tensors."""
    if unknown := sorted(set(sources) - set(SOURCES)):
        raise ValueError(f"rng names {unknown[0]!r}; there are: {', '.join(SOURCES)}.")
    states: dict[str, Any] = {}
    if "torch" in sources:
        states["torch"] = torch.get_rng_state()
        states |= _accelerator_states()
    if "python" in sources:
        states["python"] = random.getstate()
    if "numpy" in sources:
        import numpy

        kind, keys, position, has_gauss, gauss = cast("tuple[Any, ...]", numpy.random.get_state(legacy=True))
        states["numpy"] = [kind, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss]
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Restore what `random_states` returned.

    Raises:
        CheckpointError: If the states are damaged; some may be restored then.

    Warns:
        InexactResume: If the accelerator's generators are not the saved ones'.
    """
    try:
        if unknown := sorted(set(states) - {*SOURCES, "accelerator"}):
            raise ValueError(f"unknown source {unknown[0]!r:.40}")
        if "torch" in states:
            torch.set_rng_state(_state(states["torch"]))
        if "accelerator" in states:
            _restore_accelerator(states["accelerator"])
        if "python" in states:
            random.setstate(states["python"])
        if "numpy" in states:
            import numpy

            kind, keys, position, has_gauss, gauss = states["numpy"]
            numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, gauss))
    except Warning:
        raise  # InexactResume, where warnings are errors
    except Exception as error:
        raise CheckpointError(f"The saved random number states cannot be restored: {error}") from error


def _module() -> tuple[str, Any] | None:
    """Return the accelerator's kind and torch module, if it is in use: asking it for its state would start it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    module = sys.modules.get(f"torch.{accelerator.type}")
    started = getattr(module, "is_initialized", lambda: True)
    return (accelerator.type, module) if module is not None and started() else None


def _accelerator_states() -> dict[str, Any]:
    if (found := _module()) is None:
        return {}
    kind, module = found
    has_all = hasattr(module, "get_rng_state_all")
    states = module.get_rng_state_all() if has_all else [module.get_rng_state()]
    return {"accelerator": {"kind": kind, "states": list(states)}}


def _restore_accelerator(saved: Mapping[str, Any]) -> None:
    kind, states = saved["kind"], [_state(state) for state in saved["states"]]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = (accelerator.type, torch.accelerator.device_count()) if accelerator is not None else ("none", 0)
    if here != (kind, len(states)):
        warn_caller(
            "The accelerators' random numbers go on otherwise than in the saved run.\n"
            f"  saved: {len(states)} x {kind!s:.20}\n"
            f"  here:  {here[1]} x {here[0]}",
            InexactResume,
        )
        return
    module = torch.get_device_module(kind)
    if hasattr(module, "set_rng_state_all"):
        module.set_rng_state_all(states)
    else:
        module.set_rng_state(states[0])


def _state(state: Any) -> Tensor:
    if not isinstance(state, Tensor) or state.dtype is not torch.uint8 or state.dim() != 1:
        raise TypeError(f"expected the bytes of a generator, found {type(state).__name__}")
    return state
