"""What is trained: the data, the hosts that lack capacity, and what may grow in them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Final, final

import torch
from kasmina_cnn import CNNHost
from kasmina_transformer import TransformerHost
from torch import Tensor, nn

from kasmina_core import HookedHost, InjectionPoint, Topology
from kasmina_core.experiments.tasks import Split, Task, load_task, moved
from kasmina_core.quiet import derived_seed, private_rng


@final
@dataclass(frozen=True, slots=True)
class Setting:
    """A task with hosts for it.

    Attributes:
        name: Name of the setting.
        task: Name of the data.
        hosts: Names of the hosts, by their normalisation.
        good: Blueprints worth growing here; the first is what an arm with a good pool grows.
        bad: Blueprints that are not: one harmful, one null or overfitting, of several.
        batch_size: Samples a training batch.
        interval: Optimiser steps between two looks at the validation loss; the lifecycle's epoch.
        intervals: What a run may cost, as so many intervals of the host alone.
        rates: Learning rates of Adam to choose from, the same for every arm.
        judged: Samples at most of the gate's and of the validation split.
        times: Shares of the budget at which the arm with fixed times germinates.
        unit: Unit of the metric.
        higher_is_better: Which way it points.
    """

    name: str
    task: str
    hosts: tuple[str, ...]
    good: tuple[str, str]
    bad: tuple[tuple[str, ...], tuple[str, ...]]
    batch_size: int
    interval: int
    intervals: int
    rates: tuple[float, ...]
    judged: int
    times: tuple[float, ...]
    unit: str
    higher_is_better: bool

    def shortened(self, share: float) -> Setting:
        """Return the same with a budget of that share; below a tenth the intervals are short too."""
        interval = self.interval if share >= 0.1 else 2
        return replace(self, intervals=max(6, round(self.intervals * share)), interval=interval)

    def blueprints(self, pool: str, slot: str, seed: int) -> Sequence[str]:
        """Return what may germinate in a slot, in order; a half-bad pool is mixed by slot and seed."""
        if pool == "good":
            return self.good[:1]
        drawn = random.Random(derived_seed(seed, "pool", slot))
        names = [*self.good, *(drawn.choice(kind) for kind in self.bad)]
        drawn.shuffle(names)
        return names


_DIGITS: Final = Setting(
    name="digits",
    task="digits",
    hosts=("batch", "group"),
    good=("cnn:conv_heavy", "cnn:conv_light"),
    bad=(("bad:static", "bad:scramble", "bad:blinker"), ("bad:noise_fed", "bad:other_sample", "bad:memory")),
    batch_size=64,
    interval=15,
    intervals=200,
    rates=(3e-3, 1e-2, 3e-2),
    judged=200,
    times=(0.12, 0.3),
    unit="accuracy",
    higher_is_better=True,
)

SETTINGS: Final[Mapping[str, Setting]] = MappingProxyType(
    {
        "digits": _DIGITS,
        "chars": Setting(
            name="chars",
            task="chars",
            hosts=("layer",),
            good=("transformer:mlp", "transformer:attention"),
            bad=(
                ("bad:static-t", "bad:scramble-t", "bad:blinker-t"),
                ("bad:noise_fed-t", "bad:other_sample-t", "bad:memory-t"),
            ),
            batch_size=32,
            interval=10,
            intervals=140,
            rates=(3e-3, 1e-2, 3e-2),
            judged=112,
            times=(0.12, 0.3),
            unit="bits per character",
            higher_is_better=False,
        ),
        "mlp": replace(
            _DIGITS,
            name="mlp",
            hosts=("mlp",),
            good=("transformer:mlp", "transformer:lora"),
            bad=(("bad:static-t",), ("bad:noise_fed-t",)),
            batch_size=64,
            intervals=300,
        ),
    }
)
"""``mlp`` is GroMo's own kind of network, on the digits."""

MLP_WIDTH: Final = 4
"""Neurons of a hidden layer of the `DigitsMLP` at birth."""


class DigitsMLP(HookedHost, nn.Module):
    """Two hidden layers on flat images; features are ``(b, 1, d)``, so that a seed takes them."""

    def __init__(self, width: int = MLP_WIDTH) -> None:
        super().__init__()
        self.width = width
        self.first, self.second, self.head = (
            nn.Linear(64, width),
            nn.Linear(width, width),
            nn.Linear(width, 10),
        )
        self.act1, self.act2 = nn.SELU(), nn.SELU()

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return a point behind each hidden layer."""
        return [
            InjectionPoint(name, name, self.width, Topology.TRANSFORMER, causal=False)
            for name in ("act1", "act2")
        ]

    def example_inputs(self) -> tuple[Tensor]:
        """Return two images."""
        return (torch.linspace(-1, 1, 128).view(2, 1, 8, 8),)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images ``(b, 1, 8, 8)``."""
        x = self.act1(self.first(x.flatten(2).flatten(1)[:, None]))
        logits: Tensor = self.head(self.act2(self.second(x)))[:, 0]
        return logits


def make_host(setting: Setting, host: str, seed: int) -> nn.Module:
    """Build a host whose weights depend on the seed alone."""
    with private_rng(derived_seed(seed, "host")):
        if setting.name == "mlp":
            return DigitsMLP()
        if setting.task == "digits":
            return CNNHost(1, 10, n_blocks=3, base_channels=3, width_factor=1, norm=host)
        return TransformerHost(64, 8, n_layers=2, n_heads=2, max_len=64, expansion=1)


@lru_cache(maxsize=4)
def load(name: str, seed: int, judged: int) -> Task:
    """Load a task; its gate and validation splits are cut to ``judged`` samples."""
    task = load_task(name, seed)
    cut = {
        key: Split(*(tensor[:judged] for tensor in split)) if key in ("gate", "val") else split
        for key, split in task.splits.items()
    }
    return replace(task, splits=MappingProxyType(cut))


def endless(task: Task, batch_size: int, generator: torch.Generator) -> Iterator[Split]:
    """Yield whole training batches for ever, each pass in a new order; images are moved by up to a pixel each way."""
    while True:
        for inputs, targets in task.batches("train", batch_size, generator):
            if len(inputs) == batch_size:
                yield Split(moved(inputs, generator) if inputs.dim() == 4 else inputs, targets)
