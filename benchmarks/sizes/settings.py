"""What is run: settings, arms with their plans, budgets, rates and forms. Fixed before the run, and printed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, final

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
        rate_of: Arm whose rate is taken; ``None`` tunes one.
        remedy: Whether it is one of the remedies, which the long form leaves out.
        fresh_moments: Whether the optimiser forgets its moments at each wave.
        seed_rate: Rate of seeds over that of the host.
        warm_again: Whether all rates rise once more after each wave.
        ramp_steps: Steps of the alpha ramp.
        rate_kept: Share of all rates that is kept at each wave.
        is_first: Whether new blocks come before those that are there; convolutions only.
        chosen_on: Seed whose runs were known when the times were set. Goals are judged on the others.
    """

    name: str
    what: str
    layers: int = 1
    at: tuple[float, ...] = ()
    needs_share: float | None = None
    copies: int = 1
    is_straight: bool = True
    plateau: bool = False
    rate_of: str | None = None
    remedy: bool = False
    fresh_moments: bool = False
    seed_rate: float = 1.0
    warm_again: bool = False
    ramp_steps: int = 1
    rate_kept: float = 1.0
    is_first: bool = False
    chosen_on: int | None = None

    @property
    def grows(self) -> bool:
        """Whether it is more than a fixed size."""
        return bool(self.at or self.needs_share or self.plateau)


FIXED: Final = (1, 2, 4, 8)


def _remedy(name: str, what: str, **changed: Any) -> Arm:
    """Return the plan with something changed; its rate is the plan's."""
    given: dict[str, Any] = {"at": (0.1, 0.4), "rate_of": PLAN} | changed
    return Arm(name, what, remedy=True, **given)


_RAMP: Final = 100
"""Steps of a ramp of alpha."""

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
        # Up to the last budget that rates are tuned on, these four are the host alone.
        _remedy(
            "later 1-2-4",
            "the plan, four times later: .4 and 1.6",
            at=(0.4, 1.6),
            rate_of="fixed 1",
            chosen_on=0,
        ),
        _remedy("later 1-2", "one block more at .4", at=(0.4,), rate_of="fixed 1"),
        _remedy(
            "later, fresh",
            "later 1-2-4; Adam forgets its moments at each wave",
            at=(0.4, 1.6),
            rate_of="fixed 1",
            fresh_moments=True,
        ),
        _remedy(
            "later, in front",
            "later 1-2-4; new blocks come before the others",
            at=(0.4, 1.6),
            rate_of="fixed 1",
            is_first=True,
        ),
        _remedy("fresh moments", "the plan; Adam forgets its moments at each wave", fresh_moments=True),
        _remedy("twice the rate", "the plan; seeds learn at twice the host's rate", seed_rate=2.0),
        _remedy("half the rate", "the plan; seeds learn at half the host's rate", seed_rate=0.5),
        _remedy("warm again", "the plan; all rates rise again after each wave", warm_again=True),
        _remedy("ramp", f"the plan; alpha rises over {_RAMP} steps", ramp_steps=_RAMP),
        _remedy("rates fall", "the plan; all rates fall to .6 at each wave", rate_kept=0.6),
        _remedy("last size's rate", "the plan at the rate of four blocks", rate_of="fixed 4"),
        _remedy("in front", "the plan; new blocks come before the others", is_first=True),
    )
}

REMEDIES: Final = tuple(arm.name for arm in ARMS.values() if arm.remedy)
SAFE: Final = tuple(arm.name for arm in ARMS.values() if arm.grows and not arm.is_straight)
_COMPARED: Final = tuple(arm.name for arm in ARMS.values() if not arm.remedy)


def is_run(setting: Setting, arm: Arm) -> bool:
    """Return whether a setting takes an arm."""
    if arm.remedy:
        return not arm.is_first or setting.kind == "cnn"
    return setting.arms is None or arm.name in setting.arms


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
    "long", tuple(SETTINGS), _COMPARED, (0.25, 0.5, 1.0, 2.0, 4.0), (4e-3, 8e-3, 1.6e-2), 2, 8, tuned_to=0.5
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
