"""What the checks of a blueprint found, as data and as text.

Nothing is called passed that did not run: a report names the devices that were really used and every check that did
not run, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
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
class ValidationVerdict(StrEnum):
    """What became of all checks that were asked for.

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
        needed: Whether a verdict has to wait for this check; false for a device or a check that was not asked for.
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
    needed: bool = True
    error: BaseException | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        """The name, with the width of a size and the device of a check that ran on one."""
        where = self.where if self.name in ("param_estimate", "param_count") else ""
        parts = (self.name, f"at {where}" if where else "", f"on {self.device}" if self.device else "")
        return " ".join(filter(None, parts))

    @property
    def detail(self) -> str:
        """In one line what was found, or why the check did not run."""
        if self.status is CheckStatus.NOT_RUN:
            return self.hint
        if self.status is CheckStatus.FAILED:
            return f"expected {plain_text(self.expected)}, measured {plain_text(self.measured)}"
        return plain_text(self.measured)

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
            "claim": self.claim,
            "needed": self.needed,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CheckResult:
        """Return the check that `to_dict` wrote, without the exception.

        Raises:
            KeyError, TypeError, ValueError: If ``data`` is something else.
        """
        status = CheckStatus(data["status"])
        needed = data["needed"]
        texts = {name: data[name] for name in ("name", "device", "where", "tolerance", "hint", "claim")}
        if not isinstance(needed, bool) or not all(isinstance(text, str) for text in texts.values()):
            raise TypeError("not a check")
        return cls(
            status=status,
            expected=data["expected"],
            measured=data["measured"],
            needed=needed,
            **texts,
        )

    def explain(self, subject: str) -> str:
        """Return the message of a failure: what is wrong with ``subject``, both values aligned, what to do."""
        lines = [f"{subject} {self.claim or 'fails the check ' + self.name}."]
        if self.name == "param_estimate" and isinstance(self.measured, int):
            ratio = f"{self.measured / self.expected:.2f}" if self.expected else "inf"
            declared, counted = f"{self.expected:,}", f"{self.measured:,}"
            wide = max(map(len, (declared, counted, ratio)))
            lines += [
                f"  declared: {declared:>{wide}} parameters at {self.where}",
                f"  counted:  {counted:>{wide}} parameters at {self.where} (fvcore)",
                f"  ratio:    {ratio:>{wide}}",
            ]
        elif self.expected is not None or self.measured is not None:
            place = ", ".join(filter(None, (self.where, f"on {self.device}" if self.device else "")))
            lines += [
                f"  expected: {plain_text(self.expected)}" + (f" at {place}" if place else ""),
                f"  measured: {plain_text(self.measured)}",
            ]
            if self.tolerance != "none":
                lines.append(f"  tolerance: {self.tolerance}")
        return "\n".join([*lines, self.hint] if self.hint else lines)


@final
@dataclass(frozen=True, slots=True)
class ValidationReport:
    """What the checks of one blueprint found.

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
    def verdict(self) -> ValidationVerdict:
        """The verdict on what was asked for; it says nothing about the rest (see `not_run`)."""
        if self.failures:
            return ValidationVerdict.FAILED
        if self.missing or not self.checks:
            return ValidationVerdict.INCOMPLETE
        return ValidationVerdict.PASSED

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The checks that failed."""
        return tuple(c for c in self.checks if c.status is CheckStatus.FAILED)

    @property
    def not_run(self) -> tuple[CheckResult, ...]:
        """The checks that did not run; ``hint`` says why."""
        return tuple(c for c in self.checks if c.status is CheckStatus.NOT_RUN)

    @property
    def missing(self) -> tuple[CheckResult, ...]:
        """The checks that were asked for and did not run."""
        return tuple(c for c in self.not_run if c.needed)

    @property
    def subject(self) -> str:
        """The blueprint as the start of a sentence, with who offers it."""
        return f"Blueprint '{self.blueprint}'" + (f" from pack '{self.origin}'" if self.origin else "")

    @property
    def headline(self) -> str:
        """The verdict, and where it comes from, in one line."""
        return f"{self.blueprint}: {self.verdict.value} on {', '.join(self.devices) or 'no device'}"

    @property
    def failure_message(self) -> str:
        """What is wrong and what to do, for people; empty if nothing failed."""
        failures = self.failures
        message = "\n".join(check.explain(self.subject) for check in failures[:1])
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

    def not_run_by_reason(self) -> dict[str, list[CheckResult]]:
        """Return the checks that did not run, under the reason why."""
        reasons: dict[str, list[CheckResult]] = {}
        for check in self.not_run:
            reasons.setdefault(check.hint, []).append(check)
        return reasons

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "blueprint": self.blueprint,
            "origin": self.origin,
            "verdict": self.verdict.value,
            "devices": list(self.devices),
            "asked": list(self.asked),
            "checks": [check.to_dict() for check in self.checks],
            "not_run": [
                {"name": c.name, "device": c.device, "where": c.where, "why": c.hint, "needed": c.needed}
                for c in self.not_run
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ValidationReport:
        """Return the report that `to_dict` wrote; the exceptions behind failures are not in it.

        Raises:
            KeyError, TypeError, ValueError: If ``data`` is something else.
        """
        return cls(
            blueprint=str(data["blueprint"]),
            origin=str(data["origin"]),
            devices=tuple(map(str, data["devices"])),
            asked=tuple(map(str, data["asked"])),
            checks=tuple(CheckResult.from_dict(check) for check in data["checks"]),
        )

    def to_markdown(self) -> str:
        """Return the report as a Markdown section: the verdict, what failed, and a table of every check."""
        from kasmina_core.checks.formats import markdown

        return markdown(self)

    def __str__(self) -> str:
        ran = [check for check in self.checks if check.status is not CheckStatus.NOT_RUN]
        wide = max((len(check.label) for check in ran), default=0)
        far = max((len(check.status.value) for check in ran), default=7)
        lines = [self.headline]
        lines += [f"  {c.status.value:<{far}}  {c.label:<{wide}}  {c.detail}".rstrip() for c in ran]
        for reason, checks in self.not_run_by_reason().items():
            lines.append(f"  {'not run':<{far}}  {', '.join(check.label for check in checks)}: {reason}")
        return "\n".join(lines)


def plain_text(value: object) -> str:
    """Return a measured or expected value for people.

    >>> plain_text(4225), plain_text([2, 64, 8, 8]), plain_text({"counted": 1})
    ('4,225', '(2, 64, 8, 8)', 'counted 1')
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, list, dict)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{str(key).replace('_', ' ')} {plain_text(item)}" for key, item in value.items())
    return "(" + ", ".join(map(str, value)) + ")"
