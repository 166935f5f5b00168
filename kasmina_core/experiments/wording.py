"""Figures and stages of a run in words, for the terminal and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple, final

from kasmina_core.experiments.record import (
    BUDGETS,
    GROWN,
    HOST_ALONE,
    ArmResult,
    Regret,
    RunRecord,
    SeedRecord,
)

EQUAL_FLOPS: Final = 0.05
"""Largest relative difference at which two arms' training FLOPs count as equal."""

EQUAL_LOSS: Final = 0.01
"""Largest relative difference at which two losses count as the same."""

NEVER_MEASURED: Final = "never measured"

AT_GATE: Final = (
    "The gain at its gate is what the last gate that decided on evidence found on its own samples, and its interval holds over "
    "all the looks it took. "
)

CONTRIBUTION: Final = (
    "The contribution is the loss without the seed minus that with it, at the end on the test samples, which decided nothing "
    "(of a culled seed the last that a gate's samples gave), with a 95 % interval. Above zero the model needs the seed; of one "
    "that has not blended in yet, it is what putting it in whole would do. The rest has adapted to a kept seed, so "
    "contributions do not add up."
)


class StageLook(NamedTuple):
    """How a stage is shown: colour in the picture, style on a terminal, meaning in words."""

    colour: str
    style: str
    meaning: str


STAGES: Final[Mapping[str, StageLook]] = MappingProxyType({
    "DORMANT": StageLook("#eeeeee", "dim", "The slot is empty; the host computes as if it were not there."),
    "GERMINATED": StageLook("#f0e442", "yellow", "A seed has been made and waits for its first turn; it computes nothing yet."),
    "TRAINING": StageLook("#8fcbee", "cyan", "The seed learns apart: it sees what the host sees, but the host's output and learning stay untouched."),
    "BLENDING": StageLook("#3d8fc9", "blue", "The seed's output is mixed in, a little more each step, until it has replaced the host's at this place."),
    "SHADOWING": StageLook("#c9a6d8", "magenta", "The seed is in; the model is measured with it and without it on samples it did not learn from."),
    "PROBATIONARY": StageLook("#9a62b5", "bright_magenta", "The seed's contribution must now hold up over some epochs."),
    "FOSSILIZED": StageLook("#1b9e77", "bold green", "The seed has become a part of the model for good."),
    "CULLED": StageLook("#d1495b", "red", "The seed was removed; the slot is the host's again."),
    "EMBARGOED": StageLook("#e8a7a7", "dim red", "The slot rests before it may take another seed."),
    "RESETTING": StageLook("#f3d3d0", "dim red", "The slot is made ready for another seed."),
})  # fmt: skip
"""Stages in order; the colours are distinct for colour-blind readers too."""


@final
@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of text.

    Attributes:
        title: What it shows.
        header: Names of the columns.
        rows: Cells, as many per row as the header has.
        numeric: Indices of the columns that hold numbers, to be aligned right.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int]


def clean(text: str) -> str:
    """Return one line without control characters, which a terminal or a figure would interpret."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def count(value: int) -> str:
    """Return a whole number with separators.

    >>> count(12345)
    '12,345'
    """
    return f"{value:,}"


def flops(value: float) -> str:
    """Return floating-point operations with a decimal prefix.

    >>> flops(2.5e9)
    '2.50 G'
    """
    if not math.isfinite(value):
        return "unknown"
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            figures = ".3g" if abs(value) >= 10 ** (power + 1) else ".2f"
            return f"{value / 10**power:{figures}} {prefix}"
    return f"{value:.0f}"


def loss(value: float) -> str:
    """Return a loss in nats."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"


def metric(value: float, name: str) -> str:
    """Return a metric; accuracies in per cent.

    >>> metric(0.9312, "accuracy")
    '93.1 %'
    >>> metric(2.5, "bits per character")
    '2.500'
    """
    if not math.isfinite(value):
        return loss(value)
    return f"{100 * value:.1f} %" if name == "accuracy" else f"{value:.3f}"


def gain(seed: SeedRecord) -> str:
    """Return a seed's contribution, its 95 % interval and sample size, marked if the interval contains zero."""
    if seed.gain is None:
        return NEVER_MEASURED
    if seed.gain_low is None or seed.gain_high is None:
        return f"{seed.gain:+.4f}"
    samples = f", n = {seed.samples}" if seed.samples is not None else ""
    return f"{seed.gain:+.4f}{_bounds(seed.gain_low, seed.gain_high, samples)}"


def gate_gain(seed: SeedRecord) -> str:
    """Return what the last gate that decided on evidence found of a seed; empty if none did."""
    if seed.finding is None:
        return ""
    # An infinity that was written comes back as text.
    effect, low, high, alpha = (float(seed.finding[name]) for name in ("effect", "low", "high", "alpha"))
    where = f" at alpha {alpha:g}" if alpha != 1 else ""
    samples = f", n = {seed.finding['samples']}{where}"
    return f"{seed.finding['gate']}: {effect:+.4f}{_bounds(low, high, samples)}"


