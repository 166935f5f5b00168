"""Export of a grown model as a plain module without slots."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from torch import Tensor, nn

from kasmina_core.blending import memory_format_of
from kasmina_core.carried import take_slots_off
from kasmina_core.errors import ExportError, HostError
from kasmina_core.growth.arguments import require_model
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.growth.slot import SeedSlot
from kasmina_core.hosts import submodule
from kasmina_core.lifecycle import SeedStage
from kasmina_core.outputs import features_in, keys_in, own_key
from kasmina_core.positions import ContextReader, follow_calls
from kasmina_core.probing import call_with, example_of
from kasmina_core.quiet import quiet_evaluation

REFUSE, DROP = "refuse", "drop"
UNFINISHED: Final = (REFUSE, DROP)
"""What to do with seeds that are no fossils: refuse the export, or leave them out."""


@final
@dataclass(slots=True)
class _Joint:
    """What was observed where a fossil joins its host."""

    args: int = 0
    keywords: tuple[str, ...] = ()
    output: Any = None
    features: Tensor | None = None
    seed: Tensor | None = None


def export_model(model: MorphogeneticModel, example: object = None, *, unfinished: str = REFUSE) -> nn.Module:
    """Return a copy of the host in which the fossils are ordinary submodules.

    Each module behind which a seed was fossilised is replaced by one that calls it and then the seed: an
    ``nn.Sequential``, or where its output is a tuple or a dataclass, a ``torch.fx.GraphModule``. So a module at path
    ``p`` moves to ``p.0`` (or ``p.body``) and its seed to ``p.1`` (or ``p.seed``), further ones to ``p.2`` and so on;
    the replacement has its plain attributes. Slots and their hooks are gone. ``torch.export.export`` takes the result. Its weights need only torch;
    to unpickle the module itself, the classes of host and seeds must be importable, from kasmina or your own package.
    Seeds that mix positions go on to be told what they mean, by the model's reader and hooks on the copy and the seeds.

    The copy is run once, in eval mode, and must give the model's output, bit for bit.

    Args:
        model: The grown model; it stays as it is.
        example: Inputs for one forward, as `MorphogeneticModel` takes them. Default: the host's ``example_inputs()``.
        unfinished: What to do with seeds that are no fossils: ``"refuse"``, or ``"drop"`` them, which gives the model
            as it is without them.

    Raises:
        ExportError: If there are unfinished seeds, or the copy computes something else, because the host reads
            something of a module that was replaced or calls it in more than one way.
        HostError: If there is no ``example``, and the host offers none; or the module of a fossil is gone.
        ValueError: If ``unfinished`` is none of the two.
        TypeError: If it is no `MorphogeneticModel`.
    """
    require_model(model, "export_model")
    model.follow_modules()
    if unfinished not in UNFINISHED:
        raise ValueError(f"unfinished must be one of {', '.join(UNFINISHED)}, not {unfinished!r}.")
    fossils = [slot for slot in model.slots.values() if slot.stage is SeedStage.FOSSILIZED]
    living = [slot for slot in model.slots.values() if slot.seed is not None and slot not in fossils]
    if living and unfinished == REFUSE:
        raise ExportError(
            "These seeds are not part of the model yet: "
            f"{', '.join(f'{slot.name} ({slot.stage.name})' for slot in living)}.\n"
            'Fossilise or cull them, or leave them out: export_model(model, unfinished="drop").'
        )
    if example is None:
        try:
            example = example_of(model.host)
        except HostError as error:
            raise HostError(
                f"{type(model.host).__name__} must be run once to prove that its export computes the same, and offers "
                "no example_inputs().\nA model does not keep the example it was made with. Give one: "
                "export_model(model, example=...), a tensor, a tuple of arguments or a mapping of keywords."
            ) from error
    joints, expected = _watch(model, fossils, living, example)
    # In one copy, so that what host and seeds share stays shared.
    reader = fossils[0].calls.reader if fossils else None
    host, seeds, reader = copy.deepcopy((model.host, {slot.name: slot.seed for slot in fossils}, reader))
    take_slots_off(host)
    if left := [path for path, module in host.named_modules() if isinstance(module, SeedSlot)]:
        raise ExportError(f"{type(host).__name__} keeps its slots after unregister_slot: {', '.join(left)}.")
    made: dict[str, nn.Module] = {}
    for slot in sorted(fossils, key=lambda one: -one.point.path.count(".")):
        host = _inline(host, slot, seeds[slot.name], joints[slot.name], made.get(slot.point.path))
        made[slot.point.path] = submodule(host, slot.point.path)
    mixing = {cast("nn.Module", seeds[slot.name]): slot.point for slot in fossils if slot.takes_context}
    if mixing:
        follow_calls(host, cast("ContextReader", reader), mixing)
    for parameter in host.parameters():
        parameter.grad = None
    try:
        with quiet_evaluation(host):
            found = call_with(host, example)
    except Exception as error:
        raise ExportError(
            f"The exported {type(model.host).__name__} does not run: {error!r:.300}\n"
            f"Its forward uses more of a replaced module than its output: {_paths(fossils)}."
        ) from error
    if not _same(expected, found):
        raise ExportError(
            f"The exported {type(model.host).__name__} computes something else than the model.\n"
            f"Something else happens at a module that was replaced: {_paths(fossils)}."
        )
    return host


def _paths(fossils: list[SeedSlot]) -> str:
    return ", ".join(dict.fromkeys(f"'{slot.point.path}'" for slot in fossils)) or "none was"


def _watch(
    model: MorphogeneticModel, fossils: list[SeedSlot], living: list[SeedSlot], example: object
) -> tuple[dict[str, _Joint], Any]:
    """Run the model once, without its living seeds, and note how each fossil joins."""
    joints = {slot.name: _Joint() for slot in fossils}
    with ExitStack() as stack:
        stack.enter_context(model.evaluation())
        for slot in living:
            stack.enter_context(model.bypassed(slot.name))
        for slot in fossils:
            joint, module = joints[slot.name], submodule(model.host, slot.point.path)

            def before(_: Any, args: Any, kwargs: Any, joint: _Joint = joint) -> None:
                joint.args, joint.keywords = len(args), tuple(kwargs)

            def after(_: Any, __: Any, output: Any, joint: _Joint = joint) -> None:
                joint.output = output

            def at_seed(_: Any, args: Any, output: Any, joint: _Joint = joint) -> None:
                joint.features, joint.seed = args[0], output

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
            if slot.seed is not None:
                stack.callback(slot.seed.register_forward_hook(at_seed).remove)
        return joints, call_with(model, example)


def _inline(
    host: nn.Module, slot: SeedSlot, seed: nn.Module | None, joint: _Joint, before: nn.Module | None
) -> nn.Module:
    """Join a fossil to its module, or to what ``before`` made of it and the fossils before it at the same point."""
    body = submodule(host, slot.point.path)
    assert seed is not None and joint.features is not None and joint.seed is not None  # noqa: PT018
    features, grown = joint.features, joint.seed
    is_plain = isinstance(joint.output, Tensor) and (joint.args, joint.keywords) == (1, ())
    is_alike = grown.dtype == features.dtype and grown.stride() == features.stride() and slot.turn is None
    if is_plain and is_alike and isinstance(before, nn.Sequential):
        before.append(seed)
        return host
    joined = nn.Sequential(body, seed) if is_plain and is_alike else _graph(body, seed, joint, slot)
    joined.training = body.training
    missing = [name for name in vars(body) if not name.startswith("_") and name not in vars(joined)]
    for name in missing:
        if not isinstance(value := vars(body)[name], (Tensor, nn.Module)):
            setattr(joined, name, value)
    if body is host:
        return joined
    for parent in list(host.modules()):  # everywhere it is held: the host may call it by any of its names
        if parent is not joined:
            for name, child in parent._modules.items():
                if child is body:
                    parent._modules[name] = joined
    return host


def _graph(body: nn.Module, seed: nn.Module, joint: _Joint, slot: SeedSlot) -> nn.Module:
    graph = torch.fx.Graph()
    given = tuple(graph.placeholder(f"given_{i}") for i in range(joint.args))
    keywords: dict[str, Any] = {name: graph.placeholder(name) for name in joint.keywords}
    output = graph.call_module("body", given, keywords)
    features, put_back = _features(graph, output, joint.output, keys_in(joint.output, slot.point.path))
    if slot.turn is not None:
        features = graph.call_method("permute", (features, slot.turn[0]))
    grown = graph.call_module("seed", (features,))
    assert joint.features is not None and joint.seed is not None  # noqa: PT018
    if joint.seed.dtype != joint.features.dtype:
        grown = graph.call_method("type_as", (grown, features))
    given_features = joint.features
    if slot.turn is not None:
        grown = graph.call_method("permute", (grown, slot.turn[1]))
        given_features = given_features.permute(slot.turn[1])
    if (memory_format := memory_format_of(given_features)) is not None:
        grown = graph.call_method("contiguous", (grown,), {"memory_format": memory_format})
    graph.output(put_back(grown))
    return torch.fx.GraphModule({"body": body, "seed": seed}, graph)


def _features(
    graph: torch.fx.Graph, node: torch.fx.Node, output: Any, keys: tuple[str, ...]
) -> tuple[torch.fx.Node, Callable[[Any], Any]]:
    """Return the features in an output, as `SlotHook` finds them, and how they are put back."""
    if not keys:
        return node, lambda grown: grown
    key, place = keys[0], features_in(output, f":{keys[0]}")
    if dataclasses.is_dataclass(output):
        names = [field.name for field in dataclasses.fields(output) if field.init]
    else:
        names = list(getattr(output, "_fields", ()))
    put: Callable[[Any], Any]
    if names:
        key = key if key in names else names[int(key)]
        parts: dict[str, Any] = {name: graph.call_function(getattr, (node, name)) for name in names}
        element = parts[key]

        # The class itself, not dataclasses.replace: a GraphModule is traced again when it is unpickled.
        def put(grown: Any) -> Any:
            return graph.call_function(type(output), (), parts | {key: grown})
    elif isinstance(output, Mapping):
        element = graph.call_function(operator.getitem, (node, own_key(output, key)))

        def put(grown: Any) -> Any:
            return graph.call_function(operator.or_, (node, {own_key(output, key): grown}))
    else:
        at = int(key) % len(output)
        element = graph.call_function(operator.getitem, (node, at))

        def put(grown: Any) -> Any:
            new = [grown] if isinstance(output, list) else (grown,)
            before, after = (
                graph.call_function(operator.getitem, (node, part))
                for part in (slice(at), slice(at + 1, None))
            )
            begun = graph.call_function(operator.add, (before, new))
            whole = graph.call_function(operator.add, (begun, after))
            is_plain = type(output) in (tuple, list)
            return whole if is_plain else graph.call_function(type(output), (whole,))

    features, put_inside = _features(graph, element, place, keys[1:])
    return features, lambda grown: put(put_inside(grown))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(_same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    return True  # what is no tensor, such as a cache, need not be comparable
