"""Shared parts of the checks of a blueprint: building and running its modules, and keeping the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, final

from kasmina_core.blueprints.foreign import contained, described
from kasmina_core.checks.global_state import STREAMS, Settings
from kasmina_core.checks.reports import CheckResult, CheckStatus
from kasmina_core.errors import PluginError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kasmina_core.blueprints.declarations import BlueprintSpec


@final
@dataclass(slots=True)
class Built:
    """A module of the blueprint, at one width."""

    width: int
    causal: bool
    module: nn.Module

    @property
    def where(self) -> str:
        """The width and the form, for reports."""
        return f"dim={self.width}" + (", causal=True" if self.causal else "")


@final
class Bench:
    """Builds and runs modules of one blueprint; keeps the results, and the settings of the program that they change."""

    def __init__(self, spec: BlueprintSpec) -> None:
        self.spec = spec
        self.results: list[CheckResult] = []
        self._settings = Settings()
        self._changed: dict[str, Any] = {}

    def passed(self, name: str, **facts: Any) -> None:
        """Keep that a check passed."""
        self.results.append(CheckResult(name, CheckStatus.PASSED, **facts))

    def failed(self, name: str, claim: str, **facts: Any) -> None:
        """Keep that a check failed; ``claim`` is read after the name of the blueprint."""
        self.results.append(CheckResult(name, CheckStatus.FAILED, claim=claim, **facts))

    def judge(self, name: str, ok: bool, claim: str, hint: str, **facts: Any) -> None:
        """Keep that a check passed, or failed with this claim and hint."""
        self.results.append(CheckResult.judged(name, ok, claim, hint, **facts))

    def not_run(self, name: str, why: str, **facts: Any) -> None:
        """Keep that a check did not run."""
        self.results.append(CheckResult(name, CheckStatus.NOT_RUN, hint=why, **facts))

    def none_ran(self, names: Iterable[str], why: str, **facts: Any) -> None:
        """Keep that no check of several ran, for one reason."""
        for name in names:
            self.not_run(name, why, **facts)

    def note_settings(self) -> None:
        """Put back settings that were changed since, and remember them."""
        for name, value in self._settings.put_back().items():
            self._changed.setdefault(name, value)

    def call(self, module: nn.Module, x: Tensor, *context: Any) -> Any:
        """Run a module, on features and perhaps their context, and put back at once the settings that it changed: what comes next depends on them."""
        try:
            with contained():
                return module(x, *context)
        finally:
            self.note_settings()

    def judge_settings(self, ran: bool) -> None:
        """Say whether foreign code left the settings of the program alone."""
        self.note_settings()
        if not self._changed and not ran:
            self.not_run("global_state", "no module was built")
            return

        def shown(values: Any, stream: str) -> dict[str, str]:
            return {name: stream if name in STREAMS else str(values[name]) for name in self._changed}

        self.judge(
            "global_state",
            not self._changed,
            "changes settings of the whole program",
            "Leave them alone in the factory and in forward; they were put back. Initial values are drawn with torch's "
            "functions.",
            expected=shown(self._settings, "as they were") or None,
            measured=shown(self._changed, "moved") or "unchanged",
        )

    def build(
        self, width: int, causal: bool = False, options: Mapping[str, Any] | None = None
    ) -> Built | CheckResult:
        """Return a module on the CPU, or the failed check that says why there is none.

        Args:
            width: Feature width.
            causal: Whether to ask for the causal form, if there is one.
            options: Options of the blueprint.
        """
        import torch
        from torch import nn
        from torch.nn.parameter import is_lazy

        from kasmina_core.carried import refusal_of

        given = dict(options or {}) | ({"causal": causal} if self.spec.takes_causal else {})
        where = f"dim={width}" + "".join(f", {name}={value!r}" for name, value in given.items())
        claim, hint, measured = "", "", ""
        error: BaseException | None = None
        try:
            with contained():
                module: object = self.spec.load_factory()(width, **given)
        except torch.OutOfMemoryError:
            raise
        except PluginError as raised:
            error, measured = (
                raised,
                described(raised.__cause__) if raised.__cause__ is not None else str(raised),
            )
            claim = "names a factory that cannot be imported"
            hint = f"factory={self.spec.factory!r} is read as 'package.module:attribute'."
        except (Exception, SystemExit) as raised:
            error, measured = raised, described(raised)
            claim = "could not be built at a width it accepts"
            hint = (
                "Let accepts_width return a reason for widths that the factory cannot take."
                if isinstance(raised, (ValueError, AssertionError, RuntimeError))
                else "The factory is called as factory(dim, **options) and returns an nn.Module."
            )
        else:
            if not isinstance(module, nn.Module):
                measured, claim = f"{type(module).__name__}", "is not built as a module"
                hint = "The factory is called as factory(dim, **options) and returns an nn.Module."
            elif any(is_lazy(tensor) for tensor in chain(module.parameters(), module.buffers())):
                measured, claim = "uninitialised (lazy) parameters", "is not complete when it is built"
                hint = "Give every layer its size: the width is known, and optimisers need the parameters."
            elif refusal := refusal_of(module):
                measured, claim, hint = (
                    refusal,
                    "carries a slot of a model",
                    "Build it of modules of its own.",
                )
            else:
                self.note_settings()
                return Built(width, causal, module)
        self.note_settings()
        return CheckResult(
            "factory",
            CheckStatus.FAILED,
            where=where,
            expected="an nn.Module",
            measured=measured,
            hint=hint,
            claim=claim,
            error=error,
        )

    def need(self, width: int) -> nn.Module:
        """Return a module at a width where one was built before.

        Raises:
            NotRepeatableError: If it cannot be built again.
        """
        made = self.build(width)
        if isinstance(made, CheckResult):
            raise NotRepeatableError(made.measured)
        return made.module


class NotRepeatableError(Exception):
    """A module that was built once cannot be built again."""


@final
@dataclass(frozen=True, slots=True)
class Words:
    """Report texts of a check: what was expected, and for a failure what is wrong and what to do."""

    expected: str
    claim: str
    hint: str
    tolerance: str = "none"


@final
class Tally:
    """For each check of a device: how often it ran, the first failure, what to report of a pass or of no run.

    Attributes:
        runs: How often it ran.
        failures: The facts of its first failure.
        measured: What a pass reports, instead of how often it ran.
        problems: Why it did not run.
        farthest: The largest distance from the identity, as a part of the RMS of the input.
    """

    def __init__(self, words: Mapping[str, Words]) -> None:
        self._words = words
        self.runs: Counter[str] = Counter()
        self.failures: dict[str, dict[str, Any]] = {}
        self.measured: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self.farthest = 0.0

    def ran(self, name: str) -> None:
        """Count a run that found nothing wrong."""
        self.runs[name] += 1

    def judge(self, name: str, ok: bool, where: str, measured: object, **changes: Any) -> None:
        """Count a run; if it failed, as `fail`."""
        if ok:
            self.ran(name)
        else:
            self.fail(name, where, measured, **changes)

    def fail(self, name: str, where: str, measured: object, **changes: Any) -> None:
        """Count a run that failed, and keep it if it is the first; ``changes`` that are not empty replace its `Words`."""
        self.ran(name)
        facts = {"where": where, "measured": measured, **asdict(self._words[name])}
        facts |= {key: value for key, value in changes.items() if value}
        listed = {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}
        self.failures.setdefault(name, listed)
