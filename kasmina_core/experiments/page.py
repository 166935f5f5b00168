"""The page of a run: charts that answer the pointer, from data in the page or from a server that follows the run."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any, Final

from kasmina_core.experiments import wording
from kasmina_core.experiments.record import GROWN, HOST_ALONE, RunRecord
from kasmina_core.experiments.wording import STAGES, TextTable, clean, short_blueprint

SIZE_COLOURS: Final = 4
"""Colours of fixed sizes; readers who are colour-blind can tell them from each other and from those of the two arms."""

_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{hash}'; connect-src {connect}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body{follow}>
<h1 id="heading">{title}</h1>
{body}
{data}<script>{script}</script>
</body>
</html>
"""


def whole_page(title: str, body: str, charts: Any = None, follow: str = "") -> str:
    """Return a page that needs nothing else; its one script is ours, and no other can run in it.

    Args:
        title: Its title, plain text.
        body: HTML.
        charts: What `charts_of` returned; drawn into the element ``charts``.
        follow: Path on the server that the page asks for what is new; empty for a page without a server.
    """
    folder = files(__package__)
    script = folder.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = ""
    if charts is not None:
        text = json.dumps(charts, allow_nan=False).replace("<", "\\u003c")  # ends no script element
        data = f'<script type="application/json" id="data">{text}</script>\n'
    return _PAGE.format(
        hash=f"sha256-{digest}",
        connect="'self'" if follow else "'none'",
        title=as_text(title),
        style=folder.joinpath("page.css").read_text(encoding="utf-8"),
        follow=f' data-follow="{as_text(follow)}"' if follow else "",
        body=body,
        data=data,
        script=script,
    )


def as_text(value: str) -> str:
    """Return text that HTML shows as it is."""
    return escape(clean(value), quote=True)


