"""Report of a run: data files, a picture, and an HTML page that explains both."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO, final

from kasmina_core.checkpoints.atomic import write_atomically
from kasmina_core.errors import KasminaError
from kasmina_core.experiments import wording
from kasmina_core.experiments.page import (
    as_text,
    charts_of,
    epoch_of_equal_flops,
    html_table,
    sizes_chart,
    stage_spans,
    whole_page,
)
from kasmina_core.experiments.record import GROWN, HOST_ALONE, EpochRecord, RunRecord
from kasmina_core.experiments.wording import STAGES, TextTable, clean, short_blueprint
from kasmina_core.telemetry.sinks import for_json
from kasmina_core.telemetry.trackers import flat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GROWN_COLOUR: Final = "#14664f"
_ALONE_COLOUR: Final = "#c8641b"
_SIZES_COLOURS: Final = {
    "--grown": _GROWN_COLOUR, "--alone": _ALONE_COLOUR,
    "--size0": "#0072b2", "--size1": "#b0408c", "--size2": "#56b4e9", "--size3": "#1f252b",
}  # fmt: skip
"""Those of page.css by day; after Okabe and Ito, https://jfly.uni-koeln.de/color/"""

_SLOT_COLOURS: Final = (
    "#0072b2", "#c75200", "#008a64", "#b0408c", "#56b4e9", "#59636d", "#e69f00", "#1f252b",
)  # fmt: skip

_ENDS: Final = {"fossilized": ("*", "#0b3d2e", "kept for good"), "culled": ("X", "#7d1128", "removed")}
"""Marker, colour and label of each way a seed's life ends."""

_WORDS: Final = (
    ("host", "The small model that the run starts with."),
    ("slot", "A place in the host where something may be added."),
    ("seed", "A small module added at a slot while the training goes on."),
    ("blueprint", "The plan a seed is made from: which layers, how wide."),
    ("stage", "Where a seed is in its life; the stages are explained below."),
    ("gate", "A check between two stages. A seed goes on only if measurements support it; if not, it waits or is removed. A seed that is put in straight is not asked on its way; it is judged afterwards, by what the host alone would have become."),
    ("alpha", "How much of the seed is mixed in: 0 is the host alone, 1 is the seed's output in its place."),
    ("gain, contribution", "The loss without the seed minus the loss with it, on samples the model did not learn from. Above zero the seed helps. The interval holds the true value in about 95 of 100 cases."),
    ("loss", "How wrong the model is (cross entropy, in nats); lower is better."),
    ("training FLOPs", "The arithmetic spent on training, trials of seeds included: the fair measure of equal effort."),
    ("host alone", "The same host trained without growth for the same training FLOPs."),
    ("fixed size", "The host with the seeds that the run kept in it from the start, fresh, without further growth, for the same training FLOPs; the host alone is the smallest."),
)  # fmt: skip


_OF_THE_COMMAND: Final = ("loss", "training FLOPs", "host alone", "fixed size")
"""Words that a page of one's own loop does not use."""

DOWNLOADS: Final = ("run.json", "config.json", "metrics.csv", "events.jsonl", "report.png")
"""Files of a run's folder that its page offers."""


class ReportError(KasminaError):
    """The report cannot be made; the message says what is missing and what to do."""


def require_plots() -> None:
    """Check, before a long run, that the picture can be drawn.

    Raises:
        ReportError: If matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401  asks whether it is there
    except ImportError as error:
        raise ReportError(
            "The report draws its picture with matplotlib, which is not installed.\n"
            "Install it with: pip install 'matplotlib>=3.9'"
        ) from error


def write_run(record: RunRecord, folder: str | os.PathLike[str]) -> list[Path]:
    """Write run.json, config.json, metrics.csv, report.png and report.html, each whole or not at all.

    Args:
        record: The run.
        folder: Where to; it is made if it is not there. Files of an earlier run are replaced.

    Returns:
        The paths, in the order above.

    Raises:
        ReportError: If matplotlib is missing; the first three files are written before.
        OSError: If a file cannot be written.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def write(name: str, content: str | bytes) -> None:
        write_atomically(target / name, content)
        written.append(target / name)

    write("run.json", record.to_json())
    write("config.json", json.dumps(for_json(record.config), indent=2, allow_nan=False) + "\n")
    write("metrics.csv", metrics_csv(record))
    require_plots()
    picture = render_png(record)
    write("report.png", picture)
    write("report.html", render_html(record, picture))
    return written


