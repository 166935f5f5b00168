"""Attribution of a joint gain to several seeds: with and without each, and Shapley's values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Final, final

import torch
from torch import Tensor

from kasmina_core.gates.paired import require_paired
from kasmina_core.gates.sequential import PairedGain
from kasmina_core.records import Record
from kasmina_core.slots.forward import ForwardMode
from kasmina_core.verdicts import interval_in_words

if TYPE_CHECKING:
    from kasmina_core.evidence.measuring import GateSamples, Processes
    from kasmina_core.slotted import SlottedModel

EXACT_SEEDS: Final = 5
"""Seeds up to which every subset is tried: 32 passes."""


@final
@dataclass(frozen=True, slots=True)
class SeedShare(Record):
    """What one of several seeds is worth, per held-out sample.

    Attributes:
        slot: Name of its slot.
        alone: With this seed and none of the others, against none of them.
        last: With all of them, against all but this one: what its removal would cost.
        shapley: Mean of what it adds over all orders in which the seeds can be added. These sum to the joint gain.
    """

    slot: str
    alone: PairedGain
    last: PairedGain
    shapley: PairedGain


@final
@dataclass(frozen=True, slots=True)
class Attribution(Record):
    """Whom a joint gain is due to.

    Attributes:
        joint: With all the seeds, against none of them.
        seeds: The share of each.
        passes: Passes over the held-out samples that it took.
        permutations: Orders that were drawn for Shapley's values; ``None`` if they are exact.
    """

    joint: PairedGain
    seeds: tuple[SeedShare, ...]
    passes: int
    permutations: int | None = None

    def __str__(self) -> str:
        lines = [f"together {_said(self.joint)} over {self.joint.samples} samples"]
        lines += [
            f"{seed.slot}: {_said(seed.shapley)}; alone {seed.alone.gain:+.4g}, last {seed.last.gain:+.4g}"
            for seed in self.seeds
        ]
        return "\n".join(lines)


def attribute(
    model: SlottedModel,
    samples: GateSamples,
    slots: Iterable[str] | None,
    processes: Processes,
    *,
    permutations: int | None = None,
    generator: torch.Generator | None = None,
) -> Attribution:
    """Measure the model with every subset of some seeds, each at alpha 1, fossils too; other seeds stay as they are.

    With ``k`` seeds and the gain ``v(S)`` of a subset, Shapley's value of seed ``i`` is::

        sum over S without i of |S|! (k - |S| - 1)! / k! * (v(S + i) - v(S))

    It is computed for every sample, so that its interval is that of a paired mean. Seeds that do the same work share
    its worth, where `SeedShare.last` would call each of them worthless.

    With ``permutations`` the spread between the orders is part of the standard errors. Arguments and errors are those of
    `MorphogeneticModel.attribute`.
    """
    names = _chosen(model, slots, permutations, generator)
    with processes.attempt("attribution"):
        value = _Values(model, samples, names, processes)
        if permutations is None:
            shapley = _exact(value, names)
        else:
            shapley = _drawn(value, names, permutations, generator)
        everyone, nobody = frozenset(names), frozenset[str]()
        seeds = tuple(
            SeedShare(
                name,
                alone=PairedGain.of(value(frozenset([name])) - value(nobody)),
                last=PairedGain.of(value(everyone) - value(everyone - {name})),
                shapley=shapley[name],
            )
            for name in names
        )
        joint = PairedGain.of(value(everyone) - value(nobody))
    return Attribution(joint, seeds, value.passes, permutations)


def _chosen(
    model: SlottedModel,
    slots: Iterable[str] | None,
    permutations: int | None,
    generator: torch.Generator | None,
) -> list[str]:
    slots = [slots] if isinstance(slots, str) else slots
    active = [name for name, slot in model.slots.items() if slot.is_active]
    names = active if slots is None else [model.slots[name].name for name in dict.fromkeys(slots)]
    if idle := [name for name in names if name not in active]:
        raise ValueError(
            f"There is nothing to attribute to slot '{idle[0]}': it is {model.slots[idle[0]].stage.name}."
        )
    if not names:
        raise ValueError("There is nothing to attribute: no slot has an active seed.")
    if permutations is None and len(names) > EXACT_SEEDS:
        raise ValueError(
            f"Every subset of {len(names)} seeds would take {2 ** len(names):,} passes.\n"
            f"  seeds: {len(names)}\n  at most: {EXACT_SEEDS}\n"
            "Name fewer slots, or give permutations=20 and a generator to draw orders instead."
        )
    if permutations is not None and (permutations < 2 or generator is None):
        raise ValueError(
            f"permutations must be at least 2 and come with a generator, not {permutations!r} with {generator!r}."
        )
    return names


class _Values:
    """What subsets of the seeds are worth, per sample; each is measured once."""

    def __init__(
        self, model: SlottedModel, samples: GateSamples, names: Sequence[str], processes: Processes
    ) -> None:
        self._model, self._samples, self._names, self._processes = model, samples, names, processes
        ends = [frozenset[str](), frozenset(names)]
        losses = [self._measured(subset) for subset in ends]
        self._counts = processes.counts(losses)
        self._without = self._gathered(losses[0])
        self._known = {s: self._worth(found) for s, found in zip(ends, losses, strict=True)}
        self.passes = 2

    def __call__(self, subset: frozenset[str]) -> Tensor:
        if subset not in self._known:
            self._known[subset] = self._worth(self._measured(subset))
            self.passes += 1
        return self._known[subset]

    def _gathered(self, losses: Tensor) -> Tensor:
        return self._processes.samples(losses if self._counts else losses[:0])

    def _worth(self, losses: Tensor) -> Tensor:
        found = self._gathered(losses)
        require_paired(found, self._without)
        sign = 1.0 if self._samples.higher_is_better else -1.0
        return sign * found.detach().double().cpu()

    def _measured(self, subset: frozenset[str]) -> Tensor:
        model = self._model
        with model.evaluation(), ExitStack() as stack:
            for name in self._names:
                mode = ForwardMode.MEASURE if name in subset else ForwardMode.PASS
                stack.enter_context(model.slots[name].forced(mode))
            return self._samples.losses()


def _exact(value: Callable[[frozenset[str]], Tensor], names: Sequence[str]) -> dict[str, PairedGain]:
    k = len(names)
    shares = {}
    for name in names:
        others = [other for other in names if other != name]
        share = torch.zeros_like(value(frozenset()))
        for size in range(k):
            weight = math.factorial(size) * math.factorial(k - size - 1) / math.factorial(k)
            for subset in map(frozenset, combinations(others, size)):
                share += weight * (value(subset | {name}) - value(subset))
        shares[name] = PairedGain.of(share)
    return shares


def _drawn(
    value: Callable[[frozenset[str]], Tensor],
    names: Sequence[str],
    permutations: int,
    generator: torch.Generator | None,
) -> dict[str, PairedGain]:
    added: dict[str, list[Tensor]] = {name: [] for name in names}
    for _ in range(permutations):
        before = frozenset[str]()
        for i in torch.randperm(len(names), generator=generator).tolist():
            after = before | {names[i]}
            added[names[i]].append(value(after) - value(before))
            before = after
    shares = {}
    for name, parts in added.items():
        stacked = torch.stack(parts)  # (permutations, n)
        gain = PairedGain.of(stacked.mean(0))
        between = stacked.mean(1).std().item() / math.sqrt(permutations)
        shares[name] = replace(gain, standard_error=math.hypot(gain.standard_error, between))
    return shares


def _said(gain: PairedGain) -> str:
    return f"{gain.gain:+.4g} ({interval_in_words(0.95, *gain.interval())})"
