"""Quality gates G0-G5: named checks on what was measured of a seed, and the verdict they give together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from functools import partial
from types import MappingProxyType
from typing import Any, Final, final

from kasmina_core.errors import BlueprintError, CheckpointError, chosen
from kasmina_core.gates.paired import SeedEvidence
from kasmina_core.gates.sequential import Finding, LevelSpending, Look, PairedGain, judge
from kasmina_core.lifecycle import SeedStage, SeedState

SCREEN_T: Final = 3.0
"""Standard errors below 0 at which the first-order screen refuses a seed."""


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
    """Verdict of one check. A gate passes if one is PASSED and every other is PASSED or NOT_REQUIRED."""

    PASSED = "passed"
    FAILED = "failed"
    NEVER_MEASURED = "never measured"
    NOT_REQUIRED = "not required"

    @property
    def stops(self) -> bool:
        """Whether it keeps a gate from passing."""
        return self in (CheckVerdict.FAILED, CheckVerdict.NEVER_MEASURED)


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
        value, minimum, maximum = numbers
        return cls(str(texts[0]), value, CheckVerdict(data.get("verdict")), minimum, maximum, str(texts[1]))


@final
@dataclass(frozen=True, slots=True)
class GateResult:
    """What a gate said. True in a condition exactly if it passed.

    Attributes:
        gate: Which gate; ``None`` for one that does not exist or a transition without a gate.
        checks: Every check, in order.
        epoch: ``epochs_total`` of the seed when it was evaluated.
        finding: Effect, interval, sample size and what the test spent, where the gate decided on evidence.
    """

    gate: GateLevel | None
    checks: tuple[GateCheck, ...]
    epoch: int = 0
    finding: Finding | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed; a gate without checks does not pass."""
        verdicts = [check.verdict for check in self.checks]
        return CheckVerdict.PASSED in verdicts and not any(verdict.stops for verdict in verdicts)

    def __bool__(self) -> bool:
        return self.passed

    @property
    def failed_checks(self) -> tuple[GateCheck, ...]:
        """The checks that keep the gate from passing."""
        return tuple(check for check in self.checks if check.verdict.stops)

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
        text = f"{self.gate.name} {'passed' if self.passed else 'failed'}: {self.reason}"
        return text if self.finding is None else f"{text}; {self.finding}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "gate": self.gate.name if self.gate is not None else None,
            "passed": self.passed,
            "reason": self.reason,
            "epoch": self.epoch,
            "checks": [check.to_dict() for check in self.checks],
            "finding": self.finding.to_dict() if self.finding is not None else None,
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
            finding = Finding.from_dict(data["finding"]) if data["finding"] is not None else None
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, CheckpointError) as error:
            raise ValueError(f"expected what a gate said, found {data!r:.80}: {error}") from error
        return cls(gate, checks, epoch, finding)


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
                f"the check raised {error!r}",
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
class ErrorBudget(Enum):
    """What ``error_rate`` is the error rate of.

    - ``PER_SEED``: of each gate of each seed. Seeds under test at the same time share it: each gets its part, by the
      number of seeds that live, when it begins to train.
    - ``PER_RUN``: of each gate over all seeds of a run together, however many there will be: the ``j``-th to germinate
      gets ``1 / (j * (j + 1))``.
    """

    PER_SEED = "per seed"
    PER_RUN = "per run"


@final
class StartComparison(Enum):
    """What G5 asks of the model against its host as it was when blending began.

    It charges the seed with the epochs of the host that it took: one that is only needed because the rest adapted to it
    does not pass.

    - ``PROVED``: significantly better, by the sequential test.
    - ``NO_HARM``: not worse by more than ``max_harm_t`` standard errors. A host at its plateau moves by about as much
      as a useful seed gains, so this is what few held-out samples can tell.
    - ``NOT_ASKED``: nothing.
    """

    PROVED = "proved"
    NO_HARM = "no harm"
    NOT_ASKED = "not asked"


