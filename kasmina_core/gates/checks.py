"""Checks of the gates: their declaration, what they look at, and the bundled ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, final

from kasmina_core.errors import BlueprintError
from kasmina_core.foreign import shown
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.gates.sequential import LEAST_INFORMATIVE, Look, PairedGain, judge
from kasmina_core.gates.thresholds import GateThresholds, StartComparison
from kasmina_core.lifecycle import SeedStage, SeedState
from kasmina_core.verdicts import CheckVerdict, Finding, GateCheck, GateLevel

SCREEN_T: Final = 3.0
"""Standard errors below 0 at which the first-order screen refuses a seed."""


@final
@dataclass(frozen=True, slots=True)
class GateContext:
    """What a gate may look at.

    Attributes:
        state: The seed's state with its metrics.
        measure: Measures the seed on held-out samples; returns the same evidence within an epoch, and ``None`` where
            nobody gave an evaluator.
        gains: Gains measured since the stage began, one an epoch, oldest first.
        germination: Findings at germination by name, for G0.
        parameters_finite: Says whether all of the seed's parameters are finite.
        look: Counts a look of the sequential test, once a measurement, and says which it is.
        screen: Measures the seed's first-order gain; ``None`` where that cannot be done.
    """

    state: SeedState
    measure: Callable[[], SeedEvidence | None] = lambda: None
    gains: Sequence[float] = ()
    germination: Mapping[str, tuple[bool, str]] = field(default_factory=dict)
    parameters_finite: Callable[[], bool] = lambda: True
    look: Callable[[], Look] = Look
    screen: Callable[[], PairedGain | None] = lambda: None


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
            anything else, the check fails and says so.
        minimum: Smallest value that passes.
        maximum: Largest value that passes.
        needs_evidence: Whether it asks for ``context.measure()``; such checks run only when the cheap ones passed.
        screens: Whether it runs between those two kinds.

    Raises:
        BlueprintError: If there is neither a minimum nor a maximum, or no gate.
    """

    name: str
    gates: tuple[GateLevel, ...]
    measure: Callable[[GateContext], float | bool | GateCheck | None]
    minimum: float | None = None
    maximum: float | None = None
    needs_evidence: bool = False
    screens: bool = False

    def __post_init__(self) -> None:
        if self.minimum is None and self.maximum is None:
            raise BlueprintError(f"Gate check '{self.name}' needs a minimum or a maximum.")
        if not self.gates:
            raise BlueprintError(f"Gate check '{self.name}' names no gate.")

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
            return GateCheck(
                self.name,
                None,
                CheckVerdict.FAILED,
                self.minimum,
                self.maximum,
                f"the check raised {shown(error)}",
            )
        if value is None:
            advice = "; give the model held-out samples with evaluate_with" if self.needs_evidence else ""
            return self.not_measured(f"no measurement{advice}")
        return _judged(self.name, value, self.minimum, self.maximum)

    def not_measured(self, why: str) -> GateCheck:
        """Return the check as one that was never measured."""
        return GateCheck(self.name, None, CheckVerdict.NEVER_MEASURED, self.minimum, self.maximum, why)


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
    "builds",
    "shape",
    "dtype",
    "finite output",
    "input unchanged",
    "random numbers",
)


def _germination_check(name: str) -> GateCheckSpec:
    def measure(context: GateContext) -> bool | None:
        finding = context.germination.get(name)
        return None if finding is None else finding[0]

    return GateCheckSpec(name, (GateLevel.G0,), measure, minimum=1.0)


def _evidence_check(
    name: str,
    gate: GateLevel,
    value: Callable[[SeedEvidence], float],
    minimum: float | None = None,
    maximum: float | None = None,
) -> GateCheckSpec:
    def measure(context: GateContext) -> float | None:
        evidence = context.measure()
        return None if evidence is None else value(evidence)

    return GateCheckSpec(name, (gate,), measure, minimum, maximum, needs_evidence=True)


