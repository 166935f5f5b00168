"""Closing verdict: why growth ended as it did, in three sentences with figures."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, final

from kasmina_core.gates.sequential import samples_needed
from kasmina_core.growth.journal import Journal, SeedLife
from kasmina_core.lifecycle import CONTRIBUTING, SeedStage
from kasmina_core.verdicts import CheckVerdict

UNPROVED_EPOCHS: Final = 5
"""A seed that was kept in so many last epochs is said to be unproved: nobody saw what became of it."""

WORSE: Final = 0.1
"""A metric that never was better than at first, and ends worse by such a share, is said to have got worse."""

FITS: Final = 0.5
"""A host fits its training data if its error there is at most this share of that on held-out data."""


@final
class GrowthCause(Enum):
    """Why growth ended as it did; see `GrowthVerdict`."""

    KEPT = "a seed stayed"
    NO_POLICY = "nothing asked for a seed"
    NOT_ASKED_FOR = "the policy asked for no seed"
    NOT_STEPPED = "no epoch was stepped"
    METRIC_NOT_FINITE = "the metric is not a number, or infinite"
    NO_METRIC = "no metric was given"
    METRIC_GOT_WORSE = "the metric only got worse"
    METRIC_STOOD_STILL = "the metric was the same in every epoch"
    NO_PLATEAU = "the metric never was on a plateau"
    NOT_GERMINATED = "every germination was refused"
    NO_GRADIENT = "the seeds had no gradient"
    NO_OPTIMIZER = "no optimiser held the seeds"
    DOUBTFUL_EVALUATOR = "what the evaluator returns cannot be what the gates take it for"
    NEVER_MEASURED = "the seeds were never measured"
    UNFINISHED = "the run ended first"
    NOT_REFUSED = "seeds were culled that no gate had refused"
    FITS_TRAINING_DATA = "the host fits its training data and has capacity to spare"
    TOO_FEW_SAMPLES = "too few held-out samples"
    REFUSED_BY_CHECK = "gates refused the seeds"


@final
@dataclass(frozen=True, slots=True)
class GrowthVerdict:
    """Why growth ended as it did; ``str()`` of it is the sentences.

    Attributes:
        cause: The one that explains most.
        sentences: What became of the seeds, why, and what to do; at most three.
        germinated: Seeds that germinated.
        kept: Ids of the seeds that became part of the model.
        unproved: Those of them that did so in the last 5 epochs.
        samples_needed: Held-out samples at which the largest gain would show in 80 of 100 cases, if it is real; ``None``
            unless there are too few.
    """

    cause: GrowthCause
    sentences: tuple[str, ...]
    germinated: int
    kept: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()
    samples_needed: int | None = None

    def __str__(self) -> str:
        return " ".join(self.sentences)


def closing_verdict(
    journal: Journal,
    epochs: int,
    held_out: float | None,
    training: float | None,
    higher_is_better: bool,
    lost_epochs: int = 0,
) -> GrowthVerdict:
    """Return why growth ended as it did.

    Args:
        journal: What happened to the seeds.
        epochs: Epochs the model has stepped.
        held_out: Its last metric on held-out data.
        training: The same metric on training data; ``None`` if not known.
        higher_is_better: Whether the metric grows with quality.
        lost_epochs: Epochs of the host's training that culls gave up.
    """
    verdict = _verdict_of_seeds(journal, epochs, held_out, training, higher_is_better, lost_epochs)
    if not journal.warned or verdict.cause in (GrowthCause.NO_GRADIENT, GrowthCause.NO_OPTIMIZER):
        return verdict
    *others, last = verdict.sentences
    return replace(verdict, sentences=(*others, f"{last} This run was warned: {' '.join(journal.warned)}"))


def _verdict_of_seeds(
    journal: Journal,
    epochs: int,
    held_out: float | None,
    training: float | None,
    higher_is_better: bool,
    lost_epochs: int,
) -> GrowthVerdict:
    lost = (
        f"; undoing culls gave up {_counted(lost_epochs, 'epoch')} of the host's training"
        if lost_epochs
        else ""
    )
    lives = list(journal.seeds.values())
    if not lives:
        return _none_germinated(journal, epochs, held_out, higher_is_better)
    if any(life.stage is SeedStage.FOSSILIZED for life in lives):
        return _some_kept(journal, epochs, held_out, higher_is_better, lost)
    culled = sum(life.stage is SeedStage.CULLED for life in lives)
    still = f", and {len(lives) - culled} not finished" if culled < len(lives) else ""
    first = (
        f"Of {_counted(len(lives), 'seed')} none stayed: within {_counted(epochs, 'epoch')} "
        f"{culled} {'was' if culled == 1 else 'were'} culled{still}{lost}."
    )
    cause, why, todo, needed = _why_none_stayed(journal, epochs, held_out, training, higher_is_better)
    return GrowthVerdict(cause, (first, why, todo), len(lives), samples_needed=needed)


def _none_germinated(
    journal: Journal, epochs: int, held_out: float | None, higher_is_better: bool
) -> GrowthVerdict:
    def verdict(cause: GrowthCause, why: str, todo: str) -> GrowthVerdict:
        return GrowthVerdict(cause, (f"No seed germinated in {_counted(epochs, 'epoch')}.", why, todo), 0)

    if epochs == 0:
        return verdict(*_NOT_STEPPED)
    if (not_finite := _not_finite(journal, epochs, held_out)) is not None:
        return verdict(*not_finite)
    if journal.refused:
        reason, _ = max(journal.refused.items(), key=lambda item: item[1])
        times = _counted(sum(journal.refused.values()), "germination")
        return verdict(
            GrowthCause.NOT_GERMINATED,
            f"All of {times} that the policy asked for were refused, most often so: {_one_line(reason)}.",
            "Name blueprints that fit the slots; kasmina plugins info ID says what one asks for.",
        )
    if not journal.policy:
        return verdict(
            GrowthCause.NO_POLICY,
            "Nothing asked for one: neither model.follow nor model.germinate was called.",
            "Call model.follow(policy) after model.step_epoch.",
        )
    if journal.patience and not journal.metrics:
        return verdict(
            GrowthCause.NO_METRIC,
            f"step_epoch was given no metric, and {journal.policy} waits for a plateau of it.",
            "Call model.step_epoch(metric) with a figure of the whole model on held-out data.",
        )
    if (worse := _got_worse(journal, held_out, higher_is_better)) is not None:
        return verdict(*worse)
    if journal.patience and journal.longest_wait < journal.patience:
        return verdict(
            GrowthCause.NO_PLATEAU,
            f"The metric never was on a plateau, which takes {journal.patience} epochs in a row without an "
            f"improvement by {100 * journal.min_delta:.3g} %; the longest time without one was "
            f"{_counted(journal.longest_wait, 'epoch')}.",
            "The host still learns by itself: train for more epochs, or give the policy less patience.",
        )
    if journal.first_time is not None and journal.first_time > epochs:
        return verdict(
            GrowthCause.NOT_ASKED_FOR,
            f"The first time for one is epoch {journal.first_time}, and the run had {epochs}.",
            "Train for more epochs, or give the policy earlier times.",
        )
    nothing = "grows nothing" if journal.policy == "NoGrowthPolicy" else "asked for none"
    return verdict(
        GrowthCause.NOT_ASKED_FOR,
        f"The policy, {journal.policy}, {nothing}.",
        "Choose another policy, or look at its settings.",
    )


def _some_kept(
    journal: Journal, epochs: int, held_out: float | None, higher_is_better: bool, lost: str
) -> GrowthVerdict:
    lives = list(journal.seeds.values())
    kept = [life for life in lives if life.stage is SeedStage.FOSSILIZED]
    added = sum(life.parameters for life in kept)
    named = f": {_by_birth(kept)}" if len(lives) > 1 else ""
    gone = [life for life in lives if life.stage is SeedStage.CULLED]
    taken = f"; taken back: {_by_birth(gone)}" if gone else ""
    if gone and gone[-1].reason:
        taken += f", the last one at {gone[-1].gate}, {_one_line(gone[-1].reason)}"
    taken += lost
    rest = [life for life in lives if life not in kept and life not in gone]
    still = f"; not finished: {_where(rest)}" if rest else ""
    adds = "it adds" if len(kept) == 1 else "they add"
    sentences = [
        f"Of {_counted(len(lives), 'seed')} {len(kept)} stayed; {adds} {added:,} parameters{named}{taken}{still}."
    ]
    fault = _not_finite(journal, epochs, held_out) or _got_worse(journal, held_out, higher_is_better)
    measured = [f"{life.gain:+.3g} ({life.seed_id})" for life in kept if life.gain is not None]
    if fault is not None:
        _, why, todo = fault
        sentences.append(f"{why} {todo}")
    elif journal.doubts:
        sentences.append(f"{_sentence(journal.doubts[0])} {_DOUBT}")
    elif measured:
        sentences.append(f"Gain per sample when last measured for a gate: {', '.join(measured)}.")
    late = [life for life in kept if life.ended is not None and life.ended > epochs - UNPROVED_EPOCHS]
    if late:
        names = ", ".join(life.seed_id for life in late)
        sentences.append(
            f"Unproved: {names} became part of the model in the last {UNPROVED_EPOCHS} epochs, so nothing shows "
            "what it is worth after that; train on and look again."
        )
    ids = tuple(life.seed_id for life in kept)
    return GrowthVerdict(
        GrowthCause.KEPT, tuple(sentences), len(lives), ids, tuple(life.seed_id for life in late)
    )


def _by_birth(lives: Sequence[SeedLife]) -> str:
    """Return the slots of seeds by the epochs after which they came in, which tell the waves of a plan apart."""
    slots: dict[int, list[str]] = {}
    for life in lives:
        slots.setdefault(life.born, []).append(life.slot)
    return " and ".join(f"{', '.join(names)} (after epoch {born})" for born, names in slots.items())


def _where(lives: Sequence[SeedLife]) -> str:
    return ", ".join(
        f"{life.seed_id} in {life.stage.name}{' and in the output' * (life.stage in CONTRIBUTING)}{_reason(life)}"
        for life in lives
    )


def _reason(life: SeedLife) -> str:
    return f" ({_one_line(life.reason)})" if life.reason else ""


def _why_none_stayed(
    journal: Journal, epochs: int, held_out: float | None, training: float | None, higher_is_better: bool
) -> tuple[GrowthCause, str, str, int | None]:
    """Return the cause, why, what to do, and the samples that would be needed."""
    lives = list(journal.seeds.values())
    n = len(lives)
    if epochs == 0:
        return *_NOT_STEPPED, None
    if (not_finite := _not_finite(journal, epochs, held_out)) is not None:
        return *not_finite, None
    learned = [life for life in lives if life.learned_epochs]
    if learned and not any(life.gradient for life in learned):
        unknown = all(life.gradient is None for life in learned)
        return (
            GrowthCause.NO_GRADIENT,
            f"No seed had a gradient in any epoch: it was {'never measured' if unknown else '0'}.",
            "Call model.step() between backward and the optimiser's step, and model.incubate(closure) before it."
            if unknown
            else "The loss does not depend on the slots, or the blueprint is dead: kasmina plugins check tests it.",
            None,
        )
    if learned and all(life.untrained_epochs == life.learned_epochs for life in learned):
        names = ", ".join(life.seed_id for life in learned)
        return (
            GrowthCause.NO_OPTIMIZER,
            f"No optimiser held all parameters of {names} in any epoch, so they did not learn.",
            "Call tie_optimizer(model, optimizer) once, before the first epoch.",
            None,
        )
    judged = [life for life in lives if life.verdict not in (None, CheckVerdict.WAITING)]
    if journal.doubts:
        return GrowthCause.DOUBTFUL_EVALUATOR, _sentence(journal.doubts[0]), _DOUBT, None
    fit = _fit(held_out, training, higher_is_better)
    had_samples = any(life.samples for life in lives)
    if (
        judged
        and all(life.verdict is CheckVerdict.NEVER_MEASURED for life in judged)
        and not (had_samples and fit)
    ):
        return (
            GrowthCause.NEVER_MEASURED,
            f"The gates had nothing to decide on: {_one_line(judged[-1].reason)}.",
            "Give them more held-out samples, or a loss that differs on most of them."
            if had_samples
            else "Give the model held-out samples with model.evaluate_with.",
            None,
        )
    if fit is None and (worse := _got_worse(journal, held_out, higher_is_better)) is not None:
        return *worse, None
    short = [life for life in judged if life.check == "held-out samples"]
    if short and len(short) == len(judged):
        return (
            GrowthCause.TOO_FEW_SAMPLES,
            f"The gates have too few held-out samples to judge a seed, however long it trains: {_one_line(short[-1].reason)}.",
            "Give them as many, or lower GateThresholds(min_samples=...) where fewer tell enough.",
            None,
        )
    if all(life.stage is not SeedStage.CULLED for life in lives):
        return (
            GrowthCause.UNFINISHED,
            f"The run ended before they were judged: {_where(lives)}.",
            "Train for more epochs, let seeds germinate earlier, or cull what is not proved (model.cull)."
            if any(life.stage in CONTRIBUTING for life in lives)
            else "Train for more epochs, or let seeds germinate earlier.",
            None,
        )
    if not judged:
        culled = [life for life in lives if life.stage is SeedStage.CULLED]
        names = ", ".join(life.seed_id + _reason(life) for life in culled)
        it, they = ("it", "it was") if len(culled) == 1 else ("any of them", "they were")
        return (
            GrowthCause.NOT_REFUSED,
            f"No gate had refused {it} when {they} culled, by hand or by the policy: {names}.",
            "Cull seeds once a gate has refused them: until then nothing tells against them.",
            None,
        )
    if fit is not None:
        return (
            GrowthCause.FITS_TRAINING_DATA,
            f"The host fits its training data and has capacity to spare: {fit}.",
            "More capacity is no help there: use more data, regularisation, or a smaller host.",
            None,
        )
    if journal.metrics >= 3 and journal.best_metric == journal.worst_metric:
        return (
            GrowthCause.METRIC_STOOD_STILL,
            f"The metric of step_epoch was {journal.best_metric:.4g} in all {journal.metrics} epochs: the host did not learn.",
            "See that optimizer.step() is called with the host's parameters, and that the metric is measured anew.",
            None,
        )
    best = max((life for life in lives if life.gain is not None), key=_gain_or_nothing, default=None)
    if best is not None and best.gain is not None and best.gain > 0.0 and best.level and best.spread > 0.0:
        needed = samples_needed(best.gain, best.spread, best.level)
        if needed > best.samples:
            why = (
                f"The largest gain, {best.gain:+.3g} per sample of {best.seed_id} ({best.blueprint}), was measured on "
                f"{best.samples:,} held-out samples; if it is real, {needed:,} would show it in 80 of 100 cases."
            )
            return (
                GrowthCause.TOO_FEW_SAMPLES,
                why,
                "Give the gates that many, or take it that seeds gain nothing here that can be shown.",
                needed,
            )
    (gate, check), times = Counter((life.gate, life.check) for life in judged).most_common(1)[0]
    last = next(life for life in reversed(judged) if (life.gate, life.check) == (gate, check))
    return (
        GrowthCause.REFUSED_BY_CHECK,
        f"Gate {gate} stopped {times} of {n} by its check '{check}', the last one so: {_one_line(last.reason)}.",
        "Seeds of these blueprints gain nothing here: try others, other slots, or a larger task."
        if best is None or not _gain_or_nothing(best) > 0.0
        else "The table of thresholds says when to change that check.",
        None,
    )


_DOUBT: Final = "Until that is settled, what the gates say of seeds proves nothing."

_NOT_STEPPED: Final = (
    GrowthCause.NOT_STEPPED,
    "Nobody called model.step_epoch, so gates and policies saw no epoch.",
    "Call model.step_epoch(metric) after each epoch, then model.follow(policy).",
)


def _not_finite(journal: Journal, epochs: int, held_out: float | None) -> tuple[GrowthCause, str, str] | None:
    """Return cause, why and what to do if the last metrics were NaN or infinite."""
    if journal.not_finite_since is None:
        return None
    kind = "infinite" if held_out is not None and math.isinf(held_out) else "no number (NaN)"
    before = f"it was {journal.best_metric:.4g} at best before" if journal.metrics else "it never was finite"
    why = (
        f"The metric of step_epoch, in kasmina grow the validation loss, has been {kind} since epoch "
        f"{journal.not_finite_since} of {epochs}; {before}."
    )
    todo = (
        "Training has diverged, or a sample is not finite: lower the learning rate, clip gradients, and look for NaN in the "
        "data."
    )
    return GrowthCause.METRIC_NOT_FINITE, why, todo


def _got_worse(
    journal: Journal, held_out: float | None, higher_is_better: bool
) -> tuple[GrowthCause, str, str] | None:
    """Return cause, why and what to do if the metric never was better than at first, and ended clearly worse."""
    first, best = journal.first_metric, journal.best_metric
    if first is None or best is None or held_out is None or journal.metrics < 3:
        return None
    sign = 1.0 if higher_is_better else -1.0
    if best != first or not sign * (first - held_out) > WORSE * abs(first):
        return None
    counts, other = ("higher", "False") if higher_is_better else ("lower", "True")
    why = (
        f"The metric of step_epoch never was better than in its first epoch: from {first:.4g} it went to {held_out:.4g}, and "
        f"{counts} counts as better."
    )
    todo = (
        f"If it is of the other kind, use GrowthConfig(higher_is_better={other}); else the host unlearns: lower the learning "
        "rate, or stop earlier."
    )
    return GrowthCause.METRIC_GOT_WORSE, why, todo


def _fit(held_out: float | None, training: float | None, higher_is_better: bool) -> str | None:
    """Return the figures if the error on training data is at most half of that on held-out data."""
    if held_out is None or training is None or not (math.isfinite(held_out) and math.isfinite(training)):
        return None
    worst = 1.0 if higher_is_better else 0.0  # of a share of right answers the error is what lacks to 1
    here, there = abs(worst - training), abs(worst - held_out)
    in_range = (0.0 <= training <= 1.0 and 0.0 <= held_out <= 1.0) if higher_is_better else training >= 0.0
    if not in_range or there == 0.0 or here > FITS * there:
        return None
    return f"its metric is {training:.4g} on training data and {held_out:.4g} on held-out data"


def _gain_or_nothing(life: SeedLife) -> float:
    return life.gain if life.gain is not None and math.isfinite(life.gain) else -math.inf


def _sentence(text: str) -> str:
    """Return a warning in one line, its indented lines in brackets."""
    bracketed = re.sub(r"(?:\n  .*)+", lambda lines: f" ({'; '.join(lines[0].strip().splitlines())})", text)
    return " ".join(bracketed.split()).rstrip(".") + "."


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(".")


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
