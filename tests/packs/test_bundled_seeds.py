"""What is true of every seed in the bundled packs."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_cases import (
    DTYPES,
    PACKS,
    SPECS,
    accepted_widths,
    every_blueprint,
    features,
    grown,
    newborn,
)

from kasmina_core import BlueprintError, BlueprintRegistry, BlueprintSpec, Topology

SOME_WIDTHS = (1, 2, 3, 4, 5, 7, 8, 12, 16, 31, 64, 96)


# Sizes


@every_blueprint
def test_declared_size_is_the_counted_size_at_every_width(spec: BlueprintSpec) -> None:
    factory = spec.load_factory()
    for dim in accepted_widths(spec):
        with torch.device("meta"):
            counted = sum(parameter.numel() for parameter in factory(dim).parameters())
        assert spec.declared_params(dim) == counted, f"width {dim}"


@every_blueprint
@pytest.mark.parametrize("dim", [48, 64])
def test_declared_size_is_the_size_that_fvcore_counts(spec: BlueprintSpec, dim: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")  # fvcore calls it on import
        from fvcore.nn import parameter_count
    assert spec.declared_params(dim) == parameter_count(newborn(spec, dim))[""]


@every_blueprint
def test_no_buffers_whose_state_could_drift(spec: BlueprintSpec) -> None:
    assert list(newborn(spec, 8).buffers()) == []


# Shapes, dtypes, numbers


@every_blueprint
@settings(deadline=None, max_examples=40)
@given(
    dim=st.integers(1, 96),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
)
def test_keeps_shape_and_dtype_and_stays_finite(
    spec: BlueprintSpec, dim: int, batch: int, size: tuple[int, int], dtype: torch.dtype, scale: float
) -> None:
    if spec.refusal(dim) is not None:
        return
    seed = grown(spec, dim).to(dtype)
    x = (scale * features(spec, dim, batch, size)).to(dtype).requires_grad_()
    y = seed(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert y.isfinite().all()
    (y.float() * features(spec, dim, batch, size, seed=4)).mean().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in seed.parameters())


@every_blueprint
def test_one_value_a_channel_is_enough(spec: BlueprintSpec) -> None:
    for dim in accepted_widths(spec, SOME_WIDTHS):
        seed = grown(spec, dim).train()
        x = features(spec, dim, batch=1, size=(1, 1))
        assert seed(x).isfinite().all(), f"width {dim}"


@every_blueprint
def test_works_without_memory_on_the_meta_device(spec: BlueprintSpec) -> None:
    x = features(spec, 12).to("meta")
    with torch.device("meta"):
        y = spec.load_factory()(12)(x)
    assert (y.shape, y.device.type) == (x.shape, "meta")


@pytest.mark.parametrize("name", [name for name in SPECS if name.startswith("cnn:")])
def test_keeps_channels_last(name: str) -> None:
    x = features(SPECS[name], 8).to(memory_format=torch.channels_last)
    y = grown(SPECS[name], 8)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, grown(SPECS[name], 8)(x.contiguous()))


@every_blueprint
def test_runs_under_autocast(spec: BlueprintSpec) -> None:
    seed, x = grown(spec, 8, std=0.1), features(spec, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = seed(x)
    assert y.isfinite().all()
    torch.testing.assert_close(y.float(), seed(x), atol=0.1, rtol=0.05)


@every_blueprint
def test_samples_of_a_batch_do_not_mix(spec: BlueprintSpec) -> None:
    seed, x = grown(spec, 8), features(spec, 8)
    torch.testing.assert_close(seed(x)[:1], seed(x[:1]))


# Birth and learning


@every_blueprint
def test_is_the_identity_at_birth(spec: BlueprintSpec) -> None:
    for dim in accepted_widths(spec, SOME_WIDTHS):
        for dtype in DTYPES:
            seed = newborn(spec, dim).to(dtype)
            x = features(spec, dim).to(dtype)
            assert torch.equal(seed(x), x), f"width {dim}, {dtype}"


@every_blueprint
def test_no_parameter_is_dead_after_three_plain_sgd_steps(spec: BlueprintSpec) -> None:
    for dim in accepted_widths(spec, SOME_WIDTHS):
        seed = newborn(spec, dim)
        x = features(spec, dim)
        target = x + 0.5 * features(spec, dim, seed=3)
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
@pytest.mark.parametrize("dim", [8, 17])
def test_learns_what_a_grown_seed_of_its_kind_does(spec: BlueprintSpec, dim: int) -> None:
    x = features(spec, dim, batch=8)
    target = grown(spec, dim, seed=9)(x).detach()
    assert _fit(newborn(spec, dim), x, target, steps=60) < 0.5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cnn:bottleneck", {"reduction": 1}),  # eight independent channels do not fit through a waist of four
        ("cnn:conv_heavy", {}),
        ("cnn:conv_light", {}),
        ("cnn:depthwise", {}),
    ],
)
def test_convolutions_learn_to_look_at_the_pixel_beside(name: str, options: dict[str, int]) -> None:
    spec = SPECS[name]
    x = features(spec, 8, batch=8)
    assert _fit(newborn(spec, 8, **options), x, x + x.roll(1, dims=3), steps=80) < 0.5


def test_attention_learns_to_average_the_past() -> None:
    spec = SPECS["transformer:attention"]
    x = features(spec, 8, batch=8, size=(3, 2))
    past = x.cumsum(1) / torch.arange(1, 7).view(1, -1, 1)
    assert _fit(newborn(spec, 8, causal=True), x, x + past, steps=80) < 0.5


def _fit(seed: torch.nn.Module, x: torch.Tensor, target: torch.Tensor, steps: int) -> float:
    """Train, and return the last loss as a part of the first."""
    optimizer = torch.optim.Adam(seed.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(seed(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


# No side effects


@every_blueprint
@pytest.mark.parametrize("training", [True, False])
def test_forward_draws_no_random_number_and_leaves_its_input(spec: BlueprintSpec, training: bool) -> None:
    seed = grown(spec, 8).train(training)
    x = features(spec, 8)
    before, state = x.clone(), torch.get_rng_state()
    y = seed(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert x._version == 0
    assert y.data_ptr() != x.data_ptr()


@every_blueprint
def test_gives_the_same_result_in_training_and_evaluation(spec: BlueprintSpec) -> None:
    seed, x = grown(spec, 8), features(spec, 8)
    assert torch.equal(seed.train()(x), seed.eval()(x))


@every_blueprint
def test_copies_pickles_and_reloads_exactly(spec: BlueprintSpec) -> None:
    seed, x = grown(spec, 8), features(spec, 8)
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
    assert spec.description
    assert spec.source.startswith("https://")
    assert all(heading in text for heading in ("Args:", "Shape:", "Raises:"))
    assert spec.source in text.partition("Source: ")[2]


@pytest.mark.parametrize("pack", list(PACKS))
def test_declarations_have_the_packs_topology_and_come_sorted(pack: str) -> None:
    specs = list(PACKS[pack].kasmina_blueprints())
    assert {spec.topology for spec in specs} == {Topology(pack)}
    assert [spec.name for spec in specs] == sorted({spec.name for spec in specs})


def test_bundled_ids_are_these() -> None:
    assert list(SPECS) == [
        "cnn:attention",
        "cnn:bottleneck",
        "cnn:conv_heavy",
        "cnn:conv_light",
        "cnn:depthwise",
        "cnn:norm",
        "transformer:attention",
        "transformer:lora",
        "transformer:mlp",
        "transformer:norm",
    ]


# Widths that are refused


@every_blueprint
def test_every_width_but_one_is_accepted_up_to_96(spec: BlueprintSpec) -> None:
    assert set(range(2, 97)) <= set(accepted_widths(spec))


REFUSED = ["cnn:bottleneck", "transformer:attention", "transformer:mlp", "transformer:norm"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_width_is_refused_with_the_reason(name: str) -> None:
    registry = BlueprintRegistry()
    registry.register(SPECS[name], pack=name.partition(":")[0])
    with pytest.raises(
        BlueprintError, match=rf"'{name}' does not take width 1: .* takes 2 (channels|features)"
    ):
        registry.create(name, 1)
    with pytest.raises(ValueError, match=r"does not take width 1: .* takes 2 "):
        SPECS[name].load_factory()(1)


def test_all_other_blueprints_take_width_one() -> None:
    assert [name for name, spec in SPECS.items() if spec.refusal(1) is not None] == REFUSED