def metrics_csv(record: RunRecord) -> str:
    """Return one line per epoch of each arm as CSV; each slot has four columns, empty for arms that do not grow."""
    out = io.StringIO()
    MetricsFile(record, out).add_all()
    return out.getvalue()


@final
class MetricsFile:
    """Writes the lines of `metrics_csv` one by one, while the run goes on.

    Args:
        record: The run; when the first line is written it holds every slot of the lines.
        out: Text file to write to.
    """

    def __init__(self, record: RunRecord, out: TextIO) -> None:
        self._record = record
        self._writer = csv.writer(out, lineterminator="\n")
        self._slots: Sequence[str] | None = None

    def add(self, arm: str, epoch: EpochRecord) -> None:
        """Write an epoch of an arm, the head of the table before the first one."""
        if self._slots is None:
            self._slots = wording.every_slot(self._record)
            self._write_head(self._slots)
        held = {slot.name: slot for slot in epoch.slots}
        row: list[object] = [arm, epoch.epoch, epoch.train_loss, epoch.val_loss, epoch.val_metric]
        row += [epoch.parameters, epoch.flops, epoch.gate]
        for name in self._slots:
            slot = held.get(name)
            row += [slot.stage, slot.blueprint, slot.alpha, slot.gain] if slot is not None else [""] * 4
        self._writer.writerow(row)

    def has_columns_of(self, epoch: EpochRecord) -> bool:
        """Say whether the table has the columns of an epoch's slots, or can still get them."""
        return self._slots is None or {slot.name for slot in epoch.slots} <= set(self._slots)

    def add_all(self) -> None:
        """Write every epoch that the record holds."""
        arms = ((GROWN, self._record.epochs), (HOST_ALONE, self._record.baseline))
        for arm, epochs in (*arms, *self._record.sizes.items()):
            for epoch in epochs:
                self.add(arm, epoch)

    def _write_head(self, slots: Sequence[str]) -> None:
        metric = f"val_{self._record.metric_name.replace(' ', '_')}"
        head = ["arm", "epoch", "train_loss", "val_loss", metric, "parameters", "flops", "gate"]
        per_slot = [f"{slot}.{what}" for slot in slots for what in ("stage", "blueprint", "alpha", "gain")]
        self._writer.writerow([*head, *per_slot])


# The picture


def render_png(record: RunRecord) -> bytes:
    """Draw losses, alphas and stages over the epochs of the grown run.

    The host alone is drawn at the epoch by which the grown run had spent the same training FLOPs, so points at the same
    place on the axis cost the same. Fixed sizes, where they were trained, come first, over the FLOPs.

    Raises:
        ImportError: If matplotlib is missing.
    """
    slots = wording.every_slot(record)
    stages_height = 0.5 * max(1, len(slots)) + 0.3
    chart = sizes_chart(record)
    ratios = [3.4, 1.5, stages_height]
    if chart is None:
        figure = blank_figure((11, 5.9 + stages_height))
        losses, alphas, stages = figure.subplots(3, 1, sharex=True, height_ratios=ratios)
    else:
        figure = blank_figure((11, 9.8 + stages_height))
        sizes, losses, alphas, stages = figure.subplots(4, 1, height_ratios=[3.4, *ratios])
        for axes in (losses, alphas):
            axes.sharex(stages)
            axes.tick_params(labelbottom=False)
        _draw_sizes(sizes, chart)
    _draw_losses(losses, record)
    _draw_alphas(alphas, record, slots)
    _draw_stages(stages, record, slots)
    last = max([epoch.epoch for epoch in record.epochs], default=1)
    stages.set_xlim(0.5, last + 0.5)
    stages.set_xlabel("epoch of the grown run")
    stages.xaxis.get_major_locator().set_params(integer=True)
    _add_flops_axis(losses, record)
    name = f"{clean(record.task)} · {clean(record.host)}"
    title = _literal(f"{name}: a host that grows, and the same host alone")
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    return figure_png(figure)


