"""The bundled pack of transformer seeds, and a small language model to grow.

This module is the pack's entry point and its door. It imports no torch: seeds and host are named as text and
imported when they are first used. PYTEST_DONT_REWRITE: see `kasmina_core`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kasmina_layers.sizes import (
    DEFAULT_COPIES,
    DEFAULT_EXPANSION,
    layer_norm_refusal,
    mlp_params,
    norm_params,
)

from kasmina_core import BlueprintSpec, HostSpec, Topology, hookimpl
from kasmina_transformer import sizes

if TYPE_CHECKING:
    from kasmina_transformer.host import TransformerHost as TransformerHost

__all__ = ["TransformerHost", "kasmina_blueprints", "kasmina_hosts"]


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return the pack's seeds, for features of shape ``(b, t, d)``."""
    return [
        BlueprintSpec(
            "attention",
            Topology.TRANSFORMER,
            "kasmina_transformer.blueprints.attention:AttentionSeed",
            sizes.attention_params,
            "Self-attention with pre-normalisation; causal where the host is",
            options={"heads": None},
            accepts_width=layer_norm_refusal,
            takes_causal=True,
            mixes="positions",
            source="https://arxiv.org/abs/1706.03762",
        ),
        BlueprintSpec(
            "block",
            Topology.TRANSFORMER,
            "kasmina_transformer.blueprints.block:BlockSeed",
            sizes.block_params,
            "Whole layers: attention and a feed-forward network with pre-normalisation; causal where the host is",
            options={"heads": None, "expansion": DEFAULT_EXPANSION, "copies": DEFAULT_COPIES},
            accepts_width=layer_norm_refusal,
            takes_causal=True,
            mixes="positions",
            source="https://arxiv.org/abs/2002.04745",
        ),
        BlueprintSpec(
            "lora",
            Topology.TRANSFORMER,
            "kasmina_transformer.blueprints.lora:LoRASeed",
            sizes.lora_params,
            "Low-rank linear update: the fewest parameters that mix features",
            options={"rank": None},
            source="https://arxiv.org/abs/2106.09685",
        ),
        BlueprintSpec(
            "mlp",
            Topology.TRANSFORMER,
            "kasmina_layers.features:MLPSeed",
            mlp_params,
            "Position-wise feed-forward network with pre-normalisation",
            options={"expansion": DEFAULT_EXPANSION},
            accepts_width=layer_norm_refusal,
            source="https://arxiv.org/abs/1706.03762",
        ),
        BlueprintSpec(
            "norm",
            Topology.TRANSFORMER,
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
            "transformer",
            "kasmina_transformer.host:TransformerHost",
            Topology.TRANSFORMER,
            "Small causal language model with a tied head; a slot after every layer",
        )
    ]


# No __dir__: pluggy before 1.7 reads every name that dir() lists, and reading TransformerHost imports torch.
def __getattr__(name: str) -> Any:
    if name == "TransformerHost":
        from kasmina_transformer.host import TransformerHost

        return TransformerHost
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
