"""A deliberately bad blueprint for every check: it fails that check, and no other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from kasmina_core import (
    WHOLE_SEQUENCES,
    BlueprintSpec,
    CheckResult,
    CheckStatus,
    SeedContext,
    Topology,
    ValidationReport,
    ValidationVerdict,
    check_blueprint_spec,
)
from kasmina_core.checks.blueprints import CHECK_NAMES
from kasmina_core.checks.devices import IDENTITY_TOLERANCE


class Scaled(nn.Module):
    """A weight a channel that starts at zero, and what to compute with it."""

    def __init__(self, dim: int, compute: Callable[[Scaled, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.compute = compute
        self.weight = nn.Parameter(torch.zeros(dim, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x) if self.compute is not None else x * (1 + self.weight)


def good(m: Scaled, x: Tensor) -> Any:
    return x * (1 + m.weight)


def crops_odd_widths(m: Scaled, x: Tensor) -> Any:
    return good(m, x)[..., : x.shape[-1] // 2 * 2]


def returns_doubles(m: Scaled, x: Tensor) -> Any:
    return good(m, x).double() if x.dtype is torch.float32 else good(m, x)


def is_infinite_at_width_7(m: Scaled, x: Tensor) -> Any:
    return good(m, x) + (float("inf") if m.dim == 7 else 0)


def writes_to_its_input(m: Scaled, x: Tensor) -> Any:
    return good(m, x.mul_(1.01))


def draws(m: Scaled, x: Tensor) -> Any:
    return good(m, x) + 0 * torch.rand(1, device=x.device, dtype=x.dtype)


def squares_a_zero(m: Scaled, x: Tensor) -> Any:
    return x + m.weight**2


def detaches_its_input(m: Scaled, x: Tensor) -> Any:
    return good(m, x.detach())


def doubles(m: Scaled, x: Tensor) -> Any:
    return good(m, 2 * x)


def looks_at_other_samples(m: Scaled, x: Tensor) -> Any:
    return x + m.weight * x.mean(0, keepdim=True)


def adds_single_precision(m: Scaled, x: Tensor) -> Any:
    return good(m, x) + torch.zeros(x.shape[-1], device=x.device)


def copies_into_the_input_dtype(m: Scaled, x: Tensor) -> Any:
    y = nn.functional.linear(x, torch.eye(x.shape[-1], device=x.device, dtype=x.dtype))
    rows = torch.arange(len(x), device=x.device)
    return good(m, x) + 0 * torch.zeros_like(x).index_copy_(0, rows, y)


def returns_contiguous_features(m: Scaled, x: Tensor) -> Any:
    return good(m, x.contiguous())


def misreads_channels_last(m: Scaled, x: Tensor) -> Any:
    _, c, h, w = x.shape
    y = torch.as_strided(x, x.shape, (c * h * w, h * w, w, 1))
    return good(m, y.contiguous(memory_format=torch.channels_last) if h * w > 1 else y) + 0 * x


def reads_the_mode(m: Scaled, x: Tensor) -> Any:
    return good(m, x) if m.training else x * (1 + 2 * m.weight)


def adds_its_own_gain(m: Any, x: Tensor) -> Any:
    return x * (1 + m.weight + m.gain)


class HiddenGain(Scaled):
    """A drawn number that no state dict has."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, adds_its_own_gain)
        self.gain = 0.1 * float(torch.rand(()))


class Unpicklable(Scaled):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.unused = lambda: None


class Uncopied(Scaled):
    def __deepcopy__(self, memo: Any) -> Uncopied:
        return self


