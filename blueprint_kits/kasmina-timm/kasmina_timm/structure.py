"""Points of a timm or torchvision model, from its modules, proved by one forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from kasmina_core import HostError, InjectionPoint, Topology
from torch import Tensor, nn

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
    "VGG": "features",
}
"""Sequences in torchvision's models by class: the last module at each resolution is a place."""

CHANNELS_LAST: Final = "its features are channels-last, (b, h, w, c), and a slot takes (b, c, h, w)"

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
      ConvNeXt, VGG, MobileNet, EfficientNet, DenseNet, …; the encoder layers of the vision transformer.

    One forward in evaluation mode proves each: it runs once, and returns ``(b, c, h, w)`` or ``(b, t, d)`` of the
    declared width. Where the declared module is not called (its list is walked, or gradient checkpointing flattens
    it), the module that computes the same features is taken. A point is named after the declared module, ``blocks_3``
    for ``blocks.3``. No point is causal.

    Args:
        model: The model, with or without a head.
        every: Distance between points: 2 gives every second one.
        example: Inputs for that forward, a tensor or a tuple of arguments; ``None`` for `example_inputs`.

    Raises:
        HostError: If the model is of another library or kind, or a place cannot hold a slot, as where features are
            channels-last; the message says how to name places by hand.
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
        found = _proved(model, _torchvision_places(model, kind) if kind else _timm_places(model), given)
    if not 1 <= every <= len(found):
        raise ValueError(f"every must be from 1 to {len(found)}, the number of places, not {every!r}.")
    return found[every - 1 :: every]


def example_inputs(model: nn.Module, size: int = EXAMPLE_SIZE) -> Tensor:
    """Return two images for one forward of a model, always the same ones, of its device and dtype.

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
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels < SPACE_TO_DEPTH:
        channels = first.in_channels
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(
        model, "image_size", None
    )
    if fixed is None and config.get("fixed_input_size"):
        fixed = made_for
    least = (config.get("min_input_size") or (0, 0, 0))[1:]
    h, w = (max(size, side) for side in least) if fixed is None else _pair(fixed)
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    pixels = torch.linspace(-1.0, 1.0, 2 * channels * h * w, device=weight.device)
    return pixels.view(2, channels, h, w).to(weight.dtype)


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
    return getattr(declared, "value", declared) == "NHWC" or torchvision_kind(model) == "SwinTransformer"


def is_channels_last(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether features of a model of that shape are ``(b, h, w, c)``: it says so, or its widths show it."""
    if len(shape) != Topology.CNN.ndim:
        return False
    widths = {int(entry["num_chs"]) for entry in _feature_info(model)}
    return says_channels_last(model) or (shape[-1] in widths and shape[1] not in widths)


# -- what models declare ----------------------------------------------------------------------------------------------


def _feature_info(model: nn.Module) -> list[Mapping[str, Any]]:
    info: Any = getattr(model, "feature_info", None) or []
    return list(info.get_dicts() if hasattr(info, "get_dicts") else info)


def _timm_places(model: nn.Module) -> list[Place]:
    declared = [(str(entry["module"]), int(entry["num_chs"])) for entry in _feature_info(model)]
    blocks, width = getattr(model, "blocks", None), getattr(model, "embed_dim", None)
    if not declared and isinstance(blocks, (nn.Sequential, nn.ModuleList)) and isinstance(width, int):
        declared = [(f"blocks.{i}", width) for i in range(len(blocks))]
    if not declared:
        raise _unsupported(
            model, "it is no model of timm with feature_info or blocks, and none of torchvision"
        )
    named = dict(model.named_modules(remove_duplicate=False))
    return [
        Place(path, width, tuple(dict.fromkeys(_candidates(named, path, i, len(declared)))))
        for i, (path, width) in enumerate(declared)
    ]


def _candidates(named: Mapping[str, nn.Module], path: str, i: int, count: int) -> Iterator[str]:
    """Yield where the features of a declared place may be found: there, under timm's wrappers, or in a list of stages."""
    inside = [name for name in named if name.endswith(f".{path}")]
    for name in (path, path.replace(".", "_"), *(inside if len(inside) == 1 else [])):
        yield from _ends(named, name)
    for name in _LISTS:
        if isinstance(stages := named.get(name), (nn.Sequential, nn.ModuleList)) and len(stages) == count:
            yield from _ends(named, f"{name}.{i}")


def _ends(named: Mapping[str, nn.Module], path: str) -> Iterator[str]:
    """Yield a path, then those of the last module in it, the last in that, …, as long as they are lists."""
    while path and path in named:
        yield path
        module = named[path]
        if not (isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module)):
            return
        path = f"{path}.{list(module._modules)[-1]}"


def _torchvision_places(model: nn.Module, kind: str) -> list[Place]:
    if says_channels_last(model):
        raise _unsupported(model, CHANNELS_LAST)
    if kind not in TORCHVISION_PLACES:
        known = ", ".join(sorted([*TORCHVISION_PLACES, *TORCHVISION_SEQUENCES]))
        raise _unsupported(model, f"of torchvision's models these are known: {known}")
    paths: list[str] = []
    for path in TORCHVISION_PLACES[kind]:
        parent, star, _ = path.partition(".*")
        children = model.get_submodule(parent).named_children() if star else []
        paths += [f"{parent}.{name}" for name, _ in children] if star else [path]
    return [Place(path, None, (path,)) for path in paths]


