"""`check_host` passes hosts that keep every promise, and names the promise that a bad one breaks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny_hosts as tiny
import torch
import torch.nn.functional as F
from kasmina_cnn import CNNHost
from kasmina_transformer import TransformerHost
from torch import Tensor, nn

from kasmina_core import (
    CheckStatus,
    HostError,
    HostSpec,
    InjectionPoint,
    MorphogeneticModel,
    PluginError,
    Topology,
    UnknownNameError,
    ValidationVerdict,
)
from kasmina_core.testing import HOST_CHECKS, HostReport, check_host

GOOD: dict[str, Callable[[], HostReport]] = {
    "bundled cnn": lambda: check_host(CNNHost),
    "bundled transformer": lambda: check_host(TransformerHost),
    "statistics, dropout, in-place": lambda: check_host(tiny.Images),
    "an instance": lambda: check_host(tiny.Images()),
    "float64": lambda: check_host(tiny.Images().double()),
    "bfloat16": lambda: check_host(tiny.Words().bfloat16()),
    "causal and says so": lambda: check_host(tiny.Words),
    "not causal and says nothing": lambda: check_host(lambda: tiny.Words(looks_ahead=True, claims=False)),
    "dataclass output, keywords, frozen and unused parameters": lambda: check_host(tiny.WithDataclass),
    "a normalisation behind the point": lambda: check_host(tiny.Normalises),
    "decoder beside an encoder of the same length": lambda: check_host(tiny.Translates),
    "any module, points by path": lambda: check_host(
        nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)),
        torch.randn(2, 1, 2, 2),
        slots=["0", "1"],
    ),
    "any module, points by declaration": lambda: check_host(
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)),
        torch.randn(2, 4, 3),
        slots=[InjectionPoint("first", "0", 3, Topology.TRANSFORMER, causal=True)],
    ),
    "a declaration": lambda: check_host(HostSpec("net", "tiny_hosts:Images", Topology.CNN)),
    "an id": lambda: check_host("cnn:cnn"),
    "options": lambda: check_host(CNNHost, options={"norm": "group", "in_channels": 2}),
    "on a device by name": lambda: check_host(tiny.Images, torch.randn(2, 1, 5, 5), device="cpu"),
}


@pytest.mark.parametrize("report", GOOD.values(), ids=list(GOOD))
def test_a_good_host_passes_every_check(report: Callable[[], HostReport]) -> None:
    torch.manual_seed(0)  # of three channels behind a ReLU all may be dead
    found = report()
    assert found.verdict is ValidationVerdict.PASSED, str(found)
    found.raise_if_failed()
    assert found.failure_message == ""
    names = [check.name for check in found.checks]
    assert names in (list(HOST_CHECKS), list(HOST_CHECKS[:-1]))
    assert found.device == "cpu"


BAD: dict[str, tuple[Any, list[str], str]] = {
    "a factory that returns no module": (lambda: 3, ["builds"], "the factory returned int"),
    "a factory that raises": (lambda: 1 / 0, ["builds"], "ZeroDivisionError"),
    "cannot be copied": (tiny.CannotBeCopied, ["deepcopy"], "there is one of me"),
    "is copied as itself": (tiny.IsCopiedAsItself, ["deepcopy"], "tensors are shared"),
    "a point nowhere": (tiny.PointNowhere, ["injection_points"], "Did you mean 'norm'?"),
    "two points of one name": (tiny.TwoPointsOfOneName, ["injection_points"], "the name 'one'"),
    "other points each time": (tiny.OtherPointsEachTime, ["injection_points"], "asking twice"),
    "no points": (lambda: nn.Linear(2, 2), ["injection_points"], "does not declare injection points"),
    "no example": (tiny.WithoutExample, ["example_runs"], "no example_inputs()"),
    "an example of another shape": (tiny.ExampleOfAnotherShape, ["example_runs"], "RuntimeError"),
    "an output of whole numbers": (tiny.ReturnsWholeNumbers, ["example_runs"], "no floating-point tensor"),
    "another output each time": (tiny.CountsCalls, ["repeatable_forward"], "differs by up to 1"),
    "a point that fires twice": (tiny.UsesAPointTwice, ["points_fire_once"], "2 times"),
    "a point that does not fire in training": (
        tiny.SkipsAPointInTraining,
        ["points_fire_once"],
        "0 times",
    ),
    "another width than declared": (
        tiny.DeclaresAnotherWidth,
        ["points_as_declared"],
        "where cnn (b, c, h, w), width 8, is declared",
    ),
    "another layout than declared": (
        tiny.DeclaresAnotherLayout,
        ["points_as_declared"],
        "where transformer (b, t, d), width 5, is declared",
    ),
    "refuses slots": (tiny.RefusesSlots, ["attaches"], "no slots today"),
    "owns its slots": (
        tiny.OwnsSlots,
        ["keys_unchanged", "hooks_restored", "slots_take_features"],
        "also slot_early",
    ),
    "keeps hooks": (tiny.KeepsHooks, ["hooks_restored"], "norm: forward_hooks"),
    "goes to eval mode": (tiny.GoesToEvalMode, ["modes_unchanged"], "'norm' is in eval"),
    "writes to a buffer": (
        tiny.CountsSlotsInABuffer,
        ["buffers_unchanged", "dormant_output", "training_output"],
        "calls: differs by up to 2",
    ),
    "draws random numbers": (tiny.DrawsNumbers, ["random_numbers_unchanged"], "cpu: differs"),
    "adds to what a slot returns": (
        lambda: tiny.OwnHooks("adds"),
        ["dormant_output", "training_output", "training_gradient"],
        "differs by up to",
    ),
    "asks the seed itself": (
        lambda: tiny.OwnHooks("asks the seed"),
        ["training_output", "training_gradient"],
        "seeds in TRAINING",
    ),
    "detaches": (
        lambda: tiny.OwnHooks("detaches"),
        ["training_gradient", "gradient_at_alpha_one"],
        "lacks stem.weight, stem.bias, norm.weight, norm.bias",
    ),
    "detaches at alpha 1": (
        lambda: tiny.OwnHooks("detaches at alpha 1"),
        ["gradient_at_alpha_one"],
        "none at stem.weight, stem.bias, norm.weight, norm.bias",
    ),
    "drops what a slot returns": (
        lambda: tiny.OwnHooks("drops"),
        ["slots_take_features"],
        "changes no output",
    ),
    "calls a slot twice": (
        lambda: tiny.OwnHooks("calls twice"),
        ["training_output"],
        "'early' is called more than once",
    ),
    "never calls a slot": (
        lambda: tiny.OwnHooks("nothing"),
        ["slots_take_features", "deepcopy_with_seeds"],
        "called 0 times",
    ),
    "a closure around a slot": (
        lambda: tiny.OwnHooks("closure"),
        ["deepcopy_with_seeds"],
        "2 of the original",
    ),
    "claims to be causal": (
        lambda: tiny.Words(looks_ahead=True),
        ["causal_claim"],
        "input[0] from position 1 on changes features before position 1",
    ),
    "a declaration of another layout": (
        HostSpec("net", tiny.Images, Topology.TRANSFORMER),
        ["injection_points"],
        "declares transformer, point 'early' cnn",
    ),
}


@pytest.mark.parametrize(("host", "failing", "text"), BAD.values(), ids=list(BAD))
def test_a_bad_host_fails_by_name(host: Any, failing: list[str], text: str) -> None:
    report = check_host(host)
    assert [check.name for check in report.failures] == failing, str(report)
    assert report.verdict is ValidationVerdict.FAILED
    with pytest.raises(HostError) as caught:
        report.raise_if_failed()
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"Host '{report.host}'")
    assert all(check.hint for check in [*report.failures, *report.not_run])


def test_every_check_is_seen_to_fail() -> None:
    assert {name for _, failing, _ in BAD.values() for name in failing} == set(HOST_CHECKS)


def test_what_could_not_run_is_not_called_passed() -> None:
    report = check_host(tiny.PointNowhere)
    assert {check.name for check in report.checks if check.status is CheckStatus.PASSED} == {
        "builds",
        "deepcopy",
    }
    assert {check.hint for check in report.not_run} == {"'injection_points' failed"}


def test_a_causal_claim_that_no_input_tells_is_not_called_true() -> None:
    report = check_host(tiny.Words(), torch.zeros(2, 1, dtype=torch.long))
    assert report.verdict is ValidationVerdict.INCOMPLETE
    (unseen,) = report.not_run
    assert unseen.name == "causal_claim"
    assert "2 positions or more" in unseen.hint


def test_one_value_alone_is_enough_to_see_a_host_look_ahead() -> None:
    example = torch.full((2, 6), 3)
    assert check_host(tiny.Words(), example).verdict is ValidationVerdict.PASSED
    assert [c.name for c in check_host(tiny.Words(looks_ahead=True), example).failures] == ["causal_claim"]


def test_the_host_and_the_program_are_left_as_they_were() -> None:
    host = tiny.Images()
    host.norm.eval()
    host.stem.weight.grad = torch.ones_like(host.stem.weight)
    twin = copy.deepcopy(host)
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate()
    with torch.no_grad():
        check_host(host).raise_if_failed()
        assert not torch.is_grad_enabled()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert [m.training for m in host.modules()] == [m.training for m in twin.modules()]
    for (name, tensor), other in zip(host.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert torch.equal(host.stem.weight.grad, torch.ones_like(host.stem.weight))
    assert not any(module._forward_hooks for module in host.modules())


def test_a_host_that_is_in_a_model_already_is_refused() -> None:
    host = CNNHost()
    model = MorphogeneticModel(host)
    report = check_host(host)
    assert [check.name for check in report.failures] == ["attaches"]
    assert "already has a slot" in report.failure_message
    assert model.slots["block2"].stage.name == "DORMANT"


def test_an_id_that_nobody_offers_is_answered_with_a_near_one() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'cnn'"):
        check_host("cnm:cnn")
    with pytest.raises(UnknownNameError, match="write 'pack:name'"):
        check_host("cnn")


def test_an_id_of_a_pack_that_cannot_be_used_raises_its_cause(kasmina_fake_distribution: Any) -> None:
    kasmina_fake_distribution(
        "fake-broken", {"broken": "fake_broken"}, {"fake_broken": "import no_such_thing"}
    )
    with pytest.raises(PluginError, match="no_such_thing"):
        check_host("broken:net")


def test_a_report_is_plain_data_and_readable_text() -> None:
    report = check_host(lambda: tiny.Words(looks_ahead=True))
    data = report.to_dict()
    assert (data["verdict"], data["device"]) == ("failed", "cpu")
    assert [check["name"] for check in data["checks"]] == list(HOST_CHECKS)
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(HOST_CHECKS)
    assert lines[1].split()[:2] == ["passed", "builds"]
    assert lines[-1].split()[:2] == ["failed", "causal_claim"]


class CausalSignal(nn.Module):
    """A convolution over time ``(b, c, t)`` that sees no later position, or with ``ahead=True`` the next one."""

    def __init__(self, layout: str, *, ahead: bool = False) -> None:
        super().__init__()
        self.layout, self.ahead = layout, ahead
        self.conv = nn.Conv1d(2, 3, 3)
        self.features = nn.Identity()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        there = [Topology.SIGNAL.axes.index(axis) for axis in self.layout]
        held = self.conv(F.pad(x, (1, 1) if self.ahead else (2, 0))).permute(there).contiguous()
        held = self.features(held).permute(Topology.SIGNAL.order(self.layout))
        return self.head(held.mT)


@pytest.mark.parametrize("layout", ["bct", "tbc"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_signal_that_looks_ahead_is_found_in_each_layout(layout: str, ahead: bool) -> None:
    point = InjectionPoint("features", "features", 3, Topology.SIGNAL, causal=True, layout=layout)
    example = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    report = check_host(CausalSignal(layout, ahead=ahead), slots=[point], example=example)
    assert [check.name for check in report.failures] == ["causal_claim"] * ahead


@pytest.mark.parametrize(
    ("causal", "failing"),
    [
        (None, []),
        (False, []),
        ({"head": False}, []),
        ({"head": True}, ["causal_claim"]),
        (True, ["causal_claim"]),
    ],
)
def test_points_given_by_path_are_as_causal_as_is_said_of_their_tower(
    causal: Any, failing: list[str]
) -> None:
    report = check_host(lambda: tiny.Words(looks_ahead=True), slots=["head"], causal=causal)
    assert [check.name for check in report.failures] == failing, str(report)
