"""``kasmina calibrate``: measure what chance gives on a task, and propose thresholds for its gates."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import click

from kasmina_core.cli import options


@click.command(short_help="Measure the noise floor of a task's gates.")
@options.task
@options.host("Host")
@options.slots
@options.many("--blueprint", "blueprints", "ID", "Blueprint to make placebos from. Default: all that fit.")
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
    help="Gain per sample to find, in nats: says how many samples that takes.",
)
@options.surroundings("calibrate-TASK", "the figures")
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

    The host is trained; then placebo seeds learn from shuffled targets, which carry no information, and are judged like
    seeds at a gate. What they gain is the noise floor. The folder then holds calibration.json and calibration.png.

    Ctrl-C ends it, and nothing is kept.
    """
    from kasmina_core.checkpoints.atomic import write_atomically
    from kasmina_core.experiments.calibration import (
        CalibrationRun,
        calibration_png,
        calibration_text,
        proposal,
    )
    from kasmina_core.experiments.display import RunDisplay
    from kasmina_core.experiments.record import write_all
    from kasmina_core.experiments.run import RunSettings
    from kasmina_core.packs.discovery import default_registry
    from kasmina_core.telemetry.sinks import for_json

    if not all(value is None or math.isfinite(value) for value in (lr, effect)):
        raise click.UsageError("--lr and --effect: give finite numbers above 0.")
    data, place = options.prepare(task, seed, device, threads, data_dir)
    settings = RunSettings(
        task=task,
        host=host,
        slots=slots,
        blueprints=blueprints,
        policy="none",
        incubation="counterfactual",
        epochs=epochs or max(1, data.epochs // 2),
        batch_size=data.batch_size,
        lr=lr or data.lr,
        seed=seed,
        device=place,
        ramp_epochs=data.ramp_epochs,
        host_options={},
    )
    with options.reading_request():
        run = CalibrationRun(settings, data, default_registry(), seeds, looks)
    folder = options.make_folder(out, f"calibrate-{data.name}")
    try:
        with RunDisplay(settings.epochs, quiet=as_json, metric_name=data.metric_name) as display:
            found = run.run(display)
    except KeyboardInterrupt:
        click.echo("Nothing was kept: the figures are made once all placebo seeds were judged.", err=True)
        with suppress(OSError):
            folder.rmdir()
        raise
    record = {
        "task": task,
        "host": run.host_id,
        "config": settings.to_dict(),
        "steps_per_look": run.steps_per_look,
        "proposal": proposal(found, effect),
        **found.to_dict(),
    }
    text = json.dumps(for_json(record), allow_nan=False)
    picture = calibration_png(found, f"{task} · {run.host_id}")
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
