"""What the conformance kit found of a host or a pack, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from kasmina_core.checks.reports import CheckResult, CheckStatus, ValidationReport, ValidationVerdict
from kasmina_core.errors import HostError, PluginError

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


class _Checked:
    """What both reports say of their own checks."""

    checks: tuple[CheckResult, ...]

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status is CheckStatus.FAILED)

    @property
    def not_run(self) -> tuple[CheckResult, ...]:
        """The checks that did not run; ``hint`` says why."""
        return tuple(check for check in self.checks if check.status is CheckStatus.NOT_RUN)

    def _own_verdict(self) -> ValidationVerdict:
        if self.failures:
            return ValidationVerdict.FAILED
        if self.not_run or not self.checks:
            return ValidationVerdict.INCOMPLETE
        return ValidationVerdict.PASSED


@final
@dataclass(frozen=True)
class HostReport(_Checked):
    """What `check_host` found.

    Attributes:
        host: Name of the host, or its class.
        origin: Who offers it, such as ``"kasmina-cnn 0.1"``; may be empty.
        device: Where it ran; empty if it did not.
        checks: Every check, also those that did not run.
    """

    host: str
    origin: str
    device: str
    checks: tuple[CheckResult, ...]

    @property
    def verdict(self) -> ValidationVerdict:
        """``failed`` if a check failed, else ``incomplete`` if one did not run, else ``passed``."""
        return self._own_verdict()

    @property
    def failure_message(self) -> str:
        """What is wrong and what to do, for people; empty if nothing failed."""
        subject = f"Host '{self.host}'" + (f" from pack '{self.origin}'" if self.origin else "")
        return _message(subject, self.failures)

    def raise_if_failed(self) -> None:
        """Raise what failed.

        Raises:
            HostError: If a check failed; the exception behind it, if there was one, is chained.
        """
        if failures := self.failures:
            raise HostError(self.failure_message) from failures[0].error

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "host": self.host,
            "origin": self.origin,
            "device": self.device,
            "verdict": self.verdict.value,
            "checks": [check.to_dict() for check in self.checks],
        }

    def __str__(self) -> str:
        place = f" on {self.device}" if self.device else ""
        return "\n".join([f"{self.host}: {self.verdict.value}{place}", *_rows(self.checks)])


@final
@dataclass(frozen=True)
class PackReport(_Checked):
    """What `check_pack` found.

    Attributes:
        pack: Name of the pack.
        origin: The distribution and version that installed it; its name if it came from none.
        checks: The checks of the pack itself.
        blueprints: The report of each blueprint, by full id.
        hosts: The report of each host, by full id.
    """

    pack: str
    origin: str
    checks: tuple[CheckResult, ...]
    blueprints: Mapping[str, ValidationReport] = field(default_factory=dict)
    hosts: Mapping[str, HostReport] = field(default_factory=dict)

    @property
    def verdict(self) -> ValidationVerdict:
        """The worst verdict among the pack's own checks, its blueprints and its hosts."""
        verdicts = [self._own_verdict(), *(part.verdict for part in self._parts)]
        worst_first = (
            ValidationVerdict.FAILED,
            ValidationVerdict.INCOMPLETE,
            ValidationVerdict.PASSED,
        )
        return next(verdict for verdict in worst_first if verdict in verdicts)

    @property
    def _parts(self) -> list[ValidationReport | HostReport]:
        return [*self.blueprints.values(), *self.hosts.values()]

    @property
    def failure_message(self) -> str:
        """What is wrong with the pack, and with each blueprint and host that failed; empty if nothing did."""
        own = _message(f"Pack '{self.pack}' ({self.origin})", self.failures)
        return "\n\n".join(filter(None, (own, *(part.failure_message for part in self._parts))))

    def raise_if_failed(self) -> None:
        """Raise what failed.

        Raises:
            PluginError: If a check failed; the exception behind the first, if there was one, is chained.
        """
        failures = [*self.failures, *(check for part in self._parts for check in part.failures)]
        if failures:
            raise PluginError(self.failure_message) from failures[0].error

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "pack": self.pack,
            "origin": self.origin,
            "verdict": self.verdict.value,
            "checks": [check.to_dict() for check in self.checks],
            "blueprints": {name: report.to_dict() for name, report in self.blueprints.items()},
            "hosts": {name: report.to_dict() for name, report in self.hosts.items()},
        }

    def __str__(self) -> str:
        head = f"{self.pack} ({self.origin}): {self.verdict.value}"
        return "\n".join([head, *_rows(self.checks), *map(str, self._parts)])


def _message(subject: str, failures: Sequence[CheckResult]) -> str:
    message = "\n".join(check.explain(subject) for check in failures[:1])
    if others := dict.fromkeys(check.name for check in failures[1:]):
        message += f"\nAlso failed: {', '.join(others)}."
    return message


def _rows(checks: Sequence[CheckResult]) -> list[str]:
    wide = max((len(check.name) for check in checks), default=0)
    return [f"  {check.status.value:<7}  {check.name:<{wide}}  {check.detail}".rstrip() for check in checks]
