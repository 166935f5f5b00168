"""Quality gates G0-G5: named checks on what was measured of a seed, and the verdict they give together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import Any, Final, final

from kasmina_core.errors import BlueprintError
from kasmina_core.evidence import SeedEvidence
from kasmina_core.lifecycle import SeedStage, SeedState


@final
class GateLevel(IntEnum):
    """The gates, each named for the transition it guards."""

    G0 = 0
    G1 = 1
    G2 = 2
    G3 = 3
    G4 = 4
    G5 = 5


GATE_INTO: Final[Mapping[SeedStage, GateLevel]] = MappingProxyType(
    {
        SeedStage.GERMINATED: GateLevel.G0,
        SeedStage.TRAINING: GateLevel.G1,
        SeedStage.BLENDING: GateLevel.G2,
        SeedStage.SHADOWING: GateLevel.G3,
        SeedStage.PROBATIONARY: GateLevel.G4,
        SeedStage.FOSSILIZED: GateLevel.G5,
    }
)
"""The gate that guards the way into a stage; stages of the cooldown have none."""


@final
class CheckVerdict(Enum):
    """Verdict of one check. Only PASSED lets a gate pass."""

    PASSED = "passed"
    FAILED = "failed"
    NEVER_MEASURED = "never measured"


@final
@dataclass(frozen=True, slots=True)
class GateCheck:
    """One named check of a gate.

    Attributes:
        name: What was checked.
        value: What was measured; ``None``, NaN or infinite where nothing usable was.
        minimum: Smallest value that passes, if there is one.
        maximum: Largest value that passes, if there is one.
        verdict: Passed, failed or never measured.
        detail: More for people, such as the reason a width was refused.
    """

    name: str
    value: float | None
    verdict: CheckVerdict
    minimum: float | None = None
    maximum: float | None = None
    detail: str = ""

    @property
    def threshold(self) -> str:
        """The bounds as text, such as ``>= 3``."""
        low = f">= {self.minimum:.6g}" if self.minimum is not None else ""
        high = f"<= {self.maximum:.6g}" if self.maximum is not None else ""
        return f"{low}, {high}".strip(", ")

    def __str__(self) -> str:
        value = "nothing" if self.value is None else f"{self.value:.4g}"
        text = f"{self.name} {self.verdict.value}: {value} (needs {self.threshold})"
        return f"{text}: {self.detail}" if self.detail else text

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "name": self.name,
            "value": self.value,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "verdict": self.verdict.value,
            "detail": self.detail,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateCheck:
        """Rebuild from `to_dict`.

        Raises:
            ValueError: If it is no check.
        """
        numbers = [data.get(name) for name in ("value", "minimum", "maximum")]
        texts = [data.get(name) for name in ("name", "detail")]
        if not (
            all(number is None or type(number) in (int, float) for number in numbers)
            and all(isinstance(text, str) for text in texts)
        ):
            raise ValueError(f"expected a check of a gate, found {data!r:.80}")
        value, minimum, maximum = (None if number is None else float(number) for number in numbers)
        return cls(str(texts[0]), value, CheckVerdict(data.get("verdict")), minimum, maximum, str(texts[1]))


@final
@dataclass(frozen=True, slots=True)
class GateResult:
    """What a gate said. True in a condition exactly if it passed.

    Attributes:
        gate: Which gate; ``None`` for one that does not exist or a transition without a gate.
        checks: Every check, in order.
        epoch: ``epochs_total`` of the seed when it was evaluated.
    """

    gate: GateLevel | None
    checks: tuple[GateCheck, ...]
    epoch: int = 0

    @property
    def passed(self) -> bool:
        """Whether every check passed; a gate without checks does not pass."""
        return bool(self.checks) and all(check.verdict is CheckVerdict.PASSED for check in self.checks)

    def __bool__(self) -> bool:
        return self.passed

    @property
    def failed_checks(self) -> tuple[GateCheck, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if check.verdict is not CheckVerdict.PASSED)

    @property
    def reason(self) -> str:
        """Why, in one line: the first check that failed (or was never measured, if none failed)."""
        if self.passed:
            return f"all {len(self.checks)} checks passed"
        if not self.failed_checks:
            return "nothing was checked"
        measured = [check for check in self.failed_checks if check.verdict is CheckVerdict.FAILED]
        return str((measured or self.failed_checks)[0])

    def __str__(self) -> str:
        if self.gate is None:
            return self.reason
        return f"{self.gate.name} {'passed' if self.passed else 'failed'}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "gate": self.gate.name if self.gate is not None else None,
            "passed": self.passed,
            "reason": self.reason,
            "epoch": self.epoch,
            "checks": [check.to_dict() for check in self.checks],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateResult:
        """Rebuild from `to_dict`; whether it passed follows from its checks.

        Raises:
            ValueError: If it is no result of a gate.
        """
        try:
            gate = GateLevel[data["gate"]] if data["gate"] is not None else None
            checks = tuple(GateCheck.from_dict(check) for check in data["checks"])
            if type(epoch := data["epoch"]) is not int:
                raise ValueError("its epoch is no whole number")
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"expected what a gate said, found {data!r:.80}: {error}") from error
        return cls(gate, checks, epoch)


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
    """

    state: SeedState
    measure: Callable[[], SeedEvidence | None] = lambda: None
    gains: Sequence[float] = ()
    germination: Mapping[str, tuple[bool, str]] = field(default_factory=dict)
    parameters_finite: Callable[[], bool] = lambda: True