def _bounded(statistic: float) -> float:
    """A statistic; a seed that saves exactly the same on every sample counts as large, not as unmeasured."""
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
    def measure(context: GateContext) -> float | None:
        finding = finding_of(gate, context, t)
        return None if finding is None else finding.effect

    return GateCheckSpec("gain", (gate,), measure, minimum=t.min_gain, needs_evidence=True)


def _test_check(
    name: str,
    gate: GateLevel,
    t: GateThresholds,
    of: Callable[[SeedEvidence], Mapping[float, PairedGain] | None],
) -> GateCheckSpec:
    """The sequential test, or a fixed threshold in its place; gains that ``of`` does not find are not required."""

    def measure(context: GateContext) -> GateCheck | None:
        evidence = context.measure()
        if evidence is None:
            return None
        gains = of(evidence)
        if gains is None:
            return _unknown_start(name, t.min_t or 0.0)
        if any(not gain.is_finite for gain in gains.values()):
            return _judged(name, math.nan, minimum=t.min_t or 0.0)
        finding = judge(gains, context.look(), t.spending)
        best = gains[finding.alpha]
        if t.min_t is not None:
            return _judged(name, _bounded(best.t), minimum=t.min_t)
        if best.is_sparse and t.error_rate < 1.0:
            return GateCheck(name, None, CheckVerdict.NEVER_MEASURED, 0.0, detail=_too_few(best))
        detail = f"p = {finding.p_value:.2g}, look {finding.look} at level {finding.level:.2g}"
        if len(gains) > 1:
            detail = f"alpha {finding.alpha:g}, {detail}"
        value = best.t if best.is_sparse else best.statistic
        return _judged(name, _bounded(value), minimum=best.critical(finding.level), detail=detail)

    bound = t.min_t if t.min_t is not None else 0.0
    return GateCheckSpec(name, (gate,), measure, minimum=bound, needs_evidence=True)


def _too_few(gain: PairedGain) -> str:
    return (
        f"only {gain.informative} samples differ, of {gain.samples}, and {LEAST_INFORMATIVE} must: a large loss may be too "
        "rare to be among them. Give more samples, a loss that differs on most of them, or right and wrong as booleans"
    )


def _start_check(t: GateThresholds) -> GateCheckSpec:
    """Compare with the host as it was when blending began."""
    name = "gain over the host at blending"
    if t.against_start is StartComparison.PROVED:
        return _test_check(
            name, GateLevel.G5, t, lambda e: None if e.since_blending is None else {1.0: e.since_blending}
        )
    least = -t.max_harm_t

    def measure(context: GateContext) -> GateCheck | None:
        evidence = context.measure()
        if evidence is None:
            return None
        since = evidence.since_blending
        return (
            _unknown_start(name, least) if since is None else _judged(name, _bounded(since.t), minimum=least)
        )

    return GateCheckSpec(name, (GateLevel.G5,), measure, minimum=least, needs_evidence=True)


def _unknown_start(name: str, minimum: float) -> GateCheck:
    why = "never measured: the host's losses as blending began are not known for these samples"
    return GateCheck(name, None, CheckVerdict.NOT_REQUIRED, minimum=minimum, detail=why)


def _screen_check(t: GateThresholds) -> GateCheckSpec:
    name = "first-order gain over its error"

    def measure(context: GateContext) -> GateCheck:
        found = context.screen()
        if found is None or not found.is_finite:
            why = "never measured: the evaluator's losses carry no graph back to the slot"
            return GateCheck(name, None, CheckVerdict.NOT_REQUIRED, minimum=-SCREEN_T, detail=why)
        return _judged(name, _bounded(found.t), minimum=-SCREEN_T)

    return GateCheckSpec(name, (GateLevel.G2,), measure, minimum=-SCREEN_T, screens=True)


def _smallest(gains: Sequence[float]) -> float | None:
    """The smallest gain; NaN if any is not finite, which ``min`` could pass over."""
    return (min(gains) if all(map(math.isfinite, gains)) else math.nan) if gains else None


def _dwell(name: str, gate: GateLevel, epochs: int) -> GateCheckSpec:
    return GateCheckSpec(name, (gate,), lambda c: c.state.metrics.epochs_in_current_stage, minimum=epochs)


