"""Calibration of a task's gates: the measurement, and its report as text and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, final

import torch

from kasmina_core.evidence import calibration
from kasmina_core.evidence.calibration import Calibration
from kasmina_core.experiments.arm import EVALUATION_BATCH, logits_of, train_epoch
from kasmina_core.experiments.flops import FlopLedger
from kasmina_core.experiments.report import blank_figure, figure_png
from kasmina_core.experiments.run import (
    Display,
    RunSettings,
    candidates,
    make_model,
)
from kasmina_core.experiments.tasks import Split, Task
from kasmina_core.experiments.wording import clean
from kasmina_core.growth.config import GrowthConfig
from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.packs.discovery import PluginRegistry
from kasmina_core.quiet import derived_seed, private_rng


@final
class CalibrationRun:
    """Trains the host of a task, then measures what placebo seeds gain.

    Args:
        settings: Host, slots, blueprints, epochs of the host, batch size, learning rate and seed.
        task: What the host learns.
        plugins: Offers the host and the blueprints.
        seeds: Placebo seeds.
        looks: Looks at each of them.

    Raises:
        KasminaError: If there is no such host, point or blueprint, or they do not fit each other.
    """

    def __init__(
        self, settings: RunSettings, task: Task, plugins: PluginRegistry, seeds: int, looks: int
    ) -> None:
        self.settings, self.task, self.seeds, self.looks = settings, task, seeds, looks
        self.steps_per_look = math.ceil(len(task.train.inputs) / settings.batch_size)
        config = GrowthConfig(seed=derived_seed(settings.seed, "seeds"))
        self.host_id, self._model = make_model(plugins, task, settings, config)
        fitting = candidates(plugins, self._model, settings.blueprints)
        slots = self._model.observe().slots
        self._blueprints = list(dict.fromkeys(name for slot in slots for name in fitting(slot)))

    def run(self, display: Display) -> Calibration:
        """Train, raise the placebo seeds, and return what was found."""
        settings, task, model = self.settings, self.task, self._model
        order = torch.Generator().manual_seed(derived_seed(settings.seed, "order"))
        batches = self._endless(order)

        def placebo_loss(twin: MorphogeneticModel, generator: torch.Generator) -> torch.Tensor:
            inputs, targets = next(batches)
            return task.loss(logits_of(twin(inputs)), calibration.shuffled(targets, generator)).mean()

        def evaluate(twin: MorphogeneticModel) -> torch.Tensor:
            return torch.cat(
                [task.loss(logits_of(twin(x)), y) for x, y in task.batches("gate", EVALUATION_BATCH)]
            )

        with private_rng(derived_seed(settings.seed, "training"), torch.device(settings.device)):
            display.phase(f"training the host on {task.name}", settings.epochs)
            optimizer, ledger = torch.optim.Adam(model.parameters(), settings.lr), FlopLedger()
            for _ in range(settings.epochs):
                train_epoch(model, task, settings.batch_size, optimizer, order, ledger)
                display.advance()
            display.phase(f"raising {self.seeds} placebo seeds", self.seeds)
            return calibration.calibrate(
                model,
                evaluate,
                placebo_loss,
                blueprints=self._blueprints,
                seeds=self.seeds,
                looks=self.looks,
                steps=self.steps_per_look,
                lr=settings.lr,
                seed=settings.seed,
                progress=lambda done, of: display.advance(),
            )

    def _endless(self, order: torch.Generator) -> Iterator[Split]:
        while True:
            yield from self.task.training_batches(self.settings.batch_size, order)


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
    """Return the noise floor per look, the error rates and the proposed thresholds as text."""
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
    """Draw each placebo's gain and score at each look, with the limits for acceptance.

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
