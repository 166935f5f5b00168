"""Episodes: a task's samples dealt anew, and the host alone on them, as far as it was needed."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from kasmina_core import Arm, Task
from torch import Tensor, nn

CURVES: Final = 64
"""Hosts alone that a process remembers; the one that was not asked for longest is forgotten first."""

SNAPSHOT_BYTES: Final = 32_000_000
"""Memory for the states of one host alone. Fewer are kept of larger hosts, and the epochs between are trained again."""

SHARES: Final = {"gate": 0.15, "val": 0.1, "test": 0.2}
"""Shares of the samples that are not the task's ``test``. The rest is trained on."""

LEAST_GATE: Final = 120
"""Samples that the gates get at least: they ask for 100."""


class ToyHost(nn.Module):
    """Three linear maps and nothing between them: a host that cannot tell the classes of `toy_task` apart.

    Args:
        in_features: Values per sample.
        num_classes: Number of classes.
    """

    def __init__(self, in_features: int = 64, num_classes: int = 2) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(in_features, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        out: Tensor = self.head(self.second(self.first(x)))
        return out


def toy_task(seed: int = 0) -> Task:
    """Return points of a plane, turned into 64 dimensions; their class is the sign of the product of two coordinates."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randn(2, 64, generator=generator) / 2
    splits = {}
    for name, n in (("train", 512), ("gate", 256), ("val", 256), ("test", 512)):
        x = torch.randn(n, 2, generator=generator)
        noise = 0.1 * torch.randn(n, generator=generator)
        splits[name] = (x @ turn, ((x.prod(1) + 0.2 * x.sum(1) + noise) > 0).long())
    return Task(
        "toy",
        "classification",
        splits,
        n_classes=2,
        description="Points of a plane in two classes, which no line divides.",
        host=ToyHost,
        slots=("first", "second"),
        epochs=80,
        batch_size=64,
        lr=1e-2,
        ramp_epochs=1.0,
    )


@dataclass(frozen=True)
class Deal:
    """The samples of one episode.

    Attributes:
        task: Its ``test`` samples are those of the reward: nothing else looks at them.
        report: The same task with the samples of reports as ``test``.
    """

    task: Task
    report: Task


def deal(task: Task, episode: int) -> Deal:
    """Deal a task's samples anew: all but its ``test`` samples, which are those of reports.

    Args:
        task: Its ``test`` samples stay, the others are put together and divided.
        episode: What the division depends on.
    """
    known = [task.splits[name] for name in ("train", "gate", "val")]
    inputs, targets = (torch.cat(parts) for parts in zip(*known, strict=True))
    n = len(inputs)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(episode)).to(inputs.device)
    splits: dict[str, Any] = {}
    start = 0
    for name, share in SHARES.items():
        size = max(round(share * n), LEAST_GATE if name == "gate" else 2)
        picked, start = order[start : start + size], start + size
        splits[name] = (inputs[picked], targets[picked])
    splits["train"] = (inputs[order[start:]], targets[order[start:]])
    if start >= n:
        raise ValueError(f"Task '{task.name}' has {n} samples to learn from, too few to deal five splits.")
    return Deal(replace(task, splits=splits), replace(task, splits=splits | {"test": task.splits["test"]}))


@dataclass
class HostAlone:
    """The host of an episode, trained without growth as far as somebody asked.

    Attributes:
        start: Makes the arm.
        dealt: Its samples.
        every: Epochs between two states that are kept.
        flops: Training FLOPs after each epoch, from 0.
        val: Mean validation loss after each epoch.
        reward: Loss of each of the reward's samples after each epoch, ``(n,)``.
    """

    start: Callable[[], Arm]
    dealt: Deal
    epochs: int
    flops: list[float] = field(default_factory=list)
    val: list[float] = field(default_factory=list)
    reward: list[Tensor] = field(default_factory=list)
    every: int = 1
    states: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._arm = self.start()
        held = 3 * sum(t.numel() * t.element_size() for t in self._arm.module.state_dict().values())
        self.every = max(1, math.ceil(held * self.epochs / SNAPSHOT_BYTES))
        self._note()

    def _note(self) -> None:
        arm, epoch = self._arm, len(self.flops)
        self.flops.append(float(arm.ledger.total))
        self.val.append(arm.evaluate("val")[0])
        self.reward.append(arm.losses("test"))
        if epoch % self.every == 0:
            weights = {name: t.detach().clone() for name, t in arm.module.state_dict().items()}
            optimizer = copy.deepcopy(arm.optimizer.state_dict())
            self.states[epoch] = {"weights": weights, "optimizer": optimizer, "order": arm.order.get_state()}

    def demand(self, epoch: int) -> None:
        """Train up to an epoch, if that was not done yet."""
        while len(self.flops) <= epoch:
            self._arm.train_epoch()
            self._note()

    def at(self, flops: float) -> Tensor:
        """Return the reward's losses of the host alone after so many FLOPs, interpolated between its epochs."""
        self.demand(1)
        while self.flops[-1] < flops:
            self.demand(len(self.flops))
        after = next(i for i, spent in enumerate(self.flops) if spent >= flops)
        if self.flops[after] == flops:
            return self.reward[after]
        low, high = self.flops[after - 1], self.flops[after]
        return torch.lerp(self.reward[after - 1], self.reward[after], (flops - low) / (high - low))

    def report_at(self, flops: float) -> float:
        """Return the mean loss on the samples of reports after so many FLOPs, interpolated between epochs."""
        self.at(flops)
        after = next(i for i, spent in enumerate(self.flops) if spent >= flops)
        last = self._report(after)
        if self.flops[after] == flops:
            return last
        low, high = self.flops[after - 1], self.flops[after]
        return last + (self._report(after - 1) - last) * (high - flops) / (high - low)

    def _report(self, epoch: int) -> float:
        arm = self.start()
        self.bring(arm, epoch)
        arm.task = self.dealt.report
        return arm.evaluate("test")[0]

    def bring(self, arm: Arm, epoch: int) -> None:
        """Bring a new arm with the same host to an epoch, bit for bit, without growth.

        Args:
            arm: The arm; its slots are empty.
            epoch: Epochs to have trained.
        """
        self.demand(epoch)
        first = epoch - epoch % self.every
        state = self.states[first]
        arm.module.load_state_dict(state["weights"])
        if first:
            arm.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        arm.order.set_state(state["order"])
        arm.epochs, arm.ledger.total = first, int(self.flops[first])
        for _ in range(first, epoch):
            arm.train_epoch()


_CURVES: OrderedDict[Hashable, HostAlone] = OrderedDict()


def host_alone(key: Hashable, make: Callable[[], HostAlone]) -> HostAlone:
    """Return the host alone of an episode; environments of one process share it."""
    if key not in _CURVES:
        _CURVES[key] = make()
    _CURVES.move_to_end(key)
    while len(_CURVES) > CURVES:
        _CURVES.popitem(last=False)
    return _CURVES[key]
