"""Sink for Weights & Biases: ``pip install wandb``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from kasmina_core.events import SeedSaved
from kasmina_core.telemetry.trackers import LOG_COLUMNS, TrackerSink, facts_of


@final
class WandbSink(TrackerSink):
    """Show growth in Weights & Biases: numbers over ``growth/epoch``, the log as a table. See `TrackerSink`.

    The active run is joined: growth goes into the row that the trainer has open, so that its steps stay as they are,
    settings go into its config under ``growth``, and it goes on when this sink is closed. Where none is active, a run of
    its own begins, and ends with the sink; ``wandb.run`` stays ``None``.

    Args:
        run: The run to join; ``None`` for the active one, or a new one.
        settings: What the run is to be found by, plain data.
        seeds: Folder for files of the seeds that are kept or culled; each is logged as an artefact of type ``seed``, named ``seed-<seed>``. ``None`` for none.
        **init: Keywords for ``wandb.init`` of a new run; ``project`` is ``kasmina`` by default.

    Raises:
        ImportError: If wandb is missing.

    Attributes:
        run: The run.
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
            import wandb
        except ImportError as error:
            raise ImportError("WandbSink needs wandb: pip install wandb") from error
        joined = run if run is not None else wandb.run
        self._is_own = joined is None
        self.run: Any = (
            joined if joined is not None else wandb.init(reinit="create_new", **{"project": "kasmina"} | init)
        )
        self._table, self._artifact = wandb.Table, wandb.Artifact
        self._open_step: int | None = None
        self.run.define_metric("growth/epoch")
        self.run.define_metric("growth/*", step_metric="growth/epoch")

    def show_numbers(self, values: Mapping[str, float], epoch: int) -> None:
        """Log a row of its own, or into the one that the trainer has open."""
        if self._is_own:
            self.run.log({"growth/epoch": epoch, **values})
            return
        if (
            self._open_step == self.run.step
        ):  # nobody logged since: the last epoch's row would be written over
            self.run.log({}, commit=True)
        self.run.log({"growth/epoch": epoch, **values}, commit=False)
        self._open_step = self.run.step

    def show_log(self, rows: Sequence[tuple[int, str, str, str, str]], epoch: int) -> None:
        """Log the table ``growth/log``."""
        self.run.log({"growth/log": self._table(columns=list(LOG_COLUMNS), data=rows)}, commit=False)

    def show_seed(self, saved: SeedSaved) -> None:
        """Log the file as an artefact."""
        name = f"seed-{Path(saved.file).stem}"
        artifact = self._artifact(name, "seed", metadata=facts_of(saved))
        artifact.add_file(saved.file)
        self.run.log_artifact(artifact)

    def show_settings(self, settings: Mapping[str, bool | int | float | str]) -> None:
        """Put the settings into the run's config."""
        self.run.config.update(
            dict(settings) if self._is_own else {"growth": dict(settings)}, allow_val_change=True
        )

    def end(self) -> None:
        """Finish a run of its own."""
        if self._is_own:
            self.run.finish()
