"""Journal of a model: what became of each seed, and what its policy waited for. `closing` reads it."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, final

from kasmina_core.events import (
    CommandRefused,
    SeedCulled,
    SeedFossilized,
    SeedGerminated,
    StageChanged,
    TelemetryEvent,
)
from kasmina_core.growth.slot import SeedSlot
from kasmina_core.lifecycle import SeedStage
from kasmina_core.policies.triggers import FixedTimes, Plateau
from kasmina_core.records import Count, Mark, Record
from kasmina_core.verdicts import CheckVerdict, GateResult

_GERMINATING = ("Germinate", "Regerminate")


@final
@dataclass(slots=True)
class SeedLife(Record):
    """What a model remembers of a seed, also when it is gone.

    Attributes:
        seed_id: The seed.
        slot: Its slot.
        blueprint: What it was made from.
        parameters: Parameters that it added.
        born: Epochs the model had stepped when it germinated.
        ended: Epochs it had stepped when the seed was kept or culled; ``None`` while it lives.
        stage: Its last stage: FOSSILIZED, CULLED, or where it is.
        gate: Name of the gate that did not let it pass when one was last asked; empty if it did, or none was.
        check: The check that decided so.
        verdict: Verdict of that check.
        reason: The check in one line.
        learned_epochs: Epochs in which it could learn.
        untrained_epochs: Those of them in which no optimiser held its parameters.
        gradient: Largest L2 norm of its gradient, mean over an epoch; ``None`` if never measured.
        gain: Gain per sample at alpha 1, as last measured; ``None`` if never.
        spread: Standard deviation of the paired differences that ``gain`` is the mean of.
        samples: Held-out samples of ``gain``.
        level: Level of the test at its last look; ``None`` if it never came to one.
    """

    seed_id: str
    slot: str
    blueprint: str
    parameters: Count
    born: Count
    ended: Count | None = None
    stage: Annotated[SeedStage, Mark.BY_NAME] = SeedStage.GERMINATED
    gate: str = ""
    check: str = ""
    verdict: Annotated[CheckVerdict | None, Mark.BY_NAME] = None
    reason: str = ""
    learned_epochs: Count = 0
    gradient: float | None = None
    gain: float | None = None
    spread: float = 0.0
    samples: Count = 0
    level: float | None = None
    untrained_epochs: Annotated[Count, Mark.LATER] = 0

    def note_gate(self, result: GateResult) -> None:
        """Record what a gate said."""
        if result.finding is not None:
            self.level = result.finding.level
        decisive = result.decisive
        if result.passed:
            self.gate, self.check, self.verdict, self.reason = "", "", None, ""
        elif result.gate is not None and decisive is not None:
            self.gate, self.check, self.verdict = result.gate.name, decisive.name, decisive.verdict
            self.reason = str(decisive)


@final
@dataclass(slots=True)
class Journal(Record):
    """What happened to the seeds of a model since the start of the run.

    Attributes:
        seeds: Every seed that germinated, by its id, in order.
        refused: Germinations of a policy that were refused, by the reason.
        policy: Name of the class of the policy that was followed last; empty if none was.
        patience: Epochs without improvement that its plateau takes; 0 if it waits for none.
        min_delta: Share by which the metric must improve.
        longest_wait: Most epochs in a row without such an improvement.
        first_time: First epoch at which a policy with fixed times germinates.
        metrics: Epochs with a finite metric.
        not_finite_since: First of the last epochs in a row whose metric was NaN or infinite; ``None`` if the last was not.
        first_metric: First finite metric.
        best_metric: Best finite metric.
        worst_metric: Worst finite metric.
        warned: First lines of the warnings of calls that were forgotten.
        doubts: Warnings that tell against the evaluator, as of the last epoch in which it was asked.
    """

    seeds: dict[str, SeedLife] = field(default_factory=dict)
    refused: dict[str, Count] = field(default_factory=dict)
    policy: str = ""
    patience: Count = 0
    min_delta: float = 0.0
    longest_wait: Count = 0
    first_time: Count | None = None
    metrics: Annotated[Count, Mark.LATER] = 0
    not_finite_since: Annotated[Count | None, Mark.LATER] = None
    first_metric: Annotated[float | None, Mark.LATER] = None
    best_metric: Annotated[float | None, Mark.LATER] = None
    worst_metric: Annotated[float | None, Mark.LATER] = None
    doubts: Annotated[list[str], Mark.LATER] = field(default_factory=list)
    warned: Annotated[list[str], Mark.LATER] = field(default_factory=list)

    def note(self, event: TelemetryEvent) -> None:
        """Record the beginning, the stages and the end of seeds, and refused germinations."""
        match event:
            case SeedGerminated():
                self.seeds[event.seed_id] = SeedLife(
                    event.seed_id, event.slot, event.blueprint_id, event.parameters, event.epoch
                )
            case StageChanged() if event.seed_id in self.seeds and self.seeds[event.seed_id].ended is None:
                self.seeds[event.seed_id].stage = SeedStage[event.after]
            case SeedFossilized() | SeedCulled() if event.seed_id in self.seeds:
                life = self.seeds[event.seed_id]
                life.ended = event.epoch
                kept = isinstance(event, SeedFossilized)
                life.stage = SeedStage.FOSSILIZED if kept else SeedStage.CULLED
            case CommandRefused() if event.command in _GERMINATING:
                self.refused[event.reason] = self.refused.get(event.reason, 0) + 1

    def note_metric(self, metric: float | None, epoch: int, higher_is_better: bool) -> None:
        """Record the metric of an epoch, counted from 1."""
        if metric is None:
            return
        if not math.isfinite(metric):
            self.not_finite_since = epoch if self.not_finite_since is None else self.not_finite_since
            return
        better, worse = (max, min) if higher_is_better else (min, max)
        self.metrics += 1
        self.not_finite_since = None
        self.first_metric = metric if self.first_metric is None else self.first_metric
        self.best_metric = metric if self.best_metric is None else better(self.best_metric, metric)
        self.worst_metric = metric if self.worst_metric is None else worse(self.worst_metric, metric)

    def note_epoch(
        self, slots: Iterable[SeedSlot], results: Mapping[str, GateResult], untrained: Container[str]
    ) -> None:
        """Record how each seed is at the end of an epoch.

        Args:
            slots: The model's slots.
            results: By slot, what the gate of this epoch said.
            untrained: Names of slots whose seeds no optimiser holds.
        """
        for slot in slots:
            life = self.seeds.get(slot.state.seed_id) if slot.state is not None else None
            if life is None or slot.state is None or life.ended is not None:
                continue
            metrics, evidence = slot.state.metrics, slot.last_evidence
            begins = slot.stage is SeedStage.TRAINING and metrics.epochs_in_current_stage == 0
            learns = slot.stage is not SeedStage.GERMINATED and not begins
            life.learned_epochs += learns
            life.untrained_epochs += learns and slot.name in untrained
            life.stage = slot.stage
            if metrics.gradient_norm is not None:
                life.gradient = max(metrics.gradient_norm, life.gradient or 0.0)
            if evidence is not None:
                life.gain, life.samples = evidence.gain, evidence.samples
                life.spread = evidence.standard_error * evidence.samples**0.5
            if slot.name in results:
                life.note_gate(results[slot.name])

    def note_policy(self, policy: object) -> None:
        """Record which policy was followed, and what it waits for."""
        trigger = getattr(policy, "trigger", None)
        self.policy = type(policy).__name__
        self.patience, self.first_time = 0, None
        if isinstance(trigger, Plateau):
            self.patience, self.min_delta = trigger.patience, trigger.min_delta
            self.longest_wait = max(self.longest_wait, trigger.stale)
        elif isinstance(trigger, FixedTimes):
            self.first_time = trigger.epochs[0]
