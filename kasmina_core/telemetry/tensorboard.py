"""Sink for TensorBoard: ``pip install tensorboard``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, final

from kasmina_core.telemetry.trackers import LOG_COLUMNS, TrackerSink, markdown


@final
class TensorBoardSink(TrackerSink):
    """Show growth in TensorBoard: scalars by epoch, the log and the settings as text. See `TrackerSink`.

    A folder becomes a run of its own, in which the settings are hyperparameters too. A ``SummaryWriter`` (of torch or
    tensorboardX) is joined: it keeps its own hyperparameters, its steps are not touched, and it stays open. TensorBoard
    takes no files, so seeds are no artefacts there.

    Args:
        target: Folder of a new run, made when the first event comes; or a ``SummaryWriter``.
        settings: What the run is to be found by, plain data.

    Raises:
        ImportError: If tensorboard is missing and ``target`` is a folder.
    """

    def __init__(
        self, target: str | os.PathLike[str] | Any = "runs/growth", settings: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings)
        self._folder: str | None = os.fspath(target) if isinstance(target, str | os.PathLike) else None
        self._writer: Any = None if self._folder is not None else target
        if self._folder is not None:
            _writer_class()

    @property
    def writer(self) -> Any:
        """The ``SummaryWriter``."""
        if self._writer is None:
            self._writer = _writer_class()(self._folder)
        return self._writer

    def show_numbers(self, values: Mapping[str, float], epoch: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)

    def show_log(self, rows: Sequence[tuple[int, str, str, str, str]], epoch: int) -> None:
        """Write the log as ``growth/log``; of one tag TensorBoard shows the last text for certain."""
        self.writer.add_text("growth/log", markdown(LOG_COLUMNS, rows), epoch)

    def show_settings(self, settings: Mapping[str, bool | int | float | str]) -> None:
        """Write the settings as ``growth/settings``, and as hyperparameters of a run of its own."""
        self.writer.add_text("growth/settings", markdown(("setting", "value"), list(settings.items())), 0)
        if self._folder is not None:
            from torch.utils.tensorboard.summary import hparams

            # add_hparams would begin another run in a folder inside of this one.
            metrics = {"growth/model/metric": 0.0}
            for summary in hparams(dict(settings), metrics):  # type: ignore[no-untyped-call]  # torch
                self.writer.file_writer.add_summary(summary)

    def flush(self) -> None:
        """Write to the disk."""
        self.writer.flush()

    def end(self) -> None:
        """Close the writer of a run of its own."""
        if self._writer is not None:
            self._writer.close() if self._folder is not None else self._writer.flush()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoardSink needs tensorboard: pip install tensorboard") from error
    return SummaryWriter
