"""Injection points of a host, and the forward hook that puts a slot at one."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, final, runtime_checkable

from kasmina_core.errors import HostError, TopologyError, did_you_mean
from kasmina_core.outputs import passed_through, split_path
from kasmina_core.state_keys import WRAPPER
from kasmina_core.topology import Topology

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, slots=True)
class InjectionPoint:
    """A named place in a host where a slot can be.

    Attributes:
        name: Name of the slot there; no dots.
        path: Dotted path of the submodule whose output is the features, as in ``host.get_submodule``; ``""`` is the
            host itself. If the output holds more than the features, their index or key follows after a colon:
            ``"encoder.layers.3:1"`` is the second element of a tuple or list, ``"block:hidden"`` a field or a key,
            ``"lstm:1:0"`` the first element of the second. Without one, a tuple's first element and a dataclass's
            first field that is not ``None`` are the features.
        dim: Width of the features: ``c`` of ``(b, c, h, w)``, ``d`` of ``(b, t, d)``.
        topology: What the axes of the features mean.
        causal: Whether position ``t`` must not see positions after it.
        layout: The order in which the host holds the axes, in the letters of ``topology.axes``: ``"bhwc"`` or ``"tbd"``.
            ``None`` for the topology's own. A slot there turns the features and turns them back: seeds see them in the
            topology's order, batch first.

    Raises:
        HostError: If the name, the width or the layout cannot be used.
    """

    name: str
    path: str
    dim: int
    topology: Topology
    causal: bool = False
    layout: str | None = None

    def __post_init__(self) -> None:
        if not self.name or "." in self.name:
            raise HostError(
                f"{self.name!r} is not a name for an injection point: it may not be empty or hold dots."
            )
        if self.dim < 1:
            raise HostError(f"Injection point '{self.name}': the width must be at least 1, not {self.dim}.")
        if self.layout is not None:
            try:
                self.topology.order(self.layout)
            except TopologyError as error:
                raise HostError(f"Injection point '{self.name}': {error}") from error

    @property
    def axes(self) -> str:
        """The letters of the axes in the order in which the host holds them."""
        return self.layout or self.topology.layout


@runtime_checkable
class HostProtocol(Protocol):
    """What the core asks of a host that knows its own points.

    A module that lacks this becomes a host by naming points: see `MorphogeneticModel`. ``HookedHost`` gives
    ``register_slot`` and ``unregister_slot`` to any module that declares ``injection_points``. A host may also offer
    ``example_inputs() -> tuple`` for the probe at attach, and ``context_reader() -> ContextReader``, which says for each
    of its calls what the positions mean to seeds that mix them.
    """

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return the places where a slot can be, in the order in which the forward pass meets them."""
        ...

    def register_slot(self, name: str, slot: nn.Module) -> None:
        """Pass the features at point ``name`` through ``slot`` from now on, without owning the slot as a child."""
        ...

    def unregister_slot(self, name: str) -> None:
        """Undo `register_slot`."""
        ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model."""
        ...


class HookedHost:
    """Gives ``register_slot`` and ``unregister_slot`` to a module that declares ``injection_points``.

    >>> from torch import nn
    >>> class Host(HookedHost, nn.Sequential):
    ...     def injection_points(self):
    ...         return [InjectionPoint("first", "0", dim=4, topology=Topology.TRANSFORMER)]
    >>> isinstance(Host(nn.Linear(4, 4)), HostProtocol)
    True
    """

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return the places where a slot can be. To be written by the host."""
        raise NotImplementedError(f"{type(self).__name__} must return its injection points.")

    def register_slot(self, name: str, slot: nn.Module) -> None:
        """Pass the output of the submodule at point ``name`` through ``slot``.

        Raises:
            HostError: If the host is no module, has no such point, or already has a slot there.
        """
        points = {point.name: point for point in self.injection_points()}
        if name not in points:
            raise HostError(
                f"{type(self).__name__} has no injection point '{name}'.{did_you_mean(name, points)}"
            )
        handles: dict[str, RemovableHandle] = self.__dict__.setdefault("_slot_handles", {})
        if name in handles:
            raise HostError(
                f"Injection point '{name}' already has a slot: a host can be in one model at a time."
            )
        from torch import nn  # the declarations above need none

        if not isinstance(self, nn.Module):
            raise HostError(f"{type(self).__name__} is not a torch.nn.Module.")
        handles[name] = submodule(self, points[name].path).register_forward_hook(
            SlotHook(slot, points[name].path)
        )

    def unregister_slot(self, name: str) -> None:
        """Undo `register_slot`; nothing happens if there is no slot."""
        handle = self.__dict__.get("_slot_handles", {}).pop(name, None)
        if handle is not None:
            handle.remove()


