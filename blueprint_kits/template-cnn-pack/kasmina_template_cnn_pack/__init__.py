"""Convolutional seeds for Kasmina.

This module is the pack's entry point. It imports no torch: the seeds are named as text and imported when they are
first used, so that listing the installed packs stays quick.
"""

from __future__ import annotations

from collections.abc import Iterable

from kasmina_core import BlueprintSpec, Topology, hookimpl

MIN_MIXER_WIDTH = 4


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return the pack's seeds, for features of shape ``(b, c, h, w)``."""
    return [
        BlueprintSpec(
            "edges",
            Topology.CNN,
            "kasmina_template_cnn_pack.seeds:EdgeSeed",
            edge_params,
            "A 3x3 convolution per channel, added to the features",
            source="https://arxiv.org/abs/1704.04861",
        ),
        BlueprintSpec(
            "mixer",
            Topology.CNN,
            "kasmina_template_cnn_pack.seeds:MixerSeed",
            mixer_params,
            "Mixes the channels through a narrow waist",
            options={"reduction": 4},
            accepts_width=mixer_refusal,
            source="https://arxiv.org/abs/1512.03385",
        ),
    ]


def edge_params(dim: int) -> int:
    """9 weights and a bias per channel: ``10 dim``."""
    return 10 * dim


def mixer_params(dim: int) -> int:
    """Two 1x1 convolutions with biases, through the waist ``m = dim // 4``: ``2 dim m + m + dim``."""
    m = dim // 4
    return 2 * dim * m + m + dim


def mixer_refusal(dim: int) -> str | None:
    """Return why a width is refused, or ``None`` if it is accepted."""
    return f"its waist needs {MIN_MIXER_WIDTH} channels or more" if dim < MIN_MIXER_WIDTH else None
