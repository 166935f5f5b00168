"""Small timm and torchvision models with random weights that declare their own points.

Nothing is downloaded: the classes are called as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from kasmina_core import HookedHost, InjectionPoint
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models import MobileNetV2  # type: ignore[import-untyped]  # ships no types
from torchvision.models import VisionTransformer as TorchvisionTransformer

from kasmina_timm.checkpointing import attach_guard
from kasmina_timm.structure import example_inputs, points

IMAGE_SIZE = 32


class DeclaresPoints(HookedHost):
    """Makes a timm or torchvision model a host: mixed into its class, before it."""

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return the model's points, one a stage or block; they are derived once."""
        known: list[InjectionPoint] | None = self.__dict__.get("_points")
        if known is None:
            known = self.__dict__["_points"] = points(cast("nn.Module", self), example=self.example_inputs())
        return known

    def example_inputs(self) -> Tensor:
        """Return two images, always the same ones."""
        return cast("Tensor", example_inputs(cast("nn.Module", self), IMAGE_SIZE))

    def register_slot(self, name: str, slot: nn.Module) -> None:
        """Pass the features at point ``name`` through ``slot``; guard it against checkpointing that passes it by."""
        super().register_slot(name, slot)
        path = next(point.path for point in self.injection_points() if point.name == name)
        guards: dict[str, RemovableHandle | None] = self.__dict__.setdefault("_slot_guards", {})
        guards[name] = attach_guard(cast("nn.Module", self), path)

    def unregister_slot(self, name: str) -> None:
        """Undo `register_slot`; nothing happens if there is no slot."""
        super().unregister_slot(name)
        if (guard := self.__dict__.get("_slot_guards", {}).pop(name, None)) is not None:
            guard.remove()


class ConvNeXtHost(DeclaresPoints, ConvNeXt):
    """timm's ConvNeXt as a host."""


class ResNetHost(DeclaresPoints, ResNet):
    """timm's ResNet as a host."""


class VisionTransformerHost(DeclaresPoints, VisionTransformer):
    """timm's vision transformer as a host."""


class TorchvisionMobileNetHost(DeclaresPoints, MobileNetV2):  # type: ignore[misc]  # ships no types
    """torchvision's MobileNetV2 as a host."""


class TorchvisionTransformerHost(DeclaresPoints, TorchvisionTransformer):  # type: ignore[misc]  # ships no types
    """torchvision's vision transformer as a host."""


def convnext_mini(
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    depths: Sequence[int] = (1, 1, 1, 1),
    dims: Sequence[int] = (16, 24, 32, 48),
    patch_size: int = 2,
    drop_path_rate: float = 0.0,
) -> ConvNeXtHost:
    """Return a ConvNeXt classifier of 4 stages, for images of 16 pixels or more. Options: those of timm's class."""
    return ConvNeXtHost(
        in_chans=in_channels,
        num_classes=num_classes,
        depths=tuple(depths),
        dims=tuple(dims),
        patch_size=patch_size,
        drop_path_rate=drop_path_rate,
    )


def resnet_mini(
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    layers: Sequence[int] = (1, 1, 1, 1),
    channels: Sequence[int] = (16, 24, 32, 64),
    stem_width: int = 16,
    drop_path_rate: float = 0.0,
) -> ResNetHost:
    """Return a ResNet classifier of a stem and 4 stages. Options: those of timm's class."""
    return ResNetHost(
        BasicBlock,  # type: ignore[arg-type]  # timm means the class
        tuple(layers),
        in_chans=in_channels,
        num_classes=num_classes,
        channels=tuple(channels),
        stem_width=stem_width,
        drop_path_rate=drop_path_rate,
    )


def vit_mini(
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int = IMAGE_SIZE,
    patch_size: int = 8,
    dim: int = 32,
    depth: int = 2,
    num_heads: int = 4,
) -> VisionTransformerHost:
    """Return a vision transformer of ``depth`` blocks of width ``dim`` that classifies images."""
    return VisionTransformerHost(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=2.0,
    )


def torchvision_mobilenet_mini(
    *, in_channels: int = 3, num_classes: int = 10, width_mult: float = 0.25
) -> TorchvisionMobileNetHost:
    """Return a MobileNetV2 classifier whose stages are ``width_mult`` times as wide as usual."""
    host = TorchvisionMobileNetHost(num_classes, width_mult)
    first = host.features[0][0]
    if in_channels != first.in_channels:  # torchvision's class takes three
        host.features[0][0] = nn.Conv2d(in_channels, first.out_channels, 3, stride=2, padding=1, bias=False)
    return host


def torchvision_vit_mini(
    *,
    num_classes: int = 10,
    image_size: int = IMAGE_SIZE,
    patch_size: int = 8,
    dim: int = 32,
    depth: int = 2,
    num_heads: int = 4,
) -> TorchvisionTransformerHost:
    """Return a vision transformer of ``depth`` encoder layers of width ``dim`` that classifies images."""
    host = TorchvisionTransformerHost(
        image_size, patch_size, depth, num_heads, dim, 2 * dim, num_classes=num_classes
    )
    # Zero otherwise: no other parameter would get a gradient.
    nn.init.trunc_normal_(host.heads.head.weight, std=0.02)
    return host
