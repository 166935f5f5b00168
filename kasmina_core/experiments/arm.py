"""An arm: one model that learns a task epoch by epoch, and a ledger of what that costs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from kasmina_core.experiments.flops import FlopLedger
from kasmina_core.experiments.tasks import SplitName, Task, TaskError
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.quiet import derived_seed, private_rng, quiet_evaluation
from kasmina_core.training.optim import tie_optimizer
from kasmina_core.verdicts import GateResult

EVALUATION_BATCH: Final = 256
"""Samples per batch in evaluation."""


@final
class Arm:
    """One model that learns a task, epoch by epoch, and pays for it in FLOPs.

    Two arms with equal arguments and equal starts are equal bit for bit, whatever runs between their epochs. The
    gates of a `MorphogeneticModel` decide on the task's ``gate`` samples; what that costs is charged, as every pass of
    the training is. What is evaluated for people, on the other splits, is not.

    Args:
        module: The model, on the task's device. A `MorphogeneticModel` grows; anything else is a host alone.
        task: Gives samples, batches and the loss.
        batch_size: Samples per training batch; default the task's.
        lr: Learning rate of Adam; default the task's.
        seed: For the order of the samples, and what random numbers training draws.
        budget: Training FLOPs that the run may spend, for policies; nothing ends by it.
        ledger: Continues another one's account of costs; default a new one.

    Attributes:
        epochs: Epochs trained.
        ledger: What was spent; ``ledger.total`` are the training FLOPs.
        optimizer: Adam, tied to the model.
        order: Shuffles the samples.

    >>> from kasmina_core import load_task, start_arm
    >>> arm = start_arm(load_task("digits"))
    >>> loss, verdicts = arm.train_epoch(), arm.end_epoch()
    >>> arm.epochs, arm.model.epoch, arm.ledger.total > 0
    (1, 1, True)
    """

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        *,
        batch_size: int | None = None,
        lr: float | None = None,
        seed: int = 0,
        budget: float | None = None,
        ledger: FlopLedger | None = None,
    ) -> None:
        self.module, self.task, self.budget = module, task, budget
        self.batch_size = batch_size or task.batch_size
        self.ledger = ledger or FlopLedger()
        self.epochs = 0
        self.seed = seed
        self.order = torch.Generator().manual_seed(derived_seed(seed, "order"))
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
            module.parameters(), task.lr if lr is None else lr
        )
        if isinstance(module, MorphogeneticModel):
            tie_optimizer(module, self.optimizer)
            module.evaluate_with(partial(self._losses, "gate", is_charged=True))

    @property
    def model(self) -> MorphogeneticModel:
        """The model that grows.

        Raises:
            TypeError: If the arm is a host alone.
        """
        if not isinstance(self.module, MorphogeneticModel):
            raise TypeError("This arm is a host alone: it has no MorphogeneticModel.")
        return self.module

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    def train_epoch(self, is_over: Callable[[], bool] = lambda: False) -> float | None:
        """Train on every sample once; seeds incubate in every step.

        Args:
            is_over: Called before each batch; true ends the epoch.

        Returns:
            Mean loss per sample; ``None`` if no batch was trained.
        """
        device = self.task.train.inputs.device
        with private_rng(derived_seed(self.seed, "epoch", self.epochs), device):
            loss = train_epoch(
                self.module, self.task, self.batch_size, self.optimizer, self.order, self.ledger, is_over
            )
        self.epochs += loss is not None
        return loss

    def end_epoch(self, metric: float | None = None) -> dict[str, GateResult]:
        """Let one epoch pass in every slot: call it once after `train_epoch`, and `MorphogeneticModel.follow` then.

        Args:
            metric: Validation loss; default that on the task's ``val`` samples.

        Returns:
            By slot, what the gate of this epoch said.

        Raises:
            TypeError: If the arm is a host alone.
        """
        value = self.evaluate("val")[0] if metric is None else metric
        return self.model.step_epoch(value, flops=float(self.ledger.total), budget=self.budget)

    def losses(self, split: SplitName) -> Tensor:
        """Return the loss of each sample of a split, ``(n,)``, in nats; nothing is charged."""
        with quiet_evaluation(self.module):
            return self._losses(split)

    def evaluate(self, split: SplitName) -> tuple[float, float]:
        """Return mean loss and mean metric of a split; nothing is charged."""
        with quiet_evaluation(self.module):
            batches = self.task.batches(split, EVALUATION_BATCH)
            logits = torch.cat([logits_of(self.module(inputs)) for inputs, _ in batches])
        targets = self.task.splits[split].targets
        return float(self.task.loss(logits, targets).mean()), float(self.task.metric(logits, targets).mean())

    def _losses(self, split: SplitName, *, is_charged: bool = False) -> Tensor:
        module, losses = self.module, []
        modes = forward_kind(module) if isinstance(module, MorphogeneticModel) else ()
        for inputs, targets in self.task.batches(split, EVALUATION_BATCH):

            def forward(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                return self.task.loss(logits_of(module(inputs)), targets)

            kind = ("evaluate", modes, tuple(inputs.shape))
            losses.append(self.ledger.charge(kind, forward) if is_charged else forward())
        return torch.cat(losses)


def logits_of(output: Any) -> Tensor:
    """Return the tensor that a task's loss takes: the output, or its ``logits`` as models of transformers have them.

    Raises:
        TaskError: If there is none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TaskError(
            f"The host must return a tensor, or something with logits, not {type(output).__name__}."
        )
    return logits


def train_epoch(
    module: nn.Module,
    task: Task,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
    ledger: FlopLedger,
    is_over: Callable[[], bool] = lambda: False,
) -> float | None:
    """Train on every sample once; a `MorphogeneticModel` incubates its seeds in every step.

    Args:
        module: The model, on the task's device.
        task: Gives batches and the loss.
        batch_size: Samples per batch.
        optimizer: Steps after each batch.
        order: Shuffles the samples.
        ledger: Is charged with what the training costs.
        is_over: Called before each batch; true ends the epoch.

    Returns:
        Mean loss per sample; ``None`` if no batch was trained.
    """
    model = module if isinstance(module, MorphogeneticModel) else None
    module.train()
    total, samples = 0.0, 0
    for inputs, targets in task.training_batches(batch_size, order):
        if is_over():
            break

        def loss(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            return task.loss(logits_of(module(inputs)), targets).mean()

        def learn(loss: Callable[[], Tensor] = loss) -> Tensor:
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]  # torch
            return value.detach()

        optimizer.zero_grad(set_to_none=True)
        kind = (forward_kind(model) if model else (), tuple(inputs.shape))
        value = ledger.charge(("learn", kind), learn)
        if model is not None:
            incubating = tuple(slot.is_incubating for slot in model.slots.values())
            ledger.charge(("incubate", kind, incubating), partial(model.incubate, loss))
            model.step()
        optimizer.step()
        total += float(value) * len(inputs)
        samples += len(inputs)
    return total / samples if samples else None


def forward_kind(model: MorphogeneticModel) -> Hashable:
    """Return what decides the cost of a forward: each slot's mode, blueprint and options, and what a replay spares."""
    slots = model.slots.values()
    modes = tuple(
        (s.mode, s.state.blueprint_id if s.state is not None else "", str(s.options)) for s in slots
    )
    return model.is_replaying, next((s.name for s in slots if s.is_forced), ""), modes
