"""Sinks for events, and delivery to them off the training thread."""

from __future__ import annotations

from kasmina_core.telemetry.delivery import SinkStatus, Telemetry
from kasmina_core.telemetry.mlflow import MlflowSink
from kasmina_core.telemetry.sinks import CallableSink, JsonLinesSink, MemorySink, Sink
from kasmina_core.telemetry.tensorboard import TensorBoardSink
from kasmina_core.telemetry.trackers import TrackerSink
from kasmina_core.telemetry.trackio import TrackioSink
from kasmina_core.telemetry.wandb import WandbSink

__all__ = [
    "CallableSink",
    "JsonLinesSink",
    "MemorySink",
    "MlflowSink",
    "Sink",
    "SinkStatus",
    "Telemetry",
    "TensorBoardSink",
    "TrackerSink",
    "TrackioSink",
    "WandbSink",
]
