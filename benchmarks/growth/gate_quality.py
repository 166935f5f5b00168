"""How well rules tell good seeds from bad ones: many seeds in trained hosts, and every rule asked of the same ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from benchmarks.growth.arms import ARMS, OURS
from benchmarks.growth.blueprints import HARMFUL, NULL, OVERFITTING
from benchmarks.growth.cells import CANDIDATES
from benchmarks.growth.growing import RECIPE, LifecycleTraining, config_of
from benchmarks.growth.settings import SETTINGS, Setting, endless, make_host
from benchmarks.growth.training import Training
from kasmina_core import (
    GateCheckSpec,
    GateLevel,
    GateThresholds,
    SeedStage,
)
from kasmina_core.experiments.tasks import Split
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.gates.sequential import LevelSpending, Look, judge
from kasmina_core.quiet import derived_seed, private_rng

RATE: Final = 1e-2
"""Learning rate of the host and of its seeds."""

FEW: Final = 24
"""Samples that the overfitting seeds learn from."""

DWELL: Final = GateThresholds().min_training_epochs
"""Intervals in TRAINING before the library's own G2 looks at a seed."""

LONGEST: Final = 24
"""Intervals of a seed's whole life after which it counts as refused."""

RULES: Final = ("ours, to the end", "ours, G2 alone", "tested G2", "report, G2", "gain > .02", "no gate")
THRESHOLD: Final = 0.02

_CNN_KINDS: Final = {
    "useful": ("cnn:conv_heavy", "cnn:conv_light", "cnn:depthwise"),
    "null": tuple(f"bad:{name}" for name in NULL),
    "harmful": tuple(f"bad:{name}" for name in HARMFUL),
    "overfitting": tuple(f"bad:{name}" for name in OVERFITTING),
}
_TEXT_KINDS: Final = {
    "useful": ("transformer:mlp", "transformer:attention"),
    **{kind: tuple(f"{name}-t" for name in names) for kind, names in _CNN_KINDS.items() if kind != "useful"},
}
KINDS_OF: Final = {"digits": _CNN_KINDS, "chars": _TEXT_KINDS}


class _Candidate(LifecycleTraining):
    """A seed's life in a host that was trained before; no policy germinates another."""

    def __init__(self, setting: Setting, module: nn.Module, number: int, *, few: bool, held: bool) -> None:
        # Every other check of G2 runs and is noted; this one keeps the seed where it is.
        hold = GateCheckSpec("held", (GateLevel.G2,), lambda c: 0.0, minimum=1.0, needs_evidence=True)
        config = config_of(
            setting,
            ARMS[OURS],
            RECIPE,
            derived_seed("candidate", number),
            (hold,) if held else (),
        )
        super().__init__(
            setting,
            module,
            ARMS[OURS],
            RECIPE,
            host_seed(number),
            RATE,
            "constant",
            float("inf"),
            config=config,
        )
        self.policy = None
        order = torch.Generator().manual_seed(derived_seed(number, "candidate's order"))
        self._batches = endless(self.task, setting.batch_size, order)
        if few:
            self._few()

    def _few(self) -> None:
        """Let the seed learn from few samples, over and over."""
        inputs, targets = (tensor[:FEW] for tensor in self.task.train)
        full = self.after_backward
        few = Split(inputs, targets)

        def after_backward(closure: Callable[[], Tensor]) -> None:
            full(lambda: self.task.loss(self.module(few.inputs), few.targets).mean())

        self.after_backward = after_backward  # type: ignore[method-assign]


def host_seed(number: int) -> int:
    """Return the seed of a candidate's host: those of one cell share it, with its split of the data."""
    return number // CANDIDATES


