"""Points of a transformers model: its lists of layers, as one forward shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Final, cast, final

import torch
from kasmina_core import HostError, InjectionPoint, Topology
from torch import Tensor, nn
from transformers import PreTrainedModel

from kasmina_hf.inputs import call, example_inputs, quiet

_Layers = nn.ModuleList | nn.Sequential
_TOPOLOGIES: Final = {
    "bchw": Topology.CNN,
    "bct": Topology.SIGNAL,
    "bhwc": Topology.CNN,
    "btd": Topology.TRANSFORMER,
    "tbd": Topology.TRANSFORMER,
}


@final
@dataclass(frozen=True)
class Tower:
    """A list of layers whose features a forward has shown.

    Attributes:
        path: Path of the list in the model.
        kind: What its members are called: layers, or stages where features are images or change their shape.
        shapes: Shape of the features after each layer that runs, as the model holds them.
        layout: The order of their axes, such as ``"btd"``.
        causal: Whether a position may not see those after it.
        part: Path of what returns the features in a layer; empty for the layer.
        item: Where the features are if a list or a dictionary is returned, such as ``":0"``.
    """

    path: str
    kind: str
    shapes: dict[int, tuple[int, ...]]
    layout: str
    causal: bool
    part: str = ""
    item: str = ""

    def points(self, prefix: str, every: int) -> list[InjectionPoint]:
        """Return points after every so many members, with names that begin with ``prefix``."""
        topology = _TOPOLOGIES[self.layout]
        width = self.layout.index(topology.width)
        return [
            InjectionPoint(
                f"{prefix}{self.kind}{i + 1}",
                f"{self.path}.{i}{self.part and '.'}{self.part}{self.item}",
                shape[width],
                topology,
                self.causal,
                None if self.layout == topology.layout else self.layout,
            )
            for i, shape in self.shapes.items()
            if (i + 1) % every == 0
        ]


def points(model: PreTrainedModel, every: int = 1, example: Any = None) -> list[InjectionPoint]:
    """Return the places in a model where a slot can be: after the layers, or stages, of each of its towers.

    A tower is a list of modules that run once each, one after the other, and return features of one layout: the
    decoder of a language model, the encoder of a sequence-to-sequence model, the text and the vision part of a CLIP.
    Points of a model with one such list are named ``layer1``, ``layer2``, … or ``stage1``, …; where a model has more,
    the first parts of their paths that differ come before: ``encoder_layer1``, ``decoder_layer1``.

    Layouts and widths are read off the modules and off a forward of ``example``; a tower that does not run there has
    no points. A tower is causal if other features at its last position leave those before it as they were.

    Args:
        model: The model, with or without a head.
        every: Distance between points of a tower: 2 gives every second layer, ``layer2``, ``layer4``, …
        example: Inputs for one forward, a mapping of keywords, a tuple or a tensor; default `example_inputs`.

    Raises:
        HostError: If no tower is found; the message says how to name places by hand.
        ValueError: If ``every`` is not from 1 to the number of layers.

    >>> from transformers import LlamaConfig, LlamaModel
    >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=2,
    ...                      num_attention_heads=1)
    >>> [(point.name, point.path, point.dim, point.causal) for point in points(LlamaModel(config))]
    [('layer1', 'layers.0', 4, True), ('layer2', 'layers.1', 4, True)]
    """
    return _points_of(model, towers(model, example), every)


def _points_of(model: PreTrainedModel, found: list[Tower], every: int) -> list[InjectionPoint]:
    most = max(max(tower.shapes) + 1 for tower in found)
    if not 1 <= every <= most:
        raise ValueError(f"every must be from 1 to {most}, the number of {found[0].kind}s, not {every!r}.")
    paths = [path for path, _ in _layer_lists(model)]
    prefixes = _prefixes(list(dict.fromkeys([*paths, *(tower.path for tower in found)])))
    return [point for tower in found for point in tower.points(prefixes[tower.path], every)]


def towers(model: PreTrainedModel, example: Any = None) -> list[Tower]:
    """Return the towers of a model that run in a forward of ``example``, in the order of its modules.

    Raises:
        HostError: If there is none.
    """
    inputs = example_inputs(model) if example is None else example
    lists = [_Members(path, "", _members(layers)) for path, layers in _layer_lists(model)]
    found, reasons = _towers_of(model, inputs, lists)
    if not found:
        found, _ = _towers_of(model, inputs, [*_inner_lists(model), *_parts(lists)])
    if not found:
        raise _unsupported(model, reasons)
    return found


def _towers_of(model: PreTrainedModel, inputs: Any, lists: list[_Members]) -> tuple[list[Tower], list[str]]:
    """Return the towers among lists of modules, and why others are none; of the parts of layers the first that are."""
    record = _Record(lists)
    with quiet(model), record:
        call(model, inputs)
    found: list[Tower] = []
    reasons = []
    for own in lists:
        if own.part and any(tower.path == own.path for tower in found):
            continue
        try:
            members = record.members(own)
            layout = _layout(own.modules, members, inputs)
            ends = own.modules[members[0][0]], own.modules[members[-1][0]]
            if layout == "btd" and _repeats(model, inputs, ends, members[-1][2].shape):
                raise _NotATowerError("its positions are those of the tokens several times over")
        except _NotATowerError as reason:
            reasons.append(f"  {own.path}.*  ({len(own.modules)}): {reason}")
            continue
        causal = "t" in layout and (
            any(
                getattr(m, "is_causal", None) is True
                for layer in own.modules.values()
                for m in layer.modules()
            )
            or not _looks_ahead(model, inputs, ends, layout.index("t"))
        )
        keeps = all(x.shape == y.shape for _, x, y in members) and len(layout) == 3
        shapes = {i: tuple(y.shape) for i, _, y in members}
        found.append(
            Tower(
                own.path,
                "layer" if keeps else "stage",
                shapes,
                layout,
                causal,
                own.part,
                record.items.get(own, ""),
            )
        )
    return found, reasons


def places(
    model: PreTrainedModel, slots: Iterable[str | InjectionPoint], example: Any = None
) -> list[str | InjectionPoint]:
    """Return what a caller asked for, with names of `points` replaced by these, and causal places declared as such.

    A path or glob names modules. What lies in a tower, or is one, is causal if that tower is; what does not, if any
    tower is.

    Args:
        model: The model.
        slots: Names of points, paths, globs, or declarations, which stay as they are.
        example: As for `points`.
    """
    inputs = example_inputs(model) if example is None else example
    wanted = list(slots)
    try:
        found = towers(model, inputs)
        derived = {point.name: point for point in _points_of(model, found, 1)}
    except HostError:
        found, derived = [], {}
    placed: list[str | InjectionPoint] = []
    for item in wanted:
        if not isinstance(item, str) or item in derived:
            placed.append(derived[item] if isinstance(item, str) else item)
            continue
        parts = item.split(".")
        for path in [
            path
            for path, _ in model.named_modules(remove_duplicate=False)
            if path.count(".") + 1 == len(parts) and all(map(fnmatchcase, path.split("."), parts))
        ] or [item]:
            nearest = [
                t for t in found if f"{path}.".startswith(f"{t.path}.") or f"{t.path}.".startswith(f"{path}.")
            ]
            causal = any(tower.causal for tower in nearest or found)
            placed.append(_causal_point(model, path, inputs) if causal or not found else path)
    return placed


def _causal_point(model: PreTrainedModel, path: str, inputs: Any) -> str | InjectionPoint:
    """Return a causal point at a path; the path itself if no single ``(b, t, d)`` comes out there."""
    seen: list[Tensor | None] = []
    try:
        handle = model.get_submodule(path).register_forward_hook(
            lambda _m, _a, output: seen.append(_features([output]))
        )
    except AttributeError:
        return path
    try:
        with quiet(model):
            call(model, inputs)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0] is None or seen[0].dim() != 3:
        return path
    return InjectionPoint(path.replace(".", "_"), path, seen[0].shape[-1], Topology.TRANSFORMER, causal=True)


class _NotATowerError(Exception):
    """Says why a list of modules is no tower."""


@dataclass(frozen=True, eq=False)
class _Members:
    """Modules that may make up a tower: items of a list, or the same part of each.

    Attributes:
        path: Path of the list.
        part: Path of the modules in the items; empty for the items.
        modules: By number of the item.
    """

    path: str
    part: str
    modules: dict[int, nn.Module]


class _Record:
    """Notes the features that come into and out of the members of lists of modules."""

    def __init__(self, lists: list[_Members]) -> None:
        self.runs: dict[_Members, list[tuple[int, Tensor | None, Tensor | None]]] = {own: [] for own in lists}
        self.items: dict[_Members, str] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for own in self.runs:
            for i, module in own.modules.items():
                self._handles.append(module.register_forward_hook(self._note(own, i), with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, own: _Members, i: int) -> Callable[..., None]:
        def note(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.items[own] = _item(output)
            self.runs[own].append((i, _features([*args, *kwargs.values()]), _features([output])))

        return note

    def members(self, own: _Members) -> list[tuple[int, Tensor, Tensor]]:
        """Return number, features before and features after of each member that runs."""
        run = self.runs[own]
        numbers = [i for i, *_ in run]
        if not run:
            raise _NotATowerError("does not run with these inputs")
        if numbers != sorted(set(numbers)):
            raise _NotATowerError("its members do not run once each, in order")
        members = [(i, x, y) for i, x, y in run if x is not None and y is not None]
        if len(members) < len(run) or len({y.dim() for _, _, y in members}) != 1:
            raise _NotATowerError("its members do not all return features of as many axes")
        return members


def _item(output: Any) -> str:
    """Return where `_features` are in an output, such as ``":0"``; empty where the core looks by itself."""
    inner = output
    keys = []
    while isinstance(inner, (tuple, list, Mapping)) and inner:
        keys.append(next(iter(inner)) if isinstance(inner, Mapping) else 0)
        inner = inner[keys[-1]]
    plain = len(keys) == 1 and type(output) not in (list, dict)
    return "" if plain or not keys else "".join(f":{key}" for key in keys)


def _features(values: list[Any]) -> Tensor | None:
    """Return the first floating-point tensor, looking into tuples and model outputs."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.dim() > 1:
                return value
        elif isinstance(value, (tuple, list)) and value:
            return _features([value[0]])
        elif isinstance(value, Mapping) and value:
            return _features([next(iter(value.values()))])
    return None


