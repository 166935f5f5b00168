"""The bundled pack of convolutional seeds, and a small convolutional host to grow.

This module is the pack's entry point and its door. It imports no torch: seeds and host are named as text and
imported when they are first used. PYTEST_DONT_REWRITE: see `kasmina_core`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kasmina_layers.sizes import (
    DEFAULT_COPIES,
    DEFAULT_REDUCTION,
    bottleneck_refusal,
    norm_params,
    waist_params,
)

from kasmina_cnn import sizes
from kasmina_core import BlueprintSpec, HostSpec, Topology, hookimpl

if TYPE_CHECKING:
    from kasmina_cnn.host import CNNHost as CNNHost

__all__ = ["CNNHost", "kasmina_blueprints", "kasmina_hosts"]


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return the pack's seeds, for features of shape ``(b, c, h, w)``."""
    return [
        BlueprintSpec(
            "attention",
            Topology.CNN,
            "kasmina_cnn.blueprints.attention:AttentionSeed",
            waist_params,
            "Channel attention: scales each channel by what the whole image holds",
            options={"reduction": DEFAULT_REDUCTION},
            source="https://arxiv.org/abs/1709.01507",
        ),
        BlueprintSpec(
            "block",
            Topology.CNN,
            "kasmina_cnn.blueprints.conv:BlockSeed",
            sizes.block_params,
            "Whole residual blocks: two 3x3 convolutions, a norm before each",
            options={"copies": DEFAULT_COPIES},
            source="https://arxiv.org/abs/1603.05027",
        ),
        BlueprintSpec(
            "bottleneck",
            Topology.CNN,
            "kasmina_cnn.blueprints.conv:BottleneckSeed",
            sizes.bottleneck_params,
            "3x3 convolution through a narrow waist: few parameters at large widths",
            options={"reduction": DEFAULT_REDUCTION},
            accepts_width=bottleneck_refusal,
            source="https://arxiv.org/abs/1512.03385",
        ),
        BlueprintSpec(
            "conv_enhance",
            Topology.CNN,
            "kasmina_cnn.blueprints.conv:ConvLightSeed",
            sizes.conv_light_params,
            "conv_light under a former name; conv_heavy is its larger size",
            source="https://arxiv.org/abs/1603.05027",
        ),
        BlueprintSpec(
            "conv_heavy",
            Topology.CNN,
            "kasmina_cnn.blueprints.conv:ConvHeavySeed",
            sizes.conv_heavy_params,
            "Two 3x3 convolutions: the most capable seed, and the largest",
            source="https://arxiv.org/abs/1603.05027",
        ),
        BlueprintSpec(
            "conv_light",
            Topology.CNN,
            "kasmina_cnn.blueprints.conv:ConvLightSeed",
            sizes.conv_light_params,
            "A 3x3 and a 1x1 convolution: about half the size of conv_heavy",
            source="https://arxiv.org/abs/1603.05027",
        ),
        BlueprintSpec(
            "depthwise",
            Topology.CNN,
            "kasmina_cnn.blueprints.conv:DepthwiseSeed",
            sizes.depthwise_params,
            "Depthwise separable convolution: a 3x3 per channel, then a 1x1 across channels",
            source="https://arxiv.org/abs/1704.04861",
        ),
        BlueprintSpec(
            "norm",
            Topology.CNN,
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
            "cnn",
            "kasmina_cnn.host:CNNHost",
            Topology.CNN,
            "Small convolutional classifier; a slot after every block but the first",
        )
    ]


# No __dir__: pluggy before 1.7 reads every name that dir() lists, and reading CNNHost imports torch.
def __getattr__(name: str) -> Any:
    if name == "CNNHost":
        from kasmina_cnn.host import CNNHost

        return CNNHost
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
