"""Verdicts on seeds: the gates, their checks, results and findings. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import Annotated, ClassVar, Final, Protocol, final

from kasmina_core.lifecycle import SeedStage
from kasmina_core.records import Count, Mark, Record


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
    """Verdict of one check. A gate passes if one is PASSED, and none is FAILED, WAITING or NEVER_MEASURED.

    WAITING means that time alone is missing: epochs in a stage, or the end of a ramp. NOT_REQUIRED: there was nothing to
    measure it on. NOT_ASKED: it was left out on purpose, as for a seed that was put in straight.
    """

    PASSED = "passed"
    FAILED = "failed"
    WAITING = "waiting"
    NEVER_MEASURED = "never measured"
    NOT_REQUIRED = "not required"
    NOT_ASKED = "not asked"

    @property
    def stops(self) -> bool:
        """Whether it keeps a gate from passing."""
        return self in (CheckVerdict.FAILED, CheckVerdict.WAITING, CheckVerdict.NEVER_MEASURED)


@final
@dataclass(frozen=True, slots=True)
class GateCheck(Record):
    """One named check of a gate.

    Attributes:
        name: What was checked.
        value: What was measured; ``None``, NaN or infinite where nothing usable was.
        minimum: Smallest value that passes, if there is one. A check that is answered by yes or no has neither.
        maximum: Largest value that passes, if there is one.
        verdict: Passed, failed, waiting, never measured, not required or not asked.
        detail: More for people, such as the reason a width was refused.
    """

    name: str
    value: float | None
    verdict: CheckVerdict
    minimum: float | None = None
    maximum: float | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        # A number that is read back is a float: so is one that was not, or a resumed run's records differ from its own.
        for name in ("value", "minimum", "maximum"):
            if type(number := getattr(self, name)) is int:
                object.__setattr__(self, name, float(number))

    @property
    def threshold(self) -> str:
        """The bounds as text, such as ``>= 3``."""
        low = f">= {self.minimum:.6g}" if self.minimum is not None else ""
        high = f"<= {self.maximum:.6g}" if self.maximum is not None else ""
        return f"{low}, {high}".strip(", ")

    @property
    def score(self) -> float:
        """How near the check is to passing, in [0, 1]: 1 exactly where it passed, 0 where nothing was measured.

        A value below ``minimum > 0`` scores ``value / minimum``, one above ``maximum > 0`` scores ``maximum / value``,
        and 0 where that is negative or a bound is not above 0.
        """
        if self.verdict is CheckVerdict.PASSED:
            return 1.0
        shares = [0.0]
        if self.value is not None and self.value > 0.0 and math.isfinite(self.value):
            shares += [self.value / self.minimum] if self.minimum is not None and self.minimum > 0.0 else []
            shares += [self.maximum / self.value] if self.maximum is not None and self.maximum > 0.0 else []
        return max((share for share in shares if share < 1.0), default=0.0)

    def __str__(self) -> str:
        value = "nothing" if self.value is None else f"{self.value:.4g}"
        if not self.threshold:
            text = f"{self.name} {self.verdict.value}"
        elif self.verdict is CheckVerdict.WAITING:
            text = f"{self.name}: {value} so far (needs {self.threshold})"
        else:
            text = f"{self.name} {self.verdict.value}: {value} (needs {self.threshold})"
        return f"{text}: {self.detail}" if self.detail else text


def interval_in_words(share: float, low: float, high: float) -> str:
    """Return an interval that holds the true value in such a share of cases, or that nothing bounds it.

    >>> interval_in_words(0.95, -0.1, 0.2)
    '95 % interval -0.1 to +0.2'
    >>> interval_in_words(0.95, -math.inf, math.inf)
    'too few samples differ to bound it'
    """
    if math.isinf(low) and math.isinf(high):
        return "too few samples differ to bound it"
    return f"{100 * share:.4g} % interval {low:+.4g} to {high:+.4g}"


@final
@dataclass(frozen=True, slots=True)
class Finding(Record):
    """What a gate found of a seed at one look.

    Attributes:
        alpha: Blend weight at which the effect was measured.
        effect: Mean gain per held-out sample; positive is good.
        bound: What the true gain is not below, one-sided; above 0 exactly where the finding is significant.
        low: Lower end of the interval of ``effect``.
        high: Upper end. All the intervals of a test, one a look, hold the true effects at once with probability
            ``1 - error_rate``.
        samples: Held-out samples.
        p_value: Probability of a finding this good, at this look alone, for a seed that does nothing.
        look: Which look this was, from 1.
        level: What ``p_value`` was compared with: the part of ``error_rate`` that this look may spend.
        spent: What this and the earlier looks have spent together.
        error_rate: What all looks at this seed may spend.
    """

    alpha: float
    effect: float
    bound: float
    low: float
    high: float
    samples: Count
    p_value: float
    look: Count
    level: float
    spent: float
    error_rate: float

    def __str__(self) -> str:
        interval = interval_in_words(1 - self.error_rate, self.low, self.high)
        return f"gain {self.effect:+.4g} ({interval}, n = {self.samples}, alpha {self.alpha:g}, look {self.look})"


@final
@dataclass(frozen=True, slots=True)
class GateResult(Record):
    """What a gate said. True in a condition exactly if it passed.

    Attributes:
        gate: Which gate; ``None`` for one that does not exist or a transition without a gate.
        checks: Every check, in order.
        epoch: ``epochs_total`` of the seed when it was evaluated.
        finding: Effect, interval, sample size and what the test spent, where the gate decided on evidence.
    """

    derived: ClassVar = ("passed", "verdict", "reason", "score")

    gate: Annotated[GateLevel | None, Mark.BY_NAME]
    checks: tuple[GateCheck, ...]
    epoch: int = 0
    finding: Finding | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed; a gate without checks does not pass."""
        verdicts = [check.verdict for check in self.checks]
        return CheckVerdict.PASSED in verdicts and not any(verdict.stops for verdict in verdicts)

    @property
    def verdict(self) -> CheckVerdict:
        """PASSED; WAITING if nothing but time is missing; otherwise FAILED, also where a check was never measured."""
        if self.passed:
            return CheckVerdict.PASSED
        stopping = {check.verdict for check in self.failed_checks}
        return CheckVerdict.WAITING if stopping == {CheckVerdict.WAITING} else CheckVerdict.FAILED

    def __bool__(self) -> bool:
        return self.passed

    @property
    def score(self) -> float:
        """How far the seed has come with this gate, in [0, 1]; 1 exactly if it passed.

        It is the mean of `GateCheck.score` over the checks that were asked. By gate that is

        - G0: the share of the tests of a new seed that passed;
        - G1: the share of its checks that passed: just germinated, finite parameters;
        - G2: how ready a seed in TRAINING is to blend in: its epochs, its isolation and its evidence;
        - G3: mostly, the share of the ramp that is done;
        - G4: how near the model with the seed is to being no worse, with outputs in bounds;
        - G5: how near the seed is to its proof: its epochs in probation and the evidence, over what the test asks.

        Evidence counts 0 until the checks that cost nothing have passed, because it is not measured before.
        """
        asked = [c for c in self.checks if c.verdict.stops or c.verdict is CheckVerdict.PASSED]
        if self.passed or not asked:
            return float(self.passed)
        return sum(check.score for check in asked) / len(asked)

    @property
    def failed_checks(self) -> tuple[GateCheck, ...]:
        """The checks that keep the gate from passing."""
        return tuple(check for check in self.checks if check.verdict.stops)

    @property
    def reason(self) -> str:
        """Why, in one line: the first check that failed, else that was never measured, else that waits."""
        if self.passed:
            left_out = (CheckVerdict.NOT_REQUIRED, CheckVerdict.NOT_ASKED)
            counts = {v.value: n for v in left_out if (n := sum(c.verdict is v for c in self.checks))}
            passed = len(self.checks) - sum(counts.values())
            return ", ".join([f"all {passed} checks passed", *(f"{n} {what}" for what, n in counts.items())])
        return str(self.decisive or "nothing was checked")

    @property
    def decisive(self) -> GateCheck | None:
        """The check that `reason` tells; ``None`` if none stops the gate."""
        # Of checks that wait, those without a value were not asked because of the others.
        worst = (CheckVerdict.FAILED, CheckVerdict.NEVER_MEASURED, CheckVerdict.WAITING)
        return min(self.failed_checks, key=lambda c: (worst.index(c.verdict), c.value is None), default=None)

    def __str__(self) -> str:
        if self.gate is None:
            return self.reason
        text = f"{self.gate.name} {self.verdict.value}: {self.reason}"
        return text if self.finding is None else f"{text}; {self.finding}"


class Evidence(Protocol):
    """What was measured of a seed on held-out samples, as far as a slot reads it. `SeedEvidence` is one."""

    @property
    def gain(self) -> float:
        """What the seed saves per sample; positive is good."""
        ...

    @property
    def t(self) -> float:
        """The gain over its standard error."""
        ...