def common_checks(t: GateThresholds) -> list[GateCheckSpec]:
    """Return the checks of both profiles."""
    g2_g5 = (GateLevel.G2, GateLevel.G5)
    return [
        *map(_germination_check, _GERMINATION_CHECKS),
        GateCheckSpec(
            "just germinated", (GateLevel.G1,), lambda c: c.state.stage is SeedStage.GERMINATED, minimum=1.0
        ),
        _dwell("epochs in training", GateLevel.G2, t.min_training_epochs),
        _dwell("epochs in shadowing", GateLevel.G4, t.min_shadowing_epochs),
        _dwell("epochs in probation", GateLevel.G5, t.min_probation_epochs),
        GateCheckSpec(
            "finite parameters",
            (GateLevel.G1, GateLevel.G2, GateLevel.G3, GateLevel.G4, GateLevel.G5),
            lambda c: c.parameters_finite(),
            minimum=1.0,
        ),
        GateCheckSpec(
            "isolation violations",
            g2_g5,
            lambda c: c.state.metrics.isolation_violations,
            maximum=t.max_isolation_violations,
        ),
        GateCheckSpec("stopped in incubation", (GateLevel.G2,), lambda c: c.state.is_stopped, maximum=0.0),
    ]


def evidence_checks(t: GateThresholds) -> list[GateCheckSpec]:
    """Return the checks of `GateProfile.EVIDENCE`."""
    checks = [
        GateCheckSpec("alpha", (GateLevel.G3,), lambda c: c.state.metrics.alpha, minimum=1.0),
        GateCheckSpec("ramp progress", (GateLevel.G3,), lambda c: c.state.metrics.ramp_progress, minimum=1.0),
    ]
    for gate in (GateLevel.G2, GateLevel.G4, GateLevel.G5):
        checks.append(_evidence_check("held-out samples", gate, lambda e: e.samples, minimum=t.min_samples))
    if t.screen:
        checks.append(_screen_check(t))
    for gate in (GateLevel.G2, GateLevel.G5) if t.prove_before_blending else (GateLevel.G5,):
        if t.min_gain > -math.inf:
            checks.append(_gain_check(gate, t))
        checks.append(_test_check("gain over its error", gate, t, partial(_weighed, gate)))
    checks.append(
        _evidence_check(
            "harm at alpha 1 over its error", GateLevel.G2, lambda e: _bounded(e.t), minimum=-t.max_harm_t
        )
    )
    checks.append(
        _evidence_check("gain over its error", GateLevel.G4, lambda e: _bounded(e.t), minimum=-t.max_harm_t)
    )
    if t.against_start is not StartComparison.NOT_ASKED:
        checks.append(_start_check(t))
    checks.append(
        _evidence_check(
            "output deviation", GateLevel.G4, lambda e: e.deviation, maximum=t.max_output_deviation
        )
    )
    if t.min_gain > -math.inf:
        checks.append(
            GateCheckSpec(
                "smallest gain in probation",
                (GateLevel.G5,),
                lambda c: (
                    _smallest(c.gains[-max(1, t.min_probation_epochs) :]) if c.measure() is not None else None
                ),
                minimum=t.min_gain,
                needs_evidence=True,
            )
        )
    return checks


def report_checks(t: GateThresholds) -> list[GateCheckSpec]:
    """Return the checks of `GateProfile.REPORT`."""
    return [
        GateCheckSpec(
            "improvement since stage start",
            (GateLevel.G2,),
            lambda c: c.state.metrics.improvement_since_stage_start,
            minimum=t.min_training_improvement,
        ),
        _dwell("epochs in blending", GateLevel.G3, t.min_blending_epochs),
        GateCheckSpec(
            "alpha", (GateLevel.G3,), lambda c: c.state.metrics.alpha, minimum=t.min_blending_alpha
        ),
        GateCheckSpec("metric", (GateLevel.G4,), lambda c: c.state.metrics.current_metric, minimum=-math.inf),
        GateCheckSpec(
            "total improvement",
            (GateLevel.G5,),
            lambda c: c.state.metrics.total_improvement,
            minimum=t.min_total_improvement,
        ),
    ]
