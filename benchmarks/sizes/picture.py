"""A picture: decayed ends over the budget, the envelope of the fixed sizes, and where the seeds came in."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from benchmarks.sizes.cells import Done
from benchmarks.sizes.settings import ARMS, Form
from benchmarks.sizes.tables import envelope, losses_of, seeds_of


def draw(form: Form, done: Done, path: Path) -> None:
    """Write the picture, one panel a setting.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    from matplotlib.figure import Figure

    panels = [(name, losses) for name in form.settings if (losses := losses_of(form, name, done))]
    if not panels:
        return
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    for place, (name, losses) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        best = envelope(losses)
        axes.plot(*zip(*best, strict=True), color="black", linewidth=4, alpha=0.25, label="best fixed size")
        for arm, found in losses.items():
            points = [(b, fmean(found[b].values())) for b in sorted(found)]
            style = "-" if ARMS[arm].grows else ":"
            (line,) = axes.plot(*zip(*points, strict=True), style, marker=".", label=arm)
            for born in seeds_of(done, name, arm) if ARMS[arm].is_straight else ():
                axes.axvline(born, color=line.get_color(), linewidth=0.6, alpha=0.5)
        axes.set_xscale("log", base=2)
        axes.set_title(name)
        axes.set_xlabel("FLOPs spent, as a share of x1")
        axes.set_ylabel("test loss after decay, nats a byte")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
