"""What is true of every seed in the pack."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import kasmina_sequence
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_cases import (
    DTYPES,
    SOME_WIDTHS,
    SPECS,
    every_blueprint,
    features,
    grown,
    newborn,
)
from torch import nn

from kasmina_core import BlueprintError, BlueprintRegistry, BlueprintSpec, Topology
from kasmina_core.testing import parametrize_blueprints


@parametrize_blueprints(kasmina_sequence)
def test_registration_check(blueprint: BlueprintSpec, check: Callable[[BlueprintSpec], None]) -> None:
    check(blueprint)


# Sizes


@every_blueprint
def test_declared_size_is_the_counted_size_at_every_width(spec: BlueprintSpec) -> None:
    factory = spec.load_factory()
    for dim in (*range(2, 97), 127, 128, 129, 1024):
        with torch.device("meta"):
            counted = sum(parameter.numel() for parameter in factory(dim).parameters())
        assert spec.declared_params(dim) == counted, f"width {dim}"


@every_blueprint
def test_no_buffers_whose_state_could_drift(spec: BlueprintSpec) -> None:
    assert list(newborn(spec, 8).buffers()) == []


# Shapes, dtypes, numbers


@every_blueprint
@settings(max_examples=30)
@given(
    dim=st.integers(2, 48),
    batch=st.integers(1, 3),
    length=st.integers(1, 17),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1000.0]),
    causal=st.booleans(),
)
def test_keeps_shape_and_dtype_and_stays_finite(
    spec: BlueprintSpec, dim: int, batch: int, length: int, dtype: torch.dtype, scale: float, causal: bool
) -> None:
    options = {"causal": causal} if spec.takes_causal else {}
    seed = grown(spec, dim, **options).to(dtype)
    x = (scale * features(dim, batch, length)).to(dtype).requires_grad_()
    y = seed(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert y.isfinite().all()
    (y.float() * features(dim, batch, length, seed=4)).mean().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in seed.parameters())


@every_blueprint
def test_one_position_is_enough(spec: BlueprintSpec) -> None:
    for dim in SOME_WIDTHS:
        y = grown(spec, dim).train()(features(dim, batch=1, length=1))
        assert y.isfinite().all(), f"width {dim}"


@every_blueprint
def test_works_without_memory_on_the_meta_device(spec: BlueprintSpec) -> None:
    x = features(12).to("meta")
    with torch.device("meta"):
        y = spec.load_factory()(12)(x)
    assert (y.shape, y.device.type) == (x.shape, "meta")


@every_blueprint
def test_takes_features_that_are_not_contiguous(spec: BlueprintSpec) -> None:
    seed, x = grown(spec, 8), features(8)
    torch.testing.assert_close(seed(x.transpose(0, 1).contiguous().transpose(0, 1)), seed(x))


@every_blueprint
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_under_autocast(spec: BlueprintSpec, dtype: torch.dtype) -> None:
    seed, x = grown(spec, 8, std=0.1), features(8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = seed(x)
    torch.testing.assert_close(y.float(), seed(x.float()), atol=0.1, rtol=0.05)


@every_blueprint
def test_samples_of_a_batch_do_not_mix(spec: BlueprintSpec) -> None:
    seed, x = grown(spec, 8), features(8)
    torch.testing.assert_close(seed(x)[:1], seed(x[:1]))


@every_blueprint
def test_compiles_to_one_graph(spec: BlueprintSpec) -> None:
    seed, x = grown(spec, 8), features(8)
    compiled = torch.compile(seed, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), seed(x))


# Birth and learning


@every_blueprint
def test_is_the_identity_at_birth(spec: BlueprintSpec) -> None:
    for dim in SOME_WIDTHS:
        for dtype in DTYPES:
            x = features(dim).to(dtype)
            assert torch.equal(newborn(spec, dim).to(dtype)(x), x), f"width {dim}, {dtype}"


@every_blueprint
def test_no_parameter_is_dead_after_three_plain_sgd_steps(spec: BlueprintSpec) -> None:
    for dim in SOME_WIDTHS:
        seed = newborn(spec, dim)
        x = features(dim)
        target = x + 0.5 * features(dim, seed=3)
        optimizer = torch.optim.SGD(seed.parameters(), lr=0.1)
        largest = {name: 0.0 for name, _ in seed.named_parameters()}
        for step in range(3):
            optimizer.zero_grad()
            F.mse_loss(seed(x), target).backward()
            for name, parameter in seed.named_parameters():
                assert parameter.grad is not None, f"{name} at width {dim}"
                largest[name] = max(largest[name], parameter.grad.abs().max().item())
            if step == 0:
                assert max(largest.values()) > 1e-4, f"no gradient at birth at width {dim}"
            optimizer.step()
        assert min(largest.values()) > 1e-9, f"width {dim}: {largest}"


@every_blueprint
def test_learns_what_a_grown_seed_of_its_kind_does(spec: BlueprintSpec) -> None:
    x = features(8, batch=8)
    assert _fit(newborn(spec, 8), x, grown(spec, 8, seed=9)(x).detach()) < 0.5


@pytest.mark.parametrize("name", ["moe", "rmsnorm_adapter", "swiglu"])
def test_position_wise_seeds_learn_a_product_of_two_features(name: str) -> None:
    x = features(8, batch=8)
    assert _fit(newborn(SPECS[name], 8), x, x + x[..., :1] * x[..., 1:2]) < 0.5


def test_gau_learns_to_average_the_past() -> None:
    x = features(8, batch=8)
    past = x.cumsum(1) / torch.arange(1, 13).view(1, -1, 1)
    assert _fit(newborn(SPECS["gau"], 8, causal=True), x, x + past) < 0.5


def _fit(seed: nn.Module, x: torch.Tensor, target: torch.Tensor) -> float:
    """Train for 60 steps, and return the last loss as a part of the first."""
    optimizer = torch.optim.Adam(seed.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(seed(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


# No side effects


@every_blueprint
def test_forward_draws_no_random_number_and_leaves_its_input(spec: BlueprintSpec) -> None:
    seed, x = grown(spec, 8), features(8)
    before, state = x.clone(), torch.get_rng_state()
    y = seed(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert x._version == 0
    assert y.data_ptr() != x.data_ptr()


@every_blueprint
def test_gives_the_same_result_in_training_and_evaluation(spec: BlueprintSpec) -> None:
    seed, x = grown(spec, 8), features(8)
    assert torch.equal(seed.train()(x), seed.eval()(x))


@every_blueprint
def test_copies_pickles_and_reloads_exactly(spec: BlueprintSpec) -> None:
    seed, x = grown(spec, 8), features(8)
    reloaded = newborn(spec, 8, seed=5)
    reloaded.load_state_dict(seed.state_dict())
    for twin in (copy.deepcopy(seed), pickle.loads(pickle.dumps(seed)), reloaded):
        assert torch.equal(twin(x), seed(x))


# Declarations


@every_blueprint
def test_declaration_pickles(spec: BlueprintSpec) -> None:
    assert pickle.loads(pickle.dumps(spec)) == spec


@every_blueprint
def test_declared_options_are_those_of_the_factory(spec: BlueprintSpec) -> None:
    signature = inspect.signature(spec.load_factory())
    keywords = {n: p.default for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
    if spec.takes_causal:
        assert keywords.pop("causal") is False
    assert dict(spec.options) == keywords


@every_blueprint
def test_docstring_gives_shape_errors_and_the_declared_source(spec: BlueprintSpec) -> None:
    text = inspect.getdoc(spec.load_factory()) or ""
    assert spec.topology is Topology.TRANSFORMER
    assert spec.description
    assert spec.source.startswith("https://arxiv.org/abs/")
    assert all(heading in text for heading in ("Args:", "Shape:", "Raises:"))
    assert spec.source in text.partition("Source: ")[2]


# Widths that are refused


@every_blueprint
def test_a_single_feature_is_refused_with_the_reason_and_nothing_else_is(spec: BlueprintSpec) -> None:
    registry = BlueprintRegistry()
    registry.register(spec, pack="sequence")
    reason = r"does not take width 1: .*nothing but its sign; it takes 2 features or more"
    with pytest.raises(BlueprintError, match=reason):
        registry.create(f"sequence:{spec.name}", 1)
    with pytest.raises(ValueError, match=reason):
        spec.load_factory()(1)
    assert [dim for dim in range(1, 97) if spec.refusal(dim) is not None] == [1]


@every_blueprint
@pytest.mark.parametrize("dim", [0, -1, 8.0, None, True])
def test_a_width_that_is_no_positive_number_is_refused(spec: BlueprintSpec, dim: object) -> None:
    with pytest.raises(ValueError, match=rf"'{spec.name}'(?s:.*)given: +dim={dim!r}"):
        spec.load_factory()(dim)