def blank_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure, ``size`` inches wide and high, that needs no display.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_png(figure: Figure) -> bytes:
    """Return a picture as PNG."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        # A name may hold characters the font lacks; it is then drawn with boxes.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _literal(text: str) -> str:
    """Escape text for matplotlib: no formula, and no leading underscore, which would hide it from a legend."""
    shown = clean(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _finite(values: Iterable[float]) -> list[float]:
    return [value if math.isfinite(value) else math.nan for value in values]


def _draw_losses(axes: Axes, record: RunRecord) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    at = [epoch.epoch for epoch in record.epochs]
    arms: tuple[tuple[str, str, Sequence[float], Sequence[EpochRecord]], ...] = (
        (GROWN, _GROWN_COLOUR, at, record.epochs),
        (HOST_ALONE, _ALONE_COLOUR, epoch_of_equal_flops(record), record.baseline),
    )
    values: list[float] = []
    for name, colour, places, epochs in arms:
        if not epochs:
            continue
        val, train = _finite(e.val_loss for e in epochs), _finite(e.train_loss for e in epochs)
        marker = "o" if len(epochs) == 1 else None
        axes.plot(places, val, color=colour, linewidth=2, marker=marker, label=f"{name}, validation")
        thin: dict[str, Any] = {"linewidth": 1, "alpha": 0.55, "linestyle": (0, (4, 2))}
        axes.plot(places, train, color=colour, label=f"{name}, training", **thin)
        values += [value for value in (*val, *train) if value > 0]
    for seed in record.seeds:
        if seed.outcome == "fossilized" and seed.ended_epoch is not None:
            kept = STAGES["FOSSILIZED"].colour
            axes.axvline(seed.ended_epoch, color=kept, linewidth=1, alpha=0.4, zorder=0)
    if values and max(values) / min(values) > 8:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("loss (nats)")
    axes.set_title("Loss: lower is better", loc="left", fontsize=10)
    _tidy(axes)
    if record.epochs or record.baseline:
        _legend(axes)


def _draw_sizes(axes: Axes, chart: dict[str, Any]) -> None:
    for line in chart["lines"]:
        colour = _SIZES_COLOURS[line["colour"]]
        width = 1.2 if line["thin"] else 2.6
        axes.plot(line["x"], _finite(v if v is not None else math.nan for v in line["y"]), color=colour,
                  linewidth=width, marker="o" if len(line["x"]) == 1 else None, label=line["name"])  # fmt: skip
    for at in chart["kept"]:
        axes.axvline(at, color=STAGES["FOSSILIZED"].colour, linewidth=1, alpha=0.4, zorder=0)
    axes.set_xlim(*chart["range"])
    axes.xaxis.set_major_formatter(lambda at, _: wording.flops(at))
    axes.set_xlabel(chart["axis"])
    axes.set_ylabel("loss (nats)")
    axes.set_title(chart["title"], loc="left", fontsize=10)
    _tidy(axes)
    _legend(axes)


def _draw_alphas(axes: Axes, record: RunRecord, slots: Sequence[str]) -> None:
    for i, name in enumerate(slots):
        # Nothing is drawn where the slot is empty: lines at 0 would hide each other.
        points = [
            (e.epoch, slot.alpha if slot.blueprint else math.nan)
            for e in record.epochs
            for slot in e.slots
            if slot.name == name
        ]
        axes.plot(
            [epoch for epoch, _ in points],
            _finite(alpha for _, alpha in points),
            color=_SLOT_COLOURS[i % len(_SLOT_COLOURS)],
            linestyle=("-", "--", ":")[i // len(_SLOT_COLOURS) % 3],
            linewidth=max(1.2, 4.2 - 0.9 * i),  # of two that coincide, the lower one shows at the edges
            label=_literal(name),
        )
    axes.set_ylim(-0.06, 1.06)
    axes.set_yticks([0, 0.5, 1])
    axes.set_ylabel("alpha")
    axes.set_title("Alpha: how much of each slot's seed is mixed in", loc="left", fontsize=10)
    _tidy(axes)
    if slots:
        _legend(axes)


def _draw_stages(axes: Axes, record: RunRecord, slots: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    seen: set[str] = set()
    for row, name in enumerate(slots):
        for start, end, stage in stage_spans(record, name):
            seen.add(stage)
            colour = STAGES[stage].colour if stage in STAGES else "#bbbbbb"
            axes.broken_barh([(start - 0.5, end - start + 1)], (row - 0.14, 0.5), facecolors=colour)
    for seed in record.seeds:
        if seed.slot not in slots:
            continue
        row = slots.index(seed.slot)
        label = _literal(short_blueprint(seed.blueprint))
        axes.text(seed.germinated_epoch - 0.5, row - 0.29, label, fontsize=7.5, va="center", clip_on=True)
        if seed.ended_epoch is not None and seed.outcome in _ENDS:
            marker, colour, _ = _ENDS[seed.outcome]
            edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.6}
            axes.plot([seed.ended_epoch], [row + 0.11], marker=marker, markersize=9, color=colour, **edge)
    axes.set_ylim(max(len(slots), 1) - 0.45, -0.55)
    axes.set_yticks(range(len(slots)), [_literal(name) for name in slots])
    axes.set_title("Stages: the life of the seed in each slot", loc="left", fontsize=10)
    _tidy(axes)
    axes.grid(visible=False)
    handles: list[Any] = [
        Patch(facecolor=look.colour, edgecolor="#999999", linewidth=0.4, label=stage.lower())
        for stage, look in STAGES.items()
        if stage in seen
    ]
    handles += [
        Line2D([], [], marker=marker, markersize=9, color=colour, linestyle="none", label=label)
        for outcome, (marker, colour, label) in _ENDS.items()
        if outcome in {seed.outcome for seed in record.seeds}
    ]
    if handles:
        axes.figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)


def _add_flops_axis(axes: Axes, record: RunRecord) -> None:
    """Write the FLOPs spent by some epochs along the top."""
    if not record.epochs or not any(epoch.flops > 0 for epoch in record.epochs):
        return
    step = max(1, round(len(record.epochs) / 6))
    chosen = record.epochs[step - 1 :: step]
    top = axes.secondary_xaxis("top")
    labels = [wording.flops(epoch.flops) for epoch in chosen]
    top.set_xticks([epoch.epoch for epoch in chosen], labels, fontsize=8)
    top.set_xlabel("training FLOPs spent", fontsize=8, loc="right")
    top.tick_params(length=3, color="#999999")
    top.spines["top"].set_visible(False)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, fontsize=8, borderaxespad=0)


# The page


def render_html(record: RunRecord, picture: bytes) -> str:
    """Return the report as one page that needs nothing else: no network, and no script but ours.

    Args:
        record: The run; every text in it is escaped.
        picture: The PNG of `render_png`, for readers without scripts.
    """
    image = base64.b64encode(picture).decode("ascii")
    shown = f'<noscript><img alt="Losses, alphas and stages" src="data:image/png;base64,{image}"></noscript>'
    links = " · ".join(f'<a href="{name}">{name}</a>' for name in DOWNLOADS)
    files = f"<h2>Files</h2><p>Beside this page: {links}</p>"
    return whole_page(title_of(record), f"{body_of(record, shown)}\n{files}", charts_of(record))


def title_of(record: RunRecord) -> str:
    """Return the title of a run's page."""
    return f"{record.task}: the host {record.host}, grown and alone" if record.host else record.task


