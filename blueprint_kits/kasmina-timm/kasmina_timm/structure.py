"""Points of a timm or torchvision model, from its modules, proved by one forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from kasmina_core import HostError, InjectionPoint, Topology
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

EXAMPLE_SIZE: Final = 96  # Inception needs 75; a stride of 32 leaves 3x3
SPACE_TO_DEPTH: Final = 16  # a first convolution of so many channels does not see the image itself

SHOWN_FAULTS: Final = 4

_LISTS: Final = ("stages", "blocks", "layers")

TORCHVISION_PLACES: Final[Mapping[str, tuple[str, ...]]] = {
    "ResNet": ("layer1", "layer2", "layer3", "layer4"),
    "RegNet": ("trunk_output.*",),
    "ShuffleNetV2": ("stage2", "stage3", "stage4"),
    "VisionTransformer": ("encoder.layers.*",),
}
"""Places in torchvision's models by class: paths, and lists of modules that each are one."""

TORCHVISION_SEQUENCES: Final[Mapping[str, str]] = {
    "AlexNet": "features",
    "ConvNeXt": "features",
    "DenseNet": "features",
    "EfficientNet": "features",
    "MNASNet": "layers",
    "MobileNetV2": "features",
    "MobileNetV3": "features",
    "SqueezeNet": "features",
    "SwinTransformer": "features",
    "SwinTransformer3d": "features",
    "VGG": "features",
}
"""Sequences in torchvision's models by class: the last module at each resolution is a place."""

BY_RANK: Final[Mapping[int, Topology]] = {
    topology.ndim: topology for topology in (Topology.TRANSFORMER, Topology.CNN, Topology.VOLUME)
}
"""What features of so many axes are in a model of images or video."""

FRAMES: Final = 16  # of an example for a model of video
TORCHVISION_SIZES: Final[Mapping[str, int]] = {"MViT": 224, "MaxVit": 224, "RAFT": 128, "S3D": 224}
"""Sizes of images of torchvision's models that take no smaller ones, or that one alone, by class."""

DETECTION: Final = "GeneralizedRCNNTransform"  # what torchvision's detectors do with a list of images

Fired = tuple[int, ...] | str
"""The output of a module: the shape of its features, or else a word for it."""


@final
@dataclass(frozen=True, slots=True)
class Place:
    """A place that a model declares.

    Attributes:
        path: As declared.
        width: As declared; ``None`` if it is not.
        candidates: Paths of modules whose output is these features, the first that fits is taken.
    """

    path: str
    width: int | None
    candidates: tuple[str, ...]


