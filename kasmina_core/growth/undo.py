"""Undo for loads and epochs: restores model, optimisers and schedulers if one of them fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from kasmina_core.slots.slot import SeedSlot

if TYPE_CHECKING:
    from kasmina_core.growth.context import SeedParameterListener


@final
class ModelBefore:
    """A host's tensors and its slots as they are now.

    Args:
        host: The host; its tensors are copied.
        slots: The slots; tensors of their seeds are copied too, since a load may write into them.
    """

    def __init__(self, host: nn.Module, slots: Iterable[SeedSlot]) -> None:
        self._slots = [(slot, dict(slot.__dict__), dict(slot._modules)) for slot in slots]
        whole = [host, *(slot for slot, *_ in self._slots)]
        self._tensors = [
            (t, t.detach().clone()) for one in whole for t in [*one.parameters(), *one.buffers()]
        ]
        self._seeds = [
            (p, p.requires_grad, p.grad) for slot, *_ in self._slots for p in slot.seed_parameters()
        ]
        parts = [part for one in whole for part in one.modules()]
        self._places = [(part, dict(part._parameters), dict(part._buffers)) for part in parts]
        self._called: list[Callable[[], None]] = []

    def call(self, listeners: Sequence[SeedParameterListener], slots: Iterable[SeedSlot]) -> None:
        """Call listeners with the parameters that went and came since; `put_back` takes it back.

        Args:
            listeners: Whom to call.
            slots: The slots that there are.
        """
        seeds = {slot: modules.get("seed") for slot, _, modules in self._slots}
        for slot in dict.fromkeys((*seeds, *slots)):
            before = seeds.get(slot)
            if slot.seed is before:
                continue
            gone = list(before.parameters()) if before is not None else []
            come = slot.seed_parameters()
            for listener in listeners:
                if gone:
                    listener.seed_removed(slot.name, gone)
                    self._called.append(partial(listener.seed_added, slot.name, gone))
                if slot.seed is not None:
                    listener.seed_added(slot.name, come)
                    self._called.append(partial(listener.seed_removed, slot.name, come))

    def put_back(self) -> None:
        """Make host and slots what they were."""
        with torch.no_grad():
            for tensor, before in self._tensors:
                tensor.copy_(before)
        for module, parameters, buffers in self._places:  # assign=True puts other tensors in their places
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for slot, attributes, modules in self._slots:
            slot.__dict__.update(attributes)
            slot.__dict__["_modules"] = modules
        for parameter, learns, gradient in self._seeds:
            parameter.requires_grad_(learns)
            parameter.grad = gradient
        while self._called:
            with suppress(Exception):  # the caller must see what made the load fail
                self._called.pop()()


@final
class EpochBefore:
    """Slots as they are now, for an epoch, which changes notes, alphas and stages but replaces no seed."""

    def __init__(self, slots: Iterable[SeedSlot]) -> None:
        self._slots = [
            (
                slot,
                dict(slot.__dict__),
                copy.deepcopy((slot.state, slot.notes)),
                [(buffer, buffer.clone()) for buffer in slot.buffers(recurse=False)],
                [(p, p.requires_grad, p.grad) for p in slot.seed_parameters()],
            )
            for slot in slots
            if slot.state is not None
        ]

    def put_back(self) -> None:
        """Make the slots what they were; a state keeps its identity, since callers of ``germinate`` hold it."""
        for slot, attributes, (state, notes), buffers, parameters in self._slots:
            slot.__dict__.update(attributes)
            slot.notes = notes
            if slot.state is not None and state is not None:
                metrics = slot.state.metrics
                _assign(metrics, state.metrics)
                _assign(slot.state, state)
                slot.state.metrics = metrics
            for buffer, value in buffers:
                buffer.copy_(value)
            for parameter, learns, gradient in parameters:
                parameter.requires_grad_(learns)
                parameter.grad = gradient


def _assign(target: Any, source: Any) -> None:
    for each in fields(source):
        setattr(target, each.name, getattr(source, each.name))


def undo_of_optimizer(optimizer: Optimizer) -> Callable[[], None]:
    """Return what makes an optimiser's groups and state what they are now; a load replaces its tensors."""
    state, items = optimizer.state, [(key, dict(value)) for key, value in optimizer.state.items()]
    groups, copies = optimizer.param_groups, [(group, dict(group)) for group in optimizer.param_groups]

    def put_back() -> None:
        state.clear()
        state.update(items)
        for group, before in copies:
            group.clear()
            group.update(before)
        groups[:] = [group for group, _ in copies]
        optimizer.state, optimizer.param_groups = state, groups

    return put_back


def undo_of_attributes(objects: Iterable[Any], inside: Callable[[Any], Iterable[Any]]) -> Callable[[], None]:
    """Return what makes the attributes of objects, such as schedulers, what they are now.

    Args:
        objects: The objects.
        inside: Returns the objects inside of one that change with it.
    """
    kept: dict[int, tuple[Any, dict[str, Any]]] = {}
    waiting = list(objects)
    while waiting:
        one = waiting.pop()
        if id(one) not in kept and hasattr(one, "__dict__"):
            kept[id(one)] = one, {key: _copied(value) for key, value in vars(one).items()}
            waiting += inside(one)

    def put_back() -> None:
        for one, attributes in kept.values():
            vars(one).clear()
            vars(one).update(attributes)

    return put_back


def _copied(value: Any) -> Any:
    return type(value)(value) if type(value) in (list, dict, set) else value