@final
@dataclass(frozen=True, slots=True)
class GateCheckSpec:
    """The declaration of a check; packs offer them through ``kasmina_gate_checks``.

    A check can veto a transition, never force one: every other check still has to pass.

    Attributes:
        name: What is checked.
        gates: The gates that ask it.
        measure: ``measure(context) -> float | bool | None``; ``None``, NaN and infinity mean never measured. If it
            raises or returns anything else, the check fails and says so.
        minimum: Smallest value that passes.
        maximum: Largest value that passes.
        needs_evidence: Whether it asks for ``context.measure()``; such checks run only when the cheap ones passed.

    Raises:
        BlueprintError: If there is neither a minimum nor a maximum, or no gate.
    """

    name: str
    gates: tuple[GateLevel, ...]
    measure: Callable[[GateContext], float | bool | None]
    minimum: float | None = None
    maximum: float | None = None
    needs_evidence: bool = False

    def __post_init__(self) -> None:
        if self.minimum is None and self.maximum is None:
            raise BlueprintError(f"Gate check '{self.name}' needs a minimum or a maximum.")
        if not self.gates:
            raise BlueprintError(f"Gate check '{self.name}' names no gate.")

    def run(self, context: GateContext) -> GateCheck:
        """Measure and judge."""
        try:
            raw = self.measure(context)
            value = None if raw is None else float(raw)
        except Exception as error:
            return GateCheck(
                self.name,
                None,
                CheckVerdict.FAILED,
                self.minimum,
                self.maximum,
                f"the check raised {error!r}",
            )
        if value is None:
            advice = "; give the model held-out samples with evaluate_with" if self.needs_evidence else ""
            return self.not_measured(f"no measurement{advice}")
        if not math.isfinite(value):
            return GateCheck(
                self.name,
                value,
                CheckVerdict.NEVER_MEASURED,
                self.minimum,
                self.maximum,
                "not a finite number",
            )
        fits = (self.minimum is None or value >= self.minimum) and (
            self.maximum is None or value <= self.maximum
        )
        verdict = CheckVerdict.PASSED if fits else CheckVerdict.FAILED
        return GateCheck(self.name, value, verdict, self.minimum, self.maximum)

    def not_measured(self, why: str) -> GateCheck:
        """Return the check as one that was never measured."""
        return GateCheck(self.name, None, CheckVerdict.NEVER_MEASURED, self.minimum, self.maximum, why)


@final
class GateProfile(Enum):
    """Which signals the gates decide on.

    - ``EVIDENCE``: the seed's own, measured by pairing held-out samples with and without it. The default.
    - ``REPORT``: improvement of the whole model since the stage began, as in the reviewed system. It needs no
      evaluator, but it measures the host: its rank correlation with a seed's worth was .05.
    """

    EVIDENCE = "evidence"
    REPORT = "report"


@final
@dataclass(frozen=True, slots=True)
class GateThresholds:
    """Thresholds of both profiles.

    Attributes:
        min_training_epochs: Epochs in TRAINING before G2.
        min_shadowing_epochs: Epochs in SHADOWING before G4.
        min_probation_epochs: Epochs in PROBATIONARY before G5.
        min_blending_epochs: Epochs in BLENDING before G3 (report profile).
        max_isolation_violations: Leaks into the host that G2 and G5 tolerate.
        min_samples: Held-out samples that evidence needs.
        min_gain: Gain that G2 and G5 need, in units of the loss per sample.
        min_t: Gain over its standard error that G2 and G5 need.
        max_harm_t: How many standard errors the model may be worse with the seed, at G4.
        max_output_deviation: Largest ``rms(seed - host) / rms(host)`` at the slot, at G4.
        min_training_improvement: Improvement since the stage began at G2, in units of the metric (report profile).
        min_blending_alpha: Alpha at G3 (report profile).
        min_total_improvement: Improvement since germination at G5, in units of the metric (report profile).
    """

    min_training_epochs: int = 3
    min_shadowing_epochs: int = 1
    min_probation_epochs: int = 3
    min_blending_epochs: int = 3
    max_isolation_violations: int = 0
    min_samples: int = 30
    min_gain: float = 0.0
    min_t: float = 3.0
    max_harm_t: float = 2.0
    max_output_deviation: float = 10.0
    min_training_improvement: float = 0.5
    min_blending_alpha: float = 0.95
    min_total_improvement: float = 0.0

    @classmethod
    def report(cls) -> GateThresholds:
        """Return the thresholds of the reviewed system, for a metric in percentage points."""
        return cls(max_isolation_violations=10, min_shadowing_epochs=1, min_probation_epochs=1)


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
    name: str, gate: GateLevel, value: Callable[[SeedEvidence], float], **bounds: float
) -> GateCheckSpec:
    def measure(context: GateContext) -> float | None:
        evidence = context.measure()
        return None if evidence is None else value(evidence)

    return GateCheckSpec(name, (gate,), measure, needs_evidence=True, **bounds)