def _layout(layers: dict[int, nn.Module], members: list[tuple[int, Tensor, Tensor]], inputs: Any) -> str:
    """Return the one layout that all members agree with."""
    tensors = _tensors_in(inputs)
    batch = tensors[0].shape[0]
    images = [tensor.shape[-2:] for tensor in tensors if tensor.dim() > 3]
    is_stream = all(x.shape == y.shape for _, x, y in members)
    is_chain = all(y.shape == x.shape for (_, _, y), (_, x, _) in pairwise(members))
    if not (is_stream or is_chain):
        raise _NotATowerError("what leaves its members is not what enters the next")
    possible: set[str] | None = None
    for i, _, y in members:
        shape, (last, channels) = tuple(y.shape), _widths(layers[i])
        fits = set()
        if len(shape) == 3:
            if shape[0] == batch and shape[2] in last:
                fits.add("btd")
            if shape[1] == batch != shape[0] and shape[2] in last and is_stream:
                fits.add("tbd")
            if shape[0] == batch and shape[1] in channels:
                fits.add("bct")
        elif len(shape) == 4 and shape[0] == batch and images:
            if shape[1] in channels or (shape[1] in last and shape[3] not in last):
                fits.add("bchw")
            if shape[3] in last and any(shape[1] * w == shape[2] * h for h, w in images):
                fits.add("bhwc")
        possible = fits if possible is None else possible & fits
    shape = tuple(members[0][2].shape)
    if not possible:
        raise _NotATowerError(f"which axes of its features {shape} are batch and width does not show")
    if len(possible) > 1:
        raise _NotATowerError(f"its features {shape} may be laid out as {' or '.join(sorted(possible))}")
    return possible.pop()


