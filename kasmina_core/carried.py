"""Slots that a module carries: where they are, and copies of modules without them."""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar

from torch import nn

from kasmina_core.hosts import HostProtocol, SlotHook
from kasmina_core.positions import CallBegins, CallEnds
from kasmina_core.slots.forward import Slot

_Module = TypeVar("_Module", bound=nn.Module)


def carried_slots(module: nn.Module) -> str:
    """Return where a module carries a slot, as text; empty if it carries none.

    A hook holds its slot, and so does every copy of a module on which it hangs: with the seed, as it was.
    """
    for path, part in module.named_modules():
        where = f"its {type(part).__name__}" + (f" '{path}'" if path else "")
        if isinstance(part, Slot) or hasattr(type(part), "demand_slots"):
            return f"{where} is a model with slots or a slot"
        for hook in part._forward_hooks.values():
            if isinstance(hook, SlotHook) and isinstance(hook.slot, Slot):
                return f"slot '{hook.slot.point.name}' hangs on {where}"
    return ""


def refusal_of(module: object) -> str:
    """Return why a module cannot be a seed or a new host, with what to write instead; empty if it carries no slot."""
    if not isinstance(module, nn.Module) or not (carried := carried_slots(module)):
        return ""
    return (
        f"{carried}, with whatever seed is in it: that would compute here too, and nothing would train or save it. "
        "Copy a host, or a part of one, with copy_without_slots(module), and a seed with "
        "copy.deepcopy(model.slots[name].seed)"
    )


def copy_without_slots(module: _Module) -> _Module:
    """Return a deep copy of a host, or of a part of one, without slots and the seeds in them.

    ``copy.deepcopy`` takes the hooks along, and each hook its slot with the seed. Other hooks are copied; gradients are
    not.

    Args:
        module: The module, which stays as it is.

    Raises:
        TypeError: If it is a `MorphogeneticModel`, whose ``host`` is to be copied, or a slot.

    >>> import torch
    >>> from kasmina_core import InjectionPoint, MorphogeneticModel, Topology
    >>> host = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
    >>> point = InjectionPoint("body", "0", 4, Topology.CNN)
    >>> model = MorphogeneticModel(host, [point], example=torch.zeros(2, 1, 8, 8))
    >>> len(host[0]._forward_hooks), len(copy_without_slots(host)[0]._forward_hooks)
    (1, 0)
    """
    if isinstance(module, Slot) or hasattr(type(module), "demand_slots"):
        raise TypeError(f"Copy the host or a part of it, model.host, not the {type(module).__name__}.")
    hooks = (
        hook
        for part in module.modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    )
    # What is in deepcopy's memo is shared, not copied: so no seed is copied that is thrown away at once.
    copied = copy.deepcopy(module, {id(hook): hook for hook in hooks if _is_of_slots(hook)})
    take_slots_off(copied)
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def take_slots_off(module: nn.Module) -> None:
    """Remove the hooks of slots from a copy of a host or of a part of one, and those that read its calls for them."""
    for part in module.modules():
        ours = [
            key
            for key, hook in (*part._forward_hooks.items(), *part._forward_pre_hooks.items())
            if _is_of_slots(hook)
        ]
        for key, (name, held) in itertools.product(ours, vars(part).items()):
            if name.startswith("_forward_") and isinstance(
                held, dict
            ):  # the hooks, and what torch notes of them
                held.pop(key, None)
        part.__dict__.pop("_slot_handles", None)
    if isinstance(module, HostProtocol):
        for point in module.injection_points():
            module.unregister_slot(point.name)


def _is_of_slots(hook: object) -> bool:
    if isinstance(hook, SlotHook):
        return isinstance(hook.slot, Slot)
    # An exported model keeps such hooks for seeds that are parts of it: they hold no slots.
    return isinstance(hook, (CallBegins, CallEnds)) and any(isinstance(slot, Slot) for slot in hook.slots)
