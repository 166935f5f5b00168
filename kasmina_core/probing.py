"""How a slot gets into a host: by name, through a forward hook, proved by a probe forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kasmina_core.errors import HostError, UnknownNameError, did_you_mean
from kasmina_core.hosts import HostProtocol, InjectionPoint
from kasmina_core.quiet import private_rng
from kasmina_core.sharding import reshard
from kasmina_core.topology import Topology


@final
class SlotHook:
    """A forward hook that passes a module's output through a slot.

    The output is the features, or holds them first (see `features_in`); the rest of it is kept. A slot whose ``mode`` is
    0 gives back what it is given, so it is only called if somebody else listens to it.
    """

    def __init__(self, slot: nn.Module) -> None:
        self.slot = slot

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        slot = self.slot
        if getattr(slot, "mode", None) == 0 and not (slot._forward_hooks or slot._forward_pre_hooks):
            return None  # torch then keeps the output; a call would be half of what an empty slot costs
        if isinstance(output, Tensor):
            return self.slot(output)
        if isinstance(output, tuple):
            return (self.slot(output[0]), *output[1:])
        if (name := _first_field(output)) is not None:
            return replace(output, **{name: self.slot(getattr(output, name))})
        return self.slot(output)


def features_in(output: Any) -> Any:
    """Return what a slot takes of a module's output: all of it, a tuple's first element, or a dataclass's first field.

    A field that is ``None`` does not count.
    """
    if isinstance(output, tuple) and output:
        return output[0]
    name = _first_field(output)
    return output if name is None else getattr(output, name)


def _first_field(output: Any) -> str | None:
    if isinstance(output, type) or not is_dataclass(output):
        return None
    return next((field.name for field in fields(output) if getattr(output, field.name) is not None), None)


class HookedHost:
    """Gives ``register_slot`` and ``unregister_slot`` to a module that declares ``injection_points``.

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
        if not isinstance(self, nn.Module):
            raise HostError(f"{type(self).__name__} is not a torch.nn.Module.")
        handles[name] = submodule(self, points[name].path).register_forward_hook(SlotHook(slot))

    def unregister_slot(self, name: str) -> None:
        """Undo `register_slot`; nothing happens if there is no slot."""
        handle = self.__dict__.get("_slot_handles", {}).pop(name, None)
        if handle is not None:
            handle.remove()