def _tensors_in(inputs: Any) -> list[Tensor]:
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    given = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
    return [tensor for tensor in given if isinstance(tensor, Tensor)]


def _widths(layer: nn.Module) -> tuple[set[int], set[int]]:
    """Return the sizes that modules in a layer give to the last axis, and to the axis of channels."""
    last: set[int] = set()
    channels: set[int] = set()
    for module in layer.modules():
        named = [
            getattr(module, name, None)
            for name in ("in_channels", "out_channels", "num_features", "num_channels")
        ]
        sizes = {size for size in named if isinstance(size, int)}
        if sizes:  # convolutions and their norms
            channels |= sizes
        elif isinstance(weight := getattr(module, "weight", None), Tensor):  # Linear, other norms, Conv1D
            last.update(weight.shape[-2:])
    return last, channels


def _looks_ahead(model: PreTrainedModel, inputs: Any, ends: tuple[nn.Module, nn.Module], axis: int) -> bool:
    """Return whether features at the end of a tower's input are seen to change its output before."""
    try:
        enters, before = _through(model, inputs, ends, axis, None)
        t, left = enters.shape[axis], before.shape[axis]
        _, after = _through(model, inputs, ends, axis, t - 1)
    except (
        Exception
    ):  # a model may not run with other features: nothing is seen, and a causal seed is right anyway
        return False
    earlier = (t - 1) * left // t
    return _differ(before.narrow(axis, 0, earlier), after.narrow(axis, 0, earlier))