def points(model: nn.Module, every: int = 1, *, example: object = None) -> list[InjectionPoint]:
    """Return the places in a model where a slot can be: after its stages, or its blocks if it is a transformer.

    - timm: the modules that ``model.feature_info`` names, of ``num_chs`` channels; where there is none, the ``blocks``
      of width ``embed_dim``.
    - torchvision: the stages of ResNet, RegNet and ShuffleNet; the last module at each resolution in the ``features`` of
      ConvNeXt, Swin, VGG, MobileNet, EfficientNet, DenseNet, …; the encoder layers of the vision transformer.
    - Other models, and those where none of these holds a slot: the parts that a forward calls once, without the parts
      of those that return features, in the model's ``backbone`` if it has one. Of images and video the last at each
      resolution, of tokens all.

    One forward in evaluation mode proves each: it runs once, and returns features of the declared width: ``(b, c, h,
    w)``, or ``(b, h, w, c)`` where the model says so or the width shows it, ``(b, t, d)`` or ``(b, c, d, h, w)``. Where
    the declared module is not called (its list is walked, or gradient checkpointing flattens it), the module that
    computes the same features is taken. Declared places that cannot hold a slot are left out, as are those whose features
    nothing in the model reads, because other outputs of the module go on. A point is named after
    the declared module, ``blocks_3`` for ``blocks.3``. No point is causal.

    Args:
        model: The model, with or without a head.
        every: Distance between points: 2 gives every second one.
        example: Inputs for that forward, a tensor or a tuple of arguments; ``None`` for `example_inputs`.

    Raises:
        HostError: If nothing in the model can hold a slot; the message says why, and how to name places by hand.
        ValueError: If ``every`` is not from 1 to the number of places.

    >>> from timm.models import VisionTransformer
    >>> model = VisionTransformer(img_size=8, patch_size=4, embed_dim=4, depth=2, num_heads=1)
    >>> [(point.name, point.path, point.dim, point.topology.value) for point in points(model)]
    [('blocks_0', 'blocks.0', 4, 'transformer'), ('blocks_1', 'blocks.1', 4, 'transformer')]
    """
    given = example_inputs(model) if example is None else example
    kind = torchvision_kind(model)
    if kind in TORCHVISION_SEQUENCES:
        found = _ends_of_resolutions(model, TORCHVISION_SEQUENCES[kind], given)
    else:
        places = _torchvision_places(model, kind) if kind in TORCHVISION_PLACES else _timm_places(model)
        found, faults = _proved(model, places, given)
        ignored = _ignored(model, found, given)
        faults += [f"  '{path}': nothing in the model reads its features" for path in ignored]
        found = [point for point in found if point.path not in ignored] or _parts(model, given, ignored)
        if not found:
            raise _unsupported(model, "nothing in it returns features that can hold a slot", faults)
    if not 1 <= every <= len(found):
        raise ValueError(f"every must be from 1 to {len(found)}, the number of places, not {every!r}.")
    return found[every - 1 :: every]


def example_inputs(model: nn.Module, size: int = EXAMPLE_SIZE) -> Any:
    """Return two images for one forward of a model, always the same ones, of its device and dtype.

    They are a tensor; two clips for a model of video; for torchvision's detectors a tuple with a list of images, and for
    its optical flow a tuple with the images before and after.

    Args:
        model: The model.
        size: Height and width for a model that takes several. One that takes a single size gets that
            (``patch_embed.img_size``, torchvision's ``image_size``, ``default_cfg["input_size"]``), and none gets less
            than ``default_cfg["min_input_size"]``.

    >>> from timm.models import ConvNeXt
    >>> tuple(example_inputs(ConvNeXt(in_chans=1, depths=(1, 1, 1, 1), dims=(4, 4, 4, 4))).shape)
    (2, 1, 96, 96)
    """
    config = getattr(model, "default_cfg", None) or {}
    channels, *made_for = config.get("input_size") or (3, size, size)
    first = next((module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))), None)
    if first is not None and first.in_channels < SPACE_TO_DEPTH:
        channels = first.in_channels
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(
        model, "image_size", None
    )
    if fixed is None and config.get("fixed_input_size"):
        fixed = made_for
    least = (config.get("min_input_size") or (0, 0, 0))[1:]
    h, w = (max(size, side) for side in least) if fixed is None else _pair(fixed)
    least_size = TORCHVISION_SIZES.get(kind := torchvision_kind(model), 0)
    h, w = max(h, least_size), max(w, least_size)
    frames = (FRAMES,) if isinstance(first, nn.Conv3d) else ()
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    shape = (2, channels, *frames, h, w)
    pixels = torch.linspace(-1.0, 1.0, math.prod(shape), device=weight.device).view(shape).to(weight.dtype)
    if kind == "RAFT":
        return pixels, pixels.flip(0)
    return (list(pixels),) if type(getattr(model, "transform", None)).__name__ == DETECTION else pixels


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def torchvision_kind(model: nn.Module) -> str:
    """Return the name of the class in torchvision that a model is of, its own or a base; empty if there is none."""
    return next(
        (kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("torchvision.models.")),
        "",
    )


def says_channels_last(model: nn.Module) -> bool:
    """Return whether a model declares that its features are ``(b, h, w, c)``."""
    declared = getattr(model, "output_fmt", "")
    return getattr(declared, "value", declared) == "NHWC" or torchvision_kind(model).startswith(
        "SwinTransformer"
    )