def _t_bounded(evidence: SeedEvidence) -> float:
    """Evidence's t; a seed that saves exactly the same on every sample counts as large, not as unmeasured."""
    return max(-1e6, min(1e6, evidence.t)) if not math.isnan(evidence.t) else math.nan


def _smallest(gains: Sequence[float]) -> float | None:
    """The smallest gain; NaN if any is not finite, which ``min`` could pass over."""
    return (min(gains) if all(map(math.isfinite, gains)) else math.nan) if gains else None


def _dwell(name: str, gate: GateLevel, epochs: int) -> GateCheckSpec:
    return GateCheckSpec(name, (gate,), lambda c: c.state.metrics.epochs_in_current_stage, minimum=epochs)


def _common_checks(t: GateThresholds) -> list[GateCheckSpec]:
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


def _evidence_checks(t: GateThresholds) -> list[GateCheckSpec]:
    checks = [
        GateCheckSpec("alpha", (GateLevel.G3,), lambda c: c.state.metrics.alpha, minimum=1.0),
        GateCheckSpec("ramp progress", (GateLevel.G3,), lambda c: c.state.metrics.ramp_progress, minimum=1.0),
    ]
    for gate in (GateLevel.G2, GateLevel.G4, GateLevel.G5):
        checks.append(_evidence_check("held-out samples", gate, lambda e: e.samples, minimum=t.min_samples))
    for gate in (GateLevel.G2, GateLevel.G5):
        checks.append(_evidence_check("gain", gate, lambda e: e.gain, minimum=t.min_gain))
        checks.append(_evidence_check("gain over its error", gate, _t_bounded, minimum=t.min_t))
    checks.append(_evidence_check("gain over its error", GateLevel.G4, _t_bounded, minimum=-t.max_harm_t))
    checks.append(
        _evidence_check(
            "output deviation", GateLevel.G4, lambda e: e.deviation, maximum=t.max_output_deviation
        )
    )
    checks.append(
        GateCheckSpec(
            "smallest gain in probation",
            (GateLevel.G5,),
            lambda c: _smallest(c.gains) if c.measure() is not None else None,
            minimum=t.min_gain,
            needs_evidence=True,
        )
    )
    return checks


def _report_checks(t: GateThresholds) -> list[GateCheckSpec]:
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


@final
class QualityGates:
    """The gates of one configuration.

    Args:
        profile: Which signals decide.
        thresholds: Thresholds; the default is the profile's.
        extra_checks: Further checks, each of which may veto.

    >>> gates = QualityGates()
    >>> bool(gates.check(GateLevel.G1, GateContext(SeedState("s", "b", "slot", SeedStage.GERMINATED))))
    True
    """

    def __init__(
        self,
        profile: GateProfile = GateProfile.EVIDENCE,
        thresholds: GateThresholds | None = None,
        extra_checks: Iterable[GateCheckSpec] = (),
    ) -> None:
        self.profile = GateProfile(profile)
        is_report = self.profile is GateProfile.REPORT
        self.thresholds = thresholds or (GateThresholds.report() if is_report else GateThresholds())
        self.extra_checks = tuple(extra_checks)
        decisive = _report_checks(self.thresholds) if is_report else _evidence_checks(self.thresholds)
        self.checks = (*_common_checks(self.thresholds), *decisive, *self.extra_checks)

    def __reduce__(self) -> tuple[Any, ...]:
        return QualityGates, (self.profile, self.thresholds, self.extra_checks)

    def check(self, gate: GateLevel | int, context: GateContext) -> GateResult:
        """Run every check of a gate.

        Checks that need evidence run only when the others passed; otherwise they are never measured. An unknown gate
        fails.
        """
        epoch = context.state.metrics.epochs_total
        try:
            level = GateLevel(gate)
        except ValueError:
            known = ", ".join(member.name for member in GateLevel)
            unknown = GateCheck(
                "gate exists", 0.0, CheckVerdict.FAILED, minimum=1.0, detail=f"{gate!r} is none of {known}"
            )
            return GateResult(None, (unknown,), epoch)
        asked = [spec for spec in self.checks if level in spec.gates]
        done = {id(spec): spec.run(context) for spec in asked if not spec.needs_evidence}
        cheap_passed = all(check.verdict is CheckVerdict.PASSED for check in done.values())
        for spec in asked:
            if spec.needs_evidence:
                done[id(spec)] = (
                    spec.run(context) if cheap_passed else spec.not_measured("an earlier check failed")
                )
        checks = tuple(done[id(spec)] for spec in asked)
        if level is GateLevel.G0:
            found = {name: text for name, (_, text) in context.germination.items()}
            checks = tuple(
                c if c.verdict is CheckVerdict.PASSED else replace(c, detail=found.get(c.name, c.detail))
                for c in checks
            )
        return GateResult(level, checks, epoch)