def _through(
    model: PreTrainedModel, inputs: Any, ends: tuple[nn.Module, nn.Module], axis: int, changed: int | None
) -> tuple[Tensor, Tensor]:
    """Return the features before and after a tower, if those that enter it are others at position ``changed``."""
    enters: list[Tensor] = []
    leaves: list[Tensor] = []

    def change(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        features = _features([*args, *kwargs.values()])
        assert features is not None  # it was there when the tower was recorded
        other = features.clone()
        if changed is not None:
            place = other.select(axis, changed)
            place.copy_(1.0 - 2.0 * place)
        enters.append(other)
        return tuple(other if x is features else x for x in args), {
            name: other if x is features else x for name, x in kwargs.items()
        }

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        if (features := _features([output])) is not None:
            leaves.append(features)

    handles = [
        ends[0].register_forward_pre_hook(change, with_kwargs=True),
        ends[1].register_forward_hook(note),
    ]
    try:
        with quiet(model):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return enters[0], leaves[0]


def _differ(a: Tensor, b: Tensor) -> bool:
    if not a.numel():
        return False
    noise = 8 * torch.finfo(a.dtype).eps * float(a.abs().max())  # experts add up in another order
    return not bool((a - b).abs().max() <= noise)


def _repeats(
    model: PreTrainedModel, inputs: Any, ends: tuple[nn.Module, nn.Module], shape: torch.Size
) -> bool:
    """Return whether positions of a tower of ``(b, t, d)`` are those of the tokens several times over."""
    t = shape[1]
    for ids in _tensors_in(inputs):
        n = ids.shape[1] if ids.dim() == 2 and not ids.is_floating_point() else t
        if t > n and t % n == 0:
            _, before = _through(model, inputs, ends, 1, None)
            last = ids[:, -1].clone()
            ids[:, -1] = ids[:, 0]
            try:
                _, after = _through(model, inputs, ends, 1, None)
            finally:
                ids[:, -1] = last
            changed = [_differ(before[:, i], after[:, i]) for i in range(t)]
            if any(changed) and changed.index(True) == n - 1 and not all(changed[n - 1 :]):
                return True
    return False


def _layer_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, _Layers]]:
    """Yield the outermost lists of modules that can run and are not plain modules of torch."""
    for name, child in module.named_children():
        path = prefix + name
        if (
            isinstance(child, (nn.ModuleList, nn.Sequential))
            and len(child)
            and not any(type(item).__module__.startswith("torch.") for item in child.children())
        ):
            yield path, child
        else:
            yield from _layer_lists(child, f"{path}.")


def _members(layers: _Layers) -> dict[int, nn.Module]:
    return {i: layer for i, layer in enumerate(layers) if layer is not None}


def _inner_lists(model: nn.Module) -> Iterator[_Members]:
    """Yield the lists in the members of the outermost lists, and lists of which some members are of torch, without these."""
    outermost = [path for path, _ in _layer_lists(model)]
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or path in outermost:
            continue
        own = {i: m for i, m in _members(module).items() if not type(m).__module__.startswith("torch.")}
        if len(own) > 1 and not any(isinstance(m, (nn.ModuleList, nn.Sequential)) for m in own.values()):
            yield _Members(path, "", own)


def _parts(lists: list[_Members]) -> Iterator[_Members]:
    """Yield the parts that all members of a list have."""
    for own in lists:
        for name, _ in next(iter(own.modules.values())).named_children():
            parts = {i: getattr(layer, name, None) for i, layer in own.modules.items()}
            if all(isinstance(part, nn.Module) for part in parts.values()):
                yield _Members(own.path, name, cast("dict[int, nn.Module]", parts))


def _prefixes(paths: list[str]) -> dict[str, str]:
    """Return what tells each path from the others: the first parts in which they differ, or nothing for a single one."""
    parts = {path: path.split(".") for path in paths}
    if len(paths) < 2:
        return dict.fromkeys(paths, "")
    common = 0
    while len({tuple(p[: common + 1]) for p in parts.values()}) == 1:
        common += 1
    prefixes = {}
    for path, own in parts.items():
        for n in range(common + 1, len(own) + 1):
            if sum(other[:n] == own[:n] for other in parts.values()) == 1:
                break
        prefixes[path] = "_".join(own[common:n]) + "_"
    return prefixes


def _unsupported(model: PreTrainedModel, reasons: list[str]) -> HostError:
    there = "\n".join(reasons) or "  none"
    name = type(model).__name__
    path = reasons[0].split()[0] if reasons else "path.of.a.layer"
    return HostError(
        f"The points of {name} cannot be derived.\n"
        f"Lists of modules that it has, and why they are not taken:\n{there}\n"
        f"Name modules by hand; globs work:\n"
        f"  kasmina_hf.grow(model, [{path!r}], example={{'{model.main_input_name}': ...}})"
    )
