"""Sinks for events, and delivery to them off the training thread."""

from __future__ import annotations

from kasmina_core.telemetry.delivery import SinkStatus, Telemetry
from kasmina_core.telemetry.sinks import CallableSink, JsonLinesSink, MemorySink, Sink
from kasmina_core.telemetry.tensorboard import TensorBoardSink
from kasmina_core.telemetry.trackers import TrackerSink

__all__ = [
    "CallableSink",
    "JsonLinesSink",
    "MemorySink",
    "Sink",
    "SinkStatus",
    "Telemetry",
    "TensorBoardSink",
    "TrackerSink",
]
