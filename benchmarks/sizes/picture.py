"""A picture: decayed ends over the budget, the envelope of the fixed sizes, regrets, and where the seeds came in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Final

from benchmarks.sizes.cells import Done
from benchmarks.sizes.settings import ARMS, FIXED, Form
from benchmarks.sizes.tables import Losses, envelope, is_judged, losses_of, regrets, seeds_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREYS: Final = dict(zip((f"fixed {n}" for n in FIXED), ("0.75", "0.6", "0.4", "0.2"), strict=True))


def draw(form: Form, done: Done, path: Path) -> None:
    """Write the picture, one column per setting: losses with the envelope above, what they are behind it below.

    A vertical line marks where the seeds of an arm came in, in its first run. Remedies are left out, but for those that are
    judged as plans are.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    from matplotlib.figure import Figure

    drawn = replace(form, arms=tuple(arm for arm in form.arms if is_judged(ARMS[arm]) or arm in _GREYS))
    columns = [(name, losses) for name in form.settings if (losses := losses_of(drawn, name, done))]
    if not columns:
        return
    figure = Figure(figsize=(5.2 * len(columns), 7.6), layout="constrained")
    panels = figure.subplots(2, len(columns), sharex="col", squeeze=False)
    for place, (name, losses) in enumerate(columns):
        above, below = panels[0, place], panels[1, place]
        _draw_losses(above, losses)
        _draw_regrets(below, losses)
        for arm in losses:
            for born in seeds_of(done, name, arm) if ARMS[arm].is_straight else ():
                for axes in (above, below):
                    axes.axvline(born, color=_colour(arm), linewidth=0.7, alpha=0.5)
        above.set_title(name)
        above.set_xscale("log", base=2)
        below.set_xlabel("FLOPs spent, as a share of x1")
    panels[0, 0].set_ylabel("test loss after decay, nats a byte")
    panels[1, 0].set_ylabel("less that of the best fixed size")
    lines = {line.get_label(): line for axes in panels[0] for line in axes.get_lines()}
    named = [name for name in ("best fixed size", *form.arms) if name in lines]
    figure.legend([lines[name] for name in named], named, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=90)


def _colour(arm: str) -> str:
    """Return a grey for a fixed size, and for any other arm a colour that it has in every panel."""
    return _GREYS.get(arm) or f"C{[name for name in ARMS if name not in _GREYS].index(arm) % 10}"


def _draw_losses(axes: Axes, losses: Losses) -> None:
    axes.plot(
        *zip(*envelope(losses), strict=True), color="gold", linewidth=6, alpha=0.5, label="best fixed size"
    )
    for arm, found in losses.items():
        points = [(b, fmean(found[b].values())) for b in sorted(found)]
        style = "-" if ARMS[arm].grows else ":"
        axes.plot(*zip(*points, strict=True), style, color=_colour(arm), marker=".", label=arm)


def _draw_regrets(axes: Axes, losses: Losses) -> None:
    found = {arm: by_budget for arm, by_budget in regrets(losses).items() if by_budget}
    for arm, by_budget in found.items():
        points = [(b, by_budget[b].middle) for b in sorted(by_budget)]
        style = "-" if ARMS[arm].grows else ":"
        axes.plot(*zip(*points, strict=True), style, color=_colour(arm), marker=".")
    grown = [i.middle for arm, by in found.items() if ARMS[arm].grows for i in by.values()]
    axes.axhline(0.0, color="gold", linewidth=6, alpha=0.5, zorder=0)
    if grown:
        axes.set_ylim(min(grown) - 0.01, max(grown) + 0.01)
