"""Blocks of code that leave random numbers, training modes and buffers as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from kasmina_core.sharding import reshard


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


def devices_of(module: nn.Module) -> list[torch.device]:
    """Return the devices on which a module has parameters or buffers, sorted by name."""
    return sorted({tensor.device for tensor in [*module.parameters(), *module.buffers()]}, key=str)


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
