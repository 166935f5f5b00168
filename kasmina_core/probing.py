"""Proof by forwards, when slots are attached: each point fires once, with features of the layout that it declares."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from kasmina_core.errors import HostError, UnknownNameError, did_you_mean
from kasmina_core.hosts import HostProtocol, InjectionPoint, demand_open_path, submodule
from kasmina_core.isolation import straight_through
from kasmina_core.layouts import (
    Evidence,
    Seen,
    batch_inputs,
    compare,
    cuts,
    demand_statement,
    main_input,
    mapped,
    read,
    smaller,
    tensors_in,
    tolerance_of,
    width_said_by,
)
from kasmina_core.outputs import (
    demand_plain,
    features_in,
    keys_in,
    name_for,
    passed_through,
    passed_unchanged,
    split_path,
    what_it_holds,
)
from kasmina_core.positions import ContextReader, HostCalls
from kasmina_core.quiet import (
    devices_of,
    kept_attributes,
    kept_buffers,
    kept_modes,
    private_rng,
    quiet_evaluation,
)
from kasmina_core.topology import Topology

_NAMED: Final = 12
"""Submodules that an error message names."""


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
        paths = [path for path, _ in host.named_modules() if path]
        more = f" and {len(paths) - _NAMED:,} more (host.named_modules())" if len(paths) > _NAMED else ""
        raise HostError(
            f"No submodule of {type(host).__name__} matches '{pattern}'. There are: {', '.join(paths[:_NAMED])}{more}."
        )
    return found


@final
@dataclass(frozen=True, slots=True)
class ProbedPoint:
    """A point that a probe forward has proved, with the features seen there.

    Attributes:
        shape: Shape of the features, in the order of the topology.
        dtype: What a seed there has: the dtype of the features, or under autocast, which casts them, of the parameters.
        is_proved: Whether the layout was proved or stated. If not, the features may as well be held in another one:
            entries of two axes keep to themselves, and a seed that mixes positions would be wrong in one reading.
    """

    point: InjectionPoint
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_proved: bool = True


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
    """Run the host and prove that every point fires, once, with features of the declared layout and width.

    The host runs on the example, and a few times on others made of it: with other samples, in another order and
    number, and with other sizes. The batch is the axis whose entries do not depend on each other; the width is the
    axis that keeps its size. What the runs leave open, modules say, or the point itself. The host is left as it was.

    Args:
        host: The module.
        wanted: Declared points, or paths whose layout and width are then read off the features.
        example: Inputs for one forward, see `call_with`.
        causal: Whether points given as paths belong to a causal host.

    Raises:
        HostError: If a point does not fire, fires more than once, is not as declared, or its layout is not proved, as
            by an example without samples or with NaN; every fault is listed.
    """
    paths = [item.path if isinstance(item, InjectionPoint) else item for item in wanted]
    for path in paths:
        demand_open_path(host, path)
    seen: dict[str, list[_Call]] = {path: [] for path in paths}
    handles = []
    said: list[tuple[nn.Module, tuple[int, ...], int]] = []
    try:
        for module in host.modules():
            handles.append(module.register_forward_hook(_listening(said)))
        for path, record in seen.items():
            handles.append(submodule(host, path).register_forward_hook(_noting(record, path, said)))
        with kept_attributes(host), kept_buffers(host), quiet_evaluation(host):
            try:
                output = call_with(host, example)
            except Exception as error:
                raise HostError(
                    f"The probe forward of {type(host).__name__} failed: {error}\n"
                    "Give inputs that the host takes: example=tensor, a tuple of arguments or a mapping of keywords."
                ) from error
    finally:
        for handle in handles:
            handle.remove()
    once = {path: record for path, record in seen.items() if len(record) == 1}
    no_proof = {path: why for path, (one,) in once.items() if (why := _why_no_proof(one.values, example))}
    known = _Runs(host, example, {path: once[path] for path in once if path not in no_proof}, output)
    faults: list[str] = []
    proved: list[ProbedPoint] = []
    taken: dict[tuple[nn.Module, tuple[str, ...]], str] = {}
    for item, path in zip(wanted, paths, strict=True):
        try:
            for one in seen[path][:1]:
                one.demand()
            features = _the_features(path, [one.output for one in seen[path]])
            if path in no_proof:
                raise HostError(f"nothing can be proved by this example: {no_proof[path]}")
            found = _prove(item, path, features, causal, known)
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
class _Call:
    """One call of a point's module.

    Attributes:
        output: What it returned.
        is_cast: Whether autocast was on.
        fault: Why a seed's features could not take the place of the host's; empty if they could.
        features: Those of the host, if they are a tensor.
        version: How often they had been written to when the slot took them.
        values: A copy of them.
        said: Axes of the width that modules say, see `Evidence`.
        batches: Axes of the batch that modules say.
    """

    output: Any
    is_cast: bool = False
    fault: str = ""
    features: Tensor | None = None
    version: int = 0
    values: Tensor | None = None
    said: list[int] = field(default_factory=list)
    batches: set[int] = field(default_factory=set)

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


def _listening(said: list[tuple[nn.Module, tuple[int, ...], int]]) -> Callable[[nn.Module, Any, Any], None]:
    def listen(module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if (
            isinstance(output, Tensor)
            and not output.is_nested
            and (axis := width_said_by(module, output)) is not None
        ):
            said.append((module, tuple(output.shape), axis))

    return listen


def _noting(
    record: list[_Call], path: str, said: Sequence[tuple[nn.Module, tuple[int, ...], int]]
) -> Callable[[nn.Module, Any, Any], Any]:
    # A closure: of a default argument a compiled host may fill a copy.
    def note(module: nn.Module, args: Any, output: Any) -> Any:
        passed, seen = output, _Call(output)
        record.append(seen)
        try:
            demand_plain(output, path)
            features = features_in(output, path)
            if isinstance(features, Tensor) and features.is_floating_point():
                device = features.device.type
                seen.is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
                # By the code that a seed's features take: what cannot be put back is found here, and not in training.
                passed = passed_unchanged(output, path, _in_training)
                if not torch._C._functorch.is_functorch_wrapped_tensor(
                    features
                ):  # one of vmap ends with its call
                    seen.values = features.detach().clone()
                alike = [(by, axis) for by, shape, axis in said if shape == tuple(features.shape)]
                inside = set(module.modules())
                seen.said = [axis for by, axis in alike if by in inside] or [axis for _, axis in alike]
                seen.batches = {int(not by.batch_first) for by, _ in alike if by in inside and _orders(by)}
                if not features.is_inference():
                    seen.features, seen.version = features, features._version
        except HostError as error:
            seen.fault = str(error)
        return passed

    return note


def _orders(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase | nn.MultiheadAttention)


def _in_training(features: Tensor) -> Tensor:
    return straight_through(features, features.clone())


@final
class _Runs:
    """Runs of a host on other examples, and what they show of the points' features.

    Args:
        host: The module.
        example: Inputs for one forward.
        calls: The one call of each point's module in the run on the example.
        output: What the host returned in it.
    """

    def __init__(
        self, host: nn.Module, example: object, calls: Mapping[str, list[_Call]], output: object
    ) -> None:
        self.host, self.example = host, example
        self.calls = {path: one for path, (one,) in calls.items() if one.values is not None}
        self.before = {path: one.values for path, one in self.calls.items() if one.values is not None}
        self.before |= _numbered(output)
        self.tolerance = {name: self._tolerance(name) for name in self.before}
        self.cuts: dict[str, dict[int, Seen]] = {name: {} for name in self.before}
        self.resized: dict[str, frozenset[int]] = dict.fromkeys(self.before, frozenset())
        self.said = {path: tuple(one.said) for path, (one,) in calls.items()}
        self.batches = {
            path: next(iter(one.batches)) for path, (one,) in calls.items() if len(one.batches) == 1
        }
        self.usable: frozenset[int] = frozenset((0, 1))
        main = main_input(example)
        self.size = main.shape[0] if main is not None else 0
        if not self.calls:
            return
        for axis in (0, 1):
            self._cut(axis)
        self._forget_random_values()
        self.usable = batch_inputs(list(self.cuts.values()))
        if any(self._is_open(path) for path in self.calls) and (small := smaller(example)) is not None:
            for name, after in self._run(small).items():
                self._note_sizes(name, after)

    def evidence(self, path: str, shape: tuple[int, ...]) -> Evidence:
        """Return what is known of the features of that shape at a path."""
        cuts, resized = self.cuts.get(path, {}), self.resized.get(path, frozenset())
        return Evidence(shape, cuts, resized, self.said.get(path, ()), self.size, self.batches.get(path))

    def _is_open(self, path: str) -> bool:
        evidence = self.evidence(path, tuple(self.before[path].shape))
        batch = next(iter(evidence.batches(self.usable)), 0)
        widths = evidence.widths(batch)
        # Of axes that are as long as each other, a module inside may have named one in another order.
        rest = [size for axis, size in enumerate(evidence.shape) if axis != batch]
        return len(widths) != 1 or rest.count(evidence.shape[widths[0]]) > 1

    def _cut(self, axis: int) -> None:
        for cut in cuts(self.example, axis):
            for name, after in self._run(cut.example).items():
                if axis not in self.cuts[name]:
                    self.cuts[name][axis] = compare(self.before[name], after, cut, self.tolerance[name])
                    self._note_sizes(name, after)
            if all(axis in self.cuts[path] for path in self.calls):
                return

    def _note_sizes(self, name: str, after: Tensor) -> None:
        old, new = self.before[name].shape, after.shape
        if len(old) == len(new):
            self.resized[name] |= {k for k in range(len(old)) if old[k] != new[k]}

    def _forget_random_values(self) -> None:
        """Run the example again where values differ, with other random numbers: what differs then says nothing."""
        differs = any(False in seen.apart.values() for each in self.cuts.values() for seen in each.values())
        if not differs:
            return
        for name, after in self._run(self.example, seed=1).items():
            before = self.before[name]
            if after.shape != before.shape:  # sizes that are drawn follow no cut
                self.cuts[name] = {}
                continue
            apart = (
                (after - before).float().nan_to_num().square().mean().sqrt() if not before.is_meta else 0.0
            )
            size = before.float().nan_to_num().square().mean().sqrt() if not before.is_meta else 0.0
            if apart > self.tolerance[name] * size:
                for axis, seen in self.cuts[name].items():
                    self.cuts[name][axis] = replace(seen, apart=dict.fromkeys(seen.apart), moves=False)

    def _run(self, example: object, seed: int | None = None) -> dict[str, Tensor]:
        """Return the features of points and the outputs that a run gives, as far as it gets."""
        found: dict[str, Tensor] = {}
        host = self.host
        with ExitStack() as stack:
            for path in self.calls:
                handle = submodule(host, path).register_forward_hook(_keeping(found, path))
                stack.callback(handle.remove)
            stack.enter_context(kept_attributes(host))
            stack.enter_context(kept_buffers(host))
            stack.enter_context(quiet_evaluation(host))
            stack.enter_context(private_rng(seed, *devices_of(host)))
            stack.enter_context(_uncompiled())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            # The host may not take such a size; what came before its refusal counts.
            stack.enter_context(suppress(Exception))
            found |= _numbered(call_with(host, example))
        return {name: tensor for name, tensor in found.items() if name in self.before}

    def _tolerance(self, name: str) -> float:
        features, dtypes = self.before[name], []
        if (call := self.calls.get(name)) is not None:
            dtypes.append(parameter_dtype(self.host, name, features.dtype))
            if call.is_cast:
                dtypes.append(torch.get_autocast_dtype(features.device.type))
        else:
            dtypes += [p.dtype for p in self.host.parameters()]
        return tolerance_of(features, *dict.fromkeys(dtypes))


def _keeping(found: dict[str, Tensor], path: str) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        try:
            features = features_in(output, path)
        except HostError:
            return
        if isinstance(features, Tensor):
            found[path] = features.detach().clone()

    return keep


def _numbered(output: object) -> dict[str, Tensor]:
    """Return the floating-point tensors of an output by names that no path has."""
    tensors = (t for t in tensors_in(output) if t.is_floating_point() and t.dim())
    return {f"output of the host/{number}": tensor.detach() for number, tensor in enumerate(tensors)}


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled functions as they were written: other sizes would make other graphs."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _why_no_proof(features: Tensor | None, example: object) -> str:
    """Return why features show nothing of their axes: they are empty, or not finite as the example; else nothing."""
    if features is None:
        return ""
    if not features.numel():
        return f"the features are empty, {tuple(features.shape)}. Give one with samples, two at least"
    if features.is_meta or _all_finite(features):
        return ""
    main = main_input(example)
    for tensor in tensors_in(example):
        if tensor.is_floating_point() and not tensor.is_meta:
            # A mask holds minus infinity.
            read = tensor if tensor is main else tensor.masked_fill(tensor == -math.inf, 0.0)
            if not _all_finite(read):
                return "it holds NaN or infinity, and so do the features. Give finite inputs, such as a batch of the data"
    return ""


def _all_finite(tensor: Tensor) -> bool:
    return bool((tensor.float() if tensor.element_size() < 4 else tensor).isfinite().all())


def _the_features(path: str, outputs: list[Any]) -> Tensor:
    """Return the features of a point that fired once.

    Raises:
        HostError: If it did not, or there are none.
    """
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
    output, keys = features_in(outputs[0], path), keys_in(outputs[0], path)
    is_float = isinstance(output, Tensor) and output.is_floating_point()
    if not is_float or (keys and output.dim() < 2):
        kind = str(output.dtype) if isinstance(output, Tensor) else type(output).__name__
        where = f" at ':{':'.join(keys)}' of its {type(outputs[0]).__name__}" if keys else ""
        lacks = (
            f"whose shape {tuple(output.shape)} has no batch and width"
            if is_float
            else "not floating-point features"
        )
        raise HostError(f"returns {kind}{where}, {lacks}; {what_it_holds(outputs[0], path)}")
    return output  # type: ignore[no-any-return]  # a tensor, see above


def _prove(
    item: str | InjectionPoint, path: str, features: Tensor, causal: bool, known: _Runs
) -> ProbedPoint:
    size, is_proved = tuple(features.shape), True

    def line(topology: Topology, layout: str, width: int) -> str:
        name = name_for(path) if isinstance(item, str) else item.name
        more = f', layout="{layout}"' if layout != topology.layout else ""
        return f'InjectionPoint("{name}", "{path}", {size[width]}, Topology("{topology.value}"){more})'

    evidence = known.evidence(path, size)
    if isinstance(item, str):
        reading = read(evidence, known.usable, line)
        topology, is_proved = reading.topology, reading.is_proved
        layout = reading.layout if reading.layout != topology.layout else None
        dim = size[reading.layout.index(topology.width)]
        is_causal = causal and topology.can_be_causal
        point = InjectionPoint(name_for(path), path, dim, topology, is_causal, layout)
    else:
        point = item
        fits = features.dim() == point.topology.ndim
        if not fits or size[point.axes.index(point.topology.width)] != point.dim:
            held = f"({', '.join(point.axes)})"
            raise HostError(
                "is not as declared\n"
                f"    declared: {point.topology.value} {held}, width {point.dim}\n"
                f"    found:    features {size}"
            )
        demand_statement(evidence, point.topology, point.axes, known.usable, line)
    shape = tuple(size[axis] for axis in point.topology.order(point.axes))
    return ProbedPoint(point, shape, features.dtype, features.device, is_proved)


def unread(
    host: nn.Module, reader: ContextReader, proved: Sequence[ProbedPoint], example: object
) -> dict[str, str]:
    """Return what a reader cannot say of positions when the host is called with the example, by name of the point.

    Args:
        host: The module.
        reader: Reads its calls.
        proved: Its points.
        example: Inputs for one forward.
    """
    points = [found.point for found in proved if found.point.topology.sequence_axis is not None]
    if not points or any(tensor.is_meta for tensor in tensors_in(example)):
        return {}
    calls = HostCalls(reader)
    faults: dict[str, str] = {}

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        try:
            calls.begin(module, args, kwargs)
        except HostError as error:
            faults.update((point.name, str(error)) for point in points)
        except Exception as error:  # a reader of the user's own
            faults.update((point.name, f"the reader {reader!r} raised {error!r}") for point in points)

    def look(point: InjectionPoint, output: Any) -> None:
        if point.name in faults or torch._C._functorch.maybe_current_level() is not None:
            return
        try:
            features = features_in(output, point.path)
            calls.context_at(point, features.permute(point.topology.order(point.axes)))
        except HostError as error:
            faults[point.name] = str(error)

    read = submodule(host, getattr(reader, "module", ""))
    with ExitStack() as stack:
        stack.callback(read.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(read.register_forward_hook(lambda *_: calls.end(), always_call=True).remove)
        for point in points:
            module = submodule(host, point.path)
            hook = module.register_forward_hook(lambda _m, _a, out, point=point: look(point, out))
            stack.callback(hook.remove)
        for block in (kept_attributes(host), kept_buffers(host), quiet_evaluation(host)):
            stack.enter_context(block)
        call_with(host, example)
    return faults


def without_gradient(host: nn.Module, proved: Sequence[ProbedPoint], example: object) -> frozenset[str]:
    """Return the names of points at which a seed would get no gradient from what the host returns.

    The output does not depend on the features there, or they are computed where gradients are off, in evaluation and in
    training mode. Nothing is said of a host whose output holds no floating-point tensors, or that computes by functions
    with a backward of their own, such as reentrant checkpoints.

    Args:
        host: The module.
        proved: Its points.
        example: Inputs for one forward.
    """
    lost = frozenset(found.point.name for found in proved)
    for training in (False, True):
        if lost:
            lost -= _with_gradient(host, [found.point for found in proved], example, training)
    return lost


def _with_gradient(
    host: nn.Module, points: Sequence[InjectionPoint], example: object, training: bool
) -> frozenset[str]:
    """Return the names of points from which a gradient would go to a seed; all of them if nothing tells."""
    everything = frozenset(point.name for point in points)
    if torch.is_inference_mode_enabled():
        return everything
    leaves: dict[Tensor, str] = {}

    def mark(point: InjectionPoint, output: Any) -> Any:
        def marked(features: Tensor) -> Tensor:
            leaf = torch.zeros((), dtype=features.dtype, device=features.device, requires_grad=True)
            leaves[leaf] = point.name
            return features + leaf

        return passed_through(marked, output, split_path(point.path)[1])

    try:
        with ExitStack() as stack:
            for point in points:
                module = submodule(host, point.path)
                hook = module.register_forward_hook(lambda _m, _a, out, point=point: mark(point, out))
                stack.callback(hook.remove)
            for block in (kept_attributes(host), kept_buffers(host), kept_modes(host), _uncompiled()):
                stack.enter_context(block)
            stack.enter_context(private_rng(None, *devices_of(host)))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            host.train(training)
            # A reentrant checkpoint of inputs without a gradient would look like no_grad.
            given = mapped(example, lambda t: t.detach().requires_grad_() + 0 if t.is_floating_point() else t)
            outputs = [t for t in tensors_in(call_with(host, given)) if t.is_floating_point()]
    except Exception:  # it does not run so, which says nothing
        return everything
    if not outputs:
        return everything
    reached: set[str] = set()
    waiting, seen = [t.grad_fn for t in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return everything
        leaf = getattr(node, "variable", None)
        reached.update(name for own, name in leaves.items() if own is leaf)
        waiting += [following for following, _ in node.next_functions]
    return frozenset(reached)


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
