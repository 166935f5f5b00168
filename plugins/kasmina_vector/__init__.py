"""The bundled pack of seeds for vectors, and a small perceptron to grow.

This module is the pack's entry point and its door. It imports no torch: seeds and host are named as text and
imported when they are first used. PYTEST_DONT_REWRITE: see `kasmina_core`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kasmina_layers.sizes import (
    DEFAULT_EXPANSION,
    DEFAULT_REDUCTION,
    layer_norm_refusal,
    mlp_params,
    norm_params,
    waist_params,
)

from kasmina_core import BlueprintSpec, HostSpec, Topology, hookimpl

if TYPE_CHECKING:
    from kasmina_vector.host import MLPHost as MLPHost

__all__ = ["MLPHost", "kasmina_blueprints", "kasmina_hosts"]


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return the pack's seeds, for features of shape ``(b, d)``."""
    return [
        BlueprintSpec(
            "bottleneck",
            Topology.VECTOR,
            "kasmina_layers.features:BottleneckSeed",
            waist_params,
            "Two linear maps through a narrow waist: few parameters at large widths",
            options={"reduction": DEFAULT_REDUCTION},
            source="https://arxiv.org/abs/1902.00751",
        ),
        BlueprintSpec(
            "mlp",
            Topology.VECTOR,
            "kasmina_layers.features:MLPSeed",
            mlp_params,
            "Feed-forward network with pre-normalisation: the most capable seed, and the largest",
            options={"expansion": DEFAULT_EXPANSION},
            accepts_width=layer_norm_refusal,
            source="https://arxiv.org/abs/1706.03762",
        ),
        BlueprintSpec(
            "norm",
            Topology.VECTOR,
            "kasmina_layers.features:NormSeed",
            norm_params,
            "Learned mixture of the features and their layer normalisation",
            accepts_width=layer_norm_refusal,
            source="https://arxiv.org/abs/1607.06450",
        ),
    ]


@hookimpl
def kasmina_hosts() -> Iterable[HostSpec]:
    """Return the pack's host."""
    return [
        HostSpec(
            "mlp",
            "kasmina_vector.host:MLPHost",
            Topology.VECTOR,
            "Small perceptron for tables; a slot after every hidden layer",
        )
    ]


# No __dir__: pluggy before 1.7 reads every name that dir() lists, and reading MLPHost imports torch.
def __getattr__(name: str) -> Any:
    if name == "MLPHost":
        from kasmina_vector.host import MLPHost

        return MLPHost
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
