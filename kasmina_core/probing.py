"""Proof by one forward, when slots are attached: each point fires once, with the features that it declares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, final

import torch
from torch import Tensor, nn

from kasmina_core.errors import HostError, UnknownNameError, did_you_mean
from kasmina_core.hosts import HostProtocol, InjectionPoint, demand_open_path, short_list, submodule
from kasmina_core.isolation import straight_through
from kasmina_core.outputs import demand_plain, features_in, keys_in, name_for, passed_unchanged, what_it_holds
from kasmina_core.quiet import kept_buffers, quiet_evaluation
from kasmina_core.topology import Topology


def matching_paths(host: nn.Module, pattern: str) -> list[str]:
    """Return the paths that a pattern names, in module order.

    ``*``, ``?`` and ``[…]`` match within one part of a dotted path: ``"layers.*"`` names the layers, not what is in
    them. An index or key behind a colon is that of each of them: ``"layers.*:1"``.

    Raises:
        HostError: If nothing matches.
    """
    modules, *keys = pattern.split(":", 1)
    if not any(sign in modules for sign in "*?["):
        submodule(host, pattern)
        return [pattern]
    wanted = modules.split(".")
    found = [
        ":".join([path, *keys])
        for path, _ in host.named_modules(remove_duplicate=False)
        if path and len(parts := path.split(".")) == len(wanted) and all(map(fnmatchcase, parts, wanted))
    ]
    if not found:
        names = ", ".join(short_list(dict(host.named_modules()), 12))
        raise HostError(f"No submodule of {type(host).__name__} matches '{pattern}'. There are: {names}.")
    return found


@final
@dataclass(frozen=True, slots=True)
class ProbedPoint:
    """A point that a probe forward has proved, with the features seen there.

    Attributes:
        shape: Shape of the features, in the order of the topology.
        dtype: What a seed there has: the dtype of the features, or under autocast, which casts them, of the parameters.
    """

    point: InjectionPoint
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def example_of(host: nn.Module) -> object:
    """Return the inputs that a host offers for one forward.

    Raises:
        HostError: If it offers none.
    """
    offered = getattr(host, "example_inputs", None)
    if callable(offered):
        return offered()
    raise HostError(
        f"{type(host).__name__} must be run once to prove that its slots work, and offers no example_inputs(): "
        "pass example=tensor, a tuple of arguments or a mapping of keywords."
    )


def call_with(host: nn.Module, example: object) -> Any:
    """Call a host with one tensor, a tuple of positional arguments, or a mapping of keyword arguments."""
    if isinstance(example, Mapping):
        return host(**example)
    if isinstance(example, tuple):
        return host(*example)
    return host(example)


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
    for path in paths:
        demand_open_path(host, path)
    seen: dict[str, list[_Seen]] = {path: [] for path in paths}
    handles = []
    try:
        for path, record in seen.items():
            handles.append(submodule(host, path).register_forward_hook(_noting(record, path)))
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
    taken: dict[tuple[nn.Module, tuple[str, ...]], str] = {}
    for item, path in zip(wanted, paths, strict=True):
        try:
            for one in seen[path][:1]:
                one.demand()
            found = _prove(item, path, [one.output for one in seen[path]], causal)
            other = taken.setdefault((submodule(host, path), keys_in(seen[path][0].output, path)), path)
            if other != path:
                raise HostError(f"names the features of '{other}' once more; name each place once")
            if seen[path][0].is_cast:
                found = replace(found, dtype=parameter_dtype(host, path, found.dtype))
            proved.append(found)
        except HostError as error:
            faults.append(f"  '{path}': {error}")
    names = [p.point.name for p in proved]
    for name in sorted({n for n in names if names.count(n) > 1}):
        faults.append(f"  the name '{name}' is used for more than one point")
    if faults:
        raise HostError(f"{type(host).__name__} cannot hold the slots asked for.\n" + "\n".join(faults))
    return proved


@final
@dataclass(slots=True)
class _Seen:
    """One call of a point's module.

    Attributes:
        output: What it returned.
        is_cast: Whether autocast was on.
        fault: Why a seed's features could not take the place of the host's; empty if they could.
        features: Those of the host, if they are a tensor.
        version: How often they had been written to when the slot took them.
    """

    output: Any
    is_cast: bool = False
    fault: str = ""
    features: Tensor | None = None
    version: int = 0

    def demand(self) -> None:
        """Demand that a slot's output can take the place of the features.

        Raises:
            HostError: If it cannot.
        """
        if self.fault:
            raise HostError(self.fault)
        if self.features is not None and self.features._version != self.version:
            raise HostError(
                "its features are changed in place after the slot took them, through another reference to them: with a "
                "seed the change would not arrive.\n"
                "    Write x = x + y instead of x += y there, or name the submodule after it."
            )


def _noting(record: list[_Seen], path: str) -> Callable[[nn.Module, Any, Any], Any]:
    # A closure: of a default argument a compiled host may fill a copy.
    def note(module: nn.Module, args: Any, output: Any) -> Any:
        passed, seen = output, _Seen(output)
        record.append(seen)
        try:
            demand_plain(output, path)
            features = features_in(output, path)
            if isinstance(features, Tensor) and features.is_floating_point():
                device = features.device.type
                seen.is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
                # By the code that a seed's features take: what cannot be put back is found here, and not in training.
                passed = passed_unchanged(output, path, _in_training)
                if not features.is_inference():
                    seen.features, seen.version = features, features._version
        except HostError as error:
            seen.fault = str(error)
        return passed

    return note


def _in_training(features: Tensor) -> Tensor:
    return straight_through(features, features.clone())


def _prove(item: str | InjectionPoint, path: str, outputs: list[Any], causal: bool) -> ProbedPoint:
    if len(outputs) != 1:
        if not outputs:
            raise HostError(
                "does not fire: the forward pass never calls it, or only its forward() or its weights. A point must fire "
                "once per forward pass"
            )
        raise HostError(
            f"fires {len(outputs)} times; a point must fire once per forward pass. If layers share it, give each its own, "
            "or name a module around it that is called once"
        )
    output = features_in(outputs[0], path)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = outputs[0].dtype if isinstance(outputs[0], Tensor) else type(outputs[0]).__name__
        raise HostError(f"returns {kind}, not floating-point features; {what_it_holds(outputs[0], path)}")
    if isinstance(item, str):
        topology = next((t for t in Topology if t.ndim == output.dim()), None)
        if topology is None:
            known = ", ".join(f"{t.value} {t}" for t in Topology)
            raise HostError(f"has features of shape {tuple(output.shape)}; they must be one of: {known}")
        dim = output.shape[topology.feature_dim]
        point = InjectionPoint(name_for(path), path, dim, topology, causal and topology.can_be_causal)
    else:
        point = item
        fits = output.dim() == point.topology.ndim
        if not fits or output.shape[point.axes.index(point.topology.width)] != point.dim:
            held = f"({', '.join(point.axes)})"
            raise HostError(
                "is not as declared\n"
                f"    declared: {point.topology.value} {held}, width {point.dim}\n"
                f"    found:    features {tuple(output.shape)}"
            )
    shape = tuple(output.shape[axis] for axis in point.topology.order(point.axes))
    return ProbedPoint(point, shape, output.dtype, output.device)


def parameter_dtype(host: nn.Module, path: str, otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype of the floating-point parameters nearest to ``path``."""
    for module in (submodule(host, path), host):
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return otherwise


def lookup(name: str, known: Mapping[str, Any], what: str) -> Any:
    """Return ``known[name]``.

    Raises:
        UnknownNameError: If there is none; the message suggests a near name.
    """
    if name in known:
        return known[name]
    raise UnknownNameError(f"There is no {what} '{name}'.{did_you_mean(name, known)}")
