"""State that the slots of a model share: agreement, listeners, telemetry, counters, and what is kept for undo."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, final

from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina_core.errors import GerminationError, KasminaError, TransitionError, warn_caller
from kasmina_core.events import (
    AlphaChanged,
    SeedCulled,
    SeedFossilized,
    SeedSaved,
    StageChanged,
    TelemetryEvent,
)
from kasmina_core.evidence.examiner import Examiner
from kasmina_core.evidence.measuring import Evaluator, GateSamples
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.gates.sequential import PairedGain
from kasmina_core.gates.thresholds import StartComparison
from kasmina_core.growth.agreement import Agreement
from kasmina_core.growth.config import GrowthConfig
from kasmina_core.growth.journal import Journal
from kasmina_core.growth.reverting import HostSnapshot, HostStateKeeper, KeptSeed, obstacle_to_revert
from kasmina_core.growth.undo import EpochBefore, ModelBefore
from kasmina_core.growth.watching.graphs import GraphForesight
from kasmina_core.growth.watching.misuse import Misuse
from kasmina_core.growth.watching.untracked import UntrackedSeeds
from kasmina_core.isolation import IsolationReading
from kasmina_core.lifecycle import SeedStage
from kasmina_core.policies.protocol import CommandOutcome
from kasmina_core.slots.settings import LEAST_TREND
from kasmina_core.slots.slot import SeedSlot
from kasmina_core.slotted import SlottedModel, held_weakly


class SeedParameterListener(Protocol):
    """Called when parameters come and go; optimisers are tied to a model through one."""

    def seed_added(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        """Take new parameters. May raise: the germination is then refused."""
        ...

    def seed_removed(self, slot: str, parameters: Sequence[nn.Parameter]) -> None:
        """Forget parameters."""
        ...


class EventTarget(Protocol):
    """Takes events; `Telemetry` is one."""

    def emit(self, event: TelemetryEvent) -> None:
        """Take an event; never raises, never waits."""
        ...


@final
class Growth:
    """The growth of one model; its slots ask it whatever lies outside of a slot.

    The model owns it and the slots refer to it, so it must not keep the model alive.

    Args:
        model: The model.
        config: How seeds are treated.
        samples: What the gates decide on.
        telemetry: Takes the events.

    Attributes:
        epoch: Epochs the model has stepped.
        lost_epochs: Epochs of the host that reverts gave up.
        outcomes: See `MorphogeneticModel.outcomes`.
        sequence: Events so far.
        steps: Optimiser steps: calls of `MorphogeneticModel.step`.
        last_metric: Metric of the last epoch.
        flops: Training FLOPs spent, as last given.
        budget: Training FLOPs that the run may spend, as last given.
        metrics: ``learned_epochs`` and the metric of the last epochs, oldest first, as many as a trend needs.
        agreement: How the processes of a job decide together; set with `decide_with`.
        examiner: What measures seeds.
        listeners: Called when parameters come and go.
        telemetry: Takes the events.
        snapshots: By slot, the host before its seed began to contribute.
        kept_seeds: By slot, the seed that was put aside.
        journal: What became of each seed.
        graphs: Watches the graphs that torch.compile makes.
        misuse: Warns of calls that were forgotten.
        untracked: Warns of seeds that no optimiser holds.
    """

    def __init__(
        self,
        model: SlottedModel,
        config: GrowthConfig,
        samples: GateSamples | None = None,
        telemetry: EventTarget | None = None,
    ) -> None:
        self._model = held_weakly(model)
        self._config = config
        self.epoch = self.lost_epochs = self.sequence = self.steps = 0
        self.last_metric: float | None = None
        self.flops: float | None = None
        self.budget: float | None = None
        self.metrics: tuple[tuple[int, float], ...] = ()
        self.outcomes: tuple[CommandOutcome, ...] = ()
        self.journal = Journal()
        self.agreement = Agreement()
        self.examiner = Examiner(model, samples)
        self.untracked = UntrackedSeeds(slot.name for slot in model.slots.values() if slot.seed is not None)
        self.listeners: list[SeedParameterListener] = [self.untracked]
        self.telemetry = telemetry
        self.snapshots: dict[str, HostSnapshot] = {}
        self.kept_seeds: dict[str, KeptSeed] = {}
        self.graphs = GraphForesight()
        self.misuse = Misuse()
        self._before: ModelBefore | None = None
        self._unsent: list[TelemetryEvent] | None = None
        self._saved: dict[str, list[str]] = {}

    def in_a_copy(self) -> dict[str, Any]:
        """Return what a copy of the model has too; what points at the outside (sinks, loaders, optimisers) stays behind."""
        return {
            name: getattr(self, name)
            for name in (
                "epoch",
                "lost_epochs",
                "sequence",
                "steps",
                "last_metric",
                "metrics",
                "flops",
                "budget",
                "journal",
                "graphs",
            )
        }

    @property
    def evaluator(self) -> Evaluator | None:
        """What returns the losses that the gates decide on."""
        return self.examiner.samples.evaluator if self.examiner.samples is not None else None

    @property
    def tied_optimizers(self) -> list[Optimizer]:
        """The optimisers that follow the model's seeds."""
        tied = (getattr(listener, "optimizer", None) for listener in self.listeners)
        return [optimizer for optimizer in tied if isinstance(optimizer, Optimizer)]

    def decide_with(self, agreement: Agreement) -> None:
        """Let the processes of a job decide and measure together from now on."""
        self.agreement = self.examiner.measurer.processes = agreement

    @contextmanager
    def undone_on_error(self) -> Iterator[ModelBefore]:
        """Undo what the block does to host and slots if it raises; a block inside of another is part of that."""
        if self._before is not None:
            yield self._before
            return
        model = self._model()
        self._before, put_back_slots = ModelBefore(model.host, model.slots.values()), model.kept_slots()
        try:
            yield self._before
        except BaseException:
            put_back_slots()
            self._before.put_back()
            raise
        else:
            self.snapshots, self.kept_seeds = {}, {}
        finally:
            self._before = None

    @contextmanager
    def whole_epoch(self) -> Iterator[None]:
        """Undo what an epoch did to slots and counters if the block raises; a block inside of another is part of that.

        Events are sent at its end; an epoch that is undone sends none.
        """
        if self._unsent is not None:
            yield
            return
        before, put_back_slots = EpochBefore(self._model().slots.values()), self._model().kept_slots()
        counters = ("epoch", "sequence", "last_metric", "metrics", "flops", "budget")
        kept = {name: getattr(self, name) for name in counters}
        snapshots = dict(self.snapshots)
        unsent: list[TelemetryEvent] = []
        self._unsent = unsent
        try:
            yield
        except BaseException:
            put_back_slots()
            before.put_back()
            vars(self).update(kept, snapshots=snapshots)
            self.examiner.forget_screens()
            unsent.clear()
            raise
        finally:
            self._unsent = None
            for event in unsent:
                self._send(event)

    @property
    def learned_epochs(self) -> int:
        """Epochs that the host has learned: those stepped, less those that reverts gave up."""
        return self.epoch - self.lost_epochs

    def note_metric(self, metric: float | None) -> None:
        """Keep the metric of the epoch that ends, for the trends of seeds that are put in straight."""
        if metric is not None:
            noted = *self.metrics, (self.learned_epochs, metric)
            self.metrics = noted[-self._config.straight.trend_epochs :]

    def forget_lost(self, epochs: int) -> None:
        """Count epochs that a revert gave up, and forget their metrics."""
        self.lost_epochs += epochs
        self.metrics = tuple(noted for noted in self.metrics if noted[0] <= self.learned_epochs)

    def obstacle_to_revert(self, slot: SeedSlot) -> str:
        """Return why the host cannot be put back to a slot's snapshot; empty if it can."""
        model = self._model()
        return obstacle_to_revert(self.snapshots.get(slot.name), model.host, model.slots.values(), slot)

    # -- what slots ask --------------------------------------------------------------------------------------------

    def emit(self, event: TelemetryEvent) -> None:
        """Give an event its place and send it."""
        placed = replace(event, epoch=self.epoch, sequence=self.sequence)
        self.sequence += 1
        if self._unsent is not None:
            self._unsent.append(placed)
        else:
            self._send(placed)
        if isinstance(event, SeedFossilized):
            self._save_seed(self._model().slots[event.slot])
        if isinstance(event, SeedFossilized | SeedCulled):
            outcome = "fossilized" if isinstance(event, SeedFossilized) else "culled"
            for file in self._saved.pop(event.slot, ()):
                self.emit(
                    SeedSaved(
                        slot=event.slot,
                        seed_id=event.seed_id,
                        blueprint_id=event.blueprint_id,
                        outcome=outcome,
                        file=file,
                    )
                )
        if isinstance(event, StageChanged | AlphaChanged):
            self.graphs.look(self._model().slots.values())

    def _send(self, event: TelemetryEvent) -> None:
        self.journal.note(event)
        if self.telemetry is not None:
            self.telemetry.emit(event)

    def _save_seed(self, slot: SeedSlot) -> None:
        """Write a seed to the folders that sinks ask for; one that cannot be written is warned of."""
        folders = getattr(self.telemetry, "seed_folders", ())
        if not folders or slot.state is None:
            return
        from kasmina_core import save_seeds  # through the door: checkpoints lie above this room

        model: Any = self._model()
        name = re.sub(r"[^\w.-]", "_", slot.state.seed_id)
        for folder in map(Path, folders):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = save_seeds(folder / f"{name}.safetensors", model, [slot.name])
            except (OSError, KasminaError) as error:
                warn_caller(f"Seed '{slot.state.seed_id}' was not saved: {error}", RuntimeWarning)
            else:
                self._saved.setdefault(slot.name, []).append(str(file))

    def measure(
        self, slot: SeedSlot, host_losses: Tensor | None
    ) -> tuple[SeedEvidence, Tensor | None] | None:
        """Measure a slot's seed for its gates; return the losses without it too, where they can be kept."""
        model = self._model()
        self.graphs.look(model.slots.values(), measured=slot)
        if self.examiner.samples is None:
            return None
        thresholds = slot.config.gates.thresholds
        asked = slot.is_incubating and thresholds.prove_before_blending
        alphas = thresholds.smaller_alphas if asked else ()
        try:
            measured = self.examiner.measurer.measure(slot, self.examiner.samples, alphas, host_losses)
        except Exception as error:
            self.misuse.note_failure(slot, error)
            raise
        self.misuse.note_measurement(model.host, slot, measured, self.last_metric, self.epoch)
        return measured.evidence, measured.without

    def screen(self, slot: SeedSlot) -> PairedGain | None:
        """Measure the first-order gain of a slot's seed, once an epoch."""
        return self.examiner.screen_of_epoch(slot, self.epoch)

    def error_share(self, slot: SeedSlot) -> float:
        """Return the part of the gates' error rate that a slot's seed may spend."""
        return self.examiner.error_share(slot)

    def measure_isolation(self, slot: SeedSlot) -> IsolationReading:
        """Measure what a slot's seed leaks into the host, in every process."""
        return self.agreement.isolation(slot, self.examiner.isolation(slot))

    @contextmanager
    def command(self, slot: SeedSlot | None, text: str) -> Iterator[None]:
        """Carry out a command as the processes of a job agree; an epoch of a slot that does not end is undone.

        Raises:
            TransitionError: If it is given within an evaluator.
        """
        if self._model().is_evaluating:
            raise TransitionError(
                f"{text} was called within an evaluator, or a closure of incubate: it would measure while it is measured.\n"
                "An evaluator returns losses and leaves the model as it is; give commands after it has returned."
            )
        whole = self.whole_epoch() if text.startswith("step_epoch(") else nullcontext()
        with whole, self.agreement.command(slot, text):
            yield

    def everywhere(self, slot: SeedSlot, what: str, holds: bool) -> bool:
        """Return whether something holds in every process of a job."""
        return self.largest(slot, what, float(not holds)) == 0.0

    def largest(self, slot: SeedSlot, what: str, value: float) -> float:
        """Return the largest of a number in every process of a job; NaN if one is."""
        return self.agreement.largest(f"{what} of '{slot.name}'", value)

    def before_move(self, slot: SeedSlot, target: SeedStage) -> None:
        """Keep, or forget, what `MorphogeneticModel.cull` needs to revert the host."""
        if target is SeedStage.CULLED:
            self._saved.pop(slot.name, None)
            self._save_seed(slot)
        is_kept = slot.state is not None and slot.state.is_straight
        if target is SeedStage.BLENDING and self._config.keep_snapshot and not is_kept:
            self._keep_host(slot)
        elif target in (SeedStage.FOSSILIZED, SeedStage.CULLED):
            self.snapshots.pop(slot.name, None)

    @property
    def can_go_straight(self) -> bool:
        """Whether there are metrics enough for G5 to judge a seed that is put in straight."""
        asked = self._config.gates.thresholds.against_start is not StartComparison.NOT_ASKED
        return not asked or len(self.metrics) >= LEAST_TREND

    def begin_straight(self, slot: SeedSlot) -> tuple[tuple[int, float], ...]:
        """Keep the host, before a seed is put in straight; return the metrics that foretell what it would become.

        Raises:
            GerminationError: If they are too few for G5.
        """
        if not self.can_go_straight:
            raise GerminationError(
                f"A seed that is put in straight is judged by the trend of its host, and slot '{slot.name}' comes too early.\n"
                f"  epochs with a metric: {len(self.metrics)}\n  needed:               {LEAST_TREND}\n"
                "Call step_epoch(metric) as often before, or GrowthConfig(gates=GateThresholds(against_start='not asked'))."
            )
        self._keep_host(slot)
        return self.metrics

    def _keep_host(self, slot: SeedSlot) -> None:
        model = self._model()
        keepers = [listener for listener in self.listeners if isinstance(listener, HostStateKeeper)]
        self.snapshots[slot.name] = HostSnapshot.take(
            model.host,
            model.slots.values(),
            slot,
            keepers,
            self.epoch,
            self.lost_epochs,
            self.snapshots.values(),
        )

    def fossilized(self, slot: SeedSlot) -> None:
        """Offer a slot behind a new fossil, if there may be one."""
        model = self._model()
        chain = model.chain_of(slot)
        if chain[-1] is slot and len(chain) <= self._config.nested_slots:
            model.open_behind(slot)

    def offer_slots(self) -> None:
        """Offer slots behind fossils that were loaded, as `fossilized` does."""
        for *_, last in self._model().chains():
            if last.stage is SeedStage.FOSSILIZED:
                self.fossilized(last)

    def seed_made(self, slot: SeedSlot, seed: nn.Module, blueprint_id: str) -> None:
        """Make a new seed the same in every process, before anybody holds its parameters."""
        self.agreement.seed_made(slot, seed, blueprint_id)

    def seed_added(self, slot: SeedSlot, parameters: Sequence[nn.Parameter]) -> None:
        """Call the listeners with new parameters; if one raises, those that took them forget them again."""
        called: list[SeedParameterListener] = []
        try:
            for listener in self.listeners:
                listener.seed_added(slot.name, parameters)
                called.append(listener)
            self.agreement.seed_accepted(slot)
        except Exception:
            for listener in called:
                listener.seed_removed(slot.name, parameters)
            raise

    def seed_removed(self, slot: SeedSlot, parameters: Sequence[nn.Parameter]) -> None:
        """Call the listeners with parameters that are gone."""
        for listener in self.listeners:
            listener.seed_removed(slot.name, parameters)