# -- what models declare ----------------------------------------------------------------------------------------------


def _feature_info(model: nn.Module) -> list[Mapping[str, Any]]:
    info: Any = getattr(model, "feature_info", None) or []
    return list(info.get_dicts() if hasattr(info, "get_dicts") else info)


def _timm_places(model: nn.Module) -> list[Place]:
    declared = [(str(entry["module"]), int(entry["num_chs"])) for entry in _feature_info(model)]
    blocks, width = getattr(model, "blocks", None), getattr(model, "embed_dim", None)
    if not declared and isinstance(blocks, (nn.Sequential, nn.ModuleList)) and isinstance(width, int):
        declared = [(f"blocks.{i}", width) for i in range(len(blocks))]
    named = dict(model.named_modules(remove_duplicate=False))
    return [
        Place(path, width, tuple(dict.fromkeys(_candidates(named, path, i, len(declared)))))
        for i, (path, width) in enumerate(declared)
    ]


def _candidates(named: Mapping[str, nn.Module], path: str, i: int, count: int) -> Iterator[str]:
    """Yield where the features of a declared place may be found: there, under timm's wrappers, or in a list of stages."""
    inside = [name for name in named if name.endswith(f".{path}")]
    for name in (path, path.replace(".", "_"), *(inside if len(inside) == 1 else [])):
        yield from _last_parts(named, name)
    for name in _LISTS:
        if isinstance(stages := named.get(name), (nn.Sequential, nn.ModuleList)) and len(stages) == count:
            yield from _last_parts(named, f"{name}.{i}")


def _last_parts(named: Mapping[str, nn.Module], path: str) -> Iterator[str]:
    """Yield a path, then those of the last module in it, the last in that, …, as long as they are lists."""
    while path and path in named:
        yield path
        module = named[path]
        if not (isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module)):
            return
        path = f"{path}.{list(module._modules)[-1]}"


def _torchvision_places(model: nn.Module, kind: str) -> list[Place]:
    paths: list[str] = []
    for path in TORCHVISION_PLACES[kind]:
        parent, star, _ = path.partition(".*")
        children = model.get_submodule(parent).named_children() if star else []
        paths += [f"{parent}.{name}" for name, _ in children] if star else [path]
    return [Place(path, None, (path,)) for path in paths]


# -- what a forward shows ---------------------------------------------------------------------------------------------


def _proved(
    model: nn.Module, places: Sequence[Place], example: object
) -> tuple[list[InjectionPoint], list[str]]:
    """Return a point for each place that can hold a slot, and why others cannot, one line each."""
    fired = _fired(model, [path for place in places for path in place.candidates], example)
    channels_last = says_channels_last(model)
    found: list[InjectionPoint] = []
    faults: list[str] = []
    for place in places:
        point = _point(place, fired, channels_last)
        if isinstance(point, str):
            faults.append(f"  '{place.path}': {point}")
        else:
            found.append(point)
    return found, faults


def _point(place: Place, fired: Mapping[str, Sequence[Fired]], channels_last: bool) -> InjectionPoint | str:
    """Return a point at the first candidate that can hold a slot, or why none can."""
    faults: dict[str, str] = {}
    for path in place.candidates:
        point = _read(path, fired[path], place.width, channels_last)
        if not isinstance(point, str):
            return replace(point, name=place.path.replace(".", "_"))
        faults[path] = point
    of_called = [fault for path, fault in faults.items() if fired[path]]
    return next(iter([*of_called, *faults.values()]), "there is no such module")


