"""Sinks for events, and delivery to them off the training thread."""

from __future__ import annotations

from kasmina_core.telemetry.delivery import SinkStatus, Telemetry
from kasmina_core.telemetry.sinks import CallableSink, JsonLinesSink, MemorySink, Sink

__all__ = ["CallableSink", "JsonLinesSink", "MemorySink", "Sink", "SinkStatus", "Telemetry"]