def submodule(host: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path.

    Raises:
        HostError: If there is none; the message suggests a near path.
    """
    named: dict[str, nn.Module] = dict(host.named_modules(remove_duplicate=False))
    if path in named:
        return named[path]
    raise HostError(f"{type(host).__name__} has no submodule '{path}'.{did_you_mean(path, _short(named))}")


def _short(named: Mapping[str, object], limit: int = 40) -> list[str]:
    return [name for name in named if name][:limit]


def matching_paths(host: nn.Module, pattern: str) -> list[str]:
    """Return the paths that a pattern names, in module order.

    ``*``, ``?`` and ``[…]`` match within one part of a dotted path: ``"layers.*"`` names the layers, not what is in
    them.

    Raises:
        HostError: If nothing matches.
    """
    if not any(sign in pattern for sign in "*?["):
        submodule(host, pattern)
        return [pattern]
    wanted = pattern.split(".")
    found = [
        path
        for path, _ in host.named_modules(remove_duplicate=False)
        if path and len(parts := path.split(".")) == len(wanted) and all(map(fnmatchcase, parts, wanted))
    ]
    if not found:
        names = ", ".join(_short(dict(host.named_modules()), 12))
        raise HostError(f"No submodule of {type(host).__name__} matches '{pattern}'. There are: {names}.")
    return found


@final
@dataclass(frozen=True, slots=True)
class ProbedPoint:
    """A point that a probe forward has proved, with the features seen there."""

    point: InjectionPoint
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def call_with(host: nn.Module, example: object) -> Any:
    """Call a host with one tensor, a tuple of positional arguments, or a mapping of keyword arguments."""
    if isinstance(example, Mapping):
        return host(**example)
    if isinstance(example, tuple):
        return host(*example)
    return host(example)


def devices_of(module: nn.Module) -> list[torch.device]:
    """Return the devices on which a module has parameters or buffers, sorted by name."""
    return sorted({tensor.device for tensor in [*module.parameters(), *module.buffers()]}, key=str)


@contextmanager
def quiet_evaluation(host: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; training modes and random numbers are then as before."""
    with private_rng(None, *devices_of(host)), torch.no_grad(), kept_modes(host):
        host.eval()
        try:
            yield
        finally:
            reshard(host)


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


def requested_points(
    host: nn.Module, slots: Iterable[str | InjectionPoint] | None
) -> list[str | InjectionPoint]:
    """Turn what a caller asked for into declared points and paths, each once, in the order asked.

    Raises:
        HostError: If nothing was asked of a host that declares nothing, or something does not exist.
        TypeError: If something is neither a name nor a point.
    """
    declared = list(host.injection_points()) if isinstance(host, HostProtocol) else []
    if slots is None:
        if not declared:
            raise HostError(
                f"{type(host).__name__} does not declare injection points, so say where the slots go: "
                "MorphogeneticModel(host, slots=['layer3'], example=inputs). A glob such as 'layers.*' works too."
            )
        return list(declared)
    if isinstance(slots, (str, InjectionPoint)):
        slots = [slots]
    slots = list(slots) if isinstance(slots, Iterable) else [slots]
    if odd := [item for item in slots if not isinstance(item, (str, InjectionPoint))]:
        raise TypeError(
            f"slots must name modules of the host, such as ['layer3'] or ['layers.*'], or be InjectionPoints, not {odd[0]!r:.200}."
        )
    wanted: list[str | InjectionPoint] = []
    for item in slots:
        if isinstance(item, InjectionPoint):
            submodule(host, item.path)
            wanted.append(item)
            continue
        by_name = [point for point in declared if fnmatchcase(point.name, item) or point.path == item]
        try:
            wanted.extend(by_name or matching_paths(host, item))
        except HostError as error:
            if not declared:
                raise
            names = ", ".join(point.name for point in declared)
            raise HostError(f"{error}\nInjection points that it declares: {names}.") from error
    unique = list(dict.fromkeys(wanted))
    if not unique:
        raise HostError("The list of slots is empty: name at least one point.")
    return unique


def probe(
    host: nn.Module, wanted: Sequence[str | InjectionPoint], example: object, *, causal: bool = False
) -> list[ProbedPoint]:
    """Run the host once and prove that every point fires, once, with features of the declared layout and width.

    Args:
        host: The module.
        wanted: Declared points, or paths whose layout and width are then read off the features.
        example: Inputs for one forward, see `call_with`.
        causal: Whether points given as paths belong to a causal host.

    Raises:
        HostError: If a point does not fire, fires more than once, or is not as declared; every fault is listed.
    """
    paths = [item.path if isinstance(item, InjectionPoint) else item for item in wanted]
    seen: dict[str, list[Any]] = {path: [] for path in paths}
    handles = []
    try:
        for path, record in seen.items():
            handles.append(submodule(host, path).register_forward_hook(_noting(record)))
        with kept_buffers(host), quiet_evaluation(host):
            try:
                call_with(host, example)
            except Exception as error:
                raise HostError(
                    f"The probe forward of {type(host).__name__} failed: {error}\n"
                    "Give inputs that the host takes: example=tensor, a tuple of arguments or a mapping of keywords."
                ) from error
    finally:
        for handle in handles:
            handle.remove()
    faults: list[str] = []
    proved: list[ProbedPoint] = []
    for item, path in zip(wanted, paths, strict=True):
        try:
            proved.append(_prove(item, path, seen[path], causal))
        except HostError as error:
            faults.append(f"  '{path}': {error}")
    names = [p.point.name for p in proved]
    for name in sorted({n for n in names if names.count(n) > 1}):
        faults.append(f"  the name '{name}' is used for more than one point")
    if faults:
        raise HostError(f"{type(host).__name__} cannot hold the slots asked for.\n" + "\n".join(faults))
    return proved


def _noting(record: list[Any]) -> Callable[[nn.Module, Any, Any], None]:
    # A closure: of a default argument a compiled host may fill a copy.
    def note(module: nn.Module, args: Any, output: Any) -> None:
        record.append(output)

    return note


def _prove(item: str | InjectionPoint, path: str, outputs: list[Any], causal: bool) -> ProbedPoint:
    if len(outputs) != 1:
        times = (
            "does not fire: the forward pass never calls it" if not outputs else f"fires {len(outputs)} times"
        )
        raise HostError(f"{times}; a point must fire once per forward pass")
    output = features_in(outputs[0])
    if not isinstance(output, Tensor):
        raise HostError(
            f"returns {type(outputs[0]).__name__}, not a tensor or a tuple or dataclass that begins with one; "
            "name a submodule that returns the features"
        )
    if not output.is_floating_point():
        raise HostError(f"returns {output.dtype}, not floating-point features")
    layouts = {topology.ndim: topology for topology in Topology}
    if output.dim() not in layouts:
        raise HostError(
            f"has features of shape {tuple(output.shape)}; they must be (b, c, h, w) or (b, t, d)"
        )
    topology = layouts[output.dim()]
    dim = output.shape[topology.feature_dim]
    if isinstance(item, str):
        point = InjectionPoint(
            path.replace(".", "_"), path, dim, topology, causal and topology is Topology.TRANSFORMER
        )
    else:
        point = item
        if (point.topology, point.dim) != (topology, dim):
            raise HostError(
                "is not as declared\n"
                f"    declared: {point.topology.value}, width {point.dim}\n"
                f"    found:    {topology.value}, width {dim}, features {tuple(output.shape)}"
            )
    return ProbedPoint(point, tuple(output.shape), output.dtype, output.device)


def lookup(name: str, known: Mapping[str, Any], what: str) -> Any:
    """Return ``known[name]``.

    Raises:
        UnknownNameError: If there is none; the message suggests a near name.
    """
    if name in known:
        return known[name]
    raise UnknownNameError(f"There is no {what} '{name}'.{did_you_mean(name, known)}")
