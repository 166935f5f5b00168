"""A pack of seeds for sequence models: SwiGLU, gated attention unit, mixture of experts and adapter.

This module is the pack's entry point. It imports no torch: the seeds are named as text and imported when one is first
made.
"""

from __future__ import annotations

from collections.abc import Iterable

from kasmina_core import BlueprintSpec, Topology, hookimpl
from kasmina_sequence import sizes

__all__ = ["kasmina_blueprints"]


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return the pack's seeds, for features of shape ``(b, t, d)``."""
    return [
        BlueprintSpec(
            "gau",
            Topology.TRANSFORMER,
            "kasmina_sequence.blueprints.gau:GAUSeed",
            sizes.gau_params,
            "Gated attention unit: attention and feed-forward network in one; causal where the host is",
            options={"expansion": sizes.GAU_EXPANSION, "key_dim": None},
            accepts_width=sizes.rms_norm_refusal,
            takes_causal=True,
            mixes="positions",
            source="https://arxiv.org/abs/2202.10447",
        ),
        BlueprintSpec(
            "moe",
            Topology.TRANSFORMER,
            "kasmina_sequence.blueprints.moe:MoESeed",
            sizes.moe_params,
            "Mixture of experts with soft routing: small networks, weighted for each position",
            options={"experts": sizes.MOE_EXPERTS, "expansion": sizes.MOE_EXPANSION},
            accepts_width=sizes.rms_norm_refusal,
            source="https://arxiv.org/abs/1312.4314",
        ),
        BlueprintSpec(
            "rmsnorm_adapter",
            Topology.TRANSFORMER,
            "kasmina_sequence.blueprints.rmsnorm_adapter:RMSNormAdapterSeed",
            sizes.rmsnorm_adapter_params,
            "Low-rank network on normalised features: few parameters, and not linear",
            options={"rank": None},
            accepts_width=sizes.rms_norm_refusal,
            source="https://arxiv.org/abs/1902.00751",
        ),
        BlueprintSpec(
            "swiglu",
            Topology.TRANSFORMER,
            "kasmina_sequence.blueprints.swiglu:SwiGLUSeed",
            sizes.swiglu_params,
            "Feed-forward network whose hidden features are gated, as in recent language models",
            options={"expansion": sizes.SWIGLU_EXPANSION},
            accepts_width=sizes.rms_norm_refusal,
            source="https://arxiv.org/abs/2002.05202",
        ),
    ]