# -- what a forward shows ---------------------------------------------------------------------------------------------


def _proved(model: nn.Module, places: Sequence[Place], example: object) -> list[InjectionPoint]:
    """Return a point for each place.

    Raises:
        HostError: If there is a place without; the message lists the faults, and the places that would do.
    """
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
    if faults:
        last = any("channels-last" in fault for fault in faults)
        reason = CHANNELS_LAST if last else f"{len(faults)} of its {len(places)} places cannot hold a slot"
        raise _unsupported(model, reason, faults, [] if last else [point.path for point in found])
    return found


def _point(place: Place, fired: Mapping[str, Sequence[Fired]], channels_last: bool) -> InjectionPoint | str:
    """Return a point at the first candidate that can hold a slot, or why none can."""
    faults: dict[str, str] = {}
    for path in place.candidates:
        layout = _layout(fired[path], place.width, channels_last)
        if not isinstance(layout, str):
            topology, dim = layout
            return InjectionPoint(place.path.replace(".", "_"), path, dim, topology)
        faults[path] = layout
    of_called = [fault for path, fault in faults.items() if fired[path]]
    return next(iter([*of_called, *faults.values()]), "there is no such module")


def _layout(fired: Sequence[Fired], width: int | None, channels_last: bool) -> tuple[Topology, int] | str:
    """Return layout and width of what a module returned, or why it cannot hold a slot.

    Args:
        fired: What it returned, call by call.
        width: Declared width of the features, if any.
        channels_last: Whether the model declares that images are ``(b, h, w, c)``.
    """
    if len(fired) != 1:
        return f"is called {len(fired)} times by a forward pass, not once" if fired else "is not called"
    shape = fired[0]
    if isinstance(shape, str):
        return f"returns {shape}"
    topology = {each.ndim: each for each in (Topology.CNN, Topology.TRANSFORMER)}.get(len(shape))
    if topology is None:
        return f"has features of shape {shape}"
    if topology is Topology.CNN and (channels_last or shape[1] != width == shape[-1]):
        return f"has channels-last features of shape {shape}"
    dim = shape[topology.feature_dim]
    if width not in (None, dim):
        return f"has features of shape {shape}, and a declared width of {width}"
    return topology, dim


def _ends_of_resolutions(model: nn.Module, sequence: str, example: object) -> list[InjectionPoint]:
    """Return a point after the last module of a sequence at each resolution."""
    paths = [f"{sequence}.{name}" for name, _ in model.get_submodule(sequence).named_children()]
    ends: dict[tuple[int, ...], tuple[str, int]] = {}
    for path, calls in _fired(model, paths, example).items():
        if len(calls) == 1 and isinstance(shape := calls[0], tuple) and len(shape) == Topology.CNN.ndim:
            ends[shape[2:]] = (path, shape[1])
    if not ends:
        raise _unsupported(model, f"nothing in its '{sequence}' returns (b, c, h, w)")
    return [InjectionPoint(path.replace(".", "_"), path, dim, Topology.CNN) for path, dim in ends.values()]


def _fired(model: nn.Module, paths: Iterable[str], example: object) -> dict[str, list[Fired]]:
    """Run a model once in evaluation mode and return what the modules at ``paths`` returned, call by call.

    Modes and random numbers are afterwards as before.

    Raises:
        HostError: If the model does not take the example.
    """
    fired: dict[str, list[Fired]] = {path: [] for path in paths}
    modes = {module: module.training for module in model.modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        for path, calls in fired.items():
            handle = model.get_submodule(path).register_forward_hook(
                lambda _m, _a, output, calls=calls: calls.append(_seen(output))
            )
            stack.callback(handle.remove)
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.no_grad())
        try:
            model.eval()
            model(*example) if isinstance(example, tuple) else model(example)
        except Exception as error:
            shape = f" of shape {tuple(example.shape)}" if isinstance(example, Tensor) else ""
            raise HostError(
                f"The points of {type(model).__name__} cannot be proved: it does not take an example{shape}: {error}\n"
                "Pass one that it takes: example=tensor."
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
    return fired


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


def _unsupported(
    model: nn.Module, reason: str, faults: Sequence[str] = (), usable: Sequence[str] = ()
) -> HostError:
    places = ", ".join(repr(path) for path in usable) or "'path.of.a.module'"
    more = [f"  … and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
    own = (
        "these of its own would do"
        if usable
        else "modules whose output is (b, c, h, w) or (b, t, d), or begins with that"
    )
    children = ", ".join(name for name, _ in model.named_children()) or "none"
    return HostError(
        "\n".join(
            [
                f"The points of {type(model).__name__} cannot be derived: {reason}.",
                *faults[:SHOWN_FAULTS],
                *more,
                f"Name places by hand, {own}; globs work:",
                f"  kasmina_timm.grow(model, [{places}])",
                f"Modules that it has: {children}.",
            ]
        )
    )
