"""The checks of the conformance kit by name, and its report on a host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from kasmina_core.checks.reports import CheckResult, Report
from kasmina_core.errors import HostError

HOST_CHECKS: Final = (
    "builds",
    "deepcopy",
    "injection_points",
    "example_runs",
    "repeatable_forward",
    "points_fire_once",
    "points_as_declared",
    "attaches",
    "keys_unchanged",
    "hooks_restored",
    "modes_unchanged",
    "buffers_unchanged",
    "random_numbers_unchanged",
    "dormant_output",
    "training_output",
    "training_gradient",
    "gradient_at_alpha_one",
    "slots_take_features",
    "deepcopy_with_seeds",
    "causal_claim",
)
"""Every check that a `HostReport` can hold, in its order. ``causal_claim`` is there if a point is declared causal."""

PACK_CHECKS: Final = ("loads", "offers_something", "declarations_repeat", "imports_no_torch")
"""Every check of the pack itself that a `PackReport` can hold, in its order."""


@final
@dataclass(frozen=True)
class HostReport(Report):
    """Result of `check_host`.

    Attributes:
        host: Name of the host, or its class.
        origin: Who offers it, such as ``"kasmina-cnn 0.1"``; may be empty.
        device: Where it ran; empty if it did not.
        checks: Every check, also those that did not run.
    """

    kind = "host"
    error = HostError
    host: str
    origin: str
    device: str
    checks: tuple[CheckResult, ...]

    @property
    def used_devices(self) -> tuple[str, ...]:
        """The device it ran on, if any."""
        return tuple(filter(None, (self.device,)))
