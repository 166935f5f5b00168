"""``kasmina grow``: train a small host on real data, grow it, and measure what that was worth."""

from __future__ import annotations

import io
import json
import math
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
from click.core import ParameterSource

from kasmina_core.cli import INTERRUPTED, options

if TYPE_CHECKING:
    from kasmina_core.experiments.progress import Beginning
    from kasmina_core.experiments.record import EpochRecord, RunRecord
    from kasmina_core.experiments.run import RunSettings
    from kasmina_core.experiments.tasks import Task
    from kasmina_core.packs.discovery import PluginRegistry
    from kasmina_core.telemetry import Sink

CONFIG: Final = "config.json"
NESTED_SLOTS: Final = {"plan": 3}
"""By policy, how many slots open behind fossils where nobody says it: a plan has several waves."""

REPEATS: Final = "repeats"
"""Key of config.json under which the folder of several runs holds their number."""

BEGAN: Final = "began"
"""Key under which it holds checksums of the task and the host of the first run."""


class _Request(NamedTuple):
    """What is asked of a run besides its settings."""

    data_dir: Path | None
    sinks: tuple[str, ...]
    as_json: bool
    command: str


@click.command(short_help="Train a host and grow it with seeds.")
@options.task
@options.host("Host to grow")
@options.many("--host-option", "host_options", "NAME=VALUE", "Option of the host.")
@options.slots
@options.many("--blueprint", "blueprints", "ID", "Blueprint to grow from. Default: the policy's choice.")
@click.option(
    "--policy",
    help="plateau, fixed-times, plan, budget, bandit, tournament, none, or one from a pack. Default: the task's, "
    "which is plan for code and plateau for the others.",
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
@click.option(
    "--nested-slots",
    metavar="N",
    type=click.IntRange(min=0),
    help="How many further slots open at each point, each behind a new fossil. Default: 3 with the policy plan, else 0.",
)
@click.option(
    "--sizes/--no-sizes",
    default=None,
    help="Also train fixed sizes for the same training FLOPs: the host with the kept seeds of the first wave, of the "
    "first two, and so on, in it from the start. Default: with the policy plan.",
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
@click.option(
    "--repeat",
    metavar="N",
    type=click.IntRange(min=2),
    help="Run N times, with --seed and the N - 1 seeds after it, and show the spread.",
)
@click.option(
    "--resume",
    metavar="RUN",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Go on from the folder of a run that was stopped or killed, exactly.",
)
@options.surroundings("TASK", "the record of the run")
@click.pass_context
def grow(
    context: click.Context,
    task: str,
    host: str | None,
    host_options: tuple[str, ...],
    slots: tuple[str, ...],
    blueprints: tuple[str, ...],
    policy: str | None,
    policy_options: tuple[str, ...],
    incubation: str,
    proof: str,
    nested_slots: int | None,
    sizes: bool | None,
    sinks: tuple[str, ...],
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    repeat: int | None,
    resume: Path | None,
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

    events.jsonl and metrics.csv grow while the run does. Ctrl-C ends the run with what there is; --resume goes on with
    it, or with one that was killed, after its last whole epoch.

    \b
    Exit code:
      0    done, whether growth was of use or not
      1    not done: the message says why
      2    refused as it was typed; nothing was run
      130  Ctrl-C
    """
    from kasmina_core.experiments.run import RunSettings, beginning_of
    from kasmina_core.packs.discovery import default_registry

    if lr is not None and not math.isfinite(lr):
        raise click.UsageError(f"--lr {lr}: give a finite number above 0.")
    given: dict[str, Any] = {
        "host_options": dict(_option("--host-option", text) for text in host_options),
        "policy_options": dict(_option("--policy-option", text) for text in policy_options),
    }
    request = _Request(data_dir, sinks, as_json, _typed(context))
    if resume is not None:
        settings, repeats, began = _saved_settings(resume)
        typed = {
            name: given.get(name, value)
            for name, value in context.params.items()
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
        _demand_same(resume, typed, settings, repeats)
        data, _ = options.prepare(settings.task, settings.seed, settings.device, threads, data_dir)
        if began is not None:
            with options.reading_request():
                began.demand(beginning_of(default_registry(), data, settings), data.name, resume)
        folder = resume
    else:
        data, place = options.prepare(task, seed, device, threads, data_dir)
        policy = policy or data.policy
        settings = RunSettings(
            task=task,
            host=host,
            slots=slots,
            blueprints=blueprints,
            policy=policy,
            incubation=incubation,
            proof=proof,
            nested_slots=nested_slots if nested_slots is not None else NESTED_SLOTS.get(policy, 0),
            sizes=sizes if sizes is not None else policy == "plan",
            epochs=epochs or data.epochs,
            batch_size=batch_size or data.batch_size,
            lr=lr or data.lr,
            seed=seed,
            device=place,
            ramp_epochs=data.ramp_epochs,
            **given,
        )
        folder, repeats = options.choose_folder(out, data.name), repeat
    click.echo(f"Run in {folder}: making the host and looking at its slots", err=True)
    if repeats is not None:
        _run_several(settings, data, folder, repeats, request)
        return
    record = _run_one(settings, data, folder, request)
    if record.interrupted:
        click.echo(f"To go on: {_resuming(folder, settings, data_dir)}", err=True)
        sys.exit(INTERRUPTED)


def _run_one(
    settings: RunSettings,
    data: Task,
    folder: Path,
    request: _Request,
    begin_several: Callable[[], None] | None = None,
) -> RunRecord:
    """Run, or go on with what the folder holds, and write all files.

    Args:
        settings: Of the run.
        data: Its task.
        folder: Where to.
        request: What else was asked for.
        begin_several: Called before the folder of a run that is one of several is made; its result is not shown.
    """
    import torch

    from kasmina_core.checkpoints.atomic import write_atomically
    from kasmina_core.experiments.display import RunDisplay, print_final
    from kasmina_core.experiments.progress import EVENTS_FILE, ModelEvents, ProgressFolder, cut_events
    from kasmina_core.experiments.record import write_all
    from kasmina_core.experiments.report import write_run
    from kasmina_core.experiments.run import GrowthRun
    from kasmina_core.packs.discovery import default_registry
    from kasmina_core.telemetry import JsonLinesSink, Telemetry

    # Some trackers print; with --json standard output holds the record alone.
    aside = redirect_stdout(sys.stderr) if request.as_json else nullcontext()
    progress = ProgressFolder(folder)
    with (
        aside,
        RunDisplay(settings.epochs, quiet=request.as_json, metric_name=data.metric_name) as display,
    ):
        plugins = default_registry()
        with options.reading_request():
            run = GrowthRun(settings, data, plugins, display, progress, request.command)
            known = {"task": data.name, "seed": settings.seed, "folder": str(folder)}
            named = [_sink(plugins, name, known) for name in request.sinks]
            run.go_on()
        begins = not (folder / CONFIG).exists()
        if begins:  # after everything that may refuse the arguments
            if begin_several is not None:
                begin_several()
            options.make_folder(folder, data.name)
            _write_config(folder, settings.to_dict())
        cut_events(folder / EVENTS_FILE, run.model.growth.sequence)
        events: Sink = JsonLinesSink(folder / EVENTS_FILE)
        to = [events if begins else ModelEvents(events), *named]
        with Telemetry(to) as telemetry, _interruptible(run.interrupt):
            for event in plugins.events:
                telemetry.emit(event)
            record = run.run(telemetry, _growing_table(run.record, folder / "metrics.csv"))

    def write_model() -> None:
        whole = io.BytesIO()
        torch.save(run.model.state_dict(), whole)
        write_atomically(folder / "model.pt", whole.getvalue())

    try:  # a full disk must not prevent the output, nor a closed pipe the files
        if begin_several is None and request.as_json:
            click.echo(json.dumps(record.to_dict(), allow_nan=False))
        elif begin_several is None:
            print_final(record)
    finally:
        write_all(folder, [lambda: write_run(record, folder), write_model])
    if not record.interrupted:
        progress.remove()
    if begin_several is None and not request.as_json:
        click.echo(f"\nFiles: {folder} (open report.html)")
    return record


def _sink(plugins: PluginRegistry, name: str, known: Mapping[str, Any]) -> Sink:
    """Make a sink.

    Raises:
        WrongRequestError: If it is a bundled one whose package is not installed.
        KasminaError: If nobody offers it, or its pack fails.
    """
    from kasmina_core.errors import PluginError
    from kasmina_core.telemetry.bundled import BUNDLED_SINKS

    try:
        return plugins.create_sink(name, known)
    except PluginError as error:
        if name in BUNDLED_SINKS and isinstance(error.__cause__, ImportError):
            raise options.WrongRequestError(f"--sink {name}: {error.__cause__}") from error
        raise


def _run_several(settings: RunSettings, data: Task, folder: Path, repeats: int, request: _Request) -> None:
    """Run with several seeds, each in a folder of its own, and show the spread; what is done already is read."""
    from kasmina_core.checkpoints.atomic import write_atomically
    from kasmina_core.experiments.record import RunRecord, write_all
    from kasmina_core.experiments.repeats import Repeats, print_repeats, repeats_png
    from kasmina_core.experiments.run import beginning_of
    from kasmina_core.experiments.tasks import load_task
    from kasmina_core.packs.discovery import default_registry

    def begin() -> None:
        if not (folder / CONFIG).exists():
            options.make_folder(folder, settings.task)
            began = beginning_of(default_registry(), data, settings)  # the first run makes the folder
            _write_config(folder, settings.to_dict() | {REPEATS: repeats, BEGAN: began.to_dict()})

    records: list[RunRecord] = []
    for seed in range(settings.seed, settings.seed + repeats):
        place, one = folder / f"seed-{seed}", replace(settings, seed=seed)
        if _is_done(place):
            records.append(RunRecord.read(place / "run.json"))
            continue
        if seed != settings.seed:
            offered = default_registry().tasks()
            data = load_task(one.task, seed, one.device, data_dir=request.data_dir, offered=offered)
        click.echo(f"seed {seed}: run {seed - settings.seed + 1} of {repeats}", err=True)
        record = _run_one(one, data, place, request, begin)
        records.append(record)
        if record.interrupted:
            if request.as_json:
                ended = {"interrupted": True, "records": [record.to_dict() for record in records]}
                click.echo(json.dumps(ended, allow_nan=False))
            click.echo(f"To go on: {_resuming(folder, settings, request.data_dir)}", err=True)
            sys.exit(INTERRUPTED)
    found = Repeats.of(records)
    text = json.dumps(found.to_dict(), allow_nan=False)
    try:
        if request.as_json:
            click.echo(text)
        else:
            print_repeats(found)
    finally:
        picture = repeats_png(found)
        write_all(
            folder,
            [
                lambda: write_atomically(folder / "repeats.json", text + "\n"),
                lambda: write_atomically(folder / "repeats.png", picture),
            ],
        )
    if not request.as_json:
        click.echo(f"\nFiles: {folder} (repeats.png, and a folder per seed)")


def _saved_settings(folder: Path) -> tuple[RunSettings, int | None, Beginning | None]:
    """Return the settings with which a run began; of several runs, their number and what the first began with, too."""
    from kasmina_core.errors import CheckpointError
    from kasmina_core.experiments.progress import Beginning
    from kasmina_core.experiments.run import RunSettings

    path = folder / CONFIG
    with options.reading_request():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            repeats = saved.pop(REPEATS, None) if isinstance(saved, dict) else None
            began = (
                Beginning.from_dict(saved.pop(BEGAN, None), f"{path}, {BEGAN}")
                if repeats is not None
                else None
            )
            settings = RunSettings.from_dict(saved, f"{path}")
        except OSError as error:
            raise CheckpointError(f"--resume {folder}: no run can be read there: {error}") from error
        except ValueError as error:
            raise CheckpointError(
                f"--resume {folder}: {path} is damaged, or no file of ours: {error}"
            ) from error
    if not isinstance(repeats, int | None):
        raise click.UsageError(f"{path}: {REPEATS} cannot be {repeats!r:.80}.")
    if repeats is None and _is_done(folder):
        raise click.UsageError(f"--resume {folder}: this run is done.")
    return settings, repeats, began


def _is_done(folder: Path) -> bool:
    """Say whether a run ended and wrote all its files."""
    from kasmina_core.experiments.progress import ProgressFolder
    from kasmina_core.experiments.record import RunRecord

    path = folder / "run.json"
    # A run that was stopped in its first epoch has a record, and nothing to go on from.
    return path.exists() and not ProgressFolder(folder).exists and not RunRecord.read(path).interrupted


def _demand_same(folder: Path, typed: Mapping[str, Any], settings: RunSettings, repeats: int | None) -> None:
    """Refuse options that a run did not begin with, and code that only its folder names.

    Raises:
        click.UsageError: If so.
    """
    if "out" in typed:
        raise click.UsageError("--resume and --out: the run goes on in its own folder.")
    begun = {field.name: getattr(settings, field.name) for field in fields(settings)} | {"repeat": repeats}
    for name, value in typed.items():
        if name in begun and value != begun[name] and not (name == "device" and value == "auto"):
            raise click.UsageError(
                f"--resume goes on with the settings of the run; leave out --{name.replace('_', '-')}.\n"
                f"  the run: {begun[name]!r}\n  given:   {value!r}"
            )
    # A file never names code to load: who resumes the run does.
    for name in _own_code(settings):
        if name not in typed:
            raise click.UsageError(
                f"The {name} of the run is code that no pack offers, and a folder must not lead to code.\n"
                f"Name it again: {_resuming(folder, settings, typed.get('data_dir'))}"
            )


def _own_code(settings: RunSettings) -> dict[str, str]:
    """Return the task and the host of a run, by the name of their option, where they are code that no pack offers."""
    from kasmina_core.packs.discovery import default_registry

    plugins = default_registry()
    named = (("task", settings.task, plugins.tasks()), ("host", settings.host, plugins.hosts))
    return {option: name for option, name, offered in named if name and ":" in name and name not in offered}


def _resuming(folder: Path, settings: RunSettings, data_dir: Path | None) -> str:
    """Return the command that goes on with a run, with all that it does not take from the folder."""
    named: dict[str, object] = {"resume": folder, **_own_code(settings)}
    if data_dir is not None:
        named["data"] = data_dir
    return shlex.join(["kasmina", "grow", *(word for k, v in named.items() for word in (f"--{k}", str(v)))])


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    from kasmina_core.checkpoints.atomic import write_atomically
    from kasmina_core.telemetry.sinks import for_json

    try:
        write_atomically(folder / CONFIG, json.dumps(for_json(config), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise options.RunFolderError(f"{folder / CONFIG}: {error.strerror}.") from error


def _growing_table(record: RunRecord, path: Path) -> Callable[[str, EpochRecord], None]:
    """Return a function that adds an epoch to metrics.csv at once; the whole file is written again in the end.

    What the record holds already is written first.
    """
    from kasmina_core.checkpoints.atomic import write_atomically
    from kasmina_core.experiments.report import MetricsFile

    text = io.StringIO()
    table = MetricsFile(record, text)

    def taken() -> str:
        written = text.getvalue()
        text.seek(0)
        text.truncate()
        return written

    if record.epochs:
        table.add_all()
        write_atomically(path, taken())
    else:
        path.unlink(missing_ok=True)

    def add(arm: str, epoch: EpochRecord) -> None:
        nonlocal table
        with suppress(OSError):  # a full disk ends no run
            if table.has_columns_of(epoch):
                table.add(arm, epoch)
                with path.open("a", encoding="utf-8", newline="") as file:
                    file.write(text.getvalue())
                taken()
            else:  # a slot has opened
                taken()
                wider = MetricsFile(record, text)
                wider.add_all()
                write_atomically(path, taken())
                table = wider

    return add


def _typed(context: click.Context) -> str:
    """Return the command as it was typed, its options in the order of the help."""
    words = ["kasmina", "grow"]
    for parameter in context.command.params:
        name, value = parameter.name or "", context.params.get(parameter.name or "")
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
            continue
        for one in value if isinstance(value, tuple) else (value,):
            words += [parameter.opts[0], str(one)]
    return shlex.join(words)


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
