"""timm's gradient checkpointing, which in some models does not call the modules that hold slots, and its refusal."""

from __future__ import annotations

from typing import Any, final

from kasmina_core import HostError
from torch import nn
from torch.utils.hooks import RemovableHandle


@final
class CheckpointingGuard:
    """A forward pre-hook of a host that refuses to run where a slot would be passed by without a word.

    With gradient checkpointing on, some models of timm walk through their stages and call the blocks in them one by
    one; a slot at a stage is then never called.

    Args:
        path: Path of the sequence that holds the slot.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, host: nn.Module, args: tuple[Any, ...]) -> None:
        if checkpoints(host):
            raise HostError(
                "Gradient checkpointing was turned on after slots were attached, and may pass by the one at "
                f"'{self.path}' of {type(host).__name__}.\n"
                "Call set_grad_checkpointing() before the slots are attached: a module that is called is taken then."
            )


def checkpoints(host: nn.Module) -> bool:
    """Return whether timm's gradient checkpointing is on for a model as a whole."""
    return getattr(host, "grad_checkpointing", False) is True


def attach_guard(host: nn.Module, path: str) -> RemovableHandle | None:
    """Guard the slot at ``path``; ``None`` if checkpointing cannot pass it by, or is on already and did not."""
    at_risk = hasattr(host, "grad_checkpointing") and isinstance(
        host.get_submodule(path.partition(":")[0]), nn.Sequential
    )
    if not at_risk or checkpoints(host):
        return None
    return host.register_forward_pre_hook(CheckpointingGuard(path))
