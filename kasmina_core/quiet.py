"""Blocks of code that leave random numbers, training modes, buffers and other threads as they were."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final, final

import torch
from torch import nn

from kasmina_core.errors import KasminaError
from kasmina_core.sharding import reshard

PATIENCE: Final = 300.0
"""Seconds after which a thread no longer waits for another one."""


def derived_seed(*parts: object) -> int:
    """Return a seed in [0, 2**63) that depends on the parts alone, the same in every process.

    >>> derived_seed(0, "block2", 1) == derived_seed(0, "block2", 1)
    True
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def private_rng(seed: int | None, *devices: torch.device) -> Iterator[None]:
    """Run the block on random numbers of its own; the global generators are left as they were found.

    Args:
        seed: Seed of the block's numbers; ``None`` goes on from the global state.
        devices: Accelerators whose generators the block may use; the CPU's is always covered.
    """
    accelerators = [d for d in devices if d.type not in ("cpu", "meta")]
    kind = accelerators[0].type if accelerators else "cuda"
    with torch.random.fork_rng(devices=[d.index or 0 for d in accelerators], device_type=kind):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for device in accelerators:
                module = torch.get_device_module(device)
                # It seeds the current device, which need not be this one; where there can be one alone, it is.
                with module.device(device) if hasattr(module, "device") else nullcontext():
                    module.manual_seed(seed)
        yield


def generator_states(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the CPU's global generator and of the device's."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def devices_of(module: nn.Module) -> list[torch.device]:
    """Return the devices on which a module has parameters or buffers, sorted by name."""
    return sorted({tensor.device for tensor in [*module.parameters(), *module.buffers()]}, key=str)


def parameters_by_id(module: nn.Module) -> dict[int, nn.Parameter]:
    """Return the parameters of a module by their ``id``.

    It takes a fifth of the time of ``module.parameters()``, which makes names, and hashes tensors in Python.
    """
    modules, waiting = {module}, [module]
    found: dict[int, nn.Parameter] = {}
    while waiting:
        current = waiting.pop()
        for parameter in current._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
        for child in current._modules.values():
            if child is not None and child not in modules:
                modules.add(child)
                waiting.append(child)
    return found


@contextmanager
def quiet_evaluation(host: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; training modes and random numbers are then as before.

    A block that switches the host to train mode between two forwards gets eval mode back at the next: batch
    statistics of held-out samples must not move the host's.
    """
    with private_rng(None, *devices_of(host)), torch.no_grad(), kept_modes(host):
        host.eval()
        handle = host.register_forward_pre_hook(_back_to_eval)
        try:
            yield
        finally:
            handle.remove()
            reshard(host)


def _back_to_eval(host: nn.Module, _inputs: object) -> None:
    if host.training:
        host.eval()


@contextmanager
def kept_modes(host: nn.Module) -> Iterator[None]:
    """Put the training mode of every module back to what it was before the block."""
    modes = {module: module.training for module in host.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def kept_buffers(host: nn.Module) -> Iterator[None]:
    """Put every buffer back to its value before the block, for hosts that write to them in eval mode too."""
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in host.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                buffer.copy_(value)
                module._buffers[name] = buffer  # a forward may have put another tensor in its place


@contextmanager
def kept_attributes(host: nn.Module) -> Iterator[None]:
    """Put the attributes of every module back that the block assigns, deletes or changes, such as a state kept between calls.

    Tensors, lists, sets and mappings that are attributes, or are in such ones, get their contents back. What objects of
    other classes keep, and what is written into parameters, stays.
    """
    before = [(module, dict(vars(module))) for module in host.modules()]
    contents: dict[int, tuple[Any, Any, int]] = {}
    for _, attributes in before:
        for name, value in attributes.items():
            _remember(value, contents, with_tensors=name not in ("_parameters", "_buffers"))
    try:
        yield
    finally:
        for module, attributes in before:
            now = vars(module)
            if len(now) != len(attributes) or any(
                now.get(key, now) is not attributes[key] for key in attributes
            ):
                now.clear()
                now.update(attributes)
        for held, saved, version in contents.values():
            _put_back(held, saved, version)


def _remember(value: Any, contents: dict[int, tuple[Any, Any, int]], with_tensors: bool = True) -> None:
    """Note what a tensor or container holds, and what is in it."""
    if isinstance(value, torch.Tensor):
        if with_tensors and id(value) not in contents and not value.is_inference():
            contents[id(value)] = value, value.detach().clone(), value._version
    elif isinstance(value, dict | list | set | tuple | deque) and id(value) not in contents:
        held = list(value.items() if isinstance(value, dict) else value)
        contents[id(value)] = value, held, 0
        for item in value.values() if isinstance(value, dict) else held:
            _remember(item, contents, with_tensors)


def _put_back(held: Any, saved: Any, version: int) -> None:
    if isinstance(held, torch.Tensor):
        if held._version != version:
            with torch.no_grad():
                held.copy_(saved)
    elif isinstance(held, dict):
        now = list(held.items())
        if len(now) != len(saved) or any(
            a is not c or b is not d for (a, b), (c, d) in zip(now, saved, strict=True)
        ):
            held.clear()
            for key, item in saved:  # the update of a Counter adds
                held[key] = item
    elif not isinstance(held, tuple) and (
        len(held) != len(saved) or any(a is not b for a, b in zip(held, saved, strict=True))
    ):
        held.clear()
        (held.update if isinstance(held, set) else held.extend)(saved)


@final
class Turns:
    """Lets many threads share an object, or one have it alone.

    A thread that waits to be alone goes before those that come to share. A thread that shares, or is alone, may do
    either once more.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing: dict[int, int] = {}
        self._alone: int | None = None

    def enter(self) -> None:
        """Begin to share; every call is paired with one of `leave`.

        Raises:
            KasminaError: After `PATIENCE` seconds.
        """
        # No lock: this is in every forward. Each side writes first and then looks at the other, so one of them waits.
        me = threading.get_ident()
        inside = self._sharing.get(me, 0)
        self._sharing[me] = inside + 1
        if inside or self._alone is None or self._alone == me:
            return
        self.leave()
        with self._changed:
            self._wait(lambda: self._alone in (None, me))
            self._sharing[me] = 1

    def leave(self) -> None:
        """End to share."""
        me = threading.get_ident()
        left = self._sharing[me] - 1
        if left:
            self._sharing[me] = left
            return
        del self._sharing[me]
        if self._alone is not None:
            with self._changed:
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run the block while no other thread shares.

        Raises:
            KasminaError: After `PATIENCE` seconds.
        """
        me = threading.get_ident()
        with self._changed:
            self._wait(lambda: self._alone in (None, me))
            before, self._alone = self._alone, me
        try:
            with self._changed:
                self._wait(lambda: all(thread == me for thread in list(self._sharing)))
            yield
        finally:
            with self._changed:
                self._alone = before
                self._changed.notify_all()

    @property
    def is_alone(self) -> bool:
        """Whether the calling thread has the object alone."""
        return self._alone == threading.get_ident()

    def _wait(self, until: Callable[[], bool]) -> None:
        if not self._changed.wait_for(until, PATIENCE):
            raise KasminaError(
                f"Waited {PATIENCE:g} seconds for another thread that measures or runs this model.\n"
                "An evaluator must run the model in the thread that calls it: what it hands to other threads waits for "
                "the measurement, and the measurement for it."
            )
