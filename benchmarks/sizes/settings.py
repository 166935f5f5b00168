"""What is run: settings, arms with their plans, budgets, rates and forms. Fixed before the run, and printed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, final

TOKENS_PER_PARAMETER: Final = 18
"""Bytes per parameter of the four-block model that make the budget 1."""

DECAY_SHARE: Final = 0.25
"""Last part of each budget, over which the rates fall to 0 on a copy."""

EPOCHS_PER_BUDGET: Final = 80
"""Looks at the plan, and clock ticks of the lifecycle, per budget of 1."""

LAG: Final = 6
"""Epochs before G5 judges a seed that was put in straight."""

TREND: Final = 6
"""Epochs that make the host's trend."""

WARMUP_STEPS: Final = 20
TUNING: Final = 1000
"""Added to seeds on which rates are chosen, which are in no table."""


@final
@dataclass(frozen=True, slots=True)
class Setting:
    """One host at one width.

    Attributes:
        batch: Sequences per batch.
        arms: Arms that are run in it; ``None`` for all. Transformers of these widths need some 2e11 FLOPs before a second
            block pays, so the wide one is dear, and the narrow one gets there at its last budget.
    """

    name: str
    kind: str
    dim: int
    batch: int = 8
    arms: tuple[str, ...] | None = None


PLAN: Final = "plan 1-2-4"
_FEW: Final = ("fixed 1", "fixed 2", "fixed 4", PLAN, "plan 1-2")

SETTINGS: Final = {
    setting.name: setting
    for setting in (
        Setting("transformer-16", "transformer", 16, arms=(*_FEW, "plan, no end", "safe 1-2-4")),
        Setting("transformer-24", "transformer", 24, arms=_FEW),
        Setting("cnn-12", "cnn", 12),
        Setting("cnn-16", "cnn", 16),
    )
}


@final
@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training.

    Attributes:
        name: As in the tables.
        what: What it does.
        layers: Blocks of the host at the start.
        at: Waves, as shares of the budget 1; the blocks double with each unless ``copies`` says how many come.
        needs_share: For a plan without an end: a wave comes at this share of what the next size needs.
        copies: Blocks of the first wave.
        is_straight: Whether seeds are put in straight.
        plateau: Whether the plateau policy decides when.
    """

    name: str
    what: str
    layers: int = 1
    at: tuple[float, ...] = ()
    needs_share: float | None = None
    copies: int = 1
    is_straight: bool = True
    plateau: bool = False

    @property
    def grows(self) -> bool:
        """Whether it is more than a fixed size."""
        return bool(self.at or self.needs_share or self.plateau)


FIXED: Final = (1, 2, 4, 8)

ARMS: Final = {
    arm.name: arm
    for arm in (
        *(Arm(f"fixed {n}", f"{n} block{'s' * (n > 1)} from the start", layers=n) for n in FIXED),
        Arm(PLAN, "straight: one block more at .1, two more at .4", at=(0.1, 0.4)),
        Arm("plan 1-2", "straight: one block more at .1", at=(0.1,)),
        Arm("plan, no end", "straight: doubles at .4 of what the next size needs", needs_share=0.4),
        Arm("at once 1-4", "straight: three blocks more at .2", at=(0.2,), copies=3),
        Arm("safe 1-2-4", "the plan's times, the whole lifecycle", at=(0.1, 0.4), is_straight=False),
        Arm("plateau", "the whole lifecycle on plateaus", is_straight=False, plateau=True),
    )
}


@final
@dataclass(frozen=True, slots=True)
class Form:
    """How much is run.

    Attributes:
        budgets: Rising, 1 among them; the last one ends the run.
        rates: One grid for all arms; a single one is not tuned.
        tuning: Seeds on which the rate of each arm is chosen, at budgets up to ``tuned_to``.
        seeds: Paired runs of each arm.
        tokens: Bytes per parameter that make the budget 1.
    """

    name: str
    settings: tuple[str, ...]
    arms: tuple[str, ...]
    budgets: tuple[float, ...]
    rates: tuple[float, ...]
    tuning: int
    seeds: int
    tuned_to: float = 1.0
    tokens: float = TOKENS_PER_PARAMETER


_EVERYTHING: Final = Form(
    "long", tuple(SETTINGS), tuple(ARMS), (0.25, 0.5, 1.0, 2.0, 4.0), (4e-3, 8e-3, 1.6e-2), 2, 8, tuned_to=0.5
)

FORMS: Final = {
    form.name: form
    for form in (
        _EVERYTHING,
        replace(
            _EVERYTHING,
            name="short",
            settings=("cnn-16",),
            arms=("fixed 1", "fixed 2", "fixed 4", PLAN),
            rates=(8e-3,),
            tuning=0,
            seeds=1,
        ),
        replace(
            _EVERYTHING,
            name="tiny",
            budgets=(0.5, 1.0),
            rates=(8e-3,),
            tuning=0,
            seeds=1,
            tokens=0.4,
        ),
    )
}
