"""``kasmina grow``: train a small host on real data, grow it, and measure what that was worth."""

from __future__ import annotations

import io
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from kasmina_core.cli import INTERRUPTED, options

if TYPE_CHECKING:
    from kasmina_core.experiments.record import EpochRecord, RunRecord


@click.command(short_help="Train a host and grow it with seeds.")
@options.task
@options.host("Host to grow")
@options.many("--host-option", "host_options", "NAME=VALUE", "Option of the host.")
@options.slots
@options.many("--blueprint", "blueprints", "ID", "Blueprint to grow from. Default: the policy's choice.")
@click.option(
    "--policy",
    default="plateau",
    show_default=True,
    help="plateau, fixed-times, plan, budget, bandit, tournament, none, or one from a pack.",
)
@options.many(
    "--policy-option",
    "policy_options",
    "NAME=VALUE",
    "Option of the policy, such as patience=5, parameters=500 or, a list, 'epochs=[3,8]'. Repeat it for more.",
)
@click.option(
    "--incubation",
    type=click.Choice(["counterfactual", "straight-through"]),
    default="counterfactual",
    show_default=True,
    help="How seeds learn before they contribute.",
)
@click.option(
    "--proof",
    type=click.Choice(["probation", "training"]),
    default="probation",
    show_default=True,
    help="When a seed's gain must be proved: in probation, after joint training, or in training too, before it blends in.",
)
@options.many(
    "--sink",
    "sinks",
    "ID",
    "Also send the events to this sink: tensorboard, wandb, mlflow, trackio, or one from a pack.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs of the grown model. Default: the task's.")
@click.option("--batch-size", type=click.IntRange(min=2), help="Samples per batch. Default: the task's.")
@options.lr
@options.surroundings("TASK", "the record of the run")
def grow(
    task: str,
    host: str | None,
    host_options: tuple[str, ...],
    slots: tuple[str, ...],
    blueprints: tuple[str, ...],
    policy: str,
    policy_options: tuple[str, ...],
    incubation: str,
    proof: str,
    sinks: tuple[str, ...],
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    seed: int,
    device: str,
    threads: int,
    data_dir: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Train a host, grow it with seeds, and compare it with the same host trained alone.

    Both arms get the same training FLOPs: what incubation, gates and culled seeds cost is charged to the grown one.
    The run's folder then holds config.json, events.jsonl, metrics.csv, run.json, model.pt, report.png and report.html.

    events.jsonl and metrics.csv grow while the run does. Ctrl-C ends the run with what there is.

    \b
    Exit code:
      0    done, whether growth was of use or not
      1    not done: the message says why
      2    refused as it was typed; nothing was run
      130  Ctrl-C
    """
    import torch

    from kasmina_core.checkpoints.atomic import write_atomically
    from kasmina_core.experiments.display import RunDisplay, print_final
    from kasmina_core.experiments.record import write_all
    from kasmina_core.experiments.report import write_run
    from kasmina_core.experiments.run import GrowthRun, RunSettings
    from kasmina_core.packs.discovery import default_registry
    from kasmina_core.telemetry import JsonLinesSink, Telemetry

    if lr is not None and not math.isfinite(lr):
        raise click.UsageError(f"--lr {lr}: give a finite number above 0.")
    data, place = options.prepare(task, seed, device, threads, data_dir)
    settings = RunSettings(
        task=task,
        host=host,
        slots=slots,
        blueprints=blueprints,
        policy=policy,
        incubation=incubation,
        proof=proof,
        epochs=epochs or data.epochs,
        batch_size=batch_size or data.batch_size,
        lr=lr or data.lr,
        seed=seed,
        device=place,
        ramp_epochs=data.ramp_epochs,
        host_options=dict(_option("--host-option", text) for text in host_options),
        policy_options=dict(_option("--policy-option", text) for text in policy_options),
    )
    # Some trackers print; with --json standard output holds the record alone.
    aside = redirect_stdout(sys.stderr) if as_json else nullcontext()
    with aside, RunDisplay(settings.epochs, quiet=as_json, metric_name=data.metric_name) as display:
        plugins = default_registry()
        with options.reading_request():
            run = GrowthRun(settings, data, plugins, display)
            folder = options.choose_folder(out, data.name)
            known = {"task": data.name, "seed": seed, "folder": str(folder)}
            named = [plugins.create_sink(name, known) for name in sinks]
        options.make_folder(folder, data.name)  # after everything that may refuse the arguments
        to = [JsonLinesSink(folder / "events.jsonl"), *named]
        with Telemetry(to) as telemetry, _interruptible(run.interrupt):
            for event in plugins.events:
                telemetry.emit(event)
            record = run.run(telemetry, _growing_table(run.record, folder / "metrics.csv"))

    def write_model() -> None:
        whole = io.BytesIO()
        torch.save(run.model.state_dict(), whole)
        write_atomically(folder / "model.pt", whole.getvalue())

    try:  # a full disk must not prevent the output, nor a closed pipe the files
        if as_json:
            click.echo(json.dumps(record.to_dict(), allow_nan=False))
        else:
            print_final(record)
    finally:
        write_all(folder, [lambda: write_run(record, folder), write_model])
    if not as_json:
        click.echo(f"\nFiles: {folder} (open report.html)")
    if record.interrupted:
        sys.exit(INTERRUPTED)


def _growing_table(record: RunRecord, path: Path) -> Callable[[str, EpochRecord], None]:
    """Return a function that adds an epoch to metrics.csv at once; the whole file is written again in the end."""
    from kasmina_core.experiments.report import MetricsFile

    text = io.StringIO()
    table = MetricsFile(record, text)

    def add(arm: str, epoch: EpochRecord) -> None:
        table.add(arm, epoch)
        with suppress(OSError):  # a full disk ends no run
            with path.open("a", encoding="utf-8", newline="") as file:
                file.write(text.getvalue())
            text.seek(0)
            text.truncate()

    return add


def _option(flag: str, text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise click.UsageError(f"{flag} {text!r} must read NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@contextmanager
def _interruptible(interrupt: Any) -> Iterator[None]:
    """Let the first Ctrl-C end the run after its batch; a second one is the usual KeyboardInterrupt."""

    def once(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        click.echo("\nStopping after this batch; Ctrl-C again to abort.", err=True)
        interrupt()

    before = signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
