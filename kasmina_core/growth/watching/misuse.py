"""Warnings, once per model, of calls that were forgotten, evaluators that cannot work, and policies that are refused."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Final, final

from torch import nn
from torch.optim import Optimizer

from kasmina_core.errors import DistributedError, MisuseWarning, warn_caller
from kasmina_core.gates.thresholds import GateProfile
from kasmina_core.lifecycle import LIVING, SeedStage
from kasmina_core.sharding import local_part
from kasmina_core.slots.settings import Incubation
from kasmina_core.slots.slot import SeedSlot
from kasmina_core.verdicts import GateResult

if TYPE_CHECKING:
    from kasmina_core.evidence.measuring import Measurement
    from kasmina_core.growth.model import MorphogeneticModel


_FORGOTTEN: Final = {"incubate", "step", "eval"}
"""Kinds of warnings that the closing verdict repeats."""

_LOOKED_AT: Final = 12
"""Last epochs in which metric and evaluator are compared."""

_SIGNS: Final = {"0 or less": (3, -0.3), "0 or 1": (5, -0.6), "": (6, -0.8)}
"""By what all numbers are: the epochs it takes, and the largest `_agreement` at which their direction is doubted."""

_MOVES: Final = 0.1
"""Share by which metric and evaluator must have moved, where the numbers themselves tell nothing."""


@final
class Misuse:
    """Watches one model from epoch to epoch, and warns of each kind of misuse once.

    A forgotten call shows in an epoch in which a tied optimiser stepped while a seed was there from its start to its end.
    Versions of parameters show whether it stepped, so that a step costs nothing more.

    Attributes:
        awaits_step: Whether `MorphogeneticModel.step` was not called yet in this epoch.
        was_in_training: Whether the model was in training mode in a step of this epoch.
        left_out: What a loaded checkpoint holds and was not loaded, by the names of ``load_checkpoint``'s arguments.
        awaits_memory: Whether a ``state_dict`` with seeds was loaded, and no policy was loaded or followed since.
    """

    def __init__(self) -> None:
        self.awaits_step = True
        self.was_in_training = False
        self.awaits_memory = False
        self.left_out: list[str] = []
        self._said: set[str] = set()
        self._had_gradients = False
        self._dropped: set[str] = set()
        self._versions: list[tuple[weakref.ref[nn.Parameter], int]] = []
        self._living: dict[str, tuple[str, int]] = {}
        self._pending: dict[str, str] = {}
        self._trained = False
        self._fault = ""
        self._fossils: list[str] = []
        self.forget_evaluator()

    def restart(self) -> None:
        """Say nothing of this epoch: parameters change for another reason than an optimiser's step."""
        self._living, self._versions = {}, []

    def note_load(self, losing: Iterable[SeedSlot]) -> None:
        """Take the slots that a ``state_dict`` empties that says nothing of any slot, before it does."""
        self._fossils = [
            f"'{slot.name}' ({slot.state.blueprint_id}, '{slot.state.seed_id}')"
            for slot in losing
            if slot.state is not None and slot.stage is SeedStage.FOSSILIZED
        ]

    def loaded(self) -> None:
        """Warn of the fossils that went with a load."""
        fossils, self._fossils = ", ".join(self._fossils), []
        if fossils:
            self._warn(
                f"bare host {fossils}",
                "A state_dict without any seed, such as that of a bare host, was loaded into a model with fossils: they "
                f"are gone.\n  slots: {fossils}\n"
                "To load the host alone and keep them: model.host.load_state_dict(...). To go on with a grown model, "
                "load what model.state_dict() returned.",
            )

    def note_step(self, model: MorphogeneticModel) -> None:
        """Take the first step of an epoch, and the first in training mode."""
        self.was_in_training = model.training
        if self.awaits_step:
            self.awaits_step = False
            self._had_gradients = any(p.grad is not None for p in model.parameters())
        if left_out := ", ".join(f"{name}=..." for name in self.left_out):
            self.left_out = []
            self._warn(
                "left out",
                "The model was loaded from a checkpoint that holds more than was loaded, and is trained on: momenta are gone, "
                "or a schedule begins anew.\n"
                f"To go on with a run: load_checkpoint(folder, model, {left_out}). In a new run nothing is missing.",
            )

    def forget_evaluator(self) -> None:
        """Forget what the evaluator returned: there is another one."""
        self._readings: dict[int, tuple[float, float]] = {}
        self._values: set[str] = set()
        self._shuffled: set[str] = set()
        self._in_parts = 0
        self._was_asked = False

    def note_dropped(self, slots: Collection[str]) -> None:
        """Take the slots whose seeds had a gradient that was not finite, and was dropped."""
        self._dropped.update(slots)

    def note_failure(self, slot: SeedSlot, error: Exception) -> None:
        """Take an error that a measurement for a gate raised."""
        if not isinstance(error, DistributedError):  # another process says why
            self._fault = f"  slot '{slot.name}': {type(error).__name__}: {error}\n"

    def note_measurement(
        self, host: nn.Module, slot: SeedSlot, measured: Measurement, metric: float | None, epoch: int
    ) -> None:
        """Take what was measured for a gate. A host that has diverged is not the evaluator's fault.

        Args:
            host: The host.
            slot: The slot that was measured.
            measured: What was found.
            metric: Metric of the epoch.
            epoch: Epochs the model has stepped.
        """
        evidence = measured.evidence
        self._was_asked = True
        self._values.add(measured.values)
        if measured.is_of_other_samples:
            self._shuffled.add(slot.name)
        if measured.is_of_parts:
            self._in_parts = evidence.samples
        if metric is not None and math.isfinite(metric):
            self._readings[epoch] = metric, evidence.loss_without if slot.is_apart else evidence.loss_with
        if (
            math.isnan(measured.evidence.loss_without)
            and bool(measured.differences.isnan().all())
            and all(bool(local_part(p).isfinite().all()) for p in host.parameters())
        ):
            self._fault = (
                f"  slot '{slot.name}': every number that it returned is NaN, also without the seed\n"
            )

    def note_policy(self, policy: object) -> None:
        """Look at a policy before it decides: one that could remember a loaded model, and does not, starts anew."""
        awaits, self.awaits_memory = self.awaits_memory, False
        save = getattr(policy, "state_dict", None)
        if awaits and not isinstance(policy, type) and callable(save) and not _holds_anything(save()):
            self._warn(
                "policy",
                f"The model was loaded with its seeds, and {type(policy).__name__} remembers nothing of the time before: "
                "it starts anew.\n"
                "To go on with a run, keep the policy too: save_checkpoint(policy=...) and load_checkpoint(policy=...), or "
                "policy.state_dict() and policy.load_state_dict(). In a new run nothing is missing.",
            )

    def note_refusal(self, command: object, slot: str, reason: str) -> None:
        """Take a command of a policy that was refused, and by no gate."""
        name = type(command).__name__
        message = f"A policy's {name} was refused; its other commands go on.\n  slot '{slot}': {reason}"
        self._warn(f"{name} {slot}", message)

    def epoch_ends(self, model: MorphogeneticModel) -> None:
        """Look at the epoch that is over, before the slots forget it."""
        self._fault = ""
        self._trained = any(
            (p := of()) is not None and p._version != version for of, version in self._versions
        )
        self._pending = {}
        stayed = [
            slot
            for name, slot in model.slots.items()
            if name in self._living and self._living[name][0] == _seed_of(slot) and _can_learn(slot)
        ]
        counterfactual = model.growth_config.incubation is Incubation.COUNTERFACTUAL
        lonely = [
            slot.name
            for slot in stayed
            if counterfactual and slot.is_incubating and slot.notes.incubations == self._living[slot.name][1]
        ]
        # Where something else is trained and no step saw a gradient of anything, zero_grad came first: warned of below.
        seen = [] if self.awaits_step or (self._trained and not self._had_gradients) else stayed
        dead = [
            slot.name
            for slot in seen
            if self._should_have_learned(slot)
            and not slot.notes.epoch.norms.count
            and slot.name not in self._dropped
        ]
        if dead:
            self._pending[f"no gradient: {dead}"] = (
                "A seed had no gradient in any step of a whole epoch: it cannot learn where it is.\n"
                f"{_listed(dead)}"
                "Its slot lies where the host computes without gradient (no_grad, detach, inference_mode), or the loss does "
                "not depend on what comes from there. Let gradients through, or cull it and choose another slot."
            )
        if not self._trained:
            return
        if lonely:
            self._pending["incubate"] = (
                "An optimiser stepped for a whole epoch, and incubate() was never called: with "
                "Incubation.COUNTERFACTUAL a seed in TRAINING learns in that pass alone.\n"
                f"{_listed(lonely)}"
                "Call model.incubate(closure) after backward and before optimizer.step(); closure() returns the loss of "
                "this model on the batch. Or use GrowthConfig(incubation='straight-through')."
            )
        if self.awaits_step and stayed:
            self._pending["step"] = (
                "An optimiser stepped for a whole epoch, and model.step() was never called: gradients of seeds are not "
                "noted, and a ramp that goes by steps stands still.\n"
                f"{_listed(slot.name for slot in stayed)}"
                "Call model.step() after backward and before optimizer.zero_grad(), once per optimiser step."
            )
        elif not self._had_gradients:
            blind = [
                s.name
                for s in stayed
                if not s.notes.epoch.norms.count and not (counterfactual and s.is_apart)
            ]
            if blind:
                self._pending["step"] = (
                    "model.step() saw no gradients for a whole epoch in which an optimiser stepped.\n"
                    f"{_listed(blind)}"
                    "Call model.step() after backward and before optimizer.zero_grad()."
                )

    def _should_have_learned(self, slot: SeedSlot) -> bool:
        """Whether the epoch that is over had a backward pass for the seed."""
        config = slot.config
        if config.incubation is not Incubation.COUNTERFACTUAL or not slot.is_apart:
            return True
        before, after = self._living[slot.name][1], slot.notes.incubations
        return -(-after // config.incubate_every) > -(-before // config.incubate_every)

    def epoch_ended(
        self, model: MorphogeneticModel, results: Mapping[str, GateResult], tied: Collection[Optimizer]
    ) -> None:
        """Warn of what the epoch has shown, and begin the next one."""
        pending, trained = self._pending, self._trained
        stepped, in_training = not self.awaits_step, self.was_in_training
        self._pending, self.awaits_step, self._had_gradients, self.was_in_training = {}, True, False, False
        self._dropped = set()
        self._living = {
            name: (seed, slot.notes.incubations)
            for name, slot in model.slots.items()
            if (seed := _seed_of(slot))
        }
        self._versions = (
            [
                (weakref.ref(p), p._version)
                for p in {
                    id(p): p
                    for optimizer in tied
                    for group in getattr(optimizer, "param_groups", ())
                    for p in group["params"]
                    if p.requires_grad and not p.is_inference()
                }.values()
            ]
            if self._living
            else []
        )
        if self._fault:
            pending["evaluator"] = (
                "The evaluator failed, and no gate that needs evidence can pass until it works.\n"
                f"{self._fault}"
                "evaluate_with takes a function that returns the loss of every held-out sample, a vector (n,)."
            )
        if trained and model.growth.evaluator is None and "no evaluator" not in self._said:
            waiting = [name for name, result in results.items() if _waits(model.slots[name], result)]
            if waiting:
                pending["no evaluator"] = (
                    "A gate needs evidence, and the model has no evaluator: no seed will get past it.\n"
                    f"{_listed(waiting, results)}"
                    "Call model.evaluate_with(evaluator) with a function that returns the loss of every held-out sample. (Gates "
                    "of GateProfile.REPORT go by the metric of step_epoch instead, which tells little of a seed.)"
                )
        if self._shuffled:
            pending["other samples"] = (
                "The evaluator gave the host other samples in one pass of a measurement than in another: losses of different "
                "samples are compared, and a seed's gain drowns in that.\n"
                f"{_listed(sorted(self._shuffled))}"
                "Draw and shuffle the samples once, outside of the evaluator. (torch's generators give it the same numbers in "
                "each pass; those of numpy and random do not.)"
            )
        if self._in_parts:
            pending["parts of samples"] = (
                "The evaluator returned more losses than the host was given samples: losses of one sample's parts, such as the "
                "tokens of a text, are not independent, and a seed's gain looks surer than it is.\n"
                f"  losses: {self._in_parts:,}\n"
                "Return the mean over the parts of each sample: for a text cross_entropy(logits.mT, labels, "
                "reduction='none').mean(1)."
            )
        samples = model.growth.examiner.samples
        if samples is not None and (against := self._direction(samples.higher_is_better, model)):
            pending["direction"] = against
        if samples is not None and (self._fault or self._was_asked):
            kinds = "evaluator", "other samples", "parts of samples", "direction"
            model.growth.journal.doubts = samples.warned + [pending[one] for one in kinds if one in pending]
        self._was_asked = False
        if stepped and not in_training and _varies_by_mode(model):
            pending["eval"] = (
                "model.step() was called for a whole epoch in which the model was in eval mode: its batch normalisation keeps "
                "the statistics it has, and its dropout does nothing.\n"
                "Call model.train() before the batches of an epoch: model.eval() for the validation stays until then."
            )
        for kind, message in pending.items():
            if kind in _FORGOTTEN and kind not in self._said:
                model.growth.journal.warned.append(message.partition("\n")[0])
            self._warn(kind, message)

    def _direction(self, higher_is_better: bool, model: MorphogeneticModel) -> str:
        """Return a warning if the evaluator's numbers most likely go another way than the gates take them."""
        readings = [self._readings[epoch] for epoch in sorted(self._readings)][-_LOOKED_AT:]
        values = next(iter(self._values)) if len(self._values) == 1 and not higher_is_better else ""
        least, most = _SIGNS[values]
        metric_grows = model.growth_config.higher_is_better
        agreement = _agreement(readings, metric_grows == higher_is_better)
        if len(readings) < least or agreement > most or not (values or _moves(readings)):
            return ""
        (metric_first, first), (metric_last, last) = readings[0], readings[-1]
        return (
            "The numbers of the evaluator seem to go another way than the gates take them.\n"
            f"  evaluator:            {first:.4g} to {last:.4g}, mean of the samples; {_better(higher_is_better)}\n"
            f"  metric of step_epoch: {metric_first:.4g} to {metric_last:.4g} in {len(readings)} epochs; "
            f"{_better(metric_grows)}\n"
            + (f"  every number of the evaluator: {values}\n" if values else "")
            + f"If the evaluator is of the other kind: model.evaluate_with(evaluator, higher_is_better={not higher_is_better})"
            f"{'' if higher_is_better else ', or return the loss itself'}. If the metric is: "
            f"GrowthConfig(higher_is_better={not metric_grows}). A loss that may be negative, or a cross entropy that rises "
            "while accuracy does too, is no mistake."
        )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warn_caller(message, MisuseWarning)


def _agreement(readings: Sequence[tuple[float, float]], same_sense: bool) -> float:
    """Return Kendall's tau of metric and evaluator, in [-1, 1]: 1 if both always got better or worse together."""
    pairs = list(combinations(readings, 2))
    signs = sum(math.copysign(1.0, x) if (x := (a - c) * (b - d)) else 0.0 for (a, b), (c, d) in pairs)
    return (signs if same_sense else -signs) / len(pairs) if pairs else 0.0


def _moves(readings: Sequence[tuple[float, float]]) -> bool:
    """Whether metric and evaluator both moved by more than noise does."""
    return all(
        abs(last - first) >= _MOVES * max(abs(first), abs(last))
        for first, last in zip(readings[0], readings[-1], strict=True)
    )


def _better(higher: bool) -> str:
    return f"{'higher' if higher else 'lower'} counts as better"


def _varies_by_mode(model: MorphogeneticModel) -> bool:
    """Whether the host learns, and has layers that do something else in training mode."""
    kinds = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
    learns = any(p.requires_grad for p in model.host.parameters())
    return learns and any(isinstance(m, kinds) and getattr(m, "p", 1.0) > 0 for m in model.host.modules())


def _seed_of(slot: SeedSlot) -> str:
    """Return the id of a seed that should be learning now; empty if there is none."""
    state = slot.state
    if slot.seed is None or state is None or state.is_paused:
        return ""
    return state.seed_id if slot.is_active and slot.stage in LIVING else ""


def _can_learn(slot: SeedSlot) -> bool:
    return any(p.requires_grad for p in slot.seed_parameters())


def _waits(slot: SeedSlot, result: GateResult) -> bool:
    """Whether a gate failed for want of evidence alone."""
    gates = slot.config.gates
    if gates.profile is not GateProfile.EVIDENCE or not result.failed_checks:
        return False
    on_evidence = {s.name for s in gates.checks if s.needs_evidence and result.gate in s.gates}
    return all(check.name in on_evidence and check.value is None for check in result.failed_checks)


def _holds_anything(state: object) -> bool:
    """Whether a policy's state has anything in it that is not empty, zero or ``None``."""
    if isinstance(state, Mapping):
        return any(map(_holds_anything, state.values()))
    if isinstance(state, list | tuple | set):
        return any(map(_holds_anything, state))
    return bool(state) if isinstance(state, str | int | float | None) else True


def _listed(slots: Iterable[str], results: Mapping[str, GateResult] | None = None) -> str:
    lines = ((name, f": {results[name].reason}" if results is not None else "") for name in slots)
    return "".join(f"  slot '{name}'{why}\n" for name, why in lines)
