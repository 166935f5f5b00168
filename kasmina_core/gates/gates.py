"""Quality gates G0-G5: named checks of one seed and the verdict they give together."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, final

from kasmina_core.gates.checks import (
    GateCheckSpec,
    GateContext,
    common_checks,
    evidence_checks,
    finding_of,
    report_checks,
)
from kasmina_core.gates.thresholds import GateProfile, GateThresholds
from kasmina_core.verdicts import CheckVerdict, GateCheck, GateLevel, GateResult

_DECIDED_ON_EVIDENCE: Final = (GateLevel.G2, GateLevel.G4, GateLevel.G5)


@final
class QualityGates:
    """The gates of one configuration.

    Args:
        profile: Which signals decide.
        thresholds: Thresholds; the default is the profile's.
        extra_checks: Further checks, each of which may veto.

    >>> from kasmina_core import SeedStage, SeedState
    >>> gates = QualityGates()
    >>> bool(gates.check(GateLevel.G1, GateContext(SeedState("s", "b", "slot", SeedStage.GERMINATED))))
    True
    """

    def __init__(
        self,
        profile: GateProfile = GateProfile.EVIDENCE,
        thresholds: GateThresholds | None = None,
        extra_checks: Iterable[GateCheckSpec] = (),
    ) -> None:
        self.profile = GateProfile(profile)
        is_report = self.profile is GateProfile.REPORT
        self.thresholds = thresholds or (GateThresholds.report() if is_report else GateThresholds())
        self.extra_checks = tuple(extra_checks)
        decisive = report_checks(self.thresholds) if is_report else evidence_checks(self.thresholds)
        self.checks = (*common_checks(self.thresholds), *decisive, *self.extra_checks)

    def __reduce__(self) -> tuple[Any, ...]:
        return QualityGates, (self.profile, self.thresholds, self.extra_checks)

    def check(
        self, gate: GateLevel | int, context: GateContext, pack_checks: Iterable[GateCheckSpec] = ()
    ) -> GateResult:
        """Run every check of a gate.

        Checks that need evidence run only when the others passed; otherwise they wait with them, or are never measured.
        An unknown gate fails.

        Args:
            gate: Which gate.
            context: What it may look at.
            pack_checks: Checks that packs declare, each of which may veto.
        """
        epoch = context.state.metrics.epochs_total
        try:
            level = GateLevel(gate)
        except ValueError:
            detail = f"{gate!r} is none of {', '.join(member.name for member in GateLevel)}"
            unknown = GateCheck("gate exists", 0.0, CheckVerdict.FAILED, minimum=1.0, detail=detail)
            return GateResult(None, (unknown,), epoch)
        asked = [spec for spec in (*self.checks, *pack_checks) if level in spec.gates]
        done: dict[int, GateCheck] = {}
        may_go_on, is_waiting = True, False
        for cost in (0, 1, 2):
            for spec in [one for one in asked if one.cost == cost]:
                done[id(spec)] = spec.run(context) if may_go_on else spec.not_asked_yet(is_waiting)
            if cost < 2:
                stopping = {check.verdict for check in done.values() if check.verdict.stops}
                may_go_on, is_waiting = not stopping, stopping == {CheckVerdict.WAITING}
        checks = tuple(done[id(spec)] for spec in asked)
        if level is GateLevel.G0:
            found = {name: text for name, (_, text) in context.germination.items()}
            checks = tuple(
                c if c.verdict is CheckVerdict.PASSED else replace(c, detail=found.get(c.name, c.detail))
                for c in checks
            )
        finding = None
        if may_go_on and self.profile is GateProfile.EVIDENCE and level in _DECIDED_ON_EVIDENCE:
            with suppress(Exception):  # the checks say what an evaluator raised
                finding = finding_of(level, context, self.thresholds)
        return GateResult(level, checks, epoch, finding)

    def foresee(
        self, gate: GateLevel, context: GateContext, pack_checks: Iterable[GateCheckSpec] = ()
    ) -> bool | None:
        """Say what a gate would answer, as far as its checks that cost nothing tell.

        Args:
            gate: Which gate.
            context: What it may look at; nothing is measured.
            pack_checks: Checks that packs declare.

        Returns:
            False if such a check fails, true if all checks are such and pass, ``None`` if the others would decide.
        """
        asked = [spec for spec in (*self.checks, *pack_checks) if gate in spec.gates]
        free = [spec.run(context) for spec in asked if spec.cost == 0]
        if any(check.verdict.stops for check in free):
            return False
        return GateResult(gate, tuple(free)).passed if len(free) == len(asked) else None
