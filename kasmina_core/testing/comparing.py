"""Bit-for-bit comparison of what two modules compute, through nested outputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from kasmina_core.errors import HostError
from kasmina_core.hosts import InjectionPoint, submodule
from kasmina_core.outputs import features_in
from kasmina_core.probing import call_with
from kasmina_core.quiet import generator_states, private_rng

SEED = 0x686F7374
"""Seed of the random numbers of every compared run."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensors_in(output: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in nested tuples, lists, mappings and dataclasses, with its path."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors_in(value, f"{path}[{key!r}]")
    elif isinstance(output, (tuple, list)):
        for number, value in enumerate(output):
            yield from tensors_in(value, f"{path}[{number}]")
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from tensors_in(getattr(output, field.name), f"{path}.{field.name}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, NaN equal to NaN.

    >>> same_bits(torch.tensor([0.0, torch.nan]), torch.tensor([0.0, torch.nan]))
    True
    >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    False
    """
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    a, b = a.detach(), b.detach()
    if not a.is_floating_point() or a.layout is not torch.strided:
        return bool(torch.equal(a, b))
    bits = _BITS[a.element_size()]
    equal = a.contiguous().view(bits) == b.contiguous().view(bits)
    return bool((equal | (a.isnan() & b.isnan())).all())


def unlike_names(before: Sequence[str], after: Sequence[str]) -> str:
    """Return in what two lists of names differ as text; empty if they are equal.

    >>> unlike_names(["a", "b"], ["a"]), unlike_names(["a"], ["a", "c"]), unlike_names(["a", "b"], ["b", "a"])
    ('lacks b', 'also c', 'another order: b, a')
    """
    fewer = list(dict.fromkeys(name for name in before if name not in after))
    more = list(dict.fromkeys(name for name in after if name not in before))
    for word, names in (("lacks", fewer), ("also", more)):
        if names:
            return f"{word} {', '.join(names[:4])}" + (" …" if len(names) > 4 else "")
    if len(before) != len(after):
        return f"{len(after)} names, before: {len(before)}"
    return "" if list(before) == list(after) else f"another order: {', '.join(after[:4])}"


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return the first difference between named tensors as text; empty if they are equal bit for bit."""
    if fault := unlike_names(list(expected), list(found)):
        return fault
    for name, tensor in expected.items():
        other = found[name]
        if same_bits(tensor, other):
            continue
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return f"{name}: {other.dtype} {tuple(other.shape)}, before: {tensor.dtype} {tuple(tensor.shape)}"
        a, b = tensor.detach().double(), other.detach().double()
        return f"{name}: differs by up to {float((a - b).abs().max()):.3g}"
    return ""


@final
@dataclass(frozen=True)
class Run:
    """Results of one forward pass, and of its backward pass if it had one.

    Attributes:
        outputs: Every tensor of the output.
        buffers: The host's buffers afterwards.
        random_state: State of the random number generators afterwards.
        gradients: Of the host's parameters that got one.
    """

    outputs: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random_state: dict[str, Tensor]
    gradients: dict[str, Tensor]


def run(
    model: nn.Module,
    host: nn.Module,
    own: Collection[str],
    example: Any,
    *,
    training: bool,
    device: torch.device,
) -> Run:
    """Call ``model`` once on random numbers from `SEED`; in training mode with a backward pass.

    The loss is a fixed random combination of all floating-point outputs, so that every output takes part. Buffers and
    gradients are kept of ``host``, under the names in ``own``.
    """
    model.train(training)
    with private_rng(SEED, device), torch.set_grad_enabled(training):
        for parameter in model.parameters():
            parameter.grad = None
        outputs = dict(tensors_in(call_with(model, example)))
        state = random_state(device)
        if training:
            _backward(outputs)
        gradients = {
            name: p.grad.detach().clone()
            for name, p in host.named_parameters()
            if p.grad is not None and name in own
        }
        for parameter in model.parameters():
            parameter.grad = None
    return Run(
        {name: tensor.detach().clone() for name, tensor in outputs.items()},
        {name: buffer.detach().clone() for name, buffer in host.named_buffers() if name in own},
        state,
        gradients,
    )


def _backward(outputs: Mapping[str, Tensor]) -> None:
    source = torch.Generator().manual_seed(1)
    parts = []
    for tensor in outputs.values():
        weights = torch.randn(tensor.shape, generator=source)
        if tensor.is_floating_point() and tensor.requires_grad:
            parts.append((tensor * weights.to(tensor.device, tensor.dtype)).sum())
    if parts:
        torch.autograd.backward(parts)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of Python's generator, the CPU's and the device's."""
    numbers = torch.tensor(list(random.getstate()[1]), dtype=torch.int64)
    return {"python": numbers, **dict(zip(("cpu", str(device)), generator_states(device), strict=False))}


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def path_of(item: str | InjectionPoint) -> str:
    """Return the path of a point, or of a place that is named by it."""
    return item.path if isinstance(item, InjectionPoint) else item


def mode_name(training: bool) -> str:
    """Return the mode for reports."""
    return "train mode" if training else "eval mode"


def unlike(bare: Run, found: Run) -> str:
    """Return the first difference in outputs, buffers or random numbers; empty if there is none."""
    return (
        difference(bare.outputs, found.outputs)
        or difference(bare.buffers, found.buffers)
        or difference(bare.random_state, found.random_state)
    )


def features_at(
    host: nn.Module, paths: Iterable[str], example: object, device: torch.device
) -> dict[str, list[Any]]:
    """Run a host once without gradients and return the features at ``paths``, or what is in their place."""
    seen: dict[str, list[Any]] = {path: [] for path in paths}
    for path, found in seen.items():
        submodule(host, path).register_forward_hook(
            lambda _m, _a, out, path=path, found=found: found.append(_features(out, path))
        )
    with private_rng(SEED, device), torch.no_grad():
        call_with(host, example)
    return seen


def _features(output: Any, path: str) -> Any:
    try:
        features = features_in(output, path)
    except HostError:
        return output
    # What comes after may write to them, as an in-place ReLU does.
    return features.clone() if isinstance(features, Tensor) else features


def mapped(example: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an example whose tensors are changed, in nested mappings, tuples and lists."""
    if isinstance(example, Tensor):
        return change(example)
    if isinstance(example, Mapping):
        return {key: mapped(value, change) for key, value in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(mapped(value, change) for value in example)
    return example
