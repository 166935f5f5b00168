"""Gate checks: declaration, context and the bundled ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, final

from kasmina_core.blueprints.foreign import described
from kasmina_core.errors import BlueprintError
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.gates.sequential import LEAST_INFORMATIVE, Look, PairedGain, judge, student_t_quantile
from kasmina_core.gates.thresholds import GateThresholds, StartComparison
from kasmina_core.gates.trend import TrendGap
from kasmina_core.lifecycle import SeedMetrics, SeedStage, SeedState
from kasmina_core.verdicts import CheckVerdict, Finding, GateCheck, GateLevel

PROBATION_DWELL: Final = "epochs in probation"

SCREEN_T: Final = 3.0
"""Standard errors below 0 at which the first-order screen refuses a seed."""


@final
@dataclass(frozen=True, slots=True)
class GateContext:
    """What a gate may look at.

    Attributes:
        state: The seed's state with its metrics.
        measure: Measures the seed on held-out samples; returns the same evidence within an epoch, and ``None`` without
            an evaluator.
        gains: Gains measured since the stage began, one per epoch, oldest first.
        germination: Findings at germination by name, for G0.
        parameters_finite: Returns whether all of the seed's parameters are finite.
        look: Counts a look of the sequential test, once per measurement, and returns which it is.
        screen: Measures the seed's first-order gain; ``None`` where that cannot be done.
        trend: Returns the gain over the host's trend, of a seed that was put in straight; ``None`` where there is none.
        since_insertion: Epochs or steps since such a seed was put in, as its lag counts.
        lag: How many of them must pass before it is judged.
    """

    state: SeedState
    measure: Callable[[], SeedEvidence | None] = lambda: None
    gains: Sequence[float] = ()
    germination: Mapping[str, tuple[bool, str]] = field(default_factory=dict)
    parameters_finite: Callable[[], bool] = lambda: True
    look: Callable[[], Look] = Look
    screen: Callable[[], PairedGain | None] = lambda: None
    trend: Callable[[], TrendGap | None] = lambda: None
    since_insertion: int = 0
    lag: int = 0


@final
@dataclass(frozen=True, slots=True)
class GateCheckSpec:
    """The declaration of a check; packs offer them through ``kasmina_gate_checks``.

    A check can veto a transition, never force one: every other check still has to pass.

    Attributes:
        name: What is checked.
        gates: The gates that ask it.
        measure: ``measure(context) -> float | bool | GateCheck | None``; ``None``, NaN and infinity mean never
            measured. A `GateCheck` is taken as it is: its bounds depend on the context. If it raises or returns
            anything else, the check fails with the reason.
        minimum: Smallest value that passes.
        maximum: Largest value that passes.
        needs_evidence: Whether it asks for ``context.measure()``; such checks run only when the cheap ones passed.
        screens: Whether it runs between those two kinds.
        waits: Whether a value out of bounds gets there with time, as a number of epochs does; the check then says
            *waiting*, not *failed*.

    Raises:
        BlueprintError: If there is neither a minimum nor a maximum, no gate, or a field is of another kind.
    """

    name: str
    gates: tuple[GateLevel, ...]
    measure: Callable[[GateContext], float | bool | GateCheck | None]
    minimum: float | None = None
    maximum: float | None = None
    needs_evidence: bool = False
    screens: bool = False
    waits: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise BlueprintError(f"A gate check is named by text, not {self.name!r:.80}.")
        what = f"Gate check '{self.name}'"
        if self.minimum is None and self.maximum is None:
            raise BlueprintError(f"{what} needs a minimum or a maximum.")
        for bound, value in (("minimum", self.minimum), ("maximum", self.maximum)):
            if value is not None and not isinstance(value, int | float):
                raise BlueprintError(f"{what}: {bound} must be a number, not {value!r:.80}.")
        if not callable(self.measure):
            raise BlueprintError(
                f"{what}: measure must be a function of the context, not {self.measure!r:.80}."
            )
        try:
            gates = tuple(map(GateLevel, self.gates))
        except (TypeError, ValueError) as error:
            raise BlueprintError(
                f"{what}: gates must be a tuple of {', '.join(f'GateLevel.{level.name}' for level in GateLevel)}, "
                f"not {self.gates!r:.80}."
            ) from error
        if not gates:
            raise BlueprintError(f"{what} names no gate.")
        object.__setattr__(self, "gates", gates)

    @property
    def cost(self) -> int:
        """When it runs: 0 at once, 1 if those passed, 2 if all before passed."""
        return 2 if self.needs_evidence else 1 if self.screens else 0

    def run(self, context: GateContext) -> GateCheck:
        """Measure and judge."""
        try:
            raw = self.measure(context)
            if isinstance(raw, GateCheck):
                return raw
            value = None if raw is None else float(raw)
        except Exception as error:
            why = f"the check raised {' '.join(described(error).split())}"
            return GateCheck(self.name, None, CheckVerdict.FAILED, self.minimum, self.maximum, why)
        if value is None:
            advice = "; give the model held-out samples with evaluate_with" if self.needs_evidence else ""
            return self.not_measured(f"no measurement{advice}")
        check = _judged(self.name, value, self.minimum, self.maximum)
        if self.waits and check.verdict is CheckVerdict.FAILED:
            check = replace(check, verdict=CheckVerdict.WAITING)
        return replace(check, minimum=None, maximum=None) if isinstance(raw, bool) else check

    @property
    def not_asked(self) -> GateCheck:
        """The check as one that a seed was spared that was put in straight."""
        why = "put in straight: compared with the host's trend"
        return GateCheck(self.name, None, CheckVerdict.NOT_ASKED, self.minimum, self.maximum, why)

    def not_measured(self, why: str) -> GateCheck:
        """Return the check as one that was never measured."""
        return GateCheck(self.name, None, CheckVerdict.NEVER_MEASURED, self.minimum, self.maximum, why)

    def not_asked_yet(self, is_waiting: bool) -> GateCheck:
        """Return the check as one that did not run because an earlier one waits, or failed."""
        if not is_waiting:
            return self.not_measured("an earlier check failed")
        why = "asked when the earlier checks have passed"
        return GateCheck(self.name, None, CheckVerdict.WAITING, self.minimum, self.maximum, why)


def _judged(
    name: str, value: float, minimum: float | None = None, maximum: float | None = None, detail: str = ""
) -> GateCheck:
    if not math.isfinite(value):
        verdict, detail = CheckVerdict.NEVER_MEASURED, "not a finite number"
    else:
        fits = (minimum is None or value >= minimum) and (maximum is None or value <= maximum)
        verdict = CheckVerdict.PASSED if fits else CheckVerdict.FAILED
    return GateCheck(name, value, verdict, minimum, maximum, detail)


_GERMINATION_CHECKS: Final = (
    "blueprint known",
    "topology",
    "width",
    "positions",
    "builds",
    "shape",
    "dtype",
    "finite output",
    "input unchanged",
    "kept apart",
    "random numbers",
)


def _germination_check(name: str) -> GateCheckSpec:
    def measure(context: GateContext) -> bool | None:
        finding = context.germination.get(name)
        return None if finding is None else finding[0]

    return GateCheckSpec(name, (GateLevel.G0,), measure, minimum=1.0)


def _metric_check(
    name: str,
    gate: GateLevel,
    value: Callable[[SeedMetrics], float | None],
    minimum: float,
    *,
    waits: bool = False,
) -> GateCheckSpec:
    return GateCheckSpec(name, (gate,), lambda c: value(c.state.metrics), minimum, waits=waits)


def _dwell(stage: str, gate: GateLevel, epochs: int) -> GateCheckSpec:
    return _metric_check(f"epochs in {stage}", gate, lambda m: m.epochs_in_current_stage, epochs, waits=True)


def _evidence_check(
    name: str,
    gate: GateLevel,
    value: Callable[[GateContext, SeedEvidence], float | GateCheck],
    minimum: float | None = None,
    maximum: float | None = None,
) -> GateCheckSpec:
    def measure(context: GateContext) -> float | GateCheck | None:
        evidence = context.measure()
        return None if evidence is None else value(context, evidence)

    return GateCheckSpec(name, (gate,), measure, minimum, maximum, needs_evidence=True)


def _harm_check(name: str, gate: GateLevel, t: GateThresholds) -> GateCheckSpec:
    return _evidence_check(name, gate, lambda _, e: _bounded(e.t), minimum=-t.max_harm_t)


def _bounded(statistic: float) -> float:
    """Cut a statistic: a seed that saves the same on every sample, infinite, counts as large, not as unmeasured."""
    return max(-1e6, min(1e6, statistic)) if not math.isnan(statistic) else math.nan


def _weighed(gate: GateLevel, evidence: SeedEvidence) -> dict[float, PairedGain]:
    """Return the gains that a gate may accept on, by alpha: all at G2, later that of the model as it is."""
    return evidence.gains if gate is GateLevel.G2 else {1.0: evidence.paired}


def finding_of(gate: GateLevel, context: GateContext, t: GateThresholds) -> Finding | None:
    """Return what the test finds of the evidence at this look; ``None`` without evidence."""
    evidence = context.measure()
    if evidence is None:
        return None
    look = Look() if gate is GateLevel.G4 else context.look()
    return judge(_weighed(gate, evidence), look, t.spending)


def _gain_check(gate: GateLevel, t: GateThresholds) -> GateCheckSpec:
    def effect(context: GateContext, evidence: SeedEvidence) -> float:
        return judge(_weighed(gate, evidence), context.look(), t.spending).effect

    return _evidence_check("gain", gate, effect, minimum=t.min_gain)


def _test_check(
    name: str,
    gate: GateLevel,
    t: GateThresholds,
    of: Callable[[SeedEvidence], Mapping[float, PairedGain] | None],
) -> GateCheckSpec:
    """The sequential test, or a fixed threshold in its place; gains that ``of`` does not find are not required."""
    bound = t.min_t if t.min_t is not None else 0.0

    def test(context: GateContext, evidence: SeedEvidence) -> GateCheck:
        gains = of(evidence)
        if gains is None:
            return _not_required(name, bound, _UNKNOWN_START)
        if any(not gain.is_finite for gain in gains.values()):
            return _judged(name, math.nan, minimum=bound)
        finding = judge(gains, context.look(), t.spending)
        best = gains[finding.alpha]
        if t.min_t is not None:
            return _judged(name, _bounded(best.t), minimum=t.min_t)
        if best.is_sparse and t.error_rate < 1.0:
            return GateCheck(name, None, CheckVerdict.NEVER_MEASURED, 0.0, detail=_too_few(best))
        detail = f"p = {finding.p_value:.2g} at look {finding.look} (needs <= {finding.level:.2g})"
        if len(gains) > 1:
            detail = f"alpha {finding.alpha:g}, {detail}"
        value = best.t if best.is_sparse else best.statistic
        return _judged(name, _bounded(value), minimum=best.critical(finding.level), detail=detail)

    return _evidence_check(name, gate, test, minimum=bound)


def _too_few(gain: PairedGain) -> str:
    return (
        f"only {gain.informative} samples differ, of {gain.samples}, and {LEAST_INFORMATIVE} must: a large loss may be too "
        "rare to be among them. Give more samples, a loss that differs on most of them, or right and wrong as booleans"
    )


_UNKNOWN_START: Final = "never measured: the host's losses as blending began are not known for these samples"


def _not_required(name: str, minimum: float, why: str) -> GateCheck:
    return GateCheck(name, None, CheckVerdict.NOT_REQUIRED, minimum, detail=why)


def _start_check(t: GateThresholds) -> GateCheckSpec:
    """Compare with the host as it was when blending began."""
    name = "gain over the host at blending"
    if t.against_start is StartComparison.PROVED:
        return _test_check(
            name, GateLevel.G5, t, lambda e: None if e.since_blending is None else {1.0: e.since_blending}
        )
    least = -t.max_harm_t

    def harm(_: GateContext, evidence: SeedEvidence) -> GateCheck:
        if (since := evidence.since_blending) is None:
            return _not_required(name, least, _UNKNOWN_START)
        return _judged(name, _bounded(since.t), minimum=least)

    return _evidence_check(name, GateLevel.G5, harm, minimum=least)


def _screen_check() -> GateCheckSpec:
    name = "first-order gain in standard errors"

    def measure(context: GateContext) -> GateCheck:
        found = context.screen()
        if found is None or not found.is_finite:
            why = "never measured: the evaluator's losses carry no graph back to the slot"
            return _not_required(name, -SCREEN_T, why)
        return _judged(name, _bounded(found.t), minimum=-SCREEN_T)

    return GateCheckSpec(name, (GateLevel.G2,), measure, minimum=-SCREEN_T, screens=True)


def _smallest_gain_check(t: GateThresholds) -> GateCheckSpec:
    def smallest(context: GateContext) -> float | None:
        gains = context.gains[-max(1, t.min_probation_epochs) :]
        if context.measure() is None or not gains:
            return None
        return min(gains) if all(map(math.isfinite, gains)) else math.nan  # min could pass over a NaN

    name = "smallest gain in probation"
    return GateCheckSpec(name, (GateLevel.G5,), smallest, minimum=t.min_gain, needs_evidence=True)


def straight_checks(t: GateThresholds) -> list[GateCheckSpec]:
    """Return the checks of G5 for a seed that was put in straight: the lag, and the host's trend."""
    lag_name, name = "lag since insertion", "gain over the host's trend"

    def lag(context: GateContext) -> GateCheck:
        check = _judged(lag_name, context.since_insertion, minimum=context.lag)
        return check if check.verdict is CheckVerdict.PASSED else replace(check, verdict=CheckVerdict.WAITING)

    def gain(context: GateContext) -> GateCheck:
        gap = context.trend()
        if gap is None:
            why = "no metric now, or too few before the insertion: give step_epoch one in each epoch"
            return GateCheck(name, None, CheckVerdict.NEVER_MEASURED, detail=why)
        detail = f"gain {gap.gain:.4g}, error {gap.standard_error:.4g}"
        if t.against_start is StartComparison.NO_HARM:
            return _judged(name, _bounded(gap.t), minimum=-t.max_harm_t, detail=detail)
        look = context.look()
        level = look.share * t.spending.at(look.number) if t.error_rate < 1.0 else 1.0
        least = student_t_quantile(1.0 - level, gap.freedom)
        return _judged(name, _bounded(gap.t), minimum=_bounded(least), detail=detail)

    checks = [GateCheckSpec(lag_name, (GateLevel.G5,), lag, minimum=0.0)]
    if t.against_start is not StartComparison.NOT_ASKED:
        checks.append(GateCheckSpec(name, (GateLevel.G5,), gain, minimum=0.0, screens=True))
    return checks