def _read(path: str, fired: Sequence[Fired], width: int | None, channels_last: bool) -> InjectionPoint | str:
    """Return a point for what a module returned, or why it cannot hold a slot.

    Args:
        path: The module's.
        fired: What it returned, call by call.
        width: Declared width of the features, if any.
        channels_last: Whether the model declares that the width of images is their last axis.
    """
    if len(fired) != 1:
        return f"is called {len(fired)} times by a forward pass, not once" if fired else "is not called"
    shape = fired[0]
    if isinstance(shape, str):
        return f"returns {shape}"
    topology = BY_RANK.get(len(shape))
    if topology is None:
        return f"has features of shape {shape}"
    layout = None
    if width in (shape[1], shape[-1]) and shape[1] != shape[-1]:
        channels_last = shape[-1] == width
    if topology is not Topology.TRANSFORMER and channels_last:
        letters = topology.layout.replace(topology.width, "")
        layout = letters + topology.width
    dim = shape[topology.feature_dim if layout is None else -1]
    if width not in (None, dim):
        return f"has features of shape {shape}, and a declared width of {width}"
    return InjectionPoint(path.replace(".", "_"), path, dim, topology, layout=layout)


def _ends_of_resolutions(model: nn.Module, sequence: str, example: object) -> list[InjectionPoint]:
    """Return a point after the last module of a sequence at each resolution."""
    paths = [f"{sequence}.{name}" for name, _ in model.get_submodule(sequence).named_children()]
    found = _ends(model, _fired(model, paths, example))
    if not found:
        raise _unsupported(model, f"nothing in its '{sequence}' returns (b, c, h, w)")
    return found


def _ends(model: nn.Module, fired: Mapping[str, Sequence[Fired]]) -> list[InjectionPoint]:
    """Return points for modules in the order of their calls: the last at each resolution, and all of tokens."""
    channels_last = says_channels_last(model)
    ends: dict[object, InjectionPoint] = {}
    for path, calls in fired.items():
        point = _read(path, calls, None, channels_last)
        if not isinstance(point, str):
            (shape,) = calls
            of_tokens = point.topology is Topology.TRANSFORMER
            width = point.axes.index(point.topology.width)
            ends[path if of_tokens else tuple(shape[:width] + shape[width + 1 :])] = point  # type: ignore[operator]
    return list(ends.values())


def _ignored(model: nn.Module, found: Sequence[InjectionPoint], example: object) -> list[str]:
    """Return the paths of points whose features no output of the model depends on.

    Such a module returns several tensors, and others of them go on: a seed would never learn.
    """
    leaves: dict[str, Tensor] = {}

    def adding(path: str) -> Callable[[nn.Module, Any, Any], Any]:
        def add(module: nn.Module, args: Any, output: Any) -> Any:
            several = type(output) is tuple
            if not several and not isinstance(output, Tensor):
                return None
            features = output[0] if several else output
            # Gradient checkpointing calls the module again in the backward: its gradient is that of the same leaf.
            leaf = leaves.setdefault(path, torch.zeros_like(features, requires_grad=True))
            return (features + leaf, *output[1:]) if several else features + leaf

        return add

    with ExitStack() as stack:
        stack.enter_context(_quiet_evaluation(model))
        stack.enter_context(torch.enable_grad())
        for point in found:
            handle = model.get_submodule(point.path).register_forward_hook(adding(point.path))
            stack.callback(handle.remove)
        outputs = [
            t for t in tree_leaves(_called(model, tree_map(_with_graph, example))) if isinstance(t, Tensor)
        ]
        # Within the block: gradient checkpointing needs the hooks and modes of the forward.
        torch.autograd.backward([output.sum() for output in outputs if output.requires_grad])  # type: ignore[no-untyped-call]  # torch
    # A model may keep features of its last call, here with a graph: no copy of it could be made.
    _run(model, example)
    return [path for path, leaf in leaves.items() if leaf.grad is None] if outputs else []