def _bounds(low: float, high: float, samples: str) -> str:
    if math.isinf(low) and math.isinf(high):
        return f"{samples}; too few differ to bound it"
    doubt = " may be 0" if low <= 0 <= high else ""
    return f" [{low:.4f}, {high:.4f}]{samples}{doubt}"


def about_gains(record: RunRecord) -> str:
    """Return what the gains of `seeds_table` are measured on; while a run goes on there are no intervals."""
    if all(seed.gain_low is None for seed in record.seeds) and not record.arms:
        return (
            "Contribution: the loss without the seed minus that with it on the gate's samples, as last measured; above zero "
            "the model needs it."
        )
    return AT_GATE * any(seed.finding is not None for seed in record.seeds) + CONTRIBUTION


def growth(record: RunRecord) -> str:
    """Return the verdict on growth; beside seeds that stayed it says if the host alone does better all the same."""
    grown, alone = record.arm(GROWN), record.arm(HOST_ALONE)
    if not (record.verdict and grown is not None and alone is not None and is_worse(record)):
        return record.verdict
    if not any(seed.contributes for seed in record.seeds):
        return record.verdict
    return (
        f"{record.verdict} All the same growth was a loss here: for the same training FLOPs the host alone has a test loss "
        f"that is {grown.test_loss - alone.test_loss:.3g} lower. A model can need a seed that it grew with and be worse for it."
    )


def arms_table(record: RunRecord) -> TextTable:
    """Return the comparison of the arms on the test samples."""
    header = ("", "parameters", "training FLOPs", "epochs", "test loss", record.metric_name, "seconds")
    rows = tuple(
        (
            arm.name,
            count(arm.parameters),
            flops(arm.flops),
            count(arm.epochs),
            loss(arm.test_loss),
            metric(arm.test_metric, record.metric_name),
            f"{arm.seconds:.1f}",
        )
        for arm in record.arms
    )
    return TextTable("Comparison on the test samples", header, rows, frozenset(range(1, 7)))


def seeds_table(record: RunRecord) -> TextTable:
    """Return the outcome of each seed."""
    header = (
        "seed", "slot", "blueprint", "outcome", "epochs", "parameters", "gain at its gate", "contribution", "why",
    )  # fmt: skip
    rows = tuple(
        (
            seed.seed_id,
            seed.slot,
            seed.blueprint,
            seed.outcome,
            f"{seed.germinated_epoch}–{'' if seed.ended_epoch is None else seed.ended_epoch}",  # noqa: RUF001  a range
            count(seed.parameters),
            gate_gain(seed),
            gain(seed),
            f"{', '.join(seed.unasked)} not asked; {seed.reason}" if seed.unasked else seed.reason,
        )
        for seed in record.seeds
    )
    return TextTable("Seeds", header, rows, frozenset({4, 5}))


def regret_table(record: RunRecord) -> TextTable:
    """Return how far the grown run and each fixed size are behind the best fixed size at each budget."""
    grown = record.arm(GROWN)
    total = grown.flops if grown is not None else 0.0
    header = ("", *(f"{flops(share * total)} FLOPs" for share in BUDGETS), "most")
    rows = tuple((one.name, *map(_behind, (*one.behind, one.most))) for one in record.regrets)
    title = "Validation loss less that of the best fixed size at each budget"
    return TextTable(title, header, rows, frozenset(range(1, len(header))))


def _behind(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}" if value else "best"  # noqa: RUF001  nothing was measured


def regret(record: RunRecord) -> str:
    """Return a sentence that compares the grown run with the size one would choose afterwards; empty without sizes."""
    if not record.regrets:
        return ""
    grown, *fixed = record.regrets

    def most(one: Regret) -> float:
        return math.inf if one.most is None else one.most

    best = min(fixed, key=most)
    of_best = f"{best.most:.3f}" if best.most is not None else "unknown"
    ahead = sum(value is not None and value < 0 for value in grown.behind)
    of_grown = f"{grown.most:+.3f}" if grown.most is not None else "unknown"
    return (
        f"Without a size chosen beforehand, the grown run is at most {of_grown} behind the best fixed size, and ahead of "
        f"every one at {ahead} of {len(BUDGETS)} budgets. The one fixed size that does best over all budgets, known only "
        f"afterwards ({best.name}), is at most {of_best} behind. One run does not tell how much of this is chance."
    )


def summary(record: RunRecord) -> str:
    """Return two sentences: what the figures show, and what they do not."""
    grown, alone = record.arm(GROWN), record.arm(HOST_ALONE)
    if grown is None:
        return "The run was stopped before the grown model was measured. Nothing can be said of it."
    first = _comparison(record, grown, alone)
    if record.interrupted:
        first = f"The run was stopped before its end: {first}"
    else:
        first = first[0].upper() + first[1:]
    return f"{first} {_caveat(record, grown, alone)}"