def body_of(record: RunRecord, picture: str = "") -> str:
    """Return the body of a run's page: what it showed, the charts, the tables, the words.

    Args:
        record: The run; every text in it is escaped.
        picture: HTML that stands where the charts are drawn.
    """
    notes = "".join(f"<li>{as_text(note)}</li>" for note in record.notes)
    stages = "".join(
        f'<dt><span class="swatch" style="background:{look.colour}"></span>{stage.lower()}</dt>'
        f"<dd>{as_text(look.meaning)}</dd>"
        for stage, look in STAGES.items()
    )
    words = "".join(
        f"<dt>{as_text(word)}</dt><dd>{as_text(meaning)}</dd>"
        for word, meaning in _WORDS
        if record.host or word not in _OF_THE_COMMAND
    )
    made = record.made_with
    used = {"host": record.host, "slots": made.get("slots")}
    config = record.config | {name: value for name, value in used.items() if value and name in record.config}
    plain = {name: value for name, value in made.items() if name not in ("slots", "growth")}
    growth = made.get("growth")
    seeds = "<h2>Seeds</h2><p>No seed germinated.</p>"
    if record.seeds:
        seeds = f"{html_table(wording.seeds_table(record))}<p>{as_text(wording.about_gains(record))}</p>"
    sections = [
        f'<p class="summary{" harm" * wording.is_worse(record)}">{as_text(wording.summary(record))}</p>'
        if record.arms or record.interrupted
        else "",
        f"<p><b>Growth.</b> {as_text(wording.growth(record))}</p>" if record.verdict else "",
        *(f'<p class="harm">{as_text(sentence)}</p>' for sentence in wording.harms(record)),
        f"<ul>{notes}</ul>" if notes else "",
        html_table(wording.arms_table(record)) if record.arms else "",
        html_table(wording.regret_table(record)) if record.regrets else "",
        f"<p>{as_text(wording.regret(record))}</p>" if record.regrets else "",
        "<h2>The run</h2>",
        f'<div id="charts">{picture}</div>',
        f"<p>{_LOSS_WORDS if record.host else _METRIC_WORDS}{_PICTURE_WORDS}</p>",
        seeds,
        f"<h2>Words</h2><dl>{words}</dl><h2>Stages</h2><dl>{stages}</dl>",
        html_table(_settings("Made with", plain)) if plain else "",
        html_table(_settings("Settings", config)) if config else "",
        f"<details><summary>How seeds were treated (GrowthConfig)</summary>{html_table(_settings('', flat(growth)))}</details>"
        if isinstance(growth, Mapping)
        else "",
    ]
    return "\n".join(section for section in sections if section)


def _settings(title: str, values: Mapping[str, Any]) -> TextTable:
    rows = tuple(
        (name, value if isinstance(value, str) else json.dumps(for_json(value)))
        for name, value in values.items()
    )
    return TextTable(title, ("setting", "value"), rows, frozenset())


_LOSS_WORDS: Final = """The parts share the epochs of the grown run.
<b>Loss</b>: the model that grew, and the same host trained alone. Each point of the host alone stands at the epoch by
which the grown run had spent as many training FLOPs, so what lies above one another cost the same effort; a thin green
line marks a seed that was kept for good."""

_METRIC_WORDS: Final = """<b>Metric</b>: what <code>step_epoch</code> was given; a thin green line marks a seed that was kept
for good."""

_PICTURE_WORDS: Final = """ <b>Alpha</b>: how much of the seed in each slot is mixed in.
<b>Stages</b>: what each slot held, epoch by epoch, with the blueprint's name where a seed germinated; a star marks a
seed kept for good, a cross one that was removed."""