def _with_graph(value: object) -> object:
    """Let features have a gradient from the input on: reentrant gradient checkpointing gives none to others."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_().clone() if is_float else value


def _parts(model: nn.Module, example: object, ignored: Iterable[str]) -> list[InjectionPoint]:
    """Return points for parts of a model that declares none: see `points`."""
    unread = set(ignored)
    while True:
        found = _parts_read(model, example, unread)
        if not (more := set(_ignored(model, found, example)) - unread):
            return found
        unread |= more


def _parts_read(model: nn.Module, example: object, unread: set[str]) -> list[InjectionPoint]:
    """Return points for parts; one in ``unread`` may hold others, and is none."""
    root = "backbone" if isinstance(getattr(model, "backbone", None), nn.Module) else ""
    fired = _fired(model, [path for path, _ in model.named_modules() if path], example)
    batch = _batch_of(example)
    whole = _size(model.get_submodule(root))

    def walk(path: str) -> Iterator[str]:
        for name, child in model.get_submodule(path).named_children():
            below = f"{path}.{name}" if path else name
            calls = fired.get(below, [])
            called_once = len(calls) == 1 and below not in unread
            is_features = called_once and isinstance(calls[0], tuple) and calls[0][0] == batch
            # A part that holds most of the model says less than what is in it.
            if not is_features or (2 * _size(child) > whole and len(child._modules)):
                yield from walk(below)
            elif any(parameter.dim() > 1 for parameter in child.parameters()):
                yield below

    parts = set(walk(root))
    return _ends(model, {path: calls for path, calls in fired.items() if path in parts})


def _batch_of(example: Any) -> int:
    while isinstance(example, tuple) and example:
        example = example[0]
    return len(example)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _fired(model: nn.Module, paths: Iterable[str], example: object) -> dict[str, list[Fired]]:
    """Run a model once in evaluation mode and return what the modules at ``paths`` returned, call by call.

    The modules are in the order of their first calls, then those that were not called. Modes and random numbers are afterwards as before.

    Raises:
        HostError: If the model does not take the example.
    """
    fired: dict[str, list[Fired]] = {path: [] for path in paths}
    order: list[str] = []
    with ExitStack() as stack:
        for path, calls in fired.items():
            handle = model.get_submodule(path).register_forward_hook(_noting(path, calls, order))
            stack.callback(handle.remove)
        _run(model, example)
    return {path: fired[path] for path in dict.fromkeys([*order, *fired])}


def _run(model: nn.Module, example: object) -> Any:
    """Run a model in evaluation mode without gradients; modes and random numbers are afterwards as before.

    Raises:
        HostError: If the model does not take the example.
    """
    with _quiet_evaluation(model), torch.no_grad():
        return _called(model, example)


@contextmanager
def _quiet_evaluation(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode; modes and random numbers are afterwards as before.

    Parameters have no gradient: some models keep what they compute of them.
    """
    modes = {module: module.training for module in model.modules()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


def _called(model: nn.Module, example: object) -> Any:
    try:
        return model(*example) if isinstance(example, tuple) else model(example)
    except Exception as error:
        shape = f" of shape {tuple(example.shape)}" if isinstance(example, Tensor) else ""
        raise HostError(
            f"The points of {type(model).__name__} cannot be proved: it does not take an example{shape}: {error}\n"
            "Pass one that it takes: example=tensor."
        ) from error


def _noting(path: str, calls: list[Fired], order: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        order.append(path)
        calls.append(_seen(output))

    return note


def _seen(output: Any) -> Fired:
    features = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(features, Tensor):
        return f"{type(output).__name__}, not features"
    return (
        tuple(features.shape)
        if features.is_floating_point()
        else f"{features.dtype}, not floating-point features"
    )


# -- refusal ------------------------------------------------------------------------------------------------------------


def _unsupported(model: nn.Module, reason: str, faults: Sequence[str] = ()) -> HostError:
    more = [f"  … and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
    children = ", ".join(name for name, _ in model.named_children()) or "none"
    return HostError(
        "\n".join(
            [
                f"The points of {type(model).__name__} cannot be derived: {reason}.",
                *faults[:SHOWN_FAULTS],
                *more,
                "Name places by hand, modules whose output is features or begins with them; globs work:",
                "  kasmina_timm.grow(model, ['path.of.a.module'])",
                f"Modules that it has: {children}.",
            ]
        )
    )