def html_table(table: TextTable) -> str:
    """Return a table under its title; on a narrow screen each cell has the name of its column beside it."""

    heads = [f' data-head="{as_text(head)}"' for head in table.header]

    def cells(tag: str, row: Sequence[str], beside: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if i in table.numeric else ''}{extra}>{as_text(cell)}</{tag}>"
            for i, (cell, extra) in enumerate(zip(row, beside, strict=True))
        )

    title = f"<h2>{as_text(table.title)}</h2>" if table.title else ""
    rows = "\n".join(f"<tr>{cells('td', row, heads)}</tr>" for row in table.rows)
    return (
        f'{title}<div class="wide"><table><thead><tr>{cells("th", table.header, [""] * len(heads))}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def charts_of(record: RunRecord) -> dict[str, Any]:
    """Return what the charts of a run are drawn from, as plain data for strict JSON."""
    at = [epoch.epoch for epoch in record.epochs]
    slots = wording.every_slot(record)
    lines: list[dict[str, Any]] = []
    for arm, colour, places, epochs in (
        (GROWN, "--grown", at, record.epochs),
        (HOST_ALONE, "--alone", epoch_of_equal_flops(record), record.baseline),
    ):
        for what, thin in (("validation", False), ("training", True)):
            values = _numbers(e.train_loss if thin else e.val_loss for e in epochs)
            name = f"{arm}, {what}" if record.host else "metric"
            if any(value is not None for value in values):
                lines.append({"name": name, "x": places, "y": values, "colour": colour, "thin": thin})
    return {
        "title": "Loss: lower is better" if record.host else "The metric that step_epoch was given",
        "axis": "" if slots else "epoch",
        "unit": "epoch",
        "whole": True,
        "range": [1, max(at, default=1) if max(at, default=1) > 1 else 2],
        "epochs": at,
        "lines": lines,
        "kept": [
            s.ended_epoch for s in record.seeds if s.outcome == "fossilized" and s.ended_epoch is not None
        ],
        "slots": [_slot(record, name) for name in slots],
        "stages": {stage: [look.colour, stage.lower()] for stage, look in STAGES.items()},
        "sizes": sizes_chart(record),
        "parameters": _parameters_chart(record),
    }


def _parameters_chart(record: RunRecord) -> dict[str, Any] | None:
    """Return how the grown model's size went, beside that of the host alone; ``None`` if no size is known."""
    if not any(epoch.parameters for epoch in record.epochs):
        return None
    arms = (
        (GROWN, "--grown", [epoch.epoch for epoch in record.epochs], record.epochs),
        (HOST_ALONE, "--alone", epoch_of_equal_flops(record), record.baseline),
    )
    lines = [
        {
            "name": name if record.host else "model",
            "x": at,
            "y": [epoch.parameters for epoch in epochs],
            "colour": colour,
        }
        for name, colour, at, epochs in arms
        if epochs
    ]
    return {"title": "Parameters", "lines": lines}


def sizes_chart(record: RunRecord) -> dict[str, Any] | None:
    """Return what the grown run is compared with fixed sizes by; ``None`` without them.

    Validation losses over the training FLOPs, and the FLOPs at which seeds came in.
    """
    if not record.sizes:
        return None
    flops = {epoch.epoch: epoch.flops for epoch in record.epochs}
    arms = ((GROWN, record.epochs), (HOST_ALONE, record.baseline), *record.sizes.items())
    lines = [
        {
            "name": name,
            "x": [epoch.flops for epoch in epochs],
            "y": _numbers(epoch.val_loss for epoch in epochs),
            "colour": {GROWN: "--grown", HOST_ALONE: "--alone"}.get(name, f"--size{i % SIZE_COLOURS}"),
            "thin": name != GROWN,
        }
        for i, (name, epochs) in enumerate(arms, -2)
    ]
    born = {seed.germinated_epoch for seed in record.seeds}
    return {
        "title": "Fixed sizes beside the grown run: validation loss; a line where seeds came in",
        "axis": "training FLOPs",
        "unit": "training FLOPs",
        "whole": False,
        "range": [0.0, max(flops.values(), default=1.0)],
        "lines": lines,
        "kept": sorted(flops[epoch] for epoch in born if epoch in flops),
    }


def several_charts(records: Sequence[tuple[str, RunRecord]]) -> dict[str, Any]:
    """Return what compares several runs: the validation losses over what was spent, FLOPs where all are known."""
    by_flops = all(epoch.flops > 0 for _, record in records for epoch in record.epochs)
    lines = [
        {
            "name": clean(name),
            "x": [epoch.flops if by_flops else float(epoch.epoch) for epoch in record.epochs],
            "y": _numbers(epoch.val_loss for epoch in record.epochs),
            "colour": f"--slot{i % 6}",
            "thin": False,
        }
        for i, (name, record) in enumerate(records)
    ]
    places = [place for line in lines for place in line["x"]]  # type: ignore[attr-defined]
    unit = "training FLOPs" if by_flops else "epoch"
    return {
        "title": "Validation loss, or the metric of step_epoch",
        "axis": unit,
        "unit": unit,
        "whole": not by_flops,
        "range": [min(places, default=0.0), max(places, default=1.0)],
        "epochs": [],
        "lines": lines,
        "kept": [],
        "slots": [],
        "stages": {},
    }


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _slot(record: RunRecord, name: str) -> dict[str, Any]:
    held = [next((slot for slot in epoch.slots if slot.name == name), None) for epoch in record.epochs]
    return {
        "name": clean(name),
        # Nothing is drawn where the slot is empty: lines at 0 would hide each other.
        "alpha": _numbers(slot.alpha if slot is not None and slot.blueprint else math.nan for slot in held),
        "spans": [list(span) for span in stage_spans(record, name)],
        "seeds": [
            {
                "blueprint": short_blueprint(seed.blueprint),
                "from": seed.germinated_epoch,
                "to": seed.ended_epoch,
                "outcome": seed.outcome,
            }
            for seed in record.seeds
            if seed.slot == name
        ],
    }


def epoch_of_equal_flops(record: RunRecord) -> list[float]:
    """Return, for each epoch of the host alone, the epoch by which the grown run had spent the same FLOPs."""
    spent = [0.0, *(epoch.flops for epoch in record.epochs)]
    at = [0.0, *(float(epoch.epoch) for epoch in record.epochs)]
    places = []
    for epoch in record.baseline:
        upper = next((i for i, flops in enumerate(spent) if i and flops >= epoch.flops), len(spent) - 1)
        span = spent[upper] - spent[upper - 1]
        if upper == 0 or not span > 0:
            places.append(float(epoch.epoch))  # the grown run's FLOPs are unknown
            continue
        share = (epoch.flops - spent[upper - 1]) / span
        places.append(at[upper - 1] + share * (at[upper] - at[upper - 1]))
    return places


def stage_spans(record: RunRecord, slot: str) -> list[tuple[int, int, str]]:
    """Return ``(first epoch, last epoch, stage)`` of each stretch in which the slot stayed in one stage."""
    spans: list[tuple[int, int, str]] = []
    for epoch, stage in (
        (e.epoch, held.stage) for e in record.epochs for held in e.slots if held.name == slot
    ):
        if spans and spans[-1][1:] == (epoch - 1, stage):
            spans[-1] = (spans[-1][0], epoch, stage)
        else:
            spans.append((epoch, epoch, stage))
    return spans