@final
class SlotHook:
    """A forward hook that passes a module's output through a slot.

    The output is the features, or holds them (see `features_in`); the rest of it is kept. A slot whose ``mode`` is 0
    gives back what it is given, so it is only called if somebody else listens to it.

    Args:
        slot: The slot.
        path: The path of its point, which says where in the output the features are.

    Attributes:
        slot: The slot.
        keys: What leads to the features, see `split_path`.
        origin: The same in every copy of the hook, and of the host that it hangs on.
        is_copied: Whether there may be a copy: it was copied or pickled, or is the result of that.
    """

    def __init__(self, slot: nn.Module, path: str = "") -> None:
        self.slot = slot
        self.keys = split_path(path)[1]
        self.origin = uuid.uuid4().hex
        self.is_copied = False

    def __getstate__(self) -> dict[str, Any]:
        self.is_copied = True
        return vars(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        slot = self.slot
        if getattr(slot, "mode", None) == 0 and not (slot._forward_hooks or slot._forward_pre_hooks):
            return None  # torch then keeps the output; a call would be half of what an empty slot costs
        return passed_through(slot, output, self.keys)


def submodule(host: nn.Module, path: str) -> nn.Module:
    """Return the module of a point's path; an index or key in it plays no part.

    Raises:
        HostError: If there is none; the message suggests a near path. If torch.jit made it: it calls no hooks.
    """
    from torch.jit import ScriptModule  # the declarations above need no torch

    path = split_path(path)[0]
    found: nn.Module | None = host
    for part in path.split(".") if path else ():
        found = found._modules.get(part) if found is not None else None
        if isinstance(found, ScriptModule):
            raise HostError(
                f"'{path}' is, or is inside of, a module scripted or traced by torch.jit: it calls no hooks.\n"
                "Put the Python module that it was made of there, or name one outside of it."
            )
    if found is not None:
        return found
    named = dict(host.named_modules(remove_duplicate=False))
    raise HostError(
        f"{type(host).__name__} has no submodule '{path}'.{did_you_mean(path, filter(None, named))}"
    )


def demand_openness(host: nn.Module) -> None:
    """Demand that hooks on a host's submodules are called, and that a seed would be trained like the host.

    Raises:
        HostError: If the host, or a part of it, is of a kind in which slots would have no effect, or wrong ones.
    """
    import torch  # the declarations above need none
    from torch import nn
    from torch.nn.parameter import is_lazy

    kind = type(host).__name__
    if isinstance(host, torch.jit.ScriptModule):
        raise HostError(
            f"{kind} is scripted or traced by torch.jit: it calls no hooks of its submodules, so no slot can be in it.\n"
            "Give the Python module that it was made of."
        )
    if any(base.__module__.startswith("torch.export") for base in type(host).__mro__):
        raise HostError(
            f"{kind} was made by torch.export: its submodules only hold weights, and are not called.\n"
            "Give the Python module that was exported; a grown model can be exported afterwards."
        )
    if WRAPPER in host._modules:
        raise HostError(
            f"{kind} was compiled before it has slots: a graph calls no hook that comes later.\n"
            "Give what was compiled, and compile the model: torch.compile(MorphogeneticModel(host._orig_mod, ...))."
        )
    for path, module in host.named_modules():
        where = f" at '{path}'" if path else ""
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or any(
            base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__
        ):
            raise HostError(
                f"{kind} holds a {type(module).__name__}{where}, which knows the parameters of its own start alone: seeds "
                "would not be copied or averaged.\n"
                "Give the module inside, and distribute afterwards: distribute(MorphogeneticModel(module, ...))."
            )
        if hasattr(type(module), "demand_slots"):
            raise HostError(
                f"{kind} is or holds a {type(module).__name__}{where}: a host can be in one model at a time.\n"
                "Name all points in one model, or take the slots of the other off first: host = old_model.detach_slots()."
            )
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise HostError(
                f"{kind} holds a {type(module).__name__}{where} that has no weights yet.\n"
                "Run the host once on an input, then attach: host(example)."
            )


def demand_open_path(host: nn.Module, path: str) -> None:
    """Demand that the module of a path is not inside of a part that was compiled before.

    Raises:
        HostError: If it is: a graph calls no hook that comes later.
    """
    names = [name for name in split_path(path)[0].split(".") if name]
    for depth in range(len(names) + 1):
        module, outer = submodule(host, ".".join(names[:depth])), ".".join(names[:depth])
        # The hooks of the wrapper that torch.compile returns run outside of its graph, those of module.compile() do not.
        if module._compiled_call_impl is not None or (WRAPPER in module._modules and depth < len(names)):
            raise HostError(
                f"'{path}' is inside of {repr(outer) if outer else type(host).__name__}, which is compiled: a graph "
                "calls no hook that comes later.\n"
                "Attach slots to the module as it was before, and compile the model afterwards: model.compile()."
            )
