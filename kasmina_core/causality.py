"""Causality found by values: one position of an input is changed, and the features at the others are looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from kasmina_core.hosts import InjectionPoint, submodule
from kasmina_core.layouts import cycled
from kasmina_core.outputs import features_in, split_path
from kasmina_core.probing import ProbedPoint, call_with
from kasmina_core.quiet import devices_of, kept_attributes, kept_buffers, private_rng, quiet_evaluation

_MOST_INPUTS: Final = 6
_MOST_STREAMS: Final = 8


@final
@dataclass(frozen=True, slots=True)
class Causality:
    """What values say of the positions at a point.

    Attributes:
        looks_ahead: Whether a position sees later ones; ``None`` if nothing tells, as where no position sees another.
        output_is_causal: Whether a position of the host's output sees earlier ones and no later one.
    """

    looks_ahead: bool | None = None
    output_is_causal: bool = False


def with_causality(
    host: nn.Module,
    proved: Sequence[ProbedPoint],
    by_path: Iterable[str],
    example: object,
    causal: bool | Mapping[str, bool] | None,
) -> tuple[list[ProbedPoint], dict[str, str]]:
    """Settle which points are causal, and return them with the doubts, by name of the point.

    What was not said is found by values. One position of each input that has the point's positions is changed, and the
    host is run in evaluation. What moves before the position has looked ahead; what moves after it alone is causal.
    Where no input has the positions, as with images, the first features of the point's shape are changed instead. Of
    several inputs one is enough: a decoder may look at all of an encoder's positions. Where nothing tells, a point is
    causal, since then no seed can show the future to what must not see it.

    Args:
        host: The module.
        proved: Its points.
        by_path: Paths of those that were given by path.
        example: Inputs for one forward.
        causal: What was said of points given by path, for all of them or by tower, see `said_of`.
    """
    wanted, trial = set(by_path), _Trial(host, proved, example)
    settled, doubts = [], {}
    for found in proved:
        point = found.point
        if point.topology.can_be_causal:
            is_said, said = True, point.causal
            if point.path in wanted:
                told = said_of(point.path, causal)
                is_said, said = told is not None, bool(told)
            if not said:
                seen = trial.at(point)
                if not is_said:
                    said = seen.looks_ahead is not True
                elif seen.output_is_causal:
                    doubts[point.name] = (
                        "a seed that mixes positions would show the host the future\n"
                        f"    declared: causal=False at '{point.path}'\n"
                        "    found:    a position of the host's output depends on no later position\n"
                        f"    Write: {_line(point, point.path in wanted)}"
                    )
            if streams := trial.streams(point):
                doubts[point.name] = (
                    "a seed that mixes positions would show those of one stream the future of another\n"
                    f"    found:    at '{point.path}' the positions of {streams} streams lie one behind the other\n"
                    "    Use a seed that treats each position by itself, or name a module outside of the streams"
                )
            found = replace(found, point=replace(point, causal=said))
        settled.append(found)
    return settled, doubts


def said_of(path: str, causal: bool | Mapping[str, bool] | None) -> bool | None:
    """Return what was said of the point at a path; of several towers that hold it the one with the longest name counts.

    >>> said_of("decoder.layers.0", {"encoder": False, "decoder": True})
    True
    >>> said_of("encoder.layers.0", {"decoder": True}) is None
    True
    """
    if not isinstance(causal, Mapping):
        return causal
    module = split_path(path)[0]
    holding = [
        key for key in causal if path == key or fnmatchcase(module, key) or f"{module}.".startswith(f"{key}.")
    ]
    return causal[max(holding, key=len)] if holding else None


def demand_towers(host: nn.Module, causal: object) -> None:
    """Demand that ``causal`` is a truth value, nothing, or truth values by path or glob.

    Raises:
        TypeError: If it is something else.
        HostError: If a path in it does not exist.
    """
    if causal is None or isinstance(causal, bool):
        return
    if not isinstance(causal, Mapping) or not all(isinstance(value, bool) for value in causal.values()):
        raise TypeError(
            f'causal must be True, False, or either by tower, as {{"encoder": False, "decoder": True}}, not {causal!r:.200}.'
        )
    for path in causal:
        if not any(sign in path for sign in "*?["):
            submodule(host, path)


def _line(point: InjectionPoint, by_path: bool) -> str:
    if by_path:
        return f'causal=True, or causal={{"{split_path(point.path)[0]}": True}}'
    return f'InjectionPoint("{point.name}", "{point.path}", {point.dim}, ..., causal=True)'


def _axis(point: InjectionPoint) -> int | None:
    """Return which axis of the host's features holds the positions."""
    axis = point.topology.causal_axis
    return None if axis is None else point.axes.index(point.topology.axes[axis])


