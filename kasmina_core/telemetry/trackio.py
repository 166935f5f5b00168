"""Sink for Trackio: ``pip install trackio``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from kasmina_core.events import SeedSaved
from kasmina_core.telemetry.trackers import LOG_COLUMNS, TrackerSink, facts_of, markdown


@final
class TrackioSink(TrackerSink):
    """Show growth in Trackio: numbers by epoch, the log and the settings as Markdown. See `TrackerSink`.

    The run that is active in the calling context is joined, and goes on when this sink is closed. Where none is, a run
    of its own begins with the first event, and ends with the sink. Growth has rows of its own, whose step is the epoch.

    Args:
        run: The run to join; ``None`` for the active one, or a new one.
        settings: What the run is to be found by, plain data; config of a new run.
        seeds: Folder for files of the seeds that are kept or culled; each is logged as an artefact of type ``seed``, named ``seed-<seed>``. ``None`` for none.
        **init: Keywords for ``trackio.init`` of a new run; ``project`` is ``kasmina`` by default.

    Raises:
        ImportError: If trackio is missing.
    """

    def __init__(
        self,
        run: Any = None,
        settings: Mapping[str, Any] | None = None,
        *,
        seeds: str | os.PathLike[str] | None = None,
        **init: Any,
    ) -> None:
        super().__init__(settings, seeds)
        try:
            import trackio
            from trackio import context_vars
        except ImportError as error:
            raise ImportError("TrackioSink needs trackio: pip install trackio") from error
        self._trackio: Any = trackio
        self._init = {"project": "kasmina"} | init
        self._run: Any = run if run is not None else context_vars.current_run.get()
        self._is_own = self._run is None

    @property
    def run(self) -> Any:
        """The run."""
        if self._run is None:  # in the sink's thread, so that the caller's active run stays what it is
            self._run = self._trackio.init(**self._init)
        return self._run

    def show_numbers(self, values: Mapping[str, float], epoch: int) -> None:
        """Log a row."""
        self.run.log({"growth/epoch": epoch, **values}, step=epoch)

    def show_log(self, rows: Sequence[tuple[int, str, str, str, str]], epoch: int) -> None:
        """Log the table ``growth/log``."""
        self.run.log({"growth/log": self._trackio.Markdown(markdown(LOG_COLUMNS, rows))}, step=epoch)

    def show_seed(self, saved: SeedSaved) -> None:
        """Log the file as an artefact."""
        artifact = self._trackio.Artifact(f"seed-{Path(saved.file).stem}", "seed", metadata=facts_of(saved))
        artifact.add_file(saved.file)
        self.run.log_artifact(artifact)

    def show_settings(self, settings: Mapping[str, bool | int | float | str]) -> None:
        """Put the settings into a new run's config, and show them."""
        if self._is_own:
            self.run.config.update(settings)  # sent with the first row
        text = markdown(("setting", "value"), list(settings.items()))
        self.run.log({"growth/settings": self._trackio.Markdown(text)}, step=0)

    def end(self) -> None:
        """Finish a run of its own."""
        if self._is_own and self._run is not None:
            self._run.finish()