@final
@dataclass(frozen=True, slots=True)
class GateThresholds:
    """Thresholds of both profiles.

    Attributes:
        min_training_epochs: Epochs in TRAINING before G2.
        min_shadowing_epochs: Epochs in SHADOWING before G4.
        min_probation_epochs: Epochs in PROBATIONARY before G5; the gain of each of the last so many must reach
            ``min_gain``, so that one bad epoch is forgotten in time.
        min_blending_epochs: Epochs in BLENDING before G3 (report profile).
        max_isolation_violations: Leaks into the host that G2 and G5 tolerate.
        min_samples: Held-out samples that evidence needs.
        min_gain: Gain that G2 and G5 need besides the test, in units of the loss per sample; ``-inf`` leaves it to the
            test alone.
        error_rate: Probability that a seed that does nothing passes G2, and again G5, at any of all its looks; see
            `LevelSpending`. At 1 the test passes everything.
        error_budget: Whether that holds for each seed or for the whole run.
        planned_looks: Looks at a seed in one stage that share most of the error rate; later ones are held to more.
        smaller_alphas: Blend weights in (0, 1) at which the gain is measured besides alpha 1. G2 accepts on the best of
            all of them, corrected for their number. A seed may be too strong as it comes out of TRAINING and still be
            of use once it has blended in; the gain at .3 foretold that better than the gain at 1.
        min_t: Gain over its standard error that G2 and G5 need instead of the test, a fixed number whose error rate
            nobody knows; ``None`` for the test.
        max_harm_t: How many standard errors the model may be worse with the seed at alpha 1, at G2 and G4.
        prove_before_blending: Whether G2 asks for the test. Without it a seed blends in if it does no significant harm at
            alpha 1, and G5 alone asks for the proof, after joint training. Seeds of which little shows behind a host
            that goes on learning then get their chance; those that do nothing disturb the host until G5 refuses them,
            so cull with ``revert=True``.
        against_start: What G5 asks of the model against its host as it was when blending began; not required where that
            was never measured.
        screen: Whether G2 first looks at the first-order gains of all incubating seeds, in one forward and backward,
            and refuses those that are significantly below 0. It needs an evaluator that keeps the graph, and memory for
            it; it pays where several seeds incubate at once.
        max_output_deviation: Largest ``rms(seed - host) / rms(host)`` at the slot, at G4.
        min_training_improvement: Improvement since the stage began at G2, in units of the metric (report profile).
        min_blending_alpha: Alpha at G3 (report profile).
        min_total_improvement: Improvement since germination at G5, in units of the metric (report profile).

    Raises:
        ValueError: If an error rate, a number of looks or an alpha is out of range, or a number of epochs, samples or
            violations is below 0.
    """

    min_training_epochs: int = 3
    min_shadowing_epochs: int = 1
    min_probation_epochs: int = 3
    min_blending_epochs: int = 3
    max_isolation_violations: int = 0
    min_samples: int = 100
    min_gain: float = 0.0
    error_rate: float = 0.05
    error_budget: ErrorBudget = ErrorBudget.PER_SEED
    planned_looks: int = 8
    smaller_alphas: tuple[float, ...] = (0.3,)
    min_t: float | None = None
    max_harm_t: float = 2.0
    prove_before_blending: bool = True
    against_start: StartComparison = StartComparison.PROVED
    screen: bool = False
    max_output_deviation: float = 10.0
    min_training_improvement: float = 0.5
    min_blending_alpha: float = 0.95
    min_total_improvement: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "error_budget", chosen("error_budget", ErrorBudget, self.error_budget))
        object.__setattr__(
            self, "against_start", chosen("against_start", StartComparison, self.against_start)
        )
        object.__setattr__(self, "smaller_alphas", tuple(map(float, self.smaller_alphas)))
        if wrong := [a for a in self.smaller_alphas if not 0.0 < a < 1.0]:
            raise ValueError(f"smaller_alphas must be between 0 and 1, not {wrong[0]!r}.")
        if len(set(self.smaller_alphas)) < len(self.smaller_alphas):
            raise ValueError(f"smaller_alphas names one twice: {self.smaller_alphas!r}.")
        for name in (
            "min_training_epochs",
            "min_shadowing_epochs",
            "min_probation_epochs",
            "min_blending_epochs",
            "max_isolation_violations",
            "min_samples",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)!r}.")
        LevelSpending(self.error_rate, self.planned_looks)

    @property
    def spending(self) -> LevelSpending:
        """How the looks spend the error rate."""
        return LevelSpending(self.error_rate, self.planned_looks)

    @classmethod
    def proof_in_probation(cls) -> GateThresholds:
        """Return thresholds that let a seed blend in early and ask for the proof after joint training.

        G2 asks, from the first epoch in TRAINING on, that the seed does no harm; G5 asks for the test, and that the model
        is no worse than its host was when blending began. Most seeds that are worth keeping show it only once the
        host trains with them, so these keep several times as many of them as the default does, and no more of those
        that do nothing. But those too blend in and disturb the host until G5 refuses them: use it with
        ``GrowthConfig(keep_snapshot=True)``, so that a policy reverts the host.
        """
        return cls(
            min_training_epochs=1,
            min_gain=-math.inf,
            prove_before_blending=False,
            against_start=StartComparison.NO_HARM,
        )

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


_DECIDED_ON_EVIDENCE: Final = (GateLevel.G2, GateLevel.G4, GateLevel.G5)


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


def _finding(gate: GateLevel, context: GateContext, t: GateThresholds) -> Finding | None:
    evidence = context.measure()
    if evidence is None:
        return None
    look = Look() if gate is GateLevel.G4 else context.look()
    return judge(_weighed(gate, evidence), look, t.spending)


def _gain_check(gate: GateLevel, t: GateThresholds) -> GateCheckSpec:
    def measure(context: GateContext) -> float | None:
        finding = _finding(gate, context, t)
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
        detail = f"p = {finding.p_value:.2g}, look {finding.look} at level {finding.level:.2g}"
        if len(gains) > 1:
            detail = f"alpha {finding.alpha:g}, {detail}"
        return _judged(name, _bounded(best.statistic), minimum=best.critical(finding.level), detail=detail)

    bound = t.min_t if t.min_t is not None else 0.0
    return GateCheckSpec(name, (gate,), measure, minimum=bound, needs_evidence=True)


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
        done: dict[int, GateCheck] = {}
        may_go_on = True
        for cost in (0, 1, 2):
            for spec in asked:
                if spec.cost == cost:
                    done[id(spec)] = (
                        spec.run(context) if may_go_on else spec.not_measured("an earlier check failed")
                    )
            if cost < 2:
                may_go_on = not any(check.verdict.stops for check in done.values())
        checks = tuple(done[id(spec)] for spec in asked)
        if level is GateLevel.G0:
            found = {name: text for name, (_, text) in context.germination.items()}
            checks = tuple(
                c if c.verdict is CheckVerdict.PASSED else replace(c, detail=found.get(c.name, c.detail))
                for c in checks
            )
        finding = None
        if may_go_on and self.profile is GateProfile.EVIDENCE and level in _DECIDED_ON_EVIDENCE:
            with suppress(Exception):  # the checks say what an evaluator raised
                finding = _finding(level, context, self.thresholds)
        return GateResult(level, checks, epoch, finding)
