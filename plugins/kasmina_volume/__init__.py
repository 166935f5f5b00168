"""The bundled pack of seeds for volumes, and a small 3-D convolutional host to grow.

This module is the pack's entry point and its door. It imports no torch: seeds and host are named as text and
imported when they are first used. PYTEST_DONT_REWRITE: see `kasmina_core`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kasmina_layers.sizes import DEFAULT_REDUCTION, bottleneck_refusal, norm_params

from kasmina_core import BlueprintSpec, HostSpec, Topology, hookimpl
from kasmina_volume import sizes

if TYPE_CHECKING:
    from kasmina_volume.host import VolumeHost as VolumeHost

__all__ = ["VolumeHost", "kasmina_blueprints", "kasmina_hosts"]


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return the pack's seeds, for features of shape ``(b, c, d, h, w)``."""
    return [
        BlueprintSpec(
            "bottleneck",
            Topology.VOLUME,
            "kasmina_volume.seeds:BottleneckSeed",
            sizes.bottleneck_params,
            "3x3x3 convolution through a narrow waist: few parameters at large widths",
            options={"reduction": DEFAULT_REDUCTION},
            accepts_width=bottleneck_refusal,
            source="https://arxiv.org/abs/1512.03385",
        ),
        BlueprintSpec(
            "conv",
            Topology.VOLUME,
            "kasmina_volume.seeds:ConvSeed",
            sizes.conv_params,
            "A 3x3x3 and a 1x1x1 convolution: the most capable seed, and the largest",
            source="https://arxiv.org/abs/1603.05027",
        ),
        BlueprintSpec(
            "depthwise",
            Topology.VOLUME,
            "kasmina_volume.seeds:DepthwiseSeed",
            sizes.depthwise_params,
            "Depthwise separable convolution: a 3x3x3 per channel, then a 1x1x1 across channels",
            source="https://arxiv.org/abs/1704.04861",
        ),
        BlueprintSpec(
            "norm",
            Topology.VOLUME,
            "kasmina_layers.convolutions:NormSeed",
            norm_params,
            "Learned mixture of the features and their group normalisation",
            source="https://arxiv.org/abs/1803.08494",
        ),
    ]


@hookimpl
def kasmina_hosts() -> Iterable[HostSpec]:
    """Return the pack's host."""
    return [
        HostSpec(
            "cnn3d",
            "kasmina_volume.host:VolumeHost",
            Topology.VOLUME,
            "Small classifier of volumes; a slot after every block but the first",
        )
    ]


# No __dir__: pluggy before 1.7 reads every name that dir() lists, and reading VolumeHost imports torch.
def __getattr__(name: str) -> Any:
    if name == "VolumeHost":
        from kasmina_volume.host import VolumeHost

        return VolumeHost
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
