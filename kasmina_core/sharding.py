"""Parameters that are sharded over processes, by what FSDP2 and DTensor offer; torch.distributed is imported for sharded ones alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that may be sharded."""
    to_local = getattr(tensor, "to_local", None)
    return cast("Tensor", to_local()) if to_local is not None else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded; then every process has to ask."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return cast("Tensor", full_tensor()) if full_tensor is not None else tensor


def sharded_like(tensor: Tensor, like: Any) -> Tensor:
    """Return a whole tensor sharded as another one of its shape is; then every process has to ask."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None or hasattr(tensor, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), mesh, like.placements)


def sharded_modules(module: nn.Module) -> list[Any]:
    """Return the modules in it, itself included, to which ``fully_shard`` was applied."""
    return [m for m in module.modules() if hasattr(m, "set_reshard_after_forward")]


def reshard(module: nn.Module) -> None:
    """Put shards in the place of whole parameters, which FSDP2 leaves behind after a forward without a backward."""
    for sharded in sharded_modules(module):
        sharded.reshard()


@contextmanager
def kept_whole(module: nn.Module) -> Iterator[None]:
    """Within the block a forward of the module leaves whole parameters, to which a gradient can be asked for."""
    inside = sharded_modules(module)
    for sharded in inside:
        sharded.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for sharded in inside:
            sharded.set_reshard_after_forward(True, recurse=False)
