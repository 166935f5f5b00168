"""A causal forecaster; it holds the features of its second block as ``(b, t, n, f)``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasmina_core import HookedHost, InjectionPoint
from kasmina_stations import STATIONS


class Block(nn.Module):
    """A causal convolution over time; features as ``layout``."""

    def __init__(self, inputs: int, outputs: int, layout: str) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3)
        self.there = tuple(STATIONS.axes.index(axis) for axis in layout)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(F.pad(x.flatten(0, 1), (2, 0))))
        return y.unflatten(0, x.shape[:2]).permute(self.there).contiguous()


class Forecast(HookedHost, nn.Module):
    """Values ``(b, n, t)`` to forecasts of the next ones, ``(b, n, t)``."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.first = Block(1, width, "bnft")
        self.second = Block(width, width, "btnf")
        self.head = nn.Linear(width, 1)

    def injection_points(self) -> list[InjectionPoint]:
        return [
            InjectionPoint("first", "first", self.width, STATIONS, causal=True),
            InjectionPoint("second", "second", self.width, STATIONS, causal=True, layout="btnf"),
        ]

    def example_inputs(self) -> tuple[Tensor]:
        return (torch.linspace(-1, 1, 30).view(2, 3, 5).sin(),)

    def forward(self, x: Tensor) -> Tensor:
        held = self.second(self.first(x[:, :, None]))  # (b, t, n, f)
        y: Tensor = self.head(held).squeeze(-1)
        return y.mT
