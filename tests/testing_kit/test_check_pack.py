"""`check_pack` loads a pack alone, checks everything it offers, and names what a bad pack lacks."""

from __future__ import annotations

import sys
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import kasmina_cnn
import pytest

from kasmina_core import (
    CheckStatus,
    HostSpec,
    PluginError,
    Topology,
    UnknownNameError,
    ValidationVerdict,
    hookimpl,
)
from kasmina_core.testing import PACK_CHECKS, check_pack

SEEDS = """
import torch
from torch import nn

class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 1, 1))

    def forward(self, x):
        return x * (1 + self.weight)
"""
HEAD = """
from kasmina_core import BlueprintSpec, Topology, hookimpl

SCALE = BlueprintSpec("scale", Topology.CNN, "fake_seeds:Scale", lambda dim: dim)
"""
PACK = HEAD + dedent(
    """
    @hookimpl
    def kasmina_blueprints():
        return [SCALE]
    """
)
EXHAUSTED = HEAD + dedent(
    """
    ONCE = iter([SCALE])

    @hookimpl
    def kasmina_blueprints():
        return ONCE
    """
)
EMPTY = "from kasmina_core import hookimpl\n@hookimpl\ndef kasmina_blueprints():\n    return []\n"

BAD = {
    "an import that raises": ("import no_such_thing", ["loads"], "No module named 'no_such_thing'"),
    "a hook that raises": (PACK.replace("return [", "1 / 0; return ["), ["loads"], "ZeroDivisionError"),
    "nothing to offer": (EMPTY, ["offers_something"], "offers nothing"),
    "declarations for once": (EXHAUSTED, ["declarations_repeat"], "expected: fake:scale"),
    "torch to list": ("import torch\n" + PACK, ["imports_no_torch"], "torch was imported"),
}


@pytest.mark.parametrize(("source", "failing", "text"), BAD.values(), ids=list(BAD))
def test_a_bad_pack_fails_by_name(
    kasmina_fake_distribution: Any, source: str, failing: list[str], text: str
) -> None:
    kasmina_fake_distribution(
        "fake-dist", {"fake": "fake_module"}, {"fake_module": source, "fake_seeds": SEEDS}, version="2.5"
    )
    report = check_pack("fake", device="cpu")
    assert [check.name for check in report.failures] == failing, str(report)
    assert report.origin == "fake-dist 2.5"
    assert report.verdict is ValidationVerdict.FAILED
    with pytest.raises(PluginError, match=r"^Pack 'fake'") as caught:
        report.raise_if_failed()
    assert text in str(caught.value)


def test_every_check_is_seen_to_fail() -> None:
    assert {name for _, failing, _ in BAD.values() for name in failing} == set(PACK_CHECKS)


def test_a_pack_that_does_not_load_has_checks_that_did_not_run(kasmina_fake_distribution: Any) -> None:
    kasmina_fake_distribution("fake-dist", {"fake": "fake_module"}, {"fake_module": "import no_such_thing"})
    report = check_pack("fake")
    assert [check.name for check in report.not_run] == list(PACK_CHECKS[1:])
    with pytest.raises(PluginError) as caught:
        report.raise_if_failed()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_good_pack_passes_with_a_report_for_each_thing_it_offers(kasmina_fake_distribution: Any) -> None:
    kasmina_fake_distribution(
        "fake-dist", {"fake": "fake_module"}, {"fake_module": PACK, "fake_seeds": SEEDS}
    )
    report = check_pack("fake", device="cpu")
    report.raise_if_failed()
    assert [check.name for check in report.checks] == list(PACK_CHECKS)
    assert {check.status for check in report.checks} == {CheckStatus.PASSED}
    assert list(report.blueprints) == ["fake:scale"]
    assert report.blueprints["fake:scale"].origin == "fake-dist 1.0"


def test_a_bundled_pack_as_a_module_is_checked_with_its_host() -> None:
    report = check_pack(kasmina_cnn, device="cpu")
    report.raise_if_failed()
    assert list(report.hosts) == ["kasmina_cnn:cnn"]
    assert report.hosts["kasmina_cnn:cnn"].verdict is ValidationVerdict.PASSED
    assert len(report.blueprints) == len(list(kasmina_cnn.kasmina_blueprints()))
    data = report.to_dict()
    assert set(data["hosts"]) == set(report.hosts)
    assert set(data["blueprints"]) == set(report.blueprints)
    assert str(report).startswith("kasmina_cnn (kasmina_cnn): ")


class HostPack:
    """A pack as an object, with a host that takes options."""

    @hookimpl
    def kasmina_hosts(self) -> list[HostSpec]:
        return [HostSpec("net", "kasmina_cnn:CNNHost", Topology.CNN)]


def test_hosts_are_built_with_the_options_that_are_given() -> None:
    report = check_pack(HostPack(), host_options={"net": {"n_blocks": 4}})
    report.raise_if_failed()
    host = report.hosts["hostpack:net"]
    (points,) = [check.measured for check in host.checks if check.name == "injection_points"]
    assert points == "3 points"
    assert [check.name for check in report.checks] == list(PACK_CHECKS[:3]), (
        "no module name leads to an object"
    )


def test_a_host_that_fails_fails_its_pack() -> None:
    report = check_pack(HostPack(), host_options={"net": {"n_blocks": 0}})
    assert report.failures == ()
    assert report.verdict is ValidationVerdict.FAILED
    with pytest.raises(PluginError, match=r"Host 'hostpack:net'.*cannot be built") as caught:
        report.raise_if_failed()
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_pack_that_is_not_installed_is_answered_with_a_near_name() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'transformer'"):
        check_pack("transfomer")


def test_no_other_pack_is_imported(kasmina_fake_distribution: Any) -> None:
    kasmina_fake_distribution(
        "fake-dist", {"fake": "fake_module"}, {"fake_module": PACK, "fake_seeds": SEEDS}
    )
    kasmina_fake_distribution("fake-bomb", {"bomb": "fake_bomb"}, {"fake_bomb": "raise SystemExit(9)"})
    check_pack("fake", device="cpu").raise_if_failed()
    assert "fake_bomb" not in sys.modules


def test_an_object_without_hooks_is_no_pack() -> None:
    report = check_pack(SimpleNamespace())
    assert [check.name for check in report.failures] == ["loads"]
    assert "no hook" in report.failure_message
