"""Bundled sinks by name, for ``Telemetry(["tensorboard"])`` and ``kasmina grow --sink tensorboard``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from kasmina_core.telemetry.sinks import Sink


def _tensorboard(config: Mapping[str, Any]) -> Sink:
    from kasmina_core.telemetry.tensorboard import TensorBoardSink

    return TensorBoardSink(os.path.join(config.get("folder", "runs"), "tensorboard"))


def _wandb(config: Mapping[str, Any]) -> Sink:
    from kasmina_core.telemetry.wandb import WandbSink

    return WandbSink(**_name("name", config))


def _mlflow(config: Mapping[str, Any]) -> Sink:
    from kasmina_core.telemetry.mlflow import MlflowSink

    return MlflowSink(**_name("run_name", config))


def _trackio(config: Mapping[str, Any]) -> Sink:
    from kasmina_core.telemetry.trackio import TrackioSink

    return TrackioSink(**_name("name", config))


def _name(keyword: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Name a new run as the run's folder is named."""
    return {keyword: os.path.basename(config["folder"])} if "folder" in config else {}


BUNDLED_SINKS: Final[Mapping[str, Callable[[Mapping[str, Any]], Sink]]] = MappingProxyType(
    {"mlflow": _mlflow, "tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}
)
"""Makes a sink from the user's settings for sinks: ``folder`` is that of the run."""
