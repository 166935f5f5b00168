"""Questions of a model about its seeds: evidence for the gates, screens, shares, isolation, error budgets."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import final

import torch

from kasmina_core.evidence.attribution import Attribution, attribute
from kasmina_core.evidence.isolation import GradientIsolationMonitor
from kasmina_core.evidence.measuring import Evaluator, GateSamples, Processes, SeedMeasurer
from kasmina_core.evidence.screening import screen
from kasmina_core.gates.sequential import PairedGain
from kasmina_core.gates.thresholds import ErrorBudget
from kasmina_core.isolation import IsolationReading
from kasmina_core.lifecycle import LIVING, SeedStage
from kasmina_core.slots.slot import SeedSlot
from kasmina_core.slotted import SlottedModel, held_weakly


@final
class Examiner:
    """Measures the seeds of one model.

    Args:
        model: The model, which is not kept alive.
        samples: What the gates decide on.

    Attributes:
        samples: What the gates decide on; ``None`` for nothing.
        measurer: What measures a seed, and knows for which slots passes can be replayed.
    """

    def __init__(self, model: SlottedModel, samples: GateSamples | None = None) -> None:
        self._model = held_weakly(model)
        self.samples = samples
        self.measurer = SeedMeasurer(model)
        self._screens: dict[tuple[str, str], PairedGain] = {}
        self._screened = -1

    @property
    def processes(self) -> Processes:
        """The processes that measure together."""
        return self.measurer.processes

    def use(self, samples: GateSamples | None) -> None:
        """Let the gates decide on other samples from now on."""
        if samples is not None and self.samples is not None:  # others than those that were measured
            for slot in self._model().slots.values():
                slot.notes.host_losses, slot.notes.epoch.failure = None, ""
            self.measurer.faults.clear()
        self.samples = samples

    def chosen(self, evaluator: Evaluator | None) -> GateSamples:
        """Return an evaluator's samples, or those of the gates for ``None``.

        Raises:
            ValueError: If there are none.
        """
        samples = self.samples if evaluator is None else GateSamples(evaluator)
        if samples is None:
            raise ValueError("There are no held-out samples: give an evaluator, here or with evaluate_with.")
        return samples

    def screen(self, evaluator: Evaluator | None) -> dict[str, PairedGain]:
        """Return the first-order gain of every seed that computes without contributing. See `screening.screen`."""
        model = self._model()
        names = [slot.name for slot in model.slots.values() if slot.is_apart]
        return screen(model, self.chosen(evaluator), names, self.processes) if names else {}

    def screen_of_epoch(self, slot: SeedSlot, epoch: int) -> PairedGain | None:
        """Return the first-order gain of a slot's seed in this epoch; ``None`` where it cannot be had."""
        if self.samples is None:
            return None
        if self._screened != epoch or _seed(slot) not in self._screens:
            self._screens = {}
            model = self._model()
            waiting = [one for one in model.slots.values() if one.is_apart]
            # What cannot be screened is measured in full.
            with suppress(Exception), self.processes.attempt("first-order screen"):
                found = screen(model, self.samples, [one.name for one in waiting], self.processes)
                self._screens = {_seed(one): found[one.name] for one in waiting}
                self._screened = epoch
        return self._screens.get(_seed(slot))

    def forget_screens(self) -> None:
        """Measure first-order gains anew when next asked for: the epoch in which they were measured was undone."""
        self._screened, self._screens = -1, {}

    def attribute(
        self,
        slots: Iterable[str] | None,
        evaluator: Evaluator | None,
        permutations: int | None,
        generator: torch.Generator | None,
    ) -> Attribution:
        """Say whom of several seeds a joint gain is due to. See `attribution.attribute`."""
        return attribute(
            self._model(),
            self.chosen(evaluator),
            slots,
            self.processes,
            permutations=permutations,
            generator=generator,
        )

    def isolation(self, slot: SeedSlot) -> IsolationReading:
        """Measure in this process what a slot's seed leaks into the host."""
        return GradientIsolationMonitor(self._model().host).measure(slot)

    def error_share(self, slot: SeedSlot) -> float:
        """Return the part of the gates' error rate that a slot's seed may spend, as it moves to its present stage."""
        slots = self._model().slots.values()
        if slot.config.gates.thresholds.error_budget is ErrorBudget.PER_RUN:
            if slot.stage is not SeedStage.GERMINATED:
                return slot.notes.error_share
            number = sum(each.germinations for each in slots)
            return 1.0 / (number * (number + 1))
        return 1.0 / sum(each.stage in LIVING for each in slots)


def _seed(slot: SeedSlot) -> tuple[str, str]:
    return slot.name, slot.state.seed_id if slot.state is not None else ""
