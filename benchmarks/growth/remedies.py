"""Recipes tried against the head start of a plain insertion, each on the same runs as the insertion."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from benchmarks.growth.arms import NAIVE, OURS
from benchmarks.growth.growing import RECIPE, Recipe
from benchmarks.growth.race import race
from benchmarks.growth.settings import Setting
from benchmarks.growth.statistics import bootstrap, paired
from benchmarks.growth.tables import text_table
from kasmina_core import StartComparison

RATE: Final = 3e-2
"""Learning rate of all of them: the one that most arms choose."""

_FIRST: Final = replace(RECIPE, min_training=3, seed_rate=1.0, together=1)
_SOON: Final = replace(_FIRST, min_training=1)

RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        "three intervals apart": _FIRST,
        "three intervals apart, G2 asks for proof": replace(_FIRST, lenient=False),
        "three intervals apart, G5 asks for proof over the start": replace(
            _FIRST, start=StartComparison.PROVED
        ),
        "three intervals apart, two slots together": replace(_FIRST, together=2),
        "one interval apart": _SOON,
        "one interval apart, a ramp of 1": replace(_SOON, ramp=1.0),
        "one interval apart, incubated every 2nd step": replace(_SOON, every=2),
        "one interval apart, harm of up to 3 errors": replace(_SOON, max_harm=3.0),
        "one interval apart, a seed's rate at .3": replace(_SOON, seed_rate=0.3),
        "one interval apart, a seed's rate at .1": replace(_SOON, seed_rate=0.1),
        "one interval apart, two slots together": replace(_SOON, together=2),
        "one interval apart, together, rate at .3": replace(_SOON, together=2, seed_rate=0.3),
        "one interval apart, together, rate at .1": replace(_SOON, together=2, seed_rate=0.1),
        "two intervals apart, together, rate at .3": replace(
            _SOON, min_training=2, together=2, seed_rate=0.3
        ),
        "three intervals apart, together, rate at .3": replace(_FIRST, together=2, seed_rate=0.3),
    }
)
"""Recipes by name."""


def case(setting: Setting, recipe: str, host: str, schedule: str, seed: int) -> dict[str, Any]:
    """Run a recipe, or an arm that it is compared with, and return its losses."""
    arm, settings = (recipe, RECIPE) if recipe in NAIVE else (OURS, RECIPES[recipe])
    found = race(setting, arm, host, schedule, RATE, seed, settings)
    return {key: found[key] for key in ("val", "test", "intervals", "log")}


def remedy_table(done: Mapping[str, Mapping[str, Any]]) -> str:
    """Return every recipe's loss less that of the plain insertion, by setting."""
    losses: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in done.values():
        if record["benchmark"] == "remedies" and "result" in record:
            place = f"{record['setting']}, {record['host']}, {record['schedule']}"
            losses[record["arm"]][place][record["seed"]] = record["result"]["val"]
    places = sorted({place for by_place in losses.values() for place in by_place})
    rows = []
    for name in (*NAIVE[1:2], *RECIPES):
        if name in losses:
            rows.append(
                [
                    name,
                    *(str(bootstrap(paired(losses[name][p], losses[NAIVE[0]][p]))) for p in places),
                ]
            )
    return text_table(["recipe", *places], rows)
