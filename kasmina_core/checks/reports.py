"""Reports of checks on a blueprint, a host or a pack, as data and as text.

Nothing is called passed that did not run: a report names the devices that were really used and every check that did
not run, with the reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self, final

from kasmina_core.blueprints.foreign import cleaned
from kasmina_core.errors import BlueprintError, KasminaError
from kasmina_core.records import Mark, Record


@final
class CheckStatus(StrEnum):
    """Outcome of one check."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


@final
class ValidationVerdict(StrEnum):
    """Outcome of all checks that were asked for.

    ``failed`` if one failed, else ``incomplete`` if one did not run, else ``passed``.
    """

    PASSED = "passed"
    FAILED = "failed"
    INCOMPLETE = "incomplete"


@final
@dataclass(frozen=True, slots=True)
class CheckResult(Record):
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
        needed: Whether the verdict is incomplete without this check; false where it was not asked for.
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
    error: Annotated[BaseException | None, Mark.UNWRITTEN] = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("where", "expected", "measured", "hint"):  # what foreign code says is printed
            if isinstance(text := getattr(self, name), str):
                object.__setattr__(self, name, cleaned(text, 4000, lines=True))

    @classmethod
    def judged(cls, name: str, ok: bool, claim: str, hint: str, **facts: Any) -> Self:
        """Return a check that passed, or failed with this claim and hint."""
        if ok:
            return cls(name, CheckStatus.PASSED, **facts)
        return cls(name, CheckStatus.FAILED, claim=claim, hint=hint, **facts)

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


class Report(Record):
    """Results of the checks of one subject, and the reports of its parts.

    Attributes:
        kind: What the subject is; the field of that name holds the subject's name.
        error: What `raise_if_failed` raises.
        origin: Who offers it, such as ``"kasmina-cnn 0.1"``; may be empty.
        checks: Every check of its own, also those that did not run.
    """

    derived: ClassVar[tuple[str, ...]] = ("verdict",)

    kind: ClassVar[str]
    error: ClassVar[type[KasminaError]]
    origin: str
    checks: tuple[CheckResult, ...]

    @property
    def subject(self) -> str:
        """The subject as the start of a sentence, with who offers it."""
        named = f"{self.kind.capitalize()} '{getattr(self, self.kind)}'"
        return named + (f" from pack '{self.origin}'" if self.origin else "")

    @property
    def used_devices(self) -> tuple[str, ...]:
        """The devices that modules really ran on."""
        return ()

    @property
    def children(self) -> tuple[Report, ...]:
        """The reports of the subject's parts."""
        return ()

    @property
    def verdict(self) -> ValidationVerdict:
        """The verdict on what was asked for, parts included; it says nothing about the rest (see `not_run`)."""
        verdicts = {child.verdict for child in self.children}
        if self.failures:
            verdicts.add(ValidationVerdict.FAILED)
        if self.missing or not self.checks:
            verdicts.add(ValidationVerdict.INCOMPLETE)
        return worst(verdicts)

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
    def headline(self) -> str:
        """The verdict, and where it comes from, in one line."""
        where = ", ".join(self.used_devices) or "no device"
        return f"{getattr(self, self.kind)}: {self.verdict.value} on {where}"

    @property
    def failure_message(self) -> str:
        """What is wrong with the subject and its parts, and what to do; empty if nothing failed."""
        failures = self.failures
        message = "\n".join(check.explain(self.subject) for check in failures[:1])
        if others := dict.fromkeys(c.name for c in failures if c.name != failures[0].name):
            message += f"\nAlso failed: {', '.join(others)}."
        return "\n\n".join(filter(None, (message, *(child.failure_message for child in self.children))))

    def raise_if_failed(self) -> None:
        """Raise what failed.

        Raises:
            BlueprintError, HostError, PluginError: Whichever the report is about, if a check failed; the exception
                behind the first failure, if there was one, is chained.
        """
        if failures := [*self.failures, *(check for child in self.children for check in child.failures)]:
            raise self.error(self.failure_message) from failures[0].error

    def not_run_by_reason(self) -> dict[str, list[CheckResult]]:
        """Return the checks that did not run, under the reason why."""
        reasons: dict[str, list[CheckResult]] = {}
        for check in self.not_run:
            reasons.setdefault(check.hint, []).append(check)
        return reasons

    def __str__(self) -> str:
        ran = [check for check in self.checks if check.status is not CheckStatus.NOT_RUN]
        wide = max((len(check.label) for check in ran), default=0)
        lines = [self.headline]
        lines += [f"  {c.status.value:<7}  {c.label:<{wide}}  {c.detail}".rstrip() for c in ran]
        for reason, checks in self.not_run_by_reason().items():
            lines.append(f"  not run  {', '.join(check.label for check in checks)}: {reason}")
        return "\n".join([*lines, *map(str, self.children)])


@final
@dataclass(frozen=True)
class ValidationReport(Report):
    """Results of the checks of one blueprint.

    Attributes:
        blueprint: Name of the blueprint.
        origin: Who offers it, such as ``"kasmina-cnn 0.1"``; may be empty.
        devices: The devices that modules really ran on.
        asked: The kinds of device, ``"cpu"`` and ``"cuda"``, that had to be used for a verdict.
        checks: Every check, also those that did not run.
    """

    derived = ("verdict", "not_run")
    kind = "blueprint"
    error = BlueprintError
    blueprint: str
    origin: str
    devices: tuple[str, ...]
    asked: tuple[str, ...]
    checks: tuple[CheckResult, ...]

    @property
    def used_devices(self) -> tuple[str, ...]:
        """The devices that modules really ran on."""
        return self.devices

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: the fields, the verdict, and why checks did not run."""
        return super().to_dict() | {
            "not_run": [
                {"name": c.name, "device": c.device, "where": c.where, "why": c.hint, "needed": c.needed}
                for c in self.not_run
            ]
        }

    def to_markdown(self) -> str:
        """Return the report as a Markdown section: the verdict, what failed, and a table of every check."""
        from kasmina_core.checks.formats import markdown

        return markdown(self)


def worst(verdicts: Collection[ValidationVerdict]) -> ValidationVerdict:
    """Return the worst verdict; ``passed`` if there is none."""
    order = (ValidationVerdict.FAILED, ValidationVerdict.INCOMPLETE)
    return next((verdict for verdict in order if verdict in verdicts), ValidationVerdict.PASSED)


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