@lru_cache(maxsize=2)
def trained_host(name: str, host: str, intervals: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train a host to its plateau; return its state and its optimiser's."""
    setting = SETTINGS[name]
    training = Training(setting, make_host(setting, host, seed), seed, RATE, "constant", float("inf"))
    with private_rng(derived_seed(seed, "plateau")):
        training.train(intervals * setting.interval)
    return copy.deepcopy(training.module.state_dict()), copy.deepcopy(training.optimizer.state_dict())


def _candidate(setting: Setting, host: str, intervals: int, number: int, few: bool, held: bool) -> _Candidate:
    module = make_host(setting, host, host_seed(number))
    weights, optimizer = trained_host(setting.name, host, intervals, host_seed(number))
    module.load_state_dict(weights)
    made = _Candidate(setting, module, number, few=few, held=held)
    made.optimizer.load_state_dict(copy.deepcopy(optimizer))  # it keeps the tensors that it is given
    return made


def candidate_of(setting: Setting, kind: str, number: int, slots: Sequence[str]) -> tuple[str, str]:
    """Return blueprint and slot of a candidate; they alternate with the number."""
    names = KINDS_OF[setting.name][kind]
    return names[number % len(names)], slots[number // len(names) % len(slots)]


def examine(setting: Setting, host: str, kind: str, number: int, intervals: int) -> dict[str, Any]:
    """Incubate one seed for as long as the policy would, and note what every rule would say after each interval.

    The seed's life is then lived once more with nothing held back, if our gate G2 passed.
    """
    few = kind == "overfitting"
    held = _candidate(setting, host, intervals, number, few, held=True)
    blueprint, name = candidate_of(setting, kind, number, list(held.model.slots))
    looks: list[dict[str, Any]] = []
    with private_rng(derived_seed("candidate", number)):
        first = held.evaluate("val")[2]
        held.model.germinate(name, blueprint)
        held.look(first, first)
        started = held.evaluate("val")[2]
        for _ in range(RECIPE.training):
            held.train(setting.interval)
            val, _, accuracy = held.evaluate("val")
            held.look(val, accuracy)
            slot = held.model.slots[name]
            if slot.stage is not SeedStage.TRAINING:
                break
            evidence, gate = slot.last_evidence, slot.last_gate
            truth = held.model.measure(name, lambda: held.losses("test"))
            looks.append(
                {
                    "g2": gate is not None and all(c.name == "held" for c in gate.failed_checks),
                    "why": next((str(c) for c in gate.failed_checks if c.name != "held"), "")
                    if gate is not None
                    else "",
                    "tested": evidence is not None and _is_proved(evidence, len(looks) + 1),
                    "gain": evidence.gain if evidence is not None else None,
                    "t": evidence.t if evidence is not None else None,
                    "improved": 100 * (accuracy - started),
                    "truth": truth.gain if truth is not None else None,
                    "truth_t": truth.t if truth is not None else None,
                }
            )
    result: dict[str, Any] = {
        "kind": kind,
        "blueprint": blueprint,
        "slot": name,
        "looks": looks,
        "kept": False,
        "ended": "refused at G2",
    }
    if any(look["g2"] for look in looks):
        result |= _live(setting, host, number, few, name, blueprint, intervals)
    return result


def _is_proved(evidence: SeedEvidence, interval: int) -> bool:
    """Return whether the sequential test of the library's own G2 accepts; its first look is after the dwell."""
    look = Look(max(1, interval - DWELL + 1))
    finding = judge({1.0: evidence.paired}, look, LevelSpending())
    return evidence.gain >= 0.0 and finding.p_value <= finding.level


def _live(
    setting: Setting, host: str, number: int, few: bool, name: str, blueprint: str, intervals: int
) -> dict[str, Any]:
    life = _candidate(setting, host, intervals, number, few, held=False)
    slot = life.model.slots[name]
    with private_rng(derived_seed("candidate", number)):
        life.model.germinate(name, blueprint)
        life.look(0.0, 0.0)
        for _ in range(LONGEST):
            life.train(setting.interval)
            life.look(life.evaluate("val")[0], 0.0)
            limit = RECIPE.training if slot.stage is SeedStage.TRAINING else RECIPE.probation
            metrics = slot.state.metrics if slot.state is not None else None
            if slot.stage is SeedStage.PROBATIONARY and slot.last_gate is not None and slot.last_gate.passed:
                slot.advance_stage()
                truth = life.model.measure(name, lambda: life.losses("test"))
                return {
                    "kept": True,
                    "ended": "kept",
                    "truth": truth.gain if truth is not None else None,
                    "deviation": truth.deviation if truth is not None else None,
                }
            if metrics is None or (
                metrics.epochs_in_current_stage >= limit and slot.stage is not SeedStage.BLENDING
            ):
                break
        truth = life.model.measure(name, lambda: life.losses("test"))
    return {
        "kept": False,
        "ended": f"refused in {slot.stage.name}",
        "why": str(slot.last_gate) if slot.last_gate is not None else "",
        "truth": truth.gain if truth is not None else None,
    }


@final
@dataclass(frozen=True, slots=True)
class Decision:
    """What a rule said of a seed, and what the seed was then worth on the test samples."""

    accepted: bool
    look: int
    gain: float


def _dwelt(rule: str, looks: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    wait = RECIPE.min_training if rule.startswith("ours") else DWELL
    return [(i, look) for i, look in enumerate(looks, 1) if i >= wait]


def decide(rule: str, record: Mapping[str, Any]) -> Decision:
    """Return what a rule of `RULES` says of an examined seed: taken at the first look that it likes, or refused.

    Ours waits as long as its recipe says, every other rule as the library's own gates do.
    """
    looks = record["looks"]
    if not looks:
        return Decision(False, 0, 0.0)
    likes: Mapping[str, Callable[[Mapping[str, Any]], bool]] = MappingProxyType(
        {
            "ours, G2 alone": lambda look: bool(look["g2"]),
            "tested G2": lambda look: bool(look["tested"]),
            "ours, to the end": lambda look: bool(look["g2"]),
            "report, G2": lambda look: look["improved"] >= 0.5,
            "gain > .02": lambda look: look["gain"] is not None and look["gain"] > THRESHOLD,
            "no gate": lambda look: True,
        }
    )
    last = float(looks[-1]["truth"] or 0.0)
    for number, look in _dwelt(rule, looks):
        if likes[rule](look):
            if rule == "ours, to the end" and not record["kept"]:
                return Decision(False, number, float(record.get("truth") or 0.0))
            truth = record.get("truth") if rule == "ours, to the end" else look["truth"]
            return Decision(True, number, float(truth or 0.0))
    return Decision(False, len(looks), last)


__all__ = ["RULES", "Decision", "candidate_of", "decide", "examine", "trained_host"]
