"""A topology that no bundled one covers, with seeds and a host: stations that each measure features over time."""

from __future__ import annotations

from kasmina_core import BlueprintSpec, HostSpec, Topology, hookimpl

STATIONS = Topology.declare(
    "stations",
    "bnft",
    width="f",
    causal="t",
    memory_formats=("channels_last",),
    detach_input_in_blending=False,
)
"""``(b, n, f, t)``: samples, stations, features, time."""


def waist(dim: int) -> int:
    """Return the width of the bottleneck."""
    return max(1, dim // 4)


def norm_refusal(dim: int) -> str | None:
    """Say why the norm refuses a width."""
    return None if dim >= 2 else "one feature alone has no spread to normalise"


def norm_params(dim: int) -> int:
    return 2 * dim


def bottleneck_params(dim: int) -> int:
    return 2 * dim * waist(dim) + waist(dim) + dim


def conv_params(dim: int) -> int:
    return 3 * dim * dim + dim


@hookimpl
def kasmina_topologies() -> list[Topology]:
    return [STATIONS]


@hookimpl
def kasmina_blueprints() -> list[BlueprintSpec]:
    return [
        BlueprintSpec(
            "norm",
            STATIONS,
            "kasmina_stations.seeds:NormSeed",
            norm_params,
            "Layer normalisation over the features",
            accepts_width=norm_refusal,
            source="https://arxiv.org/abs/1607.06450",
        ),
        BlueprintSpec(
            "bottleneck",
            STATIONS,
            "kasmina_stations.seeds:BottleneckSeed",
            bottleneck_params,
            "Two linear maps through a narrow waist",
            source="https://arxiv.org/abs/1902.00751",
        ),
        BlueprintSpec(
            "conv",
            STATIONS,
            "kasmina_stations.seeds:ConvSeed",
            conv_params,
            "A convolution over time, which looks back only in a causal host",
            takes_causal=True,
            source="https://arxiv.org/abs/1609.03499",
        ),
    ]


@hookimpl
def kasmina_hosts() -> list[HostSpec]:
    return [
        HostSpec(
            "forecast",
            "kasmina_stations.hosts:Forecast",
            STATIONS,
            "Forecasts the next value of each station",
        )
    ]