class Short(nn.Module):
    """A position for each of 20 places of a sequence."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(20, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position[: x.shape[1]]


class LooksBack(nn.Module):
    """Adds the position before, and says nothing of padding."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, context: SeedContext = WHOLE_SEQUENCES) -> Tensor:
        return x + self.weight * (x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class HeedsPadding(LooksBack):
    def forward(self, x: Tensor, context: SeedContext = WHOLE_SEQUENCES) -> Tensor:
        real = x if context.real is None else x * context.real[..., None]
        return x + self.weight * (real + nn.functional.pad(real, (0, 0, 1, 0))[:, :-1])


class HeedsDocuments(LooksBack):
    def forward(self, x: Tensor, context: SeedContext = WHOLE_SEQUENCES) -> Tensor:
        seen = context.visible(x, causal=True)
        before = nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        if seen is not None and not context.past:
            before = before * nn.functional.pad(seen[:, 0].diagonal(-1, 1, 2), (1, 0))[..., None]
        return x + self.weight * (x + before)


class Causal(Scaled):
    def __init__(self, dim: int, causal: bool = False) -> None:
        super().__init__(dim)


def of(compute: Callable[[Scaled, Tensor], Any]) -> Callable[[int], nn.Module]:
    return lambda dim: Scaled(dim, compute)


def only_eights(dim: int) -> nn.Module:
    if dim % 8:
        raise ValueError("a width that eight divides")
    return Scaled(dim)


def with_pythons_numbers(dim: int) -> nn.Module:
    random.random()
    return Scaled(dim)


def with_numpys_numbers(dim: int) -> nn.Module:
    numpy.random.rand()
    return Scaled(dim)


SHARED: dict[int, nn.Parameter] = {}


def with_a_cached_parameter(dim: int) -> nn.Module:
    module = Scaled(dim)
    module.weight = SHARED.setdefault(dim, module.weight)
    return module


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "an option that is passed already": (
        "declaration",
        {"factory": Causal, "takes_causal": True, "options": {"causal": False}},
        "takes_causal=True passes it already",
    ),
    "an option that a checkpoint cannot hold": (
        "declaration",
        {"factory": lambda dim, kind=None: Scaled(dim), "options": {"kind": Topology.CNN}},
        "plain data",
    ),
    "a description that is no text": ("declaration", {"description": 3}, "expected: text"),
    "a width refused without a reason": (
        "accepts_width",
        {"accepts_width": lambda dim: "" if dim == 24 else None},
        "the reason as text",
    ),
    "a width that cannot be built": ("factory", {"factory": only_eights}, "dim=7"),
    "a factory that is not there": (
        "factory",
        {"factory": "test_checks_bad_blueprints:Nobody"},
        "names a factory that cannot be imported",
    ),
    "an option that the factory does not take": ("options", {"options": {"gian": 1}}, "gian"),
    "Python's random numbers": (
        "global_state",
        {"factory": with_pythons_numbers},
        "random numbers of Python moved",
    ),
    "numpy's random numbers": (
        "global_state",
        {"factory": with_numpys_numbers},
        "random numbers of numpy moved",
    ),
    "a wrong size": (
        "param_estimate",
        {"param_estimate": lambda dim: dim + 1},
        "declared:   65 parameters at dim=64",
    ),
    "a cached parameter": ("independent_builds", {"factory": with_a_cached_parameter}, "measured: weight"),
    "mixing that is not said": (
        "positions",
        {"topology": Topology.TRANSFORMER, "factory": LooksBack},
        "mixes positions and does not say so",
    ),
    "padding that is looked at": (
        "positions",
        {"topology": Topology.TRANSFORMER, "factory": LooksBack, "mixes": "positions"},
        "padded to 7 on the left differ",
    ),
    "documents that are looked at": (
        "positions",
        {"topology": Topology.TRANSFORMER, "factory": HeedsPadding, "mixes": "positions"},
        "does not heed documents",
    ),
    "a cache that is not kept": (
        "positions",
        {"topology": Topology.TRANSFORMER, "factory": HeedsDocuments, "mixes": "positions"},
        "does not heed cached positions",
    ),
    "another shape": ("output_shape", {"factory": of(crops_odd_widths)}, "measured: (1, 64, 7, 4)"),
    "another dtype": ("output_dtype", {"factory": of(returns_doubles)}, "torch.float64"),
    "infinity": ("output_finite", {"factory": of(is_infinite_at_width_7)}, "dim=7"),
    "writing to the input": ("input_unchanged", {"factory": of(writes_to_its_input)}, "1 in-place writes"),
    "drawing in forward": ("forward_draws_no_random_numbers", {"factory": of(draws)}, "dropout"),
    "a dead branch": ("gradient_at_birth", {"factory": of(squares_a_zero)}, "multiplies by zero"),
    "a wall": ("gradient_to_input", {"factory": of(detaches_its_input)}, "do not detach"),
    "far from the identity": (
        "identity_at_birth",
        {"factory": of(doubles)},
        f"measured: 1 of the input's RMS away\n  tolerance: {IDENTITY_TOLERANCE} of the input's RMS",
    ),
    "one sample for all": (
        "samples_apart",
        {"factory": of(looks_at_other_samples)},
        "lets one sample change another's features",
    ),
    "a longest sequence": (
        "shape_grid",
        {"topology": Topology.TRANSFORMER, "factory": Short, "param_estimate": lambda dim: 20 * dim},
        "input (3, 33, 64)",
    ),
    "single precision": ("other_dtypes", {"factory": of(adds_single_precision)}, "torch.bfloat16"),
    "two dtypes under autocast": ("autocast", {"factory": of(copies_into_the_input_dtype)}, "dtype"),
    "one memory format": ("channels_last", {"factory": of(returns_contiguous_features)}, "contiguous"),
    "misread memory": ("channels_last", {"factory": of(misreads_channels_last)}, "another memory format"),
    "reading the mode": ("eval_and_train", {"factory": of(reads_the_mode)}, "self.training"),
    "state outside the state dict": ("state_dict", {"factory": HiddenGain}, "not kept by its state_dict"),
    "a lambda": ("pickle", {"factory": Unpicklable}, "lambda"),
    "a copy that is no copy": ("deepcopy", {"factory": Uncopied}, "shares parameters"),
}


