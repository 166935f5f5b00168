"""The registration checks on a CUDA device; their CPU half is in test_registration_checks.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kasmina_core import BlueprintSpec, Topology, ValidationVerdict, check_blueprint_spec
from kasmina_core.checks.devices import device_check_names

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Identity(nn.Conv2d):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 1, bias=False)
        nn.init.dirac_(self.weight)


class Pinned(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 1, 1))
        self.shift = torch.zeros(dim, 1, 1)  # no buffer: it stays where it was made

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight) + self.shift.to(x.dtype)


class Drawing(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(1, device=x.device, dtype=x.dtype) if x.is_cuda else 0.0
        return x * (1 + self.weight) + 0 * noise


def test_with_cuda_the_checks_run_on_cpu_and_cuda_and_leave_its_random_numbers() -> None:
    torch.cuda.init()
    before = torch.cuda.get_rng_state()
    spec = BlueprintSpec("c", Topology.CNN, Identity, lambda dim: dim * dim)
    report = check_blueprint_spec(spec)
    assert report.verdict is ValidationVerdict.PASSED, report
    assert report.devices == ("cpu", f"cuda:{torch.cuda.current_device()}")
    assert report.not_run == ()
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_what_works_on_the_cpu_alone_fails() -> None:
    report = check_blueprint_spec(BlueprintSpec("pinned", Topology.CNN, Pinned, lambda dim: dim))
    assert report.verdict is ValidationVerdict.FAILED
    assert {c.device.partition(":")[0] for c in report.failures} == {"cuda"}


def test_random_numbers_drawn_on_the_device_are_seen() -> None:
    report = check_blueprint_spec(BlueprintSpec("drawing", Topology.CNN, Drawing, lambda dim: dim))
    assert [c.name for c in report.failures] == ["forward_draws_no_random_numbers"]


def test_the_full_checks_pass_on_both_devices() -> None:
    report = check_blueprint_spec(BlueprintSpec("c", Topology.CNN, Identity, lambda dim: dim * dim))
    assert report.verdict is ValidationVerdict.PASSED, str(report)
    ran = {check.name for check in report.checks if check.device.startswith("cuda")}
    assert set(device_check_names(Topology.CNN, full=True)) <= ran


def test_single_precision_is_seen_under_half() -> None:
    class Single(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(dim, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x * (1 + self.weight)
            return y.float() if x.dtype is torch.float16 else y

    report = check_blueprint_spec(
        BlueprintSpec("single", Topology.CNN, Single, lambda dim: dim), device="cuda"
    )
    assert "other_dtypes" in {check.name for check in report.failures}
