"""A pack of convolutional seeds: ConvNeXt, ECA, CBAM and the inverted residual of MobileNetV2.

This module is the pack's entry point. It imports no torch: the seeds are named as text and imported when one is first
made.
"""

from __future__ import annotations

from collections.abc import Iterable

from kasmina_core import BlueprintSpec, Topology, hookimpl
from kasmina_vision import sizes

__all__ = ["kasmina_blueprints"]


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return the pack's seeds, for features of shape ``(b, c, h, w)``."""
    return [
        BlueprintSpec(
            "cbam",
            Topology.CNN,
            "kasmina_vision.blueprints.cbam:CBAMSeed",
            sizes.cbam_params,
            "Channel attention, then spatial attention: scales each channel, then each pixel",
            options={"reduction": sizes.CBAM_REDUCTION},
            source="https://arxiv.org/abs/1807.06521",
        ),
        BlueprintSpec(
            "convnext",
            Topology.CNN,
            "kasmina_vision.blueprints.convnext:ConvNeXtSeed",
            sizes.convnext_params,
            "ConvNeXt block: a 7x7 per channel, then a network over the channels of each pixel",
            options={"kernel_size": sizes.CONVNEXT_KERNEL, "expansion": sizes.CONVNEXT_EXPANSION},
            accepts_width=sizes.convnext_refusal,
            source="https://arxiv.org/abs/2201.03545",
        ),
        BlueprintSpec(
            "eca",
            Topology.CNN,
            "kasmina_vision.blueprints.eca:ECASeed",
            sizes.eca_params,
            "Efficient channel attention: a handful of parameters, whatever the width",
            options={"kernel_size": None},
            source="https://arxiv.org/abs/1910.03151",
        ),
        BlueprintSpec(
            "inverted_residual",
            Topology.CNN,
            "kasmina_vision.blueprints.inverted_residual:InvertedResidualSeed",
            sizes.inverted_residual_params,
            "MobileNetV2 block: widens, filters each channel with a 3x3, narrows again",
            options={"expansion": sizes.INVERTED_EXPANSION},
            source="https://arxiv.org/abs/1801.04381",
        ),
    ]
