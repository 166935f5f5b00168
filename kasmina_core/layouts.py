"""Evidence of axes: what axes of features mean, from runs of a host on examples that differ in one axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from kasmina_core.errors import HostError
from kasmina_core.topology import Topology

_BUNDLED: Final = (Topology.VECTOR, Topology.TRANSFORMER, Topology.SIGNAL, Topology.CNN, Topology.VOLUME)
"""Topologies of points given by path: a pack that is installed must not change how they are read."""

_TF32: Final = 1e-3
"""Relative rounding of TensorFloat-32, in which CUDA may compute float32."""

_POOLS: Final = ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")
_BATCH_NORMS: Final = ("BatchNorm", "InstanceNorm", "SyncBatchNorm")
_CONVOLUTIONS: Final = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


# -- other examples ---------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Cut:
    """Another example: along one axis it has other entries, in another order, a new one among them.

    An entry that is kept has other neighbours on both sides, so that what depends on neighbours changes.

    Attributes:
        example: Inputs for one forward.
        axis: Axis of the first input that was cut.
        size: Number of entries in the example that it was made of.
        places: For each entry, the place that it had in that example; ``None`` for a new one.
    """

    example: object
    axis: int
    size: int
    places: tuple[int | None, ...]

    @property
    def kept(self) -> tuple[list[int], list[int]]:
        """Places of the entries that are the same: in the example before, and in this one."""
        pairs = [(old, new) for new, old in enumerate(self.places) if old is not None]
        return [old for old, _ in pairs], [new for _, new in pairs]


def cuts(example: object, axis: int) -> Iterator[Cut]:
    """Yield examples that differ along an axis of the inputs, those that tell most first.

    Other inputs are cut along with the first one, where an axis of theirs is as long. Whole numbers stay among those
    that occur, and those that an input alone holds are at most one greater.
    """
    main = main_input(example)
    if main is None or main.dim() <= axis or main.shape[axis] < 1:
        return
    size = main.shape[axis]
    others = [t for t in tensors_in(example) if t is not main and t.dim()]
    # What numbers the entries of the axis must not be left without the entry that it names.
    grows = any(
        not t.is_floating_point() and t.dtype is not torch.bool and size not in t.shape[:2] for t in others
    )
    resized = _places(size, grows)
    attempts: list[tuple[tuple[int | None, ...], bool, bool]] = [(resized, True, False)]
    if any(t.dim() > 1 and t.shape[0] == t.shape[1] == size for t in others) and axis < 2:
        attempts.append((resized, True, True))
    attempts.append((resized, False, False))
    if size > 1 and axis == 0:
        attempts.append(((*range(size - 1, 0, -1), None), True, False))
    for places, is_varied, is_swapped in attempts:
        yield Cut(_cut(example, main, axis, places, is_varied, is_swapped), axis, size, places)


def smaller(example: object) -> object | None:
    """Return an example whose first input is half as long in every axis behind the second; ``None`` if there is none."""
    main = main_input(example)
    if main is None or main.dim() < 3:
        return None
    halves = {size: size // 2 for size in main.shape[2:] if size > 1}

    def half(tensor: Tensor) -> Tensor:
        for axis in range(2, tensor.dim()):
            if tensor.dim() == main.dim() and tensor.shape[axis] in halves:
                tensor = tensor.narrow(axis, 0, halves[tensor.shape[axis]])
        return tensor

    return mapped(example, half) if halves else None


def main_input(example: object) -> Tensor | None:
    """Return the first input with a batch and another axis, else the first with an axis."""
    found = [t for t in tensors_in(example) if t.dtype is not torch.bool and t.dim() and not t.is_complex()]
    return next((t for t in found if t.dim() > 1), found[0] if found else None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every dense tensor in nested mappings, tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif type(value) in (tuple, list) or hasattr(value, "_fields"):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value whose tensors are changed, in nested mappings, tuples and lists."""
    if isinstance(value, Tensor):
        return change(value) if value.layout is torch.strided else value
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change) for item in value)
    return value


