"""Experiment trackers: the part that their sinks share."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kasmina_core.events import (
    CommandDone,
    CommandRefused,
    EpochEnded,
    GateEvaluated,
    GatesNotAsked,
    IncubationStopped,
    IsolationViolation,
    RunStarted,
    SeedCulled,
    SeedFossilized,
    SeedGerminated,
    SeedSaved,
    StageChanged,
    TelemetryEvent,
)
from kasmina_core.lifecycle import SeedStage

LOG_ROWS: Final = 1000
"""Rows of the log that a tracker shows; older ones are left out. A `JsonLinesSink` keeps everything."""

LOG_COLUMNS: Final = ("epoch", "slot", "seed", "event", "what")


class TrackerSink(ABC):
    """Base of sinks for experiment trackers. Give each model a sink of its own.

    - Numbers per epoch, all of them under ``growth/``: ``growth/model/metric``, ``…/host_parameters``,
      ``…/seed_parameters``, ``…/flops`` and ``…/lost_epochs``, and for each slot ``growth/slots/<slot>/stage`` (the
      number of the `SeedStage`), ``…/alpha``, ``…/parameters``, ``…/gain``, ``…/deviation`` and ``…/gradient_norm``.
      What was never measured is left out. Their step is the model's epoch, whatever steps a trainer counts.
    - The log: one row per germination, change of stage, gate, command and end, the last `LOG_ROWS` of them. It is
      written at the end of an epoch in which something else than a gate was told, and when the sink is closed.
    - Settings: those given here, and those of a `RunStarted` event.
    - Seeds, where a folder is given: the file of each seed that is kept or culled, as an artefact.

    Args:
        settings: What the run is to be found by, plain data.
        seeds: Folder for files of seeds, as `save_seeds` writes them; ``None`` for none. Give each sink its own.

    Attributes:
        seeds: The folder, ``None`` for none.
    """

    def __init__(
        self, settings: Mapping[str, Any] | None = None, seeds: str | os.PathLike[str] | None = None
    ) -> None:
        self.seeds = os.path.abspath(seeds) if seeds is not None else None
        self._settings = dict(settings or {})
        self._settings_are_new = bool(settings)
        self._rows: deque[tuple[int, str, str, str, str]] = deque(maxlen=LOG_ROWS)
        self._log_is_due = False
        self._epoch = 0
        self._unwritten_rows = False

    def write(self, batch: Sequence[TelemetryEvent]) -> None:
        """Show a batch."""
        for event in batch:
            self._epoch = max(self._epoch, event.epoch)
            if isinstance(event, RunStarted):
                self._settings |= event.settings
                # The rest of it is long, and follows from these.
                made = {name: text for name, text in event.made_with.items() if isinstance(text, str)}
                self._settings |= {"made_with": made} if made else {}
                self._settings_are_new = True
            elif (row := _row(event)) is not None:
                self._rows.append((event.epoch, event.slot, event.seed_id, *row))
                self._unwritten_rows = True
                self._log_is_due |= not isinstance(event, GateEvaluated)
            self._show_settings()
            if isinstance(event, SeedSaved) and os.path.dirname(event.file) == self.seeds:
                self.show_seed(event)
            if isinstance(event, EpochEnded):
                self.show_numbers(_numbers(event), event.epoch)
                if self._log_is_due:
                    self._show_log()
        self.flush()

    def close(self) -> None:
        """Show the rest of the log, and end the run if this sink began it."""
        try:
            self._show_settings()
            if self._unwritten_rows:
                self._show_log()
        finally:
            self.end()

    def _show_settings(self) -> None:
        if self._settings_are_new:
            self.show_settings(flat(self._settings))
            self._settings_are_new = False

    def _show_log(self) -> None:
        self.show_log(list(self._rows), self._epoch)
        self._log_is_due = self._unwritten_rows = False

    @abstractmethod
    def show_numbers(self, values: Mapping[str, float], epoch: int) -> None:
        """Show the numbers of an epoch."""

    @abstractmethod
    def show_log(self, rows: Sequence[tuple[int, str, str, str, str]], epoch: int) -> None:
        """Show the log, in place of the one shown before; its columns are `LOG_COLUMNS`."""

    @abstractmethod
    def show_settings(self, settings: Mapping[str, bool | int | float | str]) -> None:
        """Show the settings."""

    def show_seed(self, saved: SeedSaved) -> None:  # noqa: B027  # not every tracker takes files
        """Upload the file of a seed; called for those in ``seeds``."""

    def flush(self) -> None:  # noqa: B027  # many have nothing to do
        """Let others see what was shown; called after each batch."""

    @abstractmethod
    def end(self) -> None:
        """End the run if this sink began it."""


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested settings as ``{"policy_options.patience": 3}``; what is no number becomes text.

    >>> flat({"lr": 0.1, "policy": {"patience": 3}, "slots": ("a", "b")})
    {'lr': 0.1, 'policy.patience': 3, 'slots': "('a', 'b')"}
    """
    found: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def facts_of(saved: SeedSaved) -> dict[str, object]:
    """Return what an artefact says of the seed in its file."""
    return {
        "slot": saved.slot,
        "blueprint": saved.blueprint_id,
        "outcome": saved.outcome,
        "epoch": saved.epoch,
    }


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def _numbers(event: EpochEnded) -> dict[str, float]:
    values: dict[str, float | None] = {
        f"growth/model/{name}": getattr(event, name)
        for name in ("metric", "host_parameters", "seed_parameters", "flops", "lost_epochs")
    }
    for slot in event.slots:
        values[f"growth/slots/{slot.slot}/stage"] = int(SeedStage[slot.stage])
        for name in ("alpha", "parameters", "gain", "deviation", "gradient_norm"):
            values[f"growth/slots/{slot.slot}/{name}"] = getattr(slot, name)
    return {name: float(value) for name, value in values.items() if value is not None}


def _row(event: TelemetryEvent) -> tuple[str, str] | None:
    """Return an event's name and content in the log; ``None`` for one that has no row."""
    match event:
        case SeedGerminated():
            what = f"{event.blueprint_id}, {event.parameters:,} parameters"
        case StageChanged():
            what = f"{event.before} → {event.after}"
        case GateEvaluated():
            what = f"{event.gate} {event.verdict or ('passed' if event.passed else 'not passed')}: {event.reason}"
        case GatesNotAsked():
            what = f"{', '.join(event.gates)}: put in straight"
        case CommandDone():
            what = f"{event.command} {_said(event.arguments)}".strip()
        case CommandRefused():
            what = f"{event.command} {_said(event.arguments)}".strip() + f": {event.reason}"
        case IsolationViolation():
            what = f"leak {event.leak:.3g}, at most {event.threshold:.3g}"
        case IncubationStopped():
            what = f"deviation {event.deviation:.3g}, at most {event.limit:.3g}"
        case SeedFossilized():
            what = f"{event.blueprint_id}, {_gain(event.gain)}"
        case SeedCulled():
            lost = f"; the host lost {event.lost_epochs} epochs with it" if event.reverted else ""
            what = f"{event.blueprint_id} in {event.stage}: {event.reason}{lost}, {_gain(event.gain)}"
        case SeedSaved():
            what = f"{event.blueprint_id}, {event.outcome}: {os.path.basename(event.file)}"
        case _:
            return None
    return event.type.value.removeprefix("seed_"), what


def _said(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in arguments.items() if value or value == 0.0)


def _gain(gain: float | None) -> str:
    return "gain never measured" if gain is None or math.isnan(gain) else f"gain {gain:+.4g}"
