"""Random numbers that nobody else's depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


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
