"""The arms: what each does with the same training FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, final

from kasmina_core import GateProfile, Incubation


@final
@dataclass(frozen=True, slots=True)
class Arm:
    """One way to spend the budget.

    Attributes:
        name: As the tables and the command line have it.
        grows: ``nothing``; ``from birth``: the final size from scratch; ``insertion``: modules put in when the trigger
            says so; ``lifecycle``: seeds; ``adapter``: PEFT's LoRA on the host, which is then frozen; ``gromo``.
        policy: ``plateau``: candidates in turn when the validation loss stalls; ``times``: at fixed shares of the budget;
            ``bandit``: what paid before, drawn; ``tournament``: candidates compared before one is grown.
        pool: ``good``: the setting's first blueprint; ``half bad``: two good and two bad ones, in an order of the
            seed's.
        random: Whether an inserted module's last layer is drawn as torch would, rather than 0.
        warmup: Intervals over which the learning rate of an inserted module rises.
        incubation: How seeds learn in TRAINING.
        gates: Which gates decide.
        what: One line for people.
    """

    name: str
    what: str
    grows: Literal["nothing", "from birth", "insertion", "lifecycle", "adapter", "gromo"] = "nothing"
    policy: Literal["plateau", "times", "bandit", "tournament"] = "plateau"
    pool: Literal["good", "half bad"] = "good"
    random: bool = False
    warmup: int = 0
    incubation: Incubation = Incubation.COUNTERFACTUAL
    gates: GateProfile = GateProfile.EVIDENCE


ALONE: Final = "host alone"
OURS: Final = "ours"
BAD: Final = ", half bad"
NAIVE: Final = ("insertion", "insertion, warm-up", "insertion, random")

_ARMS: Final = (
    Arm(ALONE, "the host, nothing grown"),
    Arm("from scratch", "the final size from the first step", "from birth"),
    Arm(NAIVE[0], "a module with a zero last layer, put in when ours germinates", "insertion"),
    Arm(NAIVE[1], "the same, its learning rate rising over 4 intervals", "insertion", warmup=4),
    Arm(NAIVE[2], "the same, its last layer drawn at random", "insertion", random=True),
    Arm(
        "straight-through",
        "the lifecycle with straight-through incubation, our gates",
        "lifecycle",
        incubation=Incubation.STRAIGHT_THROUGH,
    ),
    Arm(OURS, "the lifecycle with counterfactual incubation, our gates", "lifecycle"),
    Arm(
        "ours, fixed times",
        "the same, germinating at fixed shares of the budget",
        "lifecycle",
        policy="times",
    ),
    Arm("LoRA (PEFT)", "PEFT adapters on every layer at the first plateau, the host frozen", "adapter"),
    Arm(NAIVE[0] + BAD, "insertion from a pool that is half bad", "insertion", pool="half bad"),
    Arm(NAIVE[1] + BAD, "the same with warm-up", "insertion", pool="half bad", warmup=4),
    Arm(
        "report" + BAD,
        "the report's lifecycle: straight-through, its gates",
        "lifecycle",
        pool="half bad",
        incubation=Incubation.STRAIGHT_THROUGH,
        gates=GateProfile.REPORT,
    ),
    Arm(OURS + BAD, "ours, from that pool", "lifecycle", pool="half bad"),
    Arm("ours, bandit" + BAD, "ours, a bandit over slots and blueprints", "lifecycle", "bandit", "half bad"),
    Arm(
        "ours, tournament" + BAD,
        "ours, candidates compared before one is grown",
        "lifecycle",
        "tournament",
        "half bad",
    ),
    Arm("GroMo", "gromo 0.1.0: neurons added to every layer, chosen by its statistics", "gromo"),
)

ARMS: Final[Mapping[str, Arm]] = MappingProxyType({arm.name: arm for arm in _ARMS})

_CLASSIC: Final = tuple(arm.name for arm in _ARMS if arm.grows != "gromo")

ARMS_OF: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "digits": _CLASSIC,
        "chars": _CLASSIC,
        "mlp": (ALONE, "from scratch", NAIVE[0], OURS, "GroMo"),
    }
)
"""The arms of each setting, by its name."""


def rates_like(arm: str) -> str:
    """Return the arm whose learning rate an arm takes: one that differs in its pool alone is not tuned again."""
    same = {"report": "straight-through", "ours, bandit": OURS, "ours, tournament": OURS}
    plain = arm.removesuffix(BAD)
    return same.get(plain, plain)
