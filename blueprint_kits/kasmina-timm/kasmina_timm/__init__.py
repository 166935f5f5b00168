"""The pack that makes models of ``timm`` and ``torchvision`` hosts of Kasmina.

This module is the pack's entry point and its door. It imports neither torch, timm nor torchvision: hosts are named as
text, and what else is here is imported when it is first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kasmina_core import HostSpec, Topology, hookimpl

if TYPE_CHECKING:
    from kasmina_timm.growing import GrowingModel as GrowingModel
    from kasmina_timm.growing import grow as grow
    from kasmina_timm.positions import TimmCall as TimmCall
    from kasmina_timm.structure import example_inputs as example_inputs
    from kasmina_timm.structure import points as points

_HOME = {
    "GrowingModel": "growing",
    "TimmCall": "positions",
    "example_inputs": "structure",
    "grow": "growing",
    "points": "structure",
}

__all__ = ["GrowingModel", "TimmCall", "example_inputs", "grow", "kasmina_hosts", "points"]


@hookimpl
def kasmina_hosts() -> Iterable[HostSpec]:
    """Return the pack's hosts: small models with random weights."""
    images, tokens = Topology.CNN, Topology.TRANSFORMER
    return [
        HostSpec("convnext-mini", "kasmina_timm.hosts:convnext_mini", images, "timm's ConvNeXt, 4 stages"),
        HostSpec("resnet-mini", "kasmina_timm.hosts:resnet_mini", images, "timm's ResNet, 4 stages"),
        HostSpec(
            "torchvision-mobilenet-mini",
            "kasmina_timm.hosts:torchvision_mobilenet_mini",
            images,
            "torchvision's MobileNetV2, narrow",
        ),
        HostSpec(
            "torchvision-vit-mini",
            "kasmina_timm.hosts:torchvision_vit_mini",
            tokens,
            "torchvision's vision transformer",
        ),
        HostSpec("vit-mini", "kasmina_timm.hosts:vit_mini", tokens, "timm's vision transformer"),
    ]


# No __dir__: pluggy before 1.7 reads every name that dir() lists, and reading these imports torch.
def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kasmina_timm.{_HOME[name]}"), name)
    globals()[name] = value
    return value
