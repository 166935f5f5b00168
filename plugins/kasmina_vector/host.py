"""A small perceptron that can grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from kasmina_layers.layers import spread_values
from kasmina_layers.sizes import require_at_least
from torch import Tensor, nn

from kasmina_core import HookedHost, InjectionPoint, Topology


class HiddenLayer(nn.Module):
    """``relu(linear(x))``.

    Args:
        in_features: Width of the input.
        width: Width of the output.

    Shape:
        ``(b, in_features)`` to ``(b, width)``.
    """

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's features."""
        return F.relu(self.linear(x))


class MLPHost(HookedHost, nn.Module):
    """A small perceptron for rows of a table; a slot after every hidden layer.

    The points are ``layer1``, ``layer2``, …, all of width ``width``.

    Args:
        in_features: Values per sample.
        num_classes: Number of classes, or of values to predict.
        n_layers: Number of hidden layers.
        width: Width of the hidden layers.

    Shape:
        ``(b, in_features)``, or ``(b, …)`` with as many values per sample, to logits ``(b, num_classes)``.

    Raises:
        ValueError: If a number is below 1.

    >>> host = MLPHost(64, width=16)
    >>> [(point.name, point.dim) for point in host.injection_points()]
    [('layer1', 16), ('layer2', 16)]
    """

    def __init__(
        self, in_features: int = 64, num_classes: int = 10, *, n_layers: int = 2, width: int = 32
    ) -> None:
        super().__init__()
        self.in_features = require_at_least("MLPHost", "in_features", in_features, 1)
        require_at_least("MLPHost", "num_classes", num_classes, 1)
        require_at_least("MLPHost", "n_layers", n_layers, 1)
        self.width = require_at_least("MLPHost", "width", width, 1)
        self.layers = nn.ModuleList(
            HiddenLayer(in_features if i == 0 else width, width) for i in range(n_layers)
        )
        self.head = nn.Linear(width, num_classes)

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return ``layer1``, ``layer2``, …, each at the output of its layer."""
        return [
            InjectionPoint(f"layer{i + 1}", f"layers.{i}", self.width, Topology.VECTOR)
            for i in range(len(self.layers))
        ]

    def example_inputs(self) -> tuple[Tensor]:
        """Return two samples of the model's device and dtype, always the same ones."""
        return (spread_values((2, self.in_features), self.head.weight),)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of samples ``x``."""
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits
