"""A small classifier of volumes that can grow."""

from __future__ import annotations

from kasmina_layers.conv_host import ConvHost
from torch import nn

from kasmina_core import Topology


class VolumeHost(ConvHost):
    """A small convolutional classifier of volumes ``(b, c, d, h, w)``; its arguments are those of `ConvHost`.

    >>> host = VolumeHost(n_blocks=3, base_channels=8)
    >>> [(point.name, point.dim) for point in host.injection_points()]
    [('block2', 16), ('block3', 32)]
    """

    conv = nn.Conv3d
    batch_norm = nn.BatchNorm3d
    max_pool = nn.MaxPool3d
    topology = Topology.VOLUME
