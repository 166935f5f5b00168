"""It replaces a class of torch and registers a hook on every module."""

from __future__ import annotations

from collections.abc import Iterable

from kasmina_core import BlueprintSpec, hookimpl


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Offer nothing."""
    import torch
    from torch.nn.modules.module import register_module_forward_hook

    torch.nn.Linear = torch.nn.Identity  # type: ignore[misc, assignment]  # that is the fault
    register_module_forward_hook(lambda module, args, output: output * 2)
    return []
