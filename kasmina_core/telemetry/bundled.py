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


BUNDLED_SINKS: Final[Mapping[str, Callable[[Mapping[str, Any]], Sink]]] = MappingProxyType(
    {"tensorboard": _tensorboard}
)
"""Makes a sink from the user's settings for sinks: ``folder`` is that of the run."""
