"""A small classifier of images that can grow."""

from __future__ import annotations

from kasmina_layers.conv_host import ConvHost
from torch import nn

from kasmina_core import Topology


class CNNHost(ConvHost):
    """A small convolutional classifier of images ``(b, c, h, w)``; its arguments are those of `ConvHost`.

    >>> host = CNNHost(n_blocks=3, base_channels=8)
    >>> [(point.name, point.dim) for point in host.injection_points()]
    [('block2', 16), ('block3', 32)]
    """

    conv = nn.Conv2d
    batch_norm = nn.BatchNorm2d
    max_pool = nn.MaxPool2d
    topology = Topology.CNN