def spec(**changes: Any) -> BlueprintSpec:
    return BlueprintSpec(
        **{"name": "bad", "topology": Topology.CNN, "factory": Scaled, "param_estimate": lambda dim: dim}
        | changes
    )


def named(report: ValidationReport, name: str) -> list[CheckResult]:
    return [check for check in report.checks if check.name == name]


def test_the_good_one_passes_every_check() -> None:
    report = check_blueprint_spec(spec(), device="cpu")
    assert report.verdict is ValidationVerdict.PASSED, str(report)
    assert not report.missing


@pytest.mark.parametrize(("name", "changes", "told"), BAD.values(), ids=list(BAD))
def test_a_bad_blueprint_fails_its_check_and_no_other(name: str, changes: dict[str, Any], told: str) -> None:
    SHARED.clear()
    report = check_blueprint_spec(spec(**changes), device="cpu", origin="my-pack 1.0")
    assert {check.name for check in report.failures} == {name}, str(report)
    assert report.failure_message.startswith("Blueprint 'bad' from pack 'my-pack 1.0' ")
    assert told in report.failure_message


def test_there_is_a_bad_blueprint_for_every_check_that_can_fail() -> None:
    reports_only = {"param_count", "flops"}
    assert {name for name, _, _ in BAD.values()} == set(CHECK_NAMES) - reports_only


@pytest.mark.parametrize("case", ["a dead branch", "far from the identity", "a cached parameter", "a wall"])
def test_registration_sees_what_is_cheap_to_see(case: str) -> None:
    SHARED.clear()
    name, changes, _ = BAD[case]
    report = check_blueprint_spec(spec(**changes), device="cpu", full=False)
    assert {check.name for check in report.failures} == {name}


def test_what_registration_leaves_out_is_told_and_not_called_passed() -> None:
    report = check_blueprint_spec(spec(), device="cpu", full=False)
    assert report.verdict is ValidationVerdict.PASSED
    left = [c for c in report.not_run if c.device != "cuda"]
    assert {c.name for c in left} == {
        "shape_grid",
        "other_dtypes",
        "autocast",
        "channels_last",
        "eval_and_train",
        "state_dict",
        "pickle",
        "deepcopy",
        "flops",
    }
    assert all("kasmina plugins check" in c.hint and not c.needed for c in left)
    assert "shape_grid, other_dtypes, autocast" in str(report)


# -- how the full checks go about it ----------------------------------------------------------------------------------


def test_the_grid_runs_on_meta_and_says_so() -> None:
    (check,) = named(check_blueprint_spec(spec(), device="cpu"), "shape_grid")
    assert (check.status, check.device) == (CheckStatus.PASSED, "meta")
    assert "widths 64, 24, 7, 1, 2, 3, 5, 12, 33, 96" in check.measured


def reads_a_value(m: Scaled, x: Tensor) -> Any:
    return good(m, x) if float(x.detach().flatten()[0]) < 1e9 else x


def test_a_grid_that_cannot_run_on_meta_runs_on_the_cpu_and_says_why() -> None:
    (check,) = named(check_blueprint_spec(spec(factory=of(reads_a_value)), device="cpu"), "shape_grid")
    assert (check.status, check.device) == (CheckStatus.PASSED, "cpu")
    assert "not on meta: RuntimeError" in check.measured


def test_the_grid_keeps_to_the_widths_that_are_given_or_accepted() -> None:
    (given,) = named(check_blueprint_spec(spec(), device="cpu", widths=[4, 6]), "shape_grid")
    assert "widths 4, 6," in given.measured
    even = spec(accepts_width=lambda dim: None if dim % 2 == 0 else "odd")
    (accepted,) = named(check_blueprint_spec(even, device="cpu"), "shape_grid")
    assert "widths 64, 24, 32, 2, 12, 96," in accepted.measured


