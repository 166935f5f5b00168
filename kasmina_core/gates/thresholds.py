"""Thresholds of the gates, and what their error rate covers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import Enum
from typing import TypeVar, final

from kasmina_core.errors import did_you_mean
from kasmina_core.gates.sequential import LevelSpending
from kasmina_core.records import Record


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
class GateThresholds(Record):
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
        for name, kind in (("error_budget", ErrorBudget), ("against_start", StartComparison)):
            object.__setattr__(self, name, chosen(name, kind, getattr(self, name)))
        object.__setattr__(self, "smaller_alphas", tuple(map(float, self.smaller_alphas)))
        if wrong := [a for a in self.smaller_alphas if not 0.0 < a < 1.0]:
            raise ValueError(f"smaller_alphas must be between 0 and 1, not {wrong[0]!r}.")
        if len(set(self.smaller_alphas)) < len(self.smaller_alphas):
            raise ValueError(f"smaller_alphas names one twice: {self.smaller_alphas!r}.")
        for name in [f.name for f in fields(self) if f.type == "int" and f.name != "planned_looks"]:
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


_Choice = TypeVar("_Choice", bound=Enum)


def chosen(name: str, kind: type[_Choice], value: object) -> _Choice:
    """Return the member of an Enum that ``value`` is, or is the value of.

    Raises:
        ValueError: If it is none; the message has the values there are.
    """
    try:
        return kind(value)
    except ValueError:
        values = [str(member.value) for member in kind]
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, values))}, not {value!r}."
            f"{did_you_mean(value, values) if isinstance(value, str) else ''}"
        ) from None
