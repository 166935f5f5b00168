"""Parameters that are sharded over processes, by what FSDP2 and DTensor offer; torch.distributed is imported for sharded ones alone."""

from __future__ import annotations

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


def sharded_modules(module: nn.Module) -> list[Any]:
    """Return the modules in it, itself included, to which ``fully_shard`` was applied."""
    return [m for m in module.modules() if hasattr(m, "set_reshard_after_forward")]


def reshard(module: nn.Module) -> None:
    """Put shards in the place of whole parameters, which FSDP2 leaves behind after a forward without a backward."""
    for sharded in sharded_modules(module):
        sharded.reshard()
