"""Convolutions in three dimensions as seeds; without docstrings of their own they show those of what they specialise."""

from __future__ import annotations

from typing import final

from kasmina_layers import convolutions
from torch import nn


@final
class BottleneckSeed(convolutions.BottleneckSeed):
    conv = nn.Conv3d


@final
class ConvSeed(convolutions.ConvLightSeed):
    conv = nn.Conv3d
    owner = "Blueprint 'conv'"


@final
class DepthwiseSeed(convolutions.DepthwiseSeed):
    conv = nn.Conv3d
