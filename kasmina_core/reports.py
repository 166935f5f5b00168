"""What the registration checks of a blueprint found, as data and as text.

Nothing is called passed that did not run: a report names the devices that were really used and every check that did
not run, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, final

from kasmina_core.errors import BlueprintError


@final
class CheckStatus(StrEnum):
    """What became of one check."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


@final
class RegistrationVerdict(StrEnum):
    """What became of all checks on the devices that were asked for.

    ``failed`` if one failed, else ``incomplete`` if one did not run, else ``passed``.
    """

    PASSED = "passed"
    FAILED = "failed"
    INCOMPLETE = "incomplete"


@final
@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check of one blueprint.

    Attributes:
        name: What was checked, such as ``param_estimate``.
        status: Passed, failed, or not run.
        device: Where, ``"cpu"`` or ``"cuda:0"``; empty for checks that are about no device.
        where: Width and input at which it was measured; for a failure, the first that failed.
        expected: What was asked, as plain data.
        measured: What was found, as plain data; ``None`` if nothing was.
        tolerance: How far the two may differ.
        hint: What to do about a failure, or why the check did not run.
        claim: What is wrong, to be read after the name of the blueprint.
        error: The exception behind a failure.
    """

    name: str
    status: CheckStatus
    device: str = ""
    where: str = ""
    expected: Any = None
    measured: Any = None
    tolerance: str = "none"
    hint: str = ""
    claim: str = ""
    error: BaseException | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON."""
        return {
            "name": self.name,
            "status": self.status.value,
            "device": self.device,
            "where": self.where,
            "expected": self.expected,
            "measured": self.measured,
            "tolerance": self.tolerance,
            "hint": self.hint,
        }

    def explain(self, subject: str) -> str:
        """Return the message of a failure: what is wrong with ``subject``, both values aligned, what to do."""
        lines = [f"{subject} {self.claim or 'fails the check ' + self.name}."]
        if self.name == "param_estimate" and isinstance(self.measured, int):
            ratio = f"{self.measured / self.expected:.2f}" if self.expected else "inf"
            declared, counted = f"{self.expected:,}", f"{self.measured:,}"
            wide = max(len(declared), len(counted))
            lines += [
                f"  declared: {declared:>{wide}} parameters at {self.where}",
                f"  counted:  {counted:>{wide}} parameters at {self.where} (fvcore)",
                f"  ratio:    {ratio:>{wide}}",
            ]
        elif self.expected is not None or self.measured is not None:
            place = ", ".join(filter(None, (self.where, f"on {self.device}" if self.device else "")))
            lines += [
                f"  expected: {_plain(self.expected)}" + (f" at {place}" if place else ""),
                f"  measured: {_plain(self.measured)}",
            ]
        return "\n".join([*lines, self.hint] if self.hint else lines)


@final
@dataclass(frozen=True, slots=True)
class RegistrationReport:
    """What the registration checks of one blueprint found.

    Attributes:
        blueprint: Name of the blueprint.
        origin: Who offers it, such as ``"kasmina-cnn 0.1"``; may be empty.
        devices: The devices that modules really ran on.
        asked: The kinds of device, ``"cpu"`` and ``"cuda"``, that had to be used for a verdict.
        checks: Every check, also those that did not run.
    """

    blueprint: str
    origin: str
    devices: tuple[str, ...]
    asked: tuple[str, ...]
    checks: tuple[CheckResult, ...]

    @property
    def verdict(self) -> RegistrationVerdict:
        """The verdict on the devices asked for; it says nothing about others (see `not_run`)."""
        if self.failures:
            return RegistrationVerdict.FAILED
        if any(c.device.partition(":")[0] in ("", *self.asked) for c in self.not_run) or not self.checks:
            return RegistrationVerdict.INCOMPLETE
        return RegistrationVerdict.PASSED

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The checks that failed."""
        return tuple(c for c in self.checks if c.status is CheckStatus.FAILED)

    @property
    def not_run(self) -> tuple[CheckResult, ...]:
        """The checks that did not run; ``hint`` says why."""
        return tuple(c for c in self.checks if c.status is CheckStatus.NOT_RUN)

    @property
    def failure_message(self) -> str:
        """What is wrong and what to do, for people; empty if nothing failed."""
        subject = f"Blueprint '{self.blueprint}'" + (f" from pack '{self.origin}'" if self.origin else "")
        failures = self.failures
        message = "\n".join(check.explain(subject) for check in failures[:1])
        if others := dict.fromkeys(c.name for c in failures if c.name != failures[0].name):
            message += f"\nAlso failed: {', '.join(others)}."
        return message

    def raise_if_failed(self) -> None:
        """Raise what failed.

        Raises:
            BlueprintError: If a check failed; the exception behind it, if there was one, is chained.
        """
        if failures := self.failures:
            raise BlueprintError(self.failure_message) from failures[0].error

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "blueprint": self.blueprint,
            "origin": self.origin,
            "verdict": self.verdict.value,
            "devices": list(self.devices),
            "checks": [check.to_dict() for check in self.checks],
            "not_run": [
                {"name": c.name, "device": c.device, "where": c.where, "why": c.hint} for c in self.not_run
            ],
        }

    def __str__(self) -> str:
        rows = [(c.status.value, _label(c), c) for c in self.checks]
        wide = max((len(label) for _, label, _ in rows), default=0)
        lines = [f"{self.blueprint}: {self.verdict.value} on {', '.join(self.devices) or 'no device'}"]
        for status, label, check in rows:
            if check.status is CheckStatus.NOT_RUN:
                detail = check.hint
            elif check.status is CheckStatus.PASSED:
                detail = _plain(check.measured)
            else:
                detail = f"expected {_plain(check.expected)}, measured {_plain(check.measured)}"
            lines.append(f"  {status:<7}  {label:<{wide}}  {detail}".rstrip())
        return "\n".join(lines)


def _label(check: CheckResult) -> str:
    where = check.where if check.name in ("param_estimate", "param_count") else ""
    return " ".join(
        filter(
            None, (check.name, f"at {where}" if where else "", f"on {check.device}" if check.device else "")
        )
    )


def _plain(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, list, dict)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "(" + ", ".join(map(str, value)) + ")"
