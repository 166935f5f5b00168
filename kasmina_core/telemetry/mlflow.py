"""Sink for MLflow: ``pip install mlflow``."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, final

from kasmina_core.events import SeedSaved
from kasmina_core.telemetry.trackers import LOG_COLUMNS, TrackerSink, markdown


@final
class MlflowSink(TrackerSink):
    """Show growth in MLflow: metrics by epoch, settings as params, the log as ``growth/log.md``. See `TrackerSink`.

    The run that is active in the calling thread is joined, and goes on when this sink is closed. Where none is, a run of
    its own begins in ``experiment``, and ends with the sink. MLflow keeps a step for each metric, so the trainer's stay.

    Args:
        run_id: The run to join; ``None`` for the active one, or a new one.
        settings: What the run is to be found by, plain data; params are named ``growth.<setting>``.
        seeds: Folder for files of the seeds that are kept or culled; each is logged as the artefact ``growth/seeds/<seed>.safetensors``. ``None`` for none.
        experiment: Experiment of a new run; made if it does not exist.
        run_name: Name of a new run; ``None`` for one that MLflow makes up.
        client: An ``MlflowClient``; ``None`` for one of ``mlflow.get_tracking_uri()``.

    Raises:
        ImportError: If mlflow is missing.

    Attributes:
        run_id: The run.
    """

    def __init__(
        self,
        run_id: str | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        seeds: str | os.PathLike[str] | None = None,
        experiment: str = "kasmina",
        run_name: str | None = None,
        client: Any = None,
    ) -> None:
        super().__init__(settings, seeds)
        try:
            import mlflow
            from mlflow.entities import Metric, Param
        except ImportError as error:
            raise ImportError("MlflowSink needs mlflow: pip install mlflow") from error
        self._metric, self._param = Metric, Param
        # Fluent functions of mlflow know the active run of their own thread alone; sinks write in another.
        self._client: Any = client if client is not None else mlflow.MlflowClient()
        active = mlflow.active_run()
        self._is_own = run_id is None and active is None
        if run_id is not None:
            self.run_id = run_id
        elif active is not None:
            self.run_id = str(active.info.run_id)
        else:
            found = self._client.get_experiment_by_name(experiment)
            where = found.experiment_id if found is not None else self._client.create_experiment(experiment)
            self.run_id = str(self._client.create_run(where, run_name=run_name).info.run_id)

    def show_numbers(self, values: Mapping[str, float], epoch: int) -> None:
        """Log metrics."""
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, epoch) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def show_log(self, rows: Sequence[tuple[int, str, str, str, str]], epoch: int) -> None:
        """Write the artefact ``growth/log.md``."""
        self._client.log_text(self.run_id, markdown(LOG_COLUMNS, rows) + "\n", "growth/log.md")

    def show_seed(self, saved: SeedSaved) -> None:
        """Log the file as an artefact."""
        self._client.log_artifact(self.run_id, saved.file, "growth/seeds")

    def show_settings(self, settings: Mapping[str, bool | int | float | str]) -> None:
        """Log params."""
        params = [self._param(f"growth.{name}", str(value)) for name, value in settings.items()]
        self._client.log_batch(self.run_id, params=params)

    def end(self) -> None:
        """End a run of its own."""
        if self._is_own:
            self._client.set_terminated(self.run_id)
