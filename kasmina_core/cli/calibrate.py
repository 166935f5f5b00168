"""``kasmina calibrate``: measure what chance gives on a task, and propose thresholds for its gates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kasmina_core.cli import options

if TYPE_CHECKING:
    import torch

    from kasmina_core.experiments.tasks import Task
    from kasmina_core.growth.model import MorphogeneticModel


@click.command(short_help="Measure the noise floor of a task's gates.")
@options.task
@options.host("Host")
@options.slots
@click.option(
    "--blueprint",
    "blueprints",
    multiple=True,
    metavar="ID",
    help="Blueprint to make placebos from. Default: all that fit.",
)
@click.option("--seeds", default=20, show_default=True, type=click.IntRange(min=2), help="Placebo seeds.")
@click.option(
    "--looks", default=6, show_default=True, type=click.IntRange(min=1), help="Looks at each of them."
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Epochs the host is trained first. Default: half the task's."
)
@options.lr
@click.option(
    "--effect",
    type=click.FloatRange(min=0, min_open=True),
    help="Gain per sample, in nats, that shall be found: says how many samples that takes.",
)
@options.seed
@options.device
@options.threads
@options.data
@options.out("calibrate-TASK")
@options.as_json("the figures")
def calibrate(
    task: str,
    host: str | None,
    slots: tuple[str, ...],
    blueprints: tuple[str, ...],
    seeds: int,
    looks: int,
    epochs: int | None,
    lr: float | None,
    effect: float | None,
    seed: int,
    device: str,
    threads: int,
    data_dir: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure what chance gives on a task, and propose thresholds for its gates.

    The host is trained; then placebo seeds learn from shuffled targets, which say nothing, and are judged as the gates
    judge seeds. What they gain is the noise floor. The folder then holds calibration.json and calibration.png.

    Ctrl-C ends it, and nothing is kept.
    """
    import torch

    from kasmina_core.checkpoints.atomic import write_atomically
    from kasmina_core.evidence.calibration import calibrate as measure
    from kasmina_core.evidence.calibration import shuffled
    from kasmina_core.experiments.calibration_report import calibration_png, calibration_text, proposal
    from kasmina_core.experiments.display import RunDisplay
    from kasmina_core.experiments.record import write_all
    from kasmina_core.experiments.report import require_plots
    from kasmina_core.experiments.run import EVALUATION_BATCH, PRESETS, RunSettings, candidates, make_host
    from kasmina_core.experiments.tasks import load_task
    from kasmina_core.growth.config import GrowthConfig
    from kasmina_core.growth.model import MorphogeneticModel
    from kasmina_core.packs.discovery import default_registry
    from kasmina_core.quiet import derived_seed, private_rng
    from kasmina_core.records import for_json

    if not all(value is None or math.isfinite(value) for value in (lr, effect)):
        raise click.UsageError("--lr and --effect: give finite numbers above 0.")
    torch.set_num_threads(threads)
    place = options.pick_device(device)
    require_plots()
    data = load_task(task, seed, place, data_dir=data_dir)
    preset = PRESETS[task]
    epochs = epochs or max(1, preset.epochs // 2)
    settings = RunSettings(
        task=task,
        host=host,
        slots=slots,
        blueprints=blueprints,
        policy="none",
        incubation="counterfactual",
        epochs=epochs,
        batch_size=preset.batch_size,
        lr=lr or preset.lr,
        seed=seed,
        device=place,
        ramp_epochs=preset.ramp_epochs,
        host_options={},
    )
    plugins = default_registry()
    host_id, module = make_host(plugins, data, settings)
    model = MorphogeneticModel(
        module,
        slots or None,
        config=GrowthConfig(seed=derived_seed(seed, "seeds")),
        example=(data.train.inputs[:2],),
        registry=plugins.blueprints,
    )
    fitting = candidates(plugins, model, blueprints)
    chosen = list(dict.fromkeys(name for slot in model.observe().slots for name in fitting(slot)))
    folder = options.make_folder(out, f"calibrate-{task}")
    order = torch.Generator().manual_seed(derived_seed(seed, "order"))

    def placebo_loss(twin: MorphogeneticModel, generator: torch.Generator) -> torch.Tensor:
        inputs, targets = next(batches)
        return data.loss(twin(inputs), shuffled(targets, generator)).mean()

    def evaluate(twin: MorphogeneticModel) -> torch.Tensor:
        return torch.cat([data.loss(twin(x), y) for x, y in data.batches("gate", EVALUATION_BATCH)])

    try:
        with (
            RunDisplay(epochs, quiet=as_json, metric_name=data.metric_name) as display,
            private_rng(derived_seed(seed, "training"), torch.device(place)),
        ):
            display.phase(f"training the host on {task}", epochs)
            optimizer = torch.optim.Adam(model.parameters(), settings.lr)
            model.train()
            for _ in range(epochs):
                for inputs, targets in data.training_batches(settings.batch_size, order):
                    optimizer.zero_grad()
                    data.loss(model(inputs), targets).mean().backward()  # type: ignore[no-untyped-call]  # torch
                    optimizer.step()
                display.advance()
            batches = _endless(data, settings.batch_size, order)
            steps = math.ceil(len(data.train.inputs) / settings.batch_size)
            display.phase(f"raising {seeds} placebo seeds", seeds)
            found = measure(
                model,
                evaluate,
                placebo_loss,
                blueprints=chosen,
                seeds=seeds,
                looks=looks,
                steps=steps,
                lr=settings.lr,
                seed=seed,
                progress=lambda done, of: display.advance(),
            )
    except KeyboardInterrupt:
        click.echo("Nothing was kept: the figures are made once all placebo seeds were judged.", err=True)
        with suppress(OSError):
            folder.rmdir()
        raise
    record = {"task": task, "host": host_id, "config": settings.to_dict(), "steps_per_look": steps}
    record |= found.to_dict() | {"proposal": proposal(found, effect)}
    text = json.dumps(for_json(record), allow_nan=False)
    picture = calibration_png(found, f"{task} · {host_id}")
    try:
        click.echo(text if as_json else calibration_text(found, effect))
    finally:
        write_all(
            folder,
            [
                lambda: write_atomically(folder / "calibration.json", text + "\n"),
                lambda: write_atomically(folder / "calibration.png", picture),
            ],
        )
    if not as_json:
        click.echo(f"\nFiles: {folder}")


def _endless(data: Task, batch_size: int, order: torch.Generator) -> Iterator[Any]:
    while True:
        yield from data.training_batches(batch_size, order)