def is_worse(record: RunRecord) -> bool:
    """Whether the grown model's test loss is higher than that of the host alone, by more than counts as equal."""
    grown, alone = record.arm(GROWN), record.arm(HOST_ALONE)
    if grown is None or alone is None:
        return False
    return grown.test_loss - alone.test_loss > EQUAL_LOSS * abs(alone.test_loss)


def harms(record: RunRecord) -> list[str]:
    """Return a sentence for each seed that is in the model and makes it worse."""
    return [
        f"{seed.seed_id} ({seed.blueprint}) is in the model and makes its test loss worse: contribution {gain(seed)}."
        for seed in record.seeds
        if seed.does_harm
    ]


def _comparison(record: RunRecord, grown: ArmResult, alone: ArmResult | None) -> str:
    name = record.metric_name
    if alone is None:
        return (
            f"the grown model ends with a test loss of {loss(grown.test_loss)} "
            f"({name} {metric(grown.test_metric, name)}); the host alone was not trained, "
            "so there is nothing to compare it with."
        )
    if not (math.isfinite(grown.test_loss) and math.isfinite(alone.test_loss)):
        return f"the test losses cannot be compared: grown {loss(grown.test_loss)}, host alone {loss(alone.test_loss)}."
    figures = (
        f"({loss(grown.test_loss)} against {loss(alone.test_loss)}; {name} "
        f"{metric(grown.test_metric, name)} against {metric(alone.test_metric, name)})"
    )
    difference = grown.test_loss - alone.test_loss
    direction = "lower" if difference < 0 else "higher"
    if abs(difference) <= EQUAL_LOSS * abs(alone.test_loss):
        verdict = f"the grown model and the host alone have the same test loss within {EQUAL_LOSS:.0%}"
    elif _metric_disagrees(record, grown, alone):
        verdict = (
            f"the figures disagree: the grown model's test loss is {abs(difference):.3g} {direction} "
            f"than that of the host alone, its {name} is {'worse' if difference < 0 else 'better'}"
        )
    else:
        verdict = (
            f"the grown model is {'better' if difference < 0 else 'worse'} than the host alone: "
            f"its test loss is {abs(difference):.3g} {direction}"
        )
    return f"{_budget(grown, alone)}, {verdict} {figures}."


def _metric_disagrees(record: RunRecord, grown: ArmResult, alone: ArmResult) -> bool:
    """Whether the metric, rounded as shown, contradicts the loss."""
    if metric(grown.test_metric, record.metric_name) == metric(alone.test_metric, record.metric_name):
        return False
    metric_is_better = (grown.test_metric > alone.test_metric) == record.higher_is_better
    return metric_is_better != (grown.test_loss < alone.test_loss)


def _budget(grown: ArmResult, alone: ArmResult) -> str:
    if alone.flops > 0 and abs(grown.flops / alone.flops - 1) <= EQUAL_FLOPS:
        return "at equal training FLOPs"
    spent = f"grown {flops(grown.flops)}, host alone {flops(alone.flops)}"
    return f"at unequal training FLOPs ({spent}), which makes the comparison unfair"


def _caveat(record: RunRecord, grown: ArmResult, alone: ArmResult | None) -> str:
    if not record.seeds:
        return "No seed germinated, so nothing of this comes from growth."
    kept = sum(seed.outcome == "fossilized" for seed in record.seeds)
    unfinished = sum(seed.outcome == "unfinished" for seed in record.seeds)
    seeds = (
        f"{kept} of {len(record.seeds)} seed{'s' if len(record.seeds) > 1 else ''} "
        f"{'was' if kept == 1 or len(record.seeds) == 1 else 'were'} kept"
    )
    if unfinished:
        seeds += f" ({unfinished} had not finished)"
    if alone is None or alone.parameters == 0:
        return f"{seeds}, at {count(grown.parameters)} parameters in all."
    if grown.parameters == alone.parameters:
        return f"{seeds}, so the grown model has the size of the host, and what the trials cost came out of its training."
    size = (
        f"the grown model has {grown.parameters / alone.parameters:.3g} times the host's parameters "
        f"({count(grown.parameters)} against {count(alone.parameters)}"
    )
    idle = sum(
        seed.parameters for seed in record.seeds if seed.outcome == "unfinished" and not seed.contributes
    )
    size += f", {count(idle)} of them of seeds that are not in its output)" if idle else ")"
    if not (math.isfinite(grown.test_loss) and math.isfinite(alone.test_loss)):
        return f"{seeds}, and {size}."
    if len(record.arms) > 2:
        return f"{seeds}, and {size}; one run does not tell how much of the difference is chance."
    return (
        f"{seeds}, and {size}; one run tells neither how much of the difference is chance "
        "nor how a model of that size would do if trained from the start."
    )


def short_blueprint(blueprint: str) -> str:
    """Return a blueprint's name without its pack.

    >>> short_blueprint("kasmina-cnn:norm")
    'norm'
    """
    return blueprint.rpartition(":")[2]


def every_slot(record: RunRecord) -> Sequence[str]:
    """Return the names of all slots of a run, in the order in which they first appear."""
    return list(dict.fromkeys(slot.name for epoch in record.epochs for slot in epoch.slots))