def _places(size: int, grows: bool) -> tuple[int | None, ...]:
    """Return places of entries in another order, with a new one; another number of them.

    >>> _places(1, False), _places(2, False), _places(8, False)
    ((None, 0, None), (1, None, 0), (3, None, 1, 0))
    """
    if size == 1:
        return (None, 0, None)
    if size < 4 or grows:
        half = size // 2
        return (*range(size - 1, half - 1, -1), None, *range(half - 1, -1, -1))
    fewer: list[int | None] = list(range(size // 2 - 1, -1, -1))
    fewer[len(fewer) // 2 - 1] = None
    return tuple(fewer)


def _cut(
    example: object,
    main: Tensor,
    axis: int,
    places: Sequence[int | None],
    is_varied: bool,
    is_swapped: bool,
) -> object:
    size = main.shape[axis]
    order = [place or 0 for place in places]

    def chosen(tensor: Tensor) -> list[int]:
        if tensor is main:
            return [axis]
        if tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2] == size and axis == 1:
            return [tensor.dim() - 2, tensor.dim() - 1]  # a mask from each position to each
        first = [k for k in ((1, 0) if (axis == 1) != is_swapped else (0, 1)) if k < tensor.dim()]
        return [k for k in first if tensor.shape[k] == size][:1]

    def change(tensor: Tensor) -> Tensor:
        axes = chosen(tensor)
        made = tensor
        for k in axes:
            made = made.index_select(k, torch.tensor(order, device=tensor.device))
        if len(axes) == 1 and tensor.dim() > 1:
            entry = tensor.narrow(axes[0], 0, 1)
            new = _varied(entry, tensor, tensor is main, is_varied)
            if new is not entry:
                for number, place in enumerate(places):
                    if place is None:
                        made.narrow(axes[0], number, 1).copy_(new)
        return made

    return mapped(example, change)


def _varied(entry: Tensor, tensor: Tensor, is_main: bool, is_strong: bool) -> Tensor:
    """Return another entry that a host takes wherever it takes this one; the same if none is known."""
    if tensor.is_complex() or tensor.dtype is torch.bool or tensor.is_meta:
        return entry
    if not is_strong:
        return entry.flip(list(range(entry.dim())))
    if tensor.is_floating_point():
        is_mask = not bool(tensor.isfinite().all()) or bool(((tensor == 0) | (tensor == 1)).all())
        if is_mask and not is_main:
            return entry
        spread = float(tensor.float().nan_to_num(0.0, 0.0, 0.0).std(correction=0)) or 0.5
        ramp = torch.linspace(-spread, spread, entry.numel(), device=entry.device).view(entry.shape)
        varied: Tensor = 0.5 * entry.flip(list(range(entry.dim()))) + (ramp + spread / 3).to(entry)
        return varied
    values = torch.unique(tensor)
    if len(values) == 1:
        only = int(values[0])
        # On CUDA a number that is out of range cannot be caught: it ends the process's use of the device.
        if only > 0 or (is_main and not entry.is_cuda):
            return entry - 1 if only > 0 and is_main else entry + int(is_main)
        return entry
    return cycled(entry, values)


def cycled(entry: Tensor, values: Tensor) -> Tensor:
    """Return whole numbers of which each is the next greater of those that occur, and the least after the greatest.

    Args:
        entry: Whole numbers that occur.
        values: All that occur, sorted, each once.

    >>> cycled(torch.tensor([3, 9]), torch.tensor([3, 5, 9]))
    tensor([5, 3])
    """
    following: Tensor = values[(torch.searchsorted(values, entry.contiguous()) + 1) % len(values)]
    return following


# -- what a run showed --------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """What a cut of the inputs did to one tensor.

    Attributes:
        resized: Axes whose size changed; ``None`` if their number did.
        rows: For each axis that follows the cut in size, its rows per entry; one where it follows exactly.
        apart: For those axes whether the rows of entries that were kept are the same; ``None`` if the values do not
            tell, because they do not depend on the inputs.
        moves: Whether values changed though no size did.
    """

    resized: frozenset[int] | None
    rows: Mapping[int, int]
    apart: Mapping[int, bool | None]
    moves: bool = False

    @property
    def own(self) -> list[int]:
        """Axes that follow the cut exactly."""
        return [axis for axis, rows in self.rows.items() if rows == 1]


def compare(before: Tensor, after: Tensor, cut: Cut, tolerance: float) -> Seen:
    """Compare a tensor of the run on the example with that of the run on a cut of it.

    Args:
        before: From the example.
        after: From the cut.
        cut: The cut.
        tolerance: Largest RMS of a difference that counts as none, as a part of the RMS of ``before``.
    """
    if before.dim() != after.dim():
        return Seen(None, {}, {})
    size, now = cut.size, len(cut.places)
    resized = frozenset(axis for axis in range(before.dim()) if before.shape[axis] != after.shape[axis])
    rows: dict[int, int] = {}
    for axis, (old, new) in enumerate(zip(before.shape, after.shape, strict=True)):
        if old % size == 0 and new * size == old * now and ((old != new) if now != size else old == size):
            rows[axis] = old // size
    verdicts = {axis: _is_apart(before, after, axis, cut, tolerance) for axis in rows}
    moves = not resized and now != size and not _close(before, after, before, tolerance)
    return Seen(resized, rows, verdicts, moves)


def _is_apart(before: Tensor, after: Tensor, axis: int, cut: Cut, tolerance: float) -> bool | None:
    if before.is_meta or any(axis != k and before.shape[k] != after.shape[k] for k in range(before.dim())):
        return None
    old, new = _by_entry(before, axis, cut.size), _by_entry(after, axis, len(cut.places))
    left, right = (_chosen(t, axis, places) for t, places in zip((old, new), cut.kept, strict=True))
    if not _close(left, right, before, tolerance):
        return False
    others = [number for number, place in enumerate(cut.places) if place is None]
    differs = not _close(_chosen(new, axis, others), _chosen(old, axis, [0] * len(others)), before, tolerance)
    if not differs and len(cut.kept[1]) > 1:
        differs = not _close(right, right.roll(1, axis), before, tolerance)
    return True if differs else None


def _by_entry(tensor: Tensor, axis: int, entries: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:axis], entries, -1, *tensor.shape[axis + 1 :])


def _chosen(tensor: Tensor, axis: int, places: Sequence[int]) -> Tensor:
    return tensor.index_select(axis, torch.tensor(places, device=tensor.device))


def _close(a: Tensor, b: Tensor, scale: Tensor, tolerance: float) -> bool:
    if a.is_meta or a.shape != b.shape:
        return a.is_meta
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return True
    a, b, scale = (t.float() if t.element_size() < 4 else t for t in (a, b, scale))
    apart = torch.where(same, torch.zeros_like(a), a - b).square().mean().sqrt()
    size = scale.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt()
    return bool(apart <= tolerance * size)


def tolerance_of(features: Tensor, *dtypes: torch.dtype) -> float:
    """Return the part of the RMS of features up to which they count as equal: rounding differs with the sizes of a batch."""
    rounding = [torch.finfo(dtype).eps for dtype in (features.dtype, *dtypes) if dtype.is_floating_point]
    if features.is_cuda and features.dtype is torch.float32:
        rounding.append(_TF32)
    return float(max(rounding) ** 0.5)


# -- what modules say ----------------------------------------------------------------------------------------------------


def width_said_by(module: nn.Module, output: Tensor) -> int | None:
    """Return the axis of the width in a module's output, if the kind of module says it.

    >>> width_said_by(nn.Conv1d(2, 4, 1), torch.zeros(3, 4, 5)), width_said_by(nn.Linear(2, 4), torch.zeros(3, 5, 4))
    (1, 2)
    """
    axis: int | None = None
    width: int | None = None
    last = output.dim() - 1
    kind = type(module).__name__
    spatial = int(kind[-2]) if kind[-2:] in ("1d", "2d", "3d") else 0
    if isinstance(module, _CONVOLUTIONS):
        axis, width = last - len(module.kernel_size), module.out_channels
    elif type(module).__module__.startswith("torch.nn.") and kind.removesuffix(f"{spatial}d") in _POOLS:
        axis = last - spatial
    elif type(module).__module__.startswith("torch.nn.") and kind.removesuffix(f"{spatial}d") in _BATCH_NORMS:
        axis, width = 1, module.num_features  # type: ignore[assignment]  # of all of them
    elif type(module) is nn.GroupNorm:
        axis, width = 1, module.num_channels
    elif isinstance(module, nn.Linear):
        axis, width = last, module.out_features
    elif isinstance(module, nn.Embedding):
        axis, width = last, module.embedding_dim
    elif type(module) in (nn.LayerNorm, nn.RMSNorm):  # subclasses turn the axes before they norm
        shape: Sequence[int] = module.normalized_shape  # type: ignore[assignment]  # of both
        axis, width = (last, shape[0]) if len(shape) == 1 else (None, None)
    elif isinstance(module, nn.RNNBase):
        axis = last
    elif isinstance(module, nn.MultiheadAttention):
        axis, width = last, module.embed_dim
    if axis is None or not 0 <= axis <= last or width not in (None, output.shape[axis]):
        return None
    return axis


# -- reading -------------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of the axes of one point's features.

    Attributes:
        shape: Their shape.
        cuts: What cuts of the first and the second axis of the inputs did.
        resized: Axes whose size some run changed.
        said: Axes of the width that modules with an output of that shape say; the latest last.
        size: Size of the first axis of the first input, ``0`` if there is none.
        batch_said: Axis of the batch by ``batch_first`` of the modules whose output this is; ``None`` if none says it.
    """

    shape: tuple[int, ...]
    cuts: Mapping[int, Seen]
    resized: frozenset[int]
    said: tuple[int, ...]
    size: int
    batch_said: int | None = None

    def batches(self, usable: Collection[int]) -> dict[int, int]:
        """Return the axes along which entries do not touch each other, each with the axis of the inputs that it follows."""
        first, second = self.cuts.get(0), self.cuts.get(1)
        # Of an example with one sample of one position an axis may be both, one behind the other.
        both: frozenset[int] = frozenset()
        if first and second and first.resized and second.resized:
            both = first.resized & second.resized
        # Samples that lie in rows of an axis are not those of another one, whose entries may be positions.
        is_folded = first is not None and not first.own and any(rows > 1 for rows in first.rows.values())
        found = {
            k: a
            for a in sorted(self.cuts, reverse=True)
            if a in usable and not (a == 1 and is_folded)
            for k in self.cuts[a].own
            if self.cuts[a].apart[k] and k not in both
        }
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def verdict(self, axis: int, rows: int | None = 1) -> bool | None:
        """Return whether entries along an axis are apart, by the cut that it follows; ``None`` if nothing tells."""
        told = [
            seen.apart[axis]
            for seen in self.cuts.values()
            if axis in seen.rows and (rows is None or seen.rows[axis] == rows)
        ]
        known = [verdict for verdict in told if verdict is not None]
        return any(known) if known else None

    @property
    def width(self) -> int | None:
        """The axis of the width as far as modules say it alone: where other axes are as long, they must agree."""
        if not self.said:
            return None
        axis = self.said[-1]
        is_clear = self.shape.count(self.shape[axis]) == 1 or len(set(self.said)) == 1
        return axis if is_clear else None

    def widths(self, batch: int | None) -> list[int]:
        """Return the axes that may be the width: what follows the inputs in size cannot."""
        free = [k for k in range(len(self.shape)) if k != batch and k not in self.resized]
        if len(free) > 1 and self.width in free:
            return [self.width]
        return free


@final
@dataclass(frozen=True, slots=True)
class Reading:
    """A topology, the layout in which the host holds it, and whether the batch axis was proved."""

    topology: Topology
    layout: str
    is_proved: bool


def batch_inputs(seen: Sequence[Mapping[int, Seen]]) -> frozenset[int]:
    """Return the axes of the inputs that can be the batch, by everything that was seen in the host.

    An axis is none if its entries touch each other somewhere, or are pooled where those of another axis are kept
    apart; if that leaves no axis, nothing is known.
    """
    apart = {a for each in seen for a, s in each.items() if any(s.apart.values())}
    out: set[int] = set()
    for each in seen:
        for a, s in each.items():
            touches = len(s.own) == 1 and s.apart[s.own[0]] is False
            pools = s.moves and any(any(other.apart.values()) for b, other in each.items() if b != a)
            if touches or pools:
                out.add(a)
    return frozenset(apart - out) or frozenset((0, 1))


def read(evidence: Evidence, usable: Collection[int], line: Callable[[Topology, str, int], str]) -> Reading:
    """Return what features are that are given by path.

    Args:
        evidence: What is known of them.
        usable: See `batch_inputs`.
        line: Writes the line that states a topology, a layout and a width.

    Raises:
        HostError: If nothing proves it, with the readings there are.
    """
    shape = evidence.shape
    known = [t for t in _BUNDLED if t.ndim == len(shape)] or [t for t in Topology if t.ndim == len(shape)]
    if not known:
        topologies = ", ".join(f"{t.value} {t}" for t in Topology)
        raise HostError(f"has features of shape {shape}; they must be one of: {topologies}")
    found = evidence.batches(usable)
    batch = next(iter(found), None)
    said = evidence.batch_said
    # Without values it must at least follow the inputs: positions may lie in one row of its own.
    silent = [k for seen in evidence.cuts.values() for k in seen.own if seen.apart[k] is None]
    is_said = said is not None and said in (found or silent)
    if is_said and len(found) != 1:
        batch = said
    elif batch is None:
        batch = _batch_by_size(evidence)

    def readings() -> str:
        lines: dict[str, Topology] = {}
        for b in (0, 1) if batch is None else (batch,):
            for width in evidence.widths(b) or [k for k in range(len(shape)) if k != b]:
                topology, layout = _named(known, len(shape), b, width)
                try:
                    demand_statement(evidence, topology, layout, usable, line)
                except HostError:
                    continue
                if batch is not None or evidence.width != b:  # a module says that this axis is the width
                    lines[line(topology, layout, width)] = topology
        if not lines:
            return "\n    Name a module whose features keep each sample on an entry of one axis."
        return "".join(
            f"\n    If {_condition(evidence, batch, topology)}, state it: {text}"
            for text, topology in lines.items()
        )

    if batch is None:
        raise HostError(
            f"has features {shape} in which no axis is proved to be the batch: "
            f"{_why_no_batch(evidence)}{readings()}"
        )
    widths = evidence.widths(batch)
    if len(widths) != 1:
        why = "all of them change with the inputs" if not widths else "no run and no module tells"
        raise HostError(
            f"has features {shape} whose batch is axis {batch}; which other axis is the width is not proved: "
            f"{why}{readings()}"
        )
    topology, layout = _named(known, len(shape), batch, widths[0])
    return Reading(topology, layout, len(found) == 1 or is_said)


def _condition(evidence: Evidence, batch: int | None, topology: Topology) -> str:
    """Return what a statement of a topology means where the batch is not proved."""
    if batch is None and topology is Topology.VECTOR:
        return "a seed may treat each row by itself, as a node or a position"
    first = evidence.cuts.get(0)
    if (
        batch is None
        and first is not None
        and not first.own
        and any(rows > 1 for rows in first.rows.values())
    ):
        return "a seed may take each row for a sample, as a frame or a window"
    return "this is right"


def _named(known: Sequence[Topology], ndim: int, batch: int, width: int) -> tuple[Topology, str]:
    """Return the topology and layout of features with that batch and width; other axes are in the topology's order.

    >>> _named([Topology.TRANSFORMER, Topology.SIGNAL], 3, 1, 2)
    (<Topology.TRANSFORMER: 'transformer'>, 'tbd')
    """
    order = [axis for axis in range(ndim) if axis != batch]
    comes_last = order[-1] == width
    topology = next((t for t in known if (t.feature_dim == -1) == comes_last), known[0])
    rest = iter(axis for axis in topology.axes if axis not in ("b", topology.width))
    letters = {batch: "b", width: topology.width}
    return topology, "".join(letters.get(axis) or next(rest) for axis in range(ndim))


def _batch_by_size(evidence: Evidence) -> int | None:
    """Return the batch by sizes alone, where values cannot tell."""
    for _, seen in sorted(evidence.cuts.items()):
        silent = [k for k in seen.own if seen.apart[k] is None]
        if len(seen.own) == 1 and silent:
            return silent[0]
    first = evidence.cuts.get(0)
    is_untried = first is None or (first.resized == frozenset() and not first.rows)
    if (
        is_untried
        and evidence.shape
        and evidence.shape[0] == evidence.size
        and evidence.verdict(0) is not False
    ):
        return 0 if first is None else None
    return None


def _why_no_batch(evidence: Evidence) -> str:
    first, second = evidence.cuts.get(0), evidence.cuts.get(1)
    if not evidence.size:
        return "the example holds no tensor that could be cut."
    if first is None:
        return "the host takes no other number of samples, and no axis is as long as the example has."
    if first.resized is None:
        return "with another number of samples they have another number of axes."
    for axis, rows in first.rows.items():
        if rows > 1:
            return f"axis {axis} holds {rows} rows for each sample. A seed would take each row for a sample."
    for number, seen in ((0, first), (1, second)):
        if seen is not None and seen.own and seen.apart[seen.own[0]] is False:
            return (
                f"another entry along axis {number} of the inputs changes features of entries that stay, along axis "
                f"{seen.own[0]}. Samples must not change each other's features."
            )
    return "none follows the number of samples."


def demand_statement(
    evidence: Evidence,
    topology: Topology,
    layout: str,
    usable: Collection[int],
    line: Callable[[Topology, str, int], str],
) -> None:
    """Demand that nothing contradicts what a point states of its features.

    Raises:
        HostError: If something does, with both readings.
    """
    shape, batch, width = evidence.shape, layout.index("b"), layout.index(topology.width)
    found = evidence.batches(usable)
    known = [topology, *(t for t in _BUNDLED if t.ndim == len(shape) and t is not topology)]
    fault = instead = ""
    by_size = _batch_by_size(evidence)
    if found and batch not in found:
        other = next(iter(found))
        fault = f"axis {other} is the batch: entries along it do not change each other's features, those along axis {batch} "
        fault += "do" if evidence.verdict(batch) is False else "are no samples"
        widths = evidence.widths(other)
        if len(widths) == 1:
            instead = line(*_named(known, len(shape), other, widths[0]), widths[0])
    elif not found and evidence.verdict(batch, None) is False and topology is not Topology.VECTOR:
        fault = f"another sample changes features along axis {batch}, which is stated to be the batch"
    elif not found and by_size is not None and by_size != batch:
        fault = f"axis {by_size} follows the number of samples, axis {batch} does not"
    elif not found and topology is not Topology.VECTOR and _is_packed(evidence, batch):
        fault = f"axis {batch} does not follow the number of samples, another axis does: they lie in one row"
    elif (widths := evidence.widths(batch)) and width not in widths:
        why = "changes with the inputs" if width in evidence.resized else "is not what the modules give"
        fault = f"axis {width}, which is stated to be the width, {why}"
        if len(widths) == 1:
            instead = line(*_named(known, len(shape), batch, widths[0]), widths[0])
    if fault:
        stated = f"{topology.value} ({', '.join(layout)}), width {shape[width]}"
        way = f"\n    write:    {instead}" if instead else ""
        raise HostError(
            f"is not as declared\n    declared: {stated}\n    found:    features {shape}; {fault}{way}"
        )


def _is_packed(evidence: Evidence, batch: int) -> bool:
    first = evidence.cuts.get(0)
    return first is not None and batch not in first.rows and any(rows > 1 for rows in first.rows.values())