class Normed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.weight = nn.Parameter(torch.zeros(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.weight * self.norm(x)
        return y


def test_batch_norm_may_differ_between_the_modes() -> None:
    report = check_blueprint_spec(spec(factory=Normed, param_estimate=lambda dim: 3 * dim), device="cpu")
    assert report.verdict is ValidationVerdict.PASSED, str(report)
    (check,) = named(report, "eval_and_train")
    assert "outputs may differ by BatchNorm2d" in check.measured


class Dropping(Scaled):
    def __init__(self, dim: int, rate: float = 0.0) -> None:
        super().__init__(dim)
        self.dropout = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.dropout(x))


def test_dropout_of_nothing_is_no_excuse_for_other_outputs() -> None:
    (check,) = named(check_blueprint_spec(spec(factory=Dropping), device="cpu"), "eval_and_train")
    assert (check.status, check.measured) == (CheckStatus.PASSED, "equal outputs")
    dropping = spec(factory=lambda dim: Dropping(dim, 0.5))
    (check,) = named(check_blueprint_spec(dropping, device="cpu"), "eval_and_train")
    assert "Dropout" in check.measured


class Remembering(Scaled):
    """Keeps the features of its last pass, as part of a graph."""

    def forward(self, x: Tensor) -> Any:
        self.last = good(self, x)
        return self.last


def test_copies_are_made_of_a_module_that_has_been_trained() -> None:
    report = check_blueprint_spec(spec(factory=Remembering), device="cpu")
    assert {check.name for check in report.failures} == {"deepcopy"}


def test_operations_are_reported_with_the_input_and_the_counter() -> None:
    conv = spec(
        factory=lambda dim: nn.Sequential(Scaled(dim), nn.Conv2d(dim, dim, 3, padding=1, bias=False)),
        param_estimate=lambda dim: 9 * dim * dim + dim,
    )
    (check,) = named(check_blueprint_spec(conv, device="cpu"), "flops")
    assert check.measured == {"multiply_adds": 9 * 64 * 64 * 64, "counted_by": "fvcore"}
    assert check.where == "dim=64, input (1, 64, 8, 8)"


def test_operations_that_nobody_can_count_are_not_called_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: nn.Module, x: Tensor) -> None:
        raise RuntimeError("no counter today")

    monkeypatch.setattr("kasmina_core.checks.flops.count_flops", refuse)
    report = check_blueprint_spec(spec(), device="cpu")
    assert [(c.name, c.hint) for c in report.missing] == [
        ("flops", "nothing could count them: RuntimeError: no counter today")
    ]
    assert report.verdict is ValidationVerdict.INCOMPLETE


class Trap:
    """Is no tensor, and cannot even be looked at."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"do not ask for {name}")


def returns_a_trap(m: Scaled, x: Tensor) -> Any:
    return Trap()


def test_an_output_that_cannot_be_looked_at_is_a_failure_and_no_error_of_ours() -> None:
    report = check_blueprint_spec(spec(factory=of(returns_a_trap)), device="cpu")
    assert {check.name for check in report.failures} == {"output_shape"}


def test_a_module_that_can_be_built_only_a_few_times_is_incomplete_and_no_error() -> None:
    left = [5]

    def scarce(dim: int) -> nn.Module:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("sold out")
        return Scaled(dim)

    report = check_blueprint_spec(spec(factory=scarce), device="cpu")
    assert report.verdict is not ValidationVerdict.PASSED
    assert "sold out" in str(report)


def test_full_checks_leave_random_numbers_threads_and_dtype_alone() -> None:
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)
    torch.set_num_threads(2)
    before = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tobytes())
    try:
        check_blueprint_spec(spec(factory=Normed, param_estimate=lambda dim: 3 * dim), device="cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tobytes()) == before[1:]
    assert torch.get_default_dtype() is torch.float32


def test_modules_run_in_one_thread_so_that_no_pool_is_made_before_a_fork() -> None:
    seen: set[int] = set()

    def counting(m: Scaled, x: Tensor) -> Any:
        seen.add(torch.get_num_threads())
        return good(m, x)

    torch.set_num_threads(2)
    try:
        check_blueprint_spec(spec(factory=of(counting)), device="cpu", full=False)
    finally:
        torch.set_num_threads(1)
    assert seen == {1}


def test_a_foreign_seed_does_not_wait_for_cuda() -> None:
    torch.manual_seed(1234)

    def seeding(dim: int) -> nn.Module:
        torch.manual_seed(99)
        return Scaled(dim)

    report = check_blueprint_spec(spec(factory=seeding), device="cpu")
    assert {check.name for check in report.failures} == {"global_state"}
    assert torch.initial_seed() == 1234
    if not torch.cuda.is_initialized():
        queued = torch.cuda._lazy_seed_tracker.manual_seed_all_cb  # what CUDA would be seeded with
        assert queued is None or 1234 in [cell.cell_contents for cell in queued[0].__closure__]