def common_checks(t: GateThresholds) -> list[GateCheckSpec]:
    """Return the checks of both profiles."""
    g2_g5 = (GateLevel.G2, GateLevel.G5)
    is_new = "just germinated"
    leaks = "isolation violations"
    return [
        *map(_germination_check, _GERMINATION_CHECKS),
        GateCheckSpec(is_new, (GateLevel.G1,), lambda c: c.state.stage is SeedStage.GERMINATED, minimum=1.0),
        _dwell("training", GateLevel.G2, t.min_training_epochs),
        _dwell("shadowing", GateLevel.G4, t.min_shadowing_epochs),
        _dwell("probation", GateLevel.G5, t.min_probation_epochs),
        GateCheckSpec(
            "finite parameters", tuple(GateLevel)[1:], lambda c: c.parameters_finite(), minimum=1.0
        ),
        GateCheckSpec(
            leaks, g2_g5, lambda c: c.state.metrics.isolation_violations, maximum=t.max_isolation_violations
        ),
        GateCheckSpec("stopped in incubation", (GateLevel.G2,), lambda c: c.state.is_stopped, maximum=0.0),
    ]


def evidence_checks(t: GateThresholds) -> list[GateCheckSpec]:
    """Return the checks of `GateProfile.EVIDENCE`."""
    checks = [
        _metric_check("alpha", GateLevel.G3, lambda m: m.alpha, 1.0, waits=True),
        _metric_check("ramp progress", GateLevel.G3, lambda m: m.ramp_progress, 1.0, waits=True),
    ]
    for gate in (GateLevel.G2, GateLevel.G4, GateLevel.G5):
        checks.append(
            _evidence_check("held-out samples", gate, lambda _, e: e.samples, minimum=t.min_samples)
        )
    if t.screen:
        checks.append(_screen_check())
    for gate in (GateLevel.G2, GateLevel.G5) if t.prove_before_blending else (GateLevel.G5,):
        if t.min_gain > -math.inf:
            checks.append(_gain_check(gate, t))
        checks.append(_test_check("gain in standard errors", gate, t, partial(_weighed, gate)))
    checks.append(_harm_check("gain at alpha 1 in standard errors", GateLevel.G2, t))
    checks.append(_harm_check("gain in standard errors", GateLevel.G4, t))
    if t.against_start is not StartComparison.NOT_ASKED:
        checks.append(_start_check(t))
    most = t.max_output_deviation
    checks.append(_evidence_check("output deviation", GateLevel.G4, lambda _, e: e.deviation, maximum=most))
    if t.min_gain > -math.inf:
        checks.append(_smallest_gain_check(t))
    return checks


def report_checks(t: GateThresholds) -> list[GateCheckSpec]:
    """Return the checks of `GateProfile.REPORT`."""
    since_start = "improvement since stage start"
    least, total = t.min_training_improvement, t.min_total_improvement
    return [
        _metric_check(since_start, GateLevel.G2, lambda m: m.improvement_since_stage_start, least),
        _dwell("blending", GateLevel.G3, t.min_blending_epochs),
        _metric_check("alpha", GateLevel.G3, lambda m: m.alpha, t.min_blending_alpha, waits=True),
        _metric_check("metric", GateLevel.G4, lambda m: m.current_metric, -math.inf),
        _metric_check("total improvement", GateLevel.G5, lambda m: m.total_improvement, total),
    ]
