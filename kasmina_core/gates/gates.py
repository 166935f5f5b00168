"""Quality gates G0-G5: named checks of one seed and the verdict they give together."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, final

from kasmina_core.gates.checks import (
    PROBATION_DWELL,
    GateCheckSpec,
    GateContext,
    common_checks,
    evidence_checks,
    finding_of,
    report_checks,
    straight_checks,
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
        common = common_checks(self.thresholds)
        self.checks = (*common, *decisive, *self.extra_checks)
        # What compares a seed with the host without it, or waits for that.
        self._spared = (*decisive, *(spec for spec in common if spec.name == PROBATION_DWELL))
        self._straight = tuple(straight_checks(self.thresholds))

    def __reduce__(self) -> tuple[Any, ...]:
        return QualityGates, (self.profile, self.thresholds, self.extra_checks)

    def check(
        self, gate: GateLevel | int, context: GateContext, pack_checks: Iterable[GateCheckSpec] = ()
    ) -> GateResult:
        """Run every check of a gate.

        Checks that need evidence run only when the others passed; otherwise they wait with them, or are never measured.
        An unknown gate fails. At G5 a seed that was put in straight is compared with the host's trend; what would compare
        it with the host without it is not asked. Checks of packs and ``extra_checks`` are.

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
            unknown = GateCheck("gate exists", 0.0, CheckVerdict.FAILED, detail=detail)
            return GateResult(None, (unknown,), epoch)
        asked, spared = self._asked(level, context, pack_checks)
        done = {id(spec): spec.not_asked for spec in spared}
        may_go_on, is_waiting = True, False
        for cost in (0, 1, 2):
            for spec in [one for one in asked if one.cost == cost]:
                done[id(spec)] = spec.run(context) if may_go_on else spec.not_asked_yet(is_waiting)
            if cost < 2:
                stopping = {check.verdict for check in done.values() if check.verdict.stops}
                may_go_on, is_waiting = not stopping, stopping == {CheckVerdict.WAITING}
        checks = tuple(done[id(spec)] for spec in (*asked, *spared))
        if level is GateLevel.G0:
            found = {name: text for name, (_, text) in context.germination.items()}
            checks = tuple(
                c if c.verdict is CheckVerdict.PASSED else replace(c, detail=found.get(c.name, c.detail))
                for c in checks
            )
        finding = None
        on_evidence = self.profile is GateProfile.EVIDENCE and level in _DECIDED_ON_EVIDENCE
        if may_go_on and on_evidence and not spared:
            with suppress(Exception):  # the checks say what an evaluator raised
                finding = finding_of(level, context, self.thresholds)
        return GateResult(level, checks, epoch, finding)

    def _asked(
        self, gate: GateLevel, context: GateContext, pack_checks: Iterable[GateCheckSpec]
    ) -> tuple[list[GateCheckSpec], list[GateCheckSpec]]:
        """Return the checks that a gate asks, and those that it spares a seed that was put in straight."""
        asked = [spec for spec in (*self.checks, *pack_checks) if gate in spec.gates]
        if not (gate is GateLevel.G5 and context.state.is_straight):
            return asked, []
        spared = [spec for spec in asked if spec in self._spared]
        return [*self._straight, *(spec for spec in asked if spec not in self._spared)], spared

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
        asked, _ = self._asked(gate, context, pack_checks)
        free = [spec.run(context) for spec in asked if spec.cost == 0]
        if any(check.verdict.stops for check in free):
            return False
        return GateResult(gate, tuple(free)).passed if len(free) == len(asked) else None