def _axis_in(tensor: Tensor, point: InjectionPoint, length: int) -> int | None:
    """Return which axis of an input or output holds the point's positions; ids have no width."""
    axis = _axis(point)
    assert axis is not None
    if tensor.dim() == point.topology.ndim - 1:
        axis -= point.axes.index(point.topology.width) < axis
    elif tensor.dim() != point.topology.ndim:
        return None
    return axis if tensor.shape[axis] == length else None


@final
class _Trial:
    """The runs of one host, each done once."""

    def __init__(self, host: nn.Module, proved: Sequence[ProbedPoint], example: object) -> None:
        self._host = host
        self._points = [found.point for found in proved]
        self._inputs, self._spec = tree_flatten(dict(example) if isinstance(example, Mapping) else example)
        self._first: dict[tuple[int, ...], nn.Module] = {}
        self._runs: dict[object, list[Tensor | None] | None] = {}

    def at(self, point: InjectionPoint) -> Causality:
        """Return what values say of one point."""
        number = self._points.index(point)
        plain = self._run("plain", self._inputs)
        features = plain[number] if plain is not None else None
        axis = _axis(point)
        if plain is None or features is None or features.is_meta or axis is None or features.shape[axis] < 2:
            return Causality()
        length = features.shape[axis]
        verdicts: list[bool | None] = []
        output_is_causal = False
        for changed, position in self._changes(point, tuple(features.shape), length):
            after = changed()
            if after is None:
                continue
            looks = [self._looks(a, b, point, length, position) for a, b in zip(plain, after, strict=False)]
            if looks[number] == (False, False, False):
                continue
            outputs = looks[len(self._points) :]
            output_is_causal = output_is_causal or _verdict(outputs) is False
            own = _verdict(looks[number : number + 1])
            verdicts.append(_verdict(looks) if own is None else own)
        if False in verdicts:
            return Causality(False, output_is_causal)
        return Causality(True if True in verdicts else None, output_is_causal)

    def streams(self, point: InjectionPoint) -> int:
        """Return how many streams of the input's positions lie one behind the other along the positions; 0 for none.

        The last position of an input is changed. Where one position follows another, what moves then lies at the end.
        """
        number, axis = self._points.index(point), _axis(point)
        run = self._run("plain", self._inputs)
        plain = run[number] if run is not None else None
        if axis is None or plain is None or plain.is_meta:
            return 0
        length = plain.shape[axis]
        for index, tensor in enumerate(self._inputs):
            if (
                not isinstance(tensor, Tensor)
                or tensor.dtype is torch.bool
                or tensor.is_complex()
                or tensor.dim() < 2
            ):
                continue
            t = tensor.shape[1]
            if t < 2 or length % t or not 2 <= length // t <= _MOST_STREAMS:
                continue
            inputs = [*self._inputs]
            inputs[index] = changed_at(tensor, 1, t - 1, 1)
            run = self._run((index, 1, t - 1), inputs)
            after = run[number] if run is not None else None
            if after is None or after.shape != plain.shape:
                continue
            moved = _moved(plain, after, axis)
            if bool(moved[t - 1]) and not bool(moved[t - 1 :].all()):
                return length // t
        return 0

    def _changes(self, point: InjectionPoint, shape: tuple[int, ...], length: int) -> list[tuple[Any, int]]:
        """Return runs in which the values at one position, near the middle, are others."""
        position = length // 2
        changes: list[tuple[Any, int]] = []
        for number, tensor in enumerate(self._inputs):
            if not isinstance(tensor, Tensor) or tensor.dtype is torch.bool or tensor.is_complex():
                continue
            axis = _axis_in(tensor, point, length)
            if axis is not None and len(changes) < _MOST_INPUTS:
                key = (number, axis, position)
                inputs = [
                    *self._inputs[:number],
                    changed_at(tensor, axis, position, 1),
                    *self._inputs[number + 1 :],
                ]
                changes.append((lambda key=key, inputs=inputs: self._run(key, inputs), position))
        first = self._first.get(shape)
        axis = _axis(point)
        if not changes and first is not None and axis is not None:
            changes.append(
                (lambda: self._run((first, position), self._inputs, (first, axis, position)), position)
            )
        return changes

    def _run(
        self, key: object, inputs: list[Any], change: tuple[nn.Module, int, int] | None = None
    ) -> list[Tensor | None] | None:
        """Return the features at every point and the outputs; ``None`` if the host does not take the inputs."""
        if key not in self._runs:
            try:
                self._runs[key] = self._forward(inputs, change)
            except Exception:  # a value that the host does not take says nothing
                self._runs[key] = None
        return self._runs[key]

    def _forward(self, inputs: list[Any], change: tuple[nn.Module, int, int] | None) -> list[Tensor | None]:
        seen: list[Tensor | None] = [None] * len(self._points)

        def note(number: int, output: Any) -> None:
            # Within a transform, such as vmap, values cannot be looked at.
            if torch._C._functorch.maybe_current_level() is None:
                seen[number] = features_in(output, self._points[number].path).detach().clone()

        def first(module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                self._first.setdefault(tuple(output.shape), module)

        with ExitStack() as stack:
            if not self._runs:
                for module in self._host.modules():
                    stack.callback(module.register_forward_hook(first).remove)
            if change is not None:
                changed, axis, position = change
                stack.callback(
                    changed.register_forward_hook(
                        lambda _m, _a, out: changed_at(out, axis, position, 1)
                    ).remove
                )
            for number, point in enumerate(self._points):
                module = submodule(self._host, point.path)
                hook = module.register_forward_hook(lambda _m, _a, out, number=number: note(number, out))
                stack.callback(hook.remove)
            stack.enter_context(kept_attributes(self._host))
            stack.enter_context(kept_buffers(self._host))
            stack.enter_context(quiet_evaluation(self._host))
            stack.enter_context(private_rng(0, *devices_of(self._host)))
            outputs = tree_flatten(call_with(self._host, tree_unflatten(inputs, self._spec)))[0]
        return seen + [
            out if isinstance(out, Tensor) and out.is_floating_point() else None for out in outputs
        ]

    def _looks(
        self, plain: Tensor | None, after: Tensor | None, point: InjectionPoint, length: int, position: int
    ) -> tuple[bool, bool, bool] | None:
        """Return what moved: before the position, at it, after it."""
        if plain is None or after is None or plain.shape != after.shape:
            return None
        axis = _axis_in(plain, point, length)
        if axis is None:
            return None
        moved = _moved(plain, after, axis)
        return bool(moved[:position].any()), bool(moved[position]), bool(moved[position + 1 :].any())


def _moved(plain: Tensor, after: Tensor, axis: int) -> Tensor:
    """Return which entries along an axis differ, bool."""
    a, b = (x.movedim(axis, 0).flatten(1).double() for x in (plain, after))
    scale = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()) if a.numel() else 0.0
    return ~torch.isclose(a, b, rtol=1e-5, atol=1e-6 * scale, equal_nan=True).all(1)


def _verdict(looks: Iterable[tuple[bool, bool, bool] | None]) -> bool | None:
    """Return whether one of them looks ahead; ``None`` if no position sees another."""
    known = [one for one in looks if one is not None]
    if any(ahead for ahead, _, _ in known):
        return True
    return False if any(back for _, _, back in known) else None


def changed_at(tensor: Tensor, axis: int, start: int, length: int) -> Tensor:
    """Return the tensor with other values at some positions; whole numbers stay among those that occur, truth values stay.

    Args:
        tensor: Numbers that a host takes.
        axis: Axis of the positions.
        start: The first of them.
        length: Their number.

    >>> changed_at(torch.tensor([[3, 5, 9]]), 1, 1, 2)
    tensor([[3, 9, 3]])
    """
    changed = tensor.clone()
    part = changed.narrow(axis, start, length)
    if tensor.is_floating_point():
        part.copy_(1.0 - 2.0 * part)
    elif tensor.dtype is not torch.bool:
        values = torch.unique(tensor)
        if len(values) == 1:
            part.add_(-1 if int(values[0]) > 0 else 1)
        else:
            part.copy_(cycled(part, values))
    return changed
