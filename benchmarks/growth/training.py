"""Training for a fixed number of floating-point operations, whatever is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.growth.settings import Setting, endless, load
from kasmina_core.experiments.flops import FlopLedger
from kasmina_core.quiet import derived_seed

EVALUATED = 256
"""Samples a batch where nothing is learned."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda spent: 1.0,
    "cosine": lambda spent: 0.5 * (1.0 + math.cos(math.pi * min(1.0, spent))),
}
"""Share of the learning rate, by the share of the budget that is spent: so a schedule ends when its run does."""


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


class Training:
    """A module, its optimiser, its samples and what it has cost so far.

    Args:
        setting: What is trained.
        module: The model; may be put in another's place as it grows.
        seed: For the split and the order of the samples.
        lr: Learning rate of Adam.
        schedule: Name of one of `SCHEDULES`.
        budget: Operations it may cost.
    """

    def __init__(
        self, setting: Setting, module: nn.Module, seed: int, lr: float, schedule: str, budget: float
    ) -> None:
        self.setting, self.module = setting, module
        self.seed = seed
        self.task = load(setting.task, seed, setting.judged)
        self.lr, self.schedule, self.budget = lr, SCHEDULES[schedule], budget
        self.optimizer = torch.optim.Adam(module.parameters(), lr, fused=True)
        self.ledger = FlopLedger()
        self.seconds = 0.0
        self.steps = 0
        self.log: list[tuple[int, str, str, str]] = []
        self.intervals = 0
        self._batches = endless(
            self.task, setting.batch_size, torch.Generator().manual_seed(derived_seed(seed, "order"))
        )

    @property
    def shape(self) -> Hashable:
        """Equal for models whose training step costs the same."""
        return ()

    @property
    def spent(self) -> float:
        """Share of the budget that is gone."""
        return self.ledger.total / self.budget

    def set_rates(self) -> None:
        """Give every group the rate of this moment."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule(self.spent) * self.factor(group)

    def factor(self, group: dict[str, Any]) -> float:
        """Return the rate of a group over that of the host."""
        return 1.0

    def after_backward(self, closure: Callable[[], Tensor]) -> None:
        """Do what belongs between backward and the optimiser's step."""

    def look(self, val_loss: float, val_accuracy: float) -> None:
        """Decide what grows, after an interval; here nothing does."""

    def train(self, steps: int) -> float:
        """Train so many steps, or until the budget is spent; return the mean loss."""
        started = time.process_time()
        self.module.train()
        total, done = 0.0, 0
        while done < steps and self.ledger.total < self.budget:
            inputs, targets = next(self._batches)

            def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                return self.task.loss(self.module(inputs), targets).mean()

            def learn(closure: Callable[[], Tensor] = closure) -> Tensor:
                loss = closure()
                loss.backward()
                return loss.detach()

            self.set_rates()
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.ledger.charge(("learn", self.shape), learn)
            self.after_backward(closure)
            self.optimizer.step()
            total += float(loss)
            done += 1
        self.steps += done
        self.seconds += time.process_time() - started
        return total / max(1, done)

    def losses(self, split: str) -> Tensor:
        """Return the loss of every sample of a split, in the mode the model is in."""
        return torch.cat(
            [self.task.loss(self.module(x), y) for x, y in self.task.batches(split, EVALUATED)]  # type: ignore[arg-type]
        )

    def evaluate(self, split: str) -> tuple[float, float, float]:
        """Return mean loss, mean metric and share of right predictions of a split."""
        with evaluation(self.module):
            outputs = [(self.module(x), y) for x, y in self.task.batches(split, EVALUATED)]  # type: ignore[arg-type]
            return tuple(  # type: ignore[return-value]
                float(torch.cat([measure(logits, y) for logits, y in outputs]).mean())
                for measure in (self.task.loss, self.task.metric, self.task.correct)
            )
