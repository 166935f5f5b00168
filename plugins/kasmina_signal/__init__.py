"""The bundled pack of seeds for signals, and a small temporal convolutional network to grow.

This module is the pack's entry point and its door. It imports no torch: seeds and host are named as text and
imported when they are first used. PYTEST_DONT_REWRITE: see `kasmina_core`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kasmina_layers.sizes import DEFAULT_REDUCTION, layer_norm_refusal, norm_params, waist_params

from kasmina_core import BlueprintSpec, HostSpec, Topology, hookimpl
from kasmina_signal import sizes

if TYPE_CHECKING:
    from kasmina_signal.host import TCNHost as TCNHost

__all__ = ["TCNHost", "kasmina_blueprints", "kasmina_hosts"]


@hookimpl
def kasmina_blueprints() -> Iterable[BlueprintSpec]:
    """Return the pack's seeds, for features of shape ``(b, c, t)``; those that look along time are causal where the host is."""
    return [
        BlueprintSpec(
            "bottleneck",
            Topology.SIGNAL,
            "kasmina_signal.seeds:BottleneckSeed",
            waist_params,
            "Two linear maps through a narrow waist, at each time step by itself",
            options={"reduction": DEFAULT_REDUCTION},
            source="https://arxiv.org/abs/1902.00751",
        ),
        BlueprintSpec(
            "conv",
            Topology.SIGNAL,
            "kasmina_signal.seeds:ConvSeed",
            sizes.conv_params,
            "A convolution along time and a pointwise one; causal where the host is",
            options={"kernel": sizes.KERNEL, "dilation": 1},
            accepts_width=layer_norm_refusal,
            takes_causal=True,
            source="https://arxiv.org/abs/1803.01271",
        ),
        BlueprintSpec(
            "depthwise",
            Topology.SIGNAL,
            "kasmina_signal.seeds:DepthwiseSeed",
            sizes.depthwise_params,
            "Depthwise separable convolution: one along time per channel, then one across channels",
            options={"kernel": sizes.DEPTHWISE_KERNEL, "dilation": 1},
            accepts_width=layer_norm_refusal,
            takes_causal=True,
            source="https://arxiv.org/abs/1706.03059",
        ),
        BlueprintSpec(
            "dilated",
            Topology.SIGNAL,
            "kasmina_signal.seeds:DilatedSeed",
            sizes.dilated_params,
            "Gated dilated convolution along time: sees far with few weights",
            options={"kernel": sizes.KERNEL, "dilation": sizes.DILATION},
            takes_causal=True,
            source="https://arxiv.org/abs/1609.03499",
        ),
        BlueprintSpec(
            "norm",
            Topology.SIGNAL,
            "kasmina_signal.seeds:NormSeed",
            norm_params,
            "Learned mixture of the features and their layer normalisation per time step",
            accepts_width=layer_norm_refusal,
            source="https://arxiv.org/abs/1607.06450",
        ),
    ]


@hookimpl
def kasmina_hosts() -> Iterable[HostSpec]:
    """Return the pack's host."""
    return [
        HostSpec(
            "tcn",
            "kasmina_signal.host:TCNHost",
            Topology.SIGNAL,
            "Small temporal convolutional network, causal by default; a slot after every block",
        )
    ]


# No __dir__: pluggy before 1.7 reads every name that dir() lists, and reading TCNHost imports torch.
def __getattr__(name: str) -> Any:
    if name == "TCNHost":
        from kasmina_signal.host import TCNHost

        return TCNHost
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
