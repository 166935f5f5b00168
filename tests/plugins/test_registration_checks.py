"""What the registration checks measure, what they say, and that they never call passed what did not run."""

from __future__ import annotations

import importlib.util
import inspect
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_packs import run_python
from torch import Tensor, nn

from kasmina_core import (
    WHOLE_SEQUENCES,
    BlueprintError,
    BlueprintSpec,
    CheckResult,
    CheckStatus,
    SeedContext,
    Topology,
    ValidationReport,
    ValidationVerdict,
    check_blueprint_spec,
)
from kasmina_core.checks import blueprints
from kasmina_core.checks.devices import _backward, device_check_names
from kasmina_core.checks.global_state import preserved_global_state


class Scale(nn.Module):
    def __init__(self, dim: int, gain: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, 1, 1), gain))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight)


class Added(nn.Module):
    """The features plus layers, the last of which starts at zero."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


class Squeeze(Scale):
    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(super().forward(x), 1)
        return x + nn.functional.batch_norm(pooled, None, None, training=True)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.inner = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor, context: SeedContext = WHOLE_SEQUENCES) -> Tensor:
        every = context.with_past("features", x)
        seen = context.visible(x, causal=self.causal)
        if seen is None and self.causal:
            seen = x.new_ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
        mask = seen if seen is None else ~seen.expand(len(x), self.inner.num_heads, -1, -1).flatten(0, 1)
        return x + self.inner(x, every, every, attn_mask=mask)[0]


def spec(**changes: Any) -> BlueprintSpec:
    return BlueprintSpec(
        **{"name": "norm", "topology": Topology.CNN, "factory": Scale, "param_estimate": lambda dim: dim}
        | changes
    )


def forward_of(function: Callable[[nn.Parameter, Tensor], Any]) -> Callable[[int], nn.Module]:
    """Return the factory of a module with one weight a channel and the given forward."""

    class Module(Scale):
        def forward(self, x: Tensor) -> Any:
            return function(self.weight, x)

    return Module


def results(report: ValidationReport, name: str, device: str | None = None) -> list[CheckResult]:
    return [c for c in report.checks if c.name == name and (device is None or c.device == device)]


def failed(report: ValidationReport) -> set[str]:
    return {check.name for check in report.failures}


# -- size -----------------------------------------------------------------------------------------------------------


def test_a_wrong_number_is_told_with_both_values_and_the_line_to_paste() -> None:
    report = check_blueprint_spec(
        spec(factory=lambda dim: Added(nn.Conv2d(dim, dim, 1)), param_estimate=129, estimate_dim=64),
        origin="kasmina-cnn 0.1",
    )
    assert report.failure_message == (
        "Blueprint 'norm' from pack 'kasmina-cnn 0.1' does not have the size it declares.\n"
        "  declared:   129 parameters at dim=64\n"
        "  counted:  4,160 parameters at dim=64 (fvcore)\n"
        "  ratio:    32.25\n"
        "Set param_estimate=4160, or estimate_dim to the width you measured at."
    )
    with pytest.raises(BlueprintError, match="4,160"):
        report.raise_if_failed()


def test_a_wrong_function_is_answered_by_the_right_one() -> None:
    report = check_blueprint_spec(
        spec(
            factory=lambda dim: Added(nn.GroupNorm(1, dim), nn.Conv2d(dim, dim, 3, padding=1)),
            param_estimate=lambda dim: 9 * dim * dim,
        )
    )
    assert (
        report.failure_message.splitlines()[-1] == "Set param_estimate=lambda dim: 9 * dim * dim + 3 * dim."
    )


def test_a_size_that_no_formula_gives_is_answered_by_the_count() -> None:
    def lumpy(dim: int) -> nn.Module:
        module = Scale(dim)
        module.register_parameter("extra", nn.Parameter(torch.zeros(dim % 5)))
        return module

    report = check_blueprint_spec(spec(factory=lumpy, param_estimate=lambda dim: 1))
    assert report.failure_message.endswith("Set param_estimate=68, estimate_dim=64, or correct the function.")


def test_an_estimate_that_is_right_at_one_width_alone_fails() -> None:
    report = check_blueprint_spec(spec(param_estimate=lambda dim: 64))
    assert [(c.where, c.status) for c in results(report, "param_estimate")] == [
        ("dim=64", CheckStatus.PASSED),
        ("dim=24", CheckStatus.FAILED),
        ("dim=7", CheckStatus.FAILED),
    ]


def test_a_number_is_compared_at_its_own_width_and_counted_at_others() -> None:
    report = check_blueprint_spec(spec(param_estimate=48, estimate_dim=48))
    assert [(c.where, c.expected, c.measured) for c in results(report, "param_estimate")] == [
        ("dim=48", 48, 48)
    ]
    assert [(c.where, c.measured) for c in results(report, "param_count")] == [("dim=64", 64), ("dim=24", 24)]
    assert report.verdict is ValidationVerdict.PASSED


def test_shared_weights_count_once() -> None:
    def tied(dim: int) -> nn.Module:
        one = Scale(dim)
        return nn.Sequential(one, one)

    assert check_blueprint_spec(spec(factory=tied)).verdict is ValidationVerdict.PASSED


# -- widths ---------------------------------------------------------------------------------------------------------


def by_eight(dim: int) -> str | None:
    return None if dim % 8 == 0 else "it has groups of 8"


def test_only_accepted_widths_are_used() -> None:
    seen: list[int] = []

    def factory(dim: int) -> nn.Module:
        seen.append(dim)
        return Added(nn.GroupNorm(8, dim), nn.Conv2d(dim, dim, 1, groups=dim, bias=False))

    report = check_blueprint_spec(
        spec(factory=factory, accepts_width=by_eight, param_estimate=lambda dim: 3 * dim)
    )
    assert report.verdict is ValidationVerdict.PASSED
    assert list(dict.fromkeys(seen))[:3] == [64, 24, 32]
    assert all(dim % 8 == 0 for dim in seen)


def test_a_width_that_is_accepted_and_cannot_be_built_fails() -> None:
    report = check_blueprint_spec(
        spec(factory=lambda dim: nn.GroupNorm(8, dim), param_estimate=lambda dim: 2 * dim)
    )
    assert failed(report) == {"factory"}
    assert "dim=7" in report.failure_message
    assert "accepts_width" in report.failure_message


def test_given_widths_are_used_all() -> None:
    report = check_blueprint_spec(spec(), widths=[1, 2, 3, 5, 8])
    assert [c.where for c in results(report, "param_estimate")] == [f"dim={d}" for d in (1, 2, 3, 5, 8)]


def test_one_accepted_width_is_incomplete_and_not_passed() -> None:
    report = check_blueprint_spec(spec(accepts_width=lambda dim: None if dim == 10 else "only 10"))
    assert report.verdict is ValidationVerdict.INCOMPLETE
    assert ("param_estimate", "only one width could be counted, and two are asked for") in [
        (c.name, c.hint) for c in report.not_run
    ]


def test_a_blueprint_that_accepts_nothing_is_incomplete_and_nothing_passed() -> None:
    report = check_blueprint_spec(spec(accepts_width=lambda dim: "no"))
    assert report.verdict is ValidationVerdict.INCOMPLETE
    assert {c.name for c in report.checks if c.status is not CheckStatus.NOT_RUN} == {"declaration"}
    assert report.devices == ()


@pytest.mark.parametrize(
    ("accepts", "found"),
    [
        (lambda dim: dim % 4 == 0, "True"),
        (lambda dim: "", "''"),
        (lambda dim: 1 // 0, "ZeroDivisionError"),
    ],
)
def test_an_accepts_width_that_gives_no_reason_fails(accepts: Any, found: str) -> None:
    report = check_blueprint_spec(spec(accepts_width=accepts))
    assert failed(report) == {"accepts_width"}
    assert found in report.failure_message


def test_an_estimate_counted_at_a_refused_width_fails() -> None:
    report = check_blueprint_spec(spec(accepts_width=by_eight, param_estimate=60, estimate_dim=60))
    assert "accepts_width" in failed(report)
    assert "refuses the width its size was counted at" in report.failure_message


# -- behaviour ------------------------------------------------------------------------------------------------------


def test_a_causal_blueprint_with_options_passes_in_both_forms() -> None:
    built: list[dict[str, Any]] = []

    def factory(dim: int, **options: Any) -> nn.Module:
        built.append({"dim": dim} | options)
        return Attention(dim, **options)

    report = check_blueprint_spec(
        spec(
            topology=Topology.TRANSFORMER,
            factory=factory,
            param_estimate=lambda dim: 4 * dim * dim + 4 * dim,
            takes_causal=True,
            mixes="positions",
            options={"heads": 4},
            accepts_width=lambda dim: None if dim % 4 == 0 else "it has 4 heads",
        )
    )
    assert report.verdict is ValidationVerdict.PASSED, report
    assert {"dim": 64, "causal": True} in built
    assert {"dim": 64, "causal": False, "heads": 4} in built


def test_options_that_the_factory_does_not_take_fail() -> None:
    report = check_blueprint_spec(spec(options={"gian": 0.0}))
    assert failed(report) == {"options"}
    assert "gian" in report.failure_message
    assert check_blueprint_spec(spec(options={"gain": 0.0})).verdict is ValidationVerdict.PASSED


MISBEHAVIOUR = {
    "shape": (forward_of(lambda w, x: (x * (1 + w))[:, :1]), "output_shape", "(2, 1, 8, 8)"),
    "shape of odd sizes": (
        lambda dim: nn.Sequential(
            nn.Conv2d(dim, dim, 1, bias=False, groups=dim), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        ),
        "output_shape",
        "(1, 64, 6, 4)",
    ),
    "batch of one": (
        lambda dim: Squeeze(dim),
        "output_shape",
        "Expected more than 1 value per channel",
    ),
    "eval mode": (
        lambda dim: nn.ModuleList([Scale(dim)]),
        "output_shape",
        "does not run",
    ),
    "no tensor": (forward_of(lambda w, x: [x * w]), "output_shape", "list"),
    "dtype": (forward_of(lambda w, x: (x * (1 + w)).double()), "output_dtype", "torch.float64"),
    "infinity": (forward_of(lambda w, x: x * (1 + w) / w.detach()), "output_finite", "NaN or infinity"),
    "writes to its input": (forward_of(lambda w, x: x.add_(1) * (1 + w)), "input_unchanged", "in-place"),
    "draws": (
        forward_of(lambda w, x: nn.functional.dropout(x * (1 + w), 0.1)),
        "forward_draws_no_random_numbers",
        "dropout",
    ),
    "dead branch": (forward_of(lambda w, x: x + w * w), "gradient_at_birth", "measured: 0\n"),
    "detached": (forward_of(lambda w, x: (x * (1 + w)).detach()), "gradient_at_birth", "no parameter"),
    "identity": (forward_of(lambda w, x: x), "gradient_at_birth", "depends on no parameter"),
    "infinite gradient": (
        forward_of(lambda w, x: x + w.abs().sqrt() * x),
        "gradient_at_birth",
        "not finite",
    ),
}


@pytest.mark.parametrize(("factory", "name", "found"), MISBEHAVIOUR.values(), ids=list(MISBEHAVIOUR))
def test_misbehaviour_fails_the_check_that_is_named_for_it(factory: Any, name: str, found: str) -> None:
    report = check_blueprint_spec(spec(factory=factory), device="cpu")
    assert name in failed(report)
    assert found in "\n".join(check.explain("It") for check in results(report, name))


def test_a_module_without_parameters_cannot_be_a_seed() -> None:
    report = check_blueprint_spec(spec(factory=lambda dim: nn.Identity(), param_estimate=lambda dim: 0))
    assert failed(report) == {"gradient_at_birth"}
    assert "no trainable parameter" in report.failure_message


def test_lazy_parameters_are_refused() -> None:
    report = check_blueprint_spec(spec(factory=lambda dim: nn.LazyConv2d(dim, 1)))
    assert failed(report) == {"factory"}
    assert "lazy" in report.failure_message


def test_a_zero_initialised_last_layer_has_a_gradient_at_birth() -> None:
    report = check_blueprint_spec(spec())
    (check,) = results(report, "gradient_at_birth", "cpu")
    assert (check.status, check.measured) == (CheckStatus.PASSED, "6 inputs")


def test_the_cause_comes_before_its_consequences() -> None:
    report = check_blueprint_spec(spec(factory=lambda dim: 1 / 0))
    assert [c.name for c in report.failures] == ["factory"]
    assert isinstance(report.failures[0].error, ZeroDivisionError)
    with pytest.raises(BlueprintError) as caught:
        report.raise_if_failed()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert {c.name: c.status for c in report.checks}["output_shape"] is CheckStatus.NOT_RUN


# -- global state ---------------------------------------------------------------------------------------------------

SETTINGS = {
    "default dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "number of threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "gradient mode": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
    "default device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "deterministic mode": (
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.use_deterministic_algorithms(True),
    ),
    "seed of the random numbers": (torch.initial_seed, lambda: torch.manual_seed(1)),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("where", ["factory", "forward"])
def test_a_blueprint_that_changes_a_setting_fails_and_the_setting_is_put_back(name: str, where: str) -> None:
    read, change = SETTINGS[name]

    class Meddler(Scale):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            if where == "factory":
                change()

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if where == "forward":
                change()
            return y

    before = read()
    report = check_blueprint_spec(spec(factory=Meddler), device="cpu")
    assert read() == before
    # The class is a local one, and seeding moves the generator.
    assert failed(report) - {"forward_draws_no_random_numbers"} == {"global_state", "pickle"}
    (check,) = results(report, "global_state")
    assert check.status is CheckStatus.FAILED
    assert list(check.measured) == [name]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_settings_change_no_verdict_and_are_kept(context: Any) -> None:
    generator = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with context(), torch.autocast("cpu", dtype=torch.bfloat16):
            report = check_blueprint_spec(
                spec(
                    factory=lambda dim: Added(nn.Conv2d(dim, dim, 1)),
                    param_estimate=lambda dim: dim * dim + dim,
                ),
                device="cpu",
            )
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert report.verdict is ValidationVerdict.PASSED, report
    assert torch.equal(torch.get_rng_state(), generator)


def test_state_is_put_back_when_the_block_raises() -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()

    def meddle() -> None:
        torch.rand(3)
        torch.set_num_threads(threads + 1)
        raise RuntimeError

    with pytest.raises(RuntimeError), preserved_global_state():
        meddle()
    assert (torch.equal(torch.get_rng_state(), before), torch.get_num_threads()) == (True, threads)


def test_two_runs_give_the_same_report() -> None:
    torch.manual_seed(1)
    first = check_blueprint_spec(spec())
    torch.manual_seed(2)
    assert check_blueprint_spec(spec()) == first


# -- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def touched(*_: object) -> None:
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)


@pytest.mark.usefixtures("no_cuda")
def test_without_cuda_the_report_says_cpu_and_lists_the_cuda_checks_as_not_run() -> None:
    report = check_blueprint_spec(spec())
    assert report.verdict is ValidationVerdict.PASSED
    assert report.devices == ("cpu",)
    assert {c.name for c in report.not_run} == set(device_check_names(Topology.CNN, full=True))
    assert {(c.device, c.hint) for c in report.not_run} == {("cuda", "this machine has no CUDA device")}
    assert "passed on cpu" in str(report)
    assert "not run  output_shape on cuda" in str(report)


@pytest.mark.usefixtures("no_cuda")
def test_asking_for_cuda_where_there_is_none_is_incomplete() -> None:
    report = check_blueprint_spec(spec(), device="cuda")
    assert report.verdict is ValidationVerdict.INCOMPLETE
    assert report.devices == ()
    assert not [c for c in report.checks if c.device and c.status is CheckStatus.PASSED]
    assert {c.hint for c in report.not_run if c.device == "cpu"} == {"not asked for"}


@pytest.mark.parametrize("full", [False, True])
def test_on_the_cpu_cuda_is_not_even_asked_for(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("asking whether there is a CUDA device spoils a later fork")

    for name in ("is_available", "device_count", "current_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, asked)
    assert check_blueprint_spec(spec(), device="cpu", full=full).verdict is ValidationVerdict.PASSED


def test_without_fvcore_the_size_is_not_called_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    blueprints._parameter_count.cache_clear()
    report = check_blueprint_spec(spec())
    assert report.verdict is ValidationVerdict.INCOMPLETE
    assert [(c.status, c.hint) for c in results(report, "param_estimate")] == [
        (CheckStatus.NOT_RUN, "fvcore cannot be imported: no module fvcore.nn.parameter_count")
    ]


def test_the_size_is_counted_by_fvcores_own_function() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")  # fvcore calls it on import
        from fvcore.nn import parameter_count
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"one": shared, "again": shared, "other": nn.Conv2d(2, 5, 3)})
    assert blueprints._parameter_count()(model) == parameter_count(model)
    assert inspect.getsource(blueprints._parameter_count()) == inspect.getsource(parameter_count)


def test_too_little_memory_is_no_failure_of_the_blueprint() -> None:
    def out_of_memory(weight: nn.Parameter, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    report = check_blueprint_spec(spec(factory=forward_of(out_of_memory)), device="cpu")
    assert report.verdict is ValidationVerdict.INCOMPLETE
    assert "too little memory" in results(report, "output_shape", "cpu")[0].hint


@pytest.mark.parametrize("changes", [{}, {"param_estimate": lambda dim: 1}, {"factory": lambda dim: 1 / 0}])
def test_a_report_is_plain_data(changes: dict[str, Any]) -> None:
    report = check_blueprint_spec(spec(**changes), origin="my-dist 1.0")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["verdict"] == report.verdict.value
    assert len(data["checks"]) == len(report.checks)
    assert set(data["checks"][0]) == {
        "name",
        "status",
        "device",
        "where",
        "expected",
        "measured",
        "tolerance",
        "hint",
        "claim",
        "needed",
    }


def test_importing_the_checks_imports_neither_torch_nor_fvcore() -> None:
    done = run_python(
        "import sys, kasmina_core.checks.blueprints\nprint([m for m in ('torch', 'fvcore') if m in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_checks_run_where_warnings_are_errors() -> None:
    done = run_python(
        "import torch\nfrom kasmina_core import *\n"
        "def factory(dim):\n"
        "    layer = torch.nn.Conv2d(dim, dim, 1, bias=False)\n"
        "    torch.nn.init.dirac_(layer.weight)\n"
        "    return layer\n"
        "r = check_blueprint_spec(BlueprintSpec('c', Topology.CNN, factory, lambda d: d * d))\n"
        "print(r.verdict.value)"
    )
    assert done.stdout == "passed\n", done.stderr


def test_loading_the_installed_packs_does_not_import_sympy() -> None:
    done = run_python(
        "import sys, torch\n"
        "from kasmina_core import default_registry\n"
        "assert default_registry().report('cnn:norm').verdict.value == 'passed'\n"
        "print('sympy' in sys.modules)"
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_the_cotangent_of_the_checks_is_the_gradient_bit_for_bit(dtype: torch.dtype) -> None:
    leaf = torch.randn(2, 3, 5).to(dtype).requires_grad_()
    cotangent = torch.randn(2, 3, 5).to(dtype)
    _backward(leaf.clone(), cotangent)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, cotangent)
