"""Measurements of a seed on held-out samples: with it at several alphas and without it, in few forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor

from kasmina_core.errors import MisuseWarning, warn_caller
from kasmina_core.evidence.replay import ReplayDiverged, ReplayTape
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.sharding import sharded_modules
from kasmina_core.slots.forward import ForwardMode
from kasmina_core.slots.slot import SeedSlot
from kasmina_core.slotted import SlottedModel, held_weakly

Evaluator = Callable[[], Tensor]
"""Returns the loss of every held-out sample, ``(n,)``, the same samples in the same order at every call."""


_BOOLEANS: Final = (
    "The evaluator returns booleans, which count as losses: True is bad. If True means right, say higher_is_better=True; if "
    "it means wrong, return numbers: wrong.float()."
)


@final
@dataclass(frozen=True, slots=True)
class GateSamples:
    """The held-out samples that the gates decide on.

    Attributes:
        evaluator: Returns the loss, or the value of a metric, of every sample, ``(n,)``.
        higher_is_better: Whether it is a metric that grows with quality.
        is_fixed: Whether the samples are the same in every epoch. With others each time, losses of different epochs
            cannot be paired.
        warned: Warnings that were given of what the evaluator returns.
    """

    evaluator: Evaluator
    higher_is_better: bool = False
    is_fixed: bool = True
    warned: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.evaluator):
            raise TypeError(
                "An evaluator is a function that returns the loss of every held-out sample, (n,): reduction='none'.\n"
                f"  given: {self.evaluator!r:.200}"
            )

    def losses(self) -> Tensor:
        """Ask the evaluator.

        Raises:
            TypeError: If it returns no tensor.

        Warns:
            MisuseWarning: If it returns booleans, and a larger number is not said to be better; once.
        """
        found: object = self.evaluator()
        if not isinstance(found, Tensor):
            raise TypeError(
                "An evaluator must return a tensor (n,), one loss per held-out sample: reduction='none'.\n"
                f"  returned: {type(found).__name__} {found!r:.80}"
            )
        if found.is_complex():
            raise TypeError(
                f"An evaluator must return real numbers or booleans, one per held-out sample, not {found.dtype}."
            )
        if found.dtype is torch.bool and not self.higher_is_better and not self.warned:
            self.warned.append(_BOOLEANS)
            warn_caller(_BOOLEANS, MisuseWarning)
        return found


class Processes:
    """Answers of the processes of a job to a measurement; here those of a process that measures by itself.

    Each process has its own part of the samples. A class for several processes overrides every method.
    """

    def attempt(self, what: str) -> AbstractContextManager[None]:
        """Do something that leaves no trace if it fails; if it fails in one process it fails in all."""
        return nullcontext()

    def largest(self, what: str, value: float) -> float:
        """Return the largest value of all processes; NaN if any is NaN."""
        return value

    def samples(self, losses: Tensor) -> Tensor:
        """Return the per-sample losses of all processes."""
        return losses

    def counts(self, losses: Sequence[Tensor]) -> bool:
        """Return whether this process's samples count: not if those of an earlier process are the same.

        Args:
            losses: Per-sample losses of all passes, which are compared bit for bit.
        """
        return True


@final
@dataclass(frozen=True, slots=True)
class Measurement:
    """Evidence, and the losses without the seed that it was taken from.

    Attributes:
        evidence: What was found.
        without: Per-sample losses with the slot empty, ``(n,)`` on the CPU; ``None`` where the samples are others in
            each epoch.
        differences: What the seed saves at alpha 1 on each sample, ``(n,)`` on the CPU; positive is good.
        values: What all numbers of the evaluator have in common that a loss seldom has: ``0 or less``, ``0 or 1``, or
            nothing.
        is_of_other_samples: Whether the evaluator gave the host other samples in one pass than in another.
        is_of_parts: Whether the evaluator returned more losses than there can be samples in what it gave the host.
    """

    evidence: SeedEvidence
    without: Tensor | None
    differences: Tensor
    values: str = ""
    is_of_other_samples: bool = False
    is_of_parts: bool = False


@final
class SeedMeasurer:
    """Measures the seeds of one model, and remembers for which slots the part before the slot need not run again.

    At the first measurement of a slot the pass with the seed runs twice, once in full and once from a tape (see
    `ReplayTape`). If both give the same losses, bit for bit, later passes run the slot and what follows it alone;
    if not, all of them run in full from then on and `faults` says why. While the seed does not change the losses the
    comparison says nothing, and is repeated.

    Args:
        model: The model, which is not kept alive.

    Attributes:
        processes: The processes that measure together.
        trusted: Slots for which the part before the slot need not run again.
        faults: By slot, why passes run in full.
        is_replaying: Whether a pass goes on in which the part before a slot does not run.
    """

    def __init__(self, model: SlottedModel) -> None:
        self._model = held_weakly(model)
        self.processes = Processes()
        self.trusted: set[str] = set()
        self.faults: dict[str, str] = {}
        self.is_replaying = False

    def measure(
        self,
        slot: SeedSlot,
        samples: GateSamples,
        alphas: Sequence[float] = (),
        before_blending: Tensor | None = None,
    ) -> Measurement:
        """Measure one slot's seed.

        Args:
            slot: A slot with an active seed.
            samples: What to measure on.
            alphas: Blend weights below 1 to measure at besides.
            before_blending: Losses of the host as it was when blending began.

        Raises:
            ValueError: If the evaluator's losses are not vectors of one length of at least 2.
            TypeError: If they are no tensor.
        """
        with self._model().alone(), self.processes.attempt(f"measurement of '{slot.name}'"):
            return self._measure(slot, samples, alphas, before_blending)

    def _measure(
        self,
        slot: SeedSlot,
        samples: GateSamples,
        alphas: Sequence[float],
        before_blending: Tensor | None,
    ) -> Measurement:
        evaluator = samples.losses
        slot.begin_measurement()
        tape = recorded = self._tape(slot)
        if tape is not None and slot.name in self.trusted:
            with self._pass(slot, ForwardMode.MEASURE), tape.recording():
                with_seed = evaluator()
            without = self._again(slot, evaluator, tape, ForwardMode.PASS)
        else:
            with self._pass(slot, ForwardMode.MEASURE):
                with_seed = evaluator()
            # Not earlier: only a pass can tell whether it is compiled, and a trace must not hold a tape.
            can_record = tape is not None and not slot.ran_compiled
            recording = tape.recording() if tape is not None and can_record else nullcontext()
            with self._pass(slot, ForwardMode.PASS), recording:
                without = evaluator()
            if tape is not None and not self._compare(slot, evaluator, tape, with_seed, without):
                tape = None
        deviation = self.processes.largest(f"deviation of '{slot.name}'", float(slot.deviation))
        smaller = {}
        for alpha in alphas:
            with slot.blend_weight(alpha):
                smaller[alpha] = self._again(slot, evaluator, tape, slot.blending_mode)
        counts = self.processes.counts([with_seed, without, *smaller.values()])

        def gather(losses: Tensor) -> Tensor:
            return self.processes.samples(losses if counts else losses[:0])

        own, with_seed, without = with_seed, gather(with_seed), gather(without)
        evidence = SeedEvidence.from_losses(
            with_seed,
            without,
            deviation,
            smaller={alpha: gather(losses) for alpha, losses in smaller.items()},
            before_blending=before_blending if samples.is_fixed else None,
            higher_is_better=samples.higher_is_better,
        )
        most = recorded.most_samples if recorded is not None else None
        is_of_parts = most is not None and len(own) > most > 0
        has_other_samples = recorded is not None and recorded.is_of_other_samples
        kept = without.detach().float().cpu() if samples.is_fixed else None
        sign = -1.0 if samples.higher_is_better else 1.0
        differences = sign * (without.double() - with_seed.double()).detach().float().cpu()
        return Measurement(
            evidence, kept, differences, _what_all_are(without), has_other_samples, is_of_parts
        )

    @contextmanager
    def _pass(self, slot: SeedSlot, mode: ForwardMode) -> Iterator[None]:
        # One context per pass: each then starts from the same random numbers.
        with self._model().evaluation(), slot.forced(mode):
            yield

    @contextmanager
    def _replaying(self, tape: ReplayTape) -> Iterator[None]:
        self.is_replaying = True
        try:
            with tape.replaying():
                yield
        finally:
            self.is_replaying = False

    def _again(
        self, slot: SeedSlot, evaluator: Evaluator, tape: ReplayTape | None, mode: ForwardMode
    ) -> Tensor:
        if tape is not None and not tape.fault:
            try:
                with self._pass(slot, mode), self._replaying(tape):
                    losses = evaluator()
            except ReplayDiverged:
                self.faults[slot.name] = tape.fault
            else:
                return losses
        with self._pass(slot, mode):
            return evaluator()

    def _compare(
        self, slot: SeedSlot, evaluator: Evaluator, tape: ReplayTape, with_seed: Tensor, without: Tensor
    ) -> bool:
        """Say whether the tape may be used from now on."""
        fault = "the forward is compiled" if slot.ran_compiled else tape.fault
        replayed = None
        if not fault:
            with suppress(ReplayDiverged), self._pass(slot, ForwardMode.MEASURE), self._replaying(tape):
                replayed = evaluator()
        if not self._all_agree(replayed is not None and _equal(replayed, with_seed)):
            self.faults[slot.name] = fault or tape.fault or "the losses differed from those of a full pass"
            return False
        if self._all_agree(not _equal(with_seed, without)):
            self.trusted.add(slot.name)
            return True
        return False

    def _tape(self, slot: SeedSlot) -> ReplayTape | None:
        model = self._model()
        if slot.name not in self.faults:
            if any(module._compiled_call_impl is not None for module in model.modules()):
                self.faults[slot.name] = "a module is compiled"
            if sharded_modules(model):
                # What a process keeps depends on its batches; the others would wait for the parts of its modules.
                self.faults[slot.name] = "the parameters are spread over processes"
        return ReplayTape(model.host, slot) if self._all_agree(slot.name not in self.faults) else None

    def _all_agree(self, answer: bool) -> bool:
        """Say whether every process found so; they must go on alike, since an evaluator may wait for the others."""
        return self.processes.largest("measuring from a tape", float(not answer)) == 0.0


def _what_all_are(losses: Tensor) -> str:
    if bool(((losses == 0) | (losses == 1)).all()):
        return "0 or 1"
    return "0 or less" if bool((losses <= 0).all()) else ""


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
