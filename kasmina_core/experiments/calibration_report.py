"""Report of a calibration, as text and as a picture."""

from __future__ import annotations

from typing import Any

from kasmina_core.evidence.calibration import Calibration
from kasmina_core.experiments.report import blank_figure, figure_png
from kasmina_core.experiments.wording import clean


def proposal(found: Calibration, effect: float | None) -> dict[str, Any]:
    """Return the thresholds to use, as plain data; ``samples_for_effect`` is ``None`` if no effect was asked for."""
    thresholds = found.propose(effect)
    return {
        "min_gain": thresholds.min_gain,
        "error_rate": thresholds.error_rate,
        "min_samples": thresholds.min_samples,
        "effect": effect,
        "samples_for_effect": found.samples_for(effect) if effect is not None else None,
    }


def calibration_text(found: Calibration, effect: float | None) -> str:
    """Return the noise floor look by look, the error rates and what follows from them."""
    t = found.thresholds
    lines = [
        f"{len(found.placebos)} placebo seeds, {found.samples} held-out samples. Gain per sample in nats:",
        "",
        "  look     5 %      50 %      95 %   score 95 %",
    ]
    for number, (gain, score) in enumerate(zip(found.gains, found.scores, strict=True), 1):
        lines.append(
            f"  {number:>4}  {gain.low:+.4f}   {gain.middle:+.4f}   {gain.high:+.4f}   {score.high:+10.2f}"
        )
    lines += [
        "",
        f"accepted placebos      {found.accepted}",
        f"accepted null samples  {found.resampled}; asked for at most {t.error_rate:.0%}",
        "",
        "Proposed for these gates:",
    ]
    wanted = proposal(found, effect)
    settings = [f"min_gain={wanted['min_gain']:g}", f"error_rate={wanted['error_rate']:g}"]
    if effect is not None:
        settings.append(f"min_samples={wanted['min_samples']}")
    lines.append(f"  GateThresholds({', '.join(settings)})")
    if effect is not None:
        needed, enough = wanted["samples_for_effect"], found.samples
        verdict = "there are enough" if enough >= needed else f"there are {enough}"
        lines.append(
            f"To find a gain of {effect:g} at the first look in 80 of 100 cases takes {needed} samples; {verdict}."
        )
    return "\n".join(lines)


def calibration_png(found: Calibration, name: str) -> bytes:
    """Draw what each placebo gained at each look, and its score beside what would have been accepted.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from statistics import NormalDist

    normal = NormalDist()
    figure = blank_figure((9.5, 6.2))
    gains, scores = figure.subplots(2, 1, sharex=True)
    looks = range(1, len(found.gains) + 1)
    for placebo in found.placebos:
        colour = "#d1495b" if placebo.accepted_at is not None else "#9aa5b1"
        style: dict[str, Any] = {"color": colour, "linewidth": 0.9, "alpha": 0.8}
        gains.plot(looks, [f.effect for f in placebo.findings], **style)
        chances = [min(1 - 1e-12, max(1e-12, f.p_value)) for f in placebo.findings]
        scores.plot(looks, [-normal.inv_cdf(p) for p in chances], **style)
    gains.axhline(0.0, color="#222222", linewidth=0.8)
    gains.axhline(
        found.propose().min_gain, color="#14664f", linewidth=1.6, linestyle="--", label="proposed min_gain"
    )
    needed = [-normal.inv_cdf(f.level) for f in found.placebos[0].findings]
    scores.plot(looks, needed, color="#14664f", linewidth=1.6, linestyle="--", label="needed to be accepted")
    gains.set_ylabel("gain (nats)")
    gains.set_title(f"{clean(name)}: what placebo seeds gain", loc="left", fontsize=11)
    scores.set_ylabel("score")
    scores.set_title("Gain over its error", loc="left", fontsize=10)
    scores.set_xlabel("look")
    scores.xaxis.get_major_locator().set_params(integer=True)
    for axes in (gains, scores):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return figure_png(figure)
