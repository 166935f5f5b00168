"""Checks of a blueprint for its author: one report, or one test case per check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, final

from kasmina_core.blueprints.declarations import BlueprintSpec
from kasmina_core.checks.blueprints import CHECK_NAMES, check_blueprint_spec
from kasmina_core.checks.reports import CheckStatus, ValidationReport
from kasmina_core.errors import UnknownNameError, did_you_mean
from kasmina_core.testing.offered import OfferedBlueprint, blueprints_of

if TYPE_CHECKING:
    import pytest
    import torch

ExpectedFailures = Mapping[str, str] | Callable[[BlueprintSpec], Mapping[str, str]]
"""Names of checks with the reason why each fails, or a function of the blueprint that returns that."""


def check_blueprint(
    blueprint: BlueprintSpec | str,
    *,
    device: str | torch.device | None = None,
    widths: Sequence[int] | None = None,
) -> ValidationReport:
    """Check one blueprint as `check_blueprint_spec` does.

    Args:
        blueprint: The declaration, or the id ``pack:name`` of one in an installed pack.
        device: Where modules run; ``None`` for the CPU and, where there is one, CUDA.
        widths: Feature widths to use, instead of some that the blueprint accepts.

    Raises:
        UnknownNameError: If nobody offers the id.
        PluginError: If its pack cannot be used.

    >>> from kasmina_core import Topology
    >>> from torch import nn
    >>> wide = BlueprintSpec("wide", Topology.TRANSFORMER, lambda dim: nn.Linear(dim, 2 * dim), lambda dim: 2 * dim * (dim + 1))
    >>> [check.name for check in check_blueprint(wide, device="cpu").failures]
    ['output_shape']
    """
    if isinstance(blueprint, str) and ":" not in blueprint:
        raise UnknownNameError(f"'{blueprint}' is not the full id of a blueprint: write 'pack:name'.")
    (offered,) = blueprints_of(blueprint)
    return check_blueprint_spec(offered.spec, device=device, widths=widths, origin=offered.origin)


@final
class BlueprintCheck:
    """One named check of one blueprint, to be called in a test with that blueprint."""

    def __init__(self, name: str, report: Callable[[], ValidationReport]) -> None:
        self.name = name
        self._report = report

    def __call__(self, blueprint: BlueprintSpec) -> None:
        """Raise what failed; skip the test with the reason where the check did not run.

        Raises:
            AssertionError: If the check failed; what is behind it is chained.
        """
        import pytest

        report = self._report()
        mine = [check for check in report.checks if check.name == self.name]
        for check in mine:
            if check.status is CheckStatus.FAILED:
                place = f" from '{report.origin}'" if report.origin else ""
                raise AssertionError(check.explain(f"Blueprint '{blueprint.name}'{place}")) from check.error
        waiting = [check for check in mine if check.status is CheckStatus.NOT_RUN and check.needed]
        if waiting or all(check.status is CheckStatus.NOT_RUN for check in mine):
            why = [check.hint for check in waiting or mine]
            pytest.skip(why[0] if why else f"{self.name} says nothing of '{blueprint.name}'")

    def __repr__(self) -> str:
        return f"<check {self.name}>"


def parametrize_blueprints(
    blueprints: ModuleType | BlueprintSpec | str | Iterable[BlueprintSpec | str] | object,
    *,
    expected_failures: ExpectedFailures | None = None,
    device: str | torch.device | None = None,
) -> pytest.MarkDecorator:
    """Make a test run once for each blueprint and each check of `check_blueprint_spec`.

    The test takes the arguments ``blueprint``, the declaration, and ``check``, which is called with it. A test case is
    named ``<blueprint>-<check>``. One that did not run (no CUDA device, say) is skipped with the reason. The checks of
    a blueprint run when the first of its cases does, so that collecting tests is cheap.

    Args:
        blueprints: A module or object with the hook ``kasmina_blueprints``, the name of an installed pack, a full id,
            a `BlueprintSpec`, or several of these.
        expected_failures: Names of checks that are known to fail, each with the reason, or a function that returns
            those of a blueprint. They are strict: one that passes is an error.
        device: Where modules run; ``None`` for the CPU and, where there is one, CUDA.

    Raises:
        UnknownNameError: If an expected failure is no check, or a name of a pack or blueprint is nobody's.
        ValueError: If an expected failure has no reason or fits no blueprint, or there is no blueprint.

    Source: https://scikit-learn.org/stable/modules/generated/sklearn.utils.estimator_checks.parametrize_with_checks.html

    >>> import kasmina_cnn
    >>> @parametrize_blueprints(kasmina_cnn)
    ... def test_blueprint(blueprint, check):
    ...     check(blueprint)
    """
    import pytest

    offered = blueprints_of(blueprints)
    if not offered:
        raise ValueError("There is no blueprint to check: the pack declares none, or the list is empty.")
    cases: list[Any] = []
    named: set[str] = set()
    met: set[str] = set()
    for one in offered:
        expected = expected_failures(one.spec) if callable(expected_failures) else expected_failures or {}
        for name, reason in expected.items():
            _demand_reason(one, name, reason)
        # Made when the first test case asks, and once for all of them.
        report = cache(partial(check_blueprint_spec, one.spec, device=device, origin=one.origin))
        names = _names_for(one.spec)
        named.update(expected)
        met.update(name for name in names if name in expected)
        for name in names:
            marks = []
            if name in expected:
                marks.append(pytest.mark.xfail(reason=expected[name], strict=True, raises=AssertionError))
            check = BlueprintCheck(name, report)
            cases.append(pytest.param(one.spec, check, id=f"{one.label}-{name}", marks=marks))
    if idle := sorted(named - met):
        raise ValueError(
            f"expected_failures: {', '.join(idle)} says nothing of any of these blueprints. Take it out."
        )
    return pytest.mark.parametrize(("blueprint", "check"), cases)


def _names_for(spec: BlueprintSpec) -> list[str]:
    """Return the checks that say something of a blueprint."""
    silent = {"param_count"}  # a count without a declaration can neither pass nor fail
    if not spec.options:
        silent.add("options")
    if not spec.topology.memory_formats:
        silent.add("channels_last")
    if spec.topology.sequence_axis is None:
        silent.add("positions")
    return [name for name in CHECK_NAMES if name not in silent]


def _demand_reason(blueprint: OfferedBlueprint, name: str, reason: object) -> None:
    if name not in CHECK_NAMES:
        raise UnknownNameError(
            f"expected_failures of '{blueprint.label}': '{name}' is no check.{did_you_mean(name, CHECK_NAMES)}"
        )
    if not isinstance(reason, str) or not reason.strip():
        raise ValueError(
            f"expected_failures of '{blueprint.label}': say why '{name}' fails.\n"
            f"  given: {name!r}: {reason!r}\n"
            "A failure that nobody explains is a bug; write the reason as text."
        )
