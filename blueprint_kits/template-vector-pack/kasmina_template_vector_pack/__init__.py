"""Seeds for Kasmina.

This module is the pack's entry point. It imports no torch: the seeds are named as text and imported when they are
first used, so that listing the installed packs stays quick.
"""

from __future__ import annotations

from collections.abc import Iterable

from kasmina_core import BlueprintSpec, Topology, hookimpl


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return the pack's seeds, for features of shape ``(b, d)``."""
    return [
        BlueprintSpec(
            "scale",
            Topology.VECTOR,
            "kasmina_template_vector_pack.seeds:ScaleSeed",
            scale_params,
            "A learned factor per feature",
        ),
        BlueprintSpec(
            "waist",
            Topology.VECTOR,
            "kasmina_template_vector_pack.seeds:WaistSeed",
            waist_params,
            "A feed-forward network through a narrow waist",
            options={"width": 4},
            source="https://arxiv.org/abs/1902.00751",
        ),
    ]


def scale_params(dim: int) -> int:
    """One factor per feature: ``dim``."""
    return dim


def waist_params(dim: int) -> int:
    """Two linear maps with biases, through 4 features: ``9 dim + 4``."""
    return 9 * dim + 4
