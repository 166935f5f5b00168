"""A seed in TRAINING learns from the host's loss, and the host's numbers do not know of it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from numeric_helpers import (
    causal_host,
    causal_model,
    cnn_host,
    cnn_model,
    gradients,
    grow_to,
    images,
    labels,
    registry,
    same_bits,
    same_tensors,
    scramble,
    snapshot,
    tokens,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from kasmina_core import (
    GerminationError,
    GradientIsolationMonitor,
    Incubation,
    SeedShapeError,
    SeedStage,
    TelemetryEvent,
    TelemetryEventType,
    TransitionError,
    bound_deviation,
    straight_through,
)
from kasmina_core.isolation import relative_deviation

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ODD = [0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, math.nan, 6e-8, 1e-40, 65504.0]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# torch itself calls torch.jit.script when forward-mode differentiation is first used
uses_forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
both_incubations = pytest.mark.parametrize("incubation", list(Incubation), ids=lambda i: i.value)


def odd_pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every pair of odd values: the first as the host's, the second as the seed's; ``(10, 10, 1)`` each."""
    host, seed = torch.meshgrid(torch.tensor(ODD, dtype=dtype), torch.tensor(ODD, dtype=dtype), indexing="ij")
    return host[..., None].clone(), seed[..., None].clone()


# -- straight_through ----------------------------------------------------------------------------------------------


@every_dtype
def test_straight_through_returns_the_host_bit_for_bit_whatever_the_seed_is(dtype: torch.dtype) -> None:
    host, seed = odd_pairs(dtype)
    assert same_bits(straight_through(host, seed), host)
    assert same_bits(straight_through(host, seed.requires_grad_()), host)


@every_dtype
def test_straight_through_gives_both_branches_the_gradient_of_the_output(dtype: torch.dtype) -> None:
    host, seed = (t.requires_grad_() for t in odd_pairs(dtype))
    gradient = torch.randn(host.shape).to(dtype)
    straight_through(host, seed).backward(gradient)
    assert same_bits(host.grad, gradient)
    assert same_bits(seed.grad, gradient)


def test_straight_through_result_may_be_changed_in_place() -> None:
    host, seed = torch.randn(2, 3, 4), torch.randn(2, 3, 4, requires_grad=True)
    host_before, seed_before = host.clone(), seed.detach().clone()
    straight_through(host, seed).relu_().sum().backward()
    assert torch.equal(host, host_before)
    assert torch.equal(seed.detach(), seed_before)
    assert torch.equal(seed.grad, (host > 0).float())


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 4, 4), (2, 1, 4, 4), (2, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_straight_through_keeps_the_layout_of_the_host(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    host = torch.randn(shape).contiguous(memory_format=memory_format)
    assert straight_through(host, torch.randn(shape)).stride() == host.stride()


def test_straight_through_takes_a_seed_of_another_dtype() -> None:
    host = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    seed = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    output = straight_through(host, seed)
    output.sum().backward()
    assert output.dtype is torch.bfloat16
    assert seed.grad.dtype is torch.float64


def test_straight_through_refuses_a_seed_of_another_shape_and_shows_both() -> None:
    with pytest.raises(SeedShapeError, match=r"host: \(2, 3, 4\)\n  seed: \(2, 1, 4\)") as caught:
        straight_through(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4))
    assert (caught.value.host_shape, caught.value.seed_shape) == ((2, 3, 4), (2, 1, 4))


def test_straight_through_works_under_vmap_and_per_sample_gradients() -> None:
    host, seed, weight = (torch.randn(5, 3, 4) for _ in range(3))
    assert torch.equal(torch.func.vmap(straight_through)(host, seed), host)

    def loss(h: Tensor, s: Tensor, w: Tensor) -> Tensor:
        return (w * straight_through(h, s) ** 2).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(host, seed, weight)
    for gradient in per_sample:
        torch.testing.assert_close(gradient, 2 * weight * host)


def test_straight_through_can_be_differentiated_twice() -> None:
    host, seed = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (first,) = torch.autograd.grad((straight_through(host, seed) ** 3).sum(), seed, create_graph=True)
    to_host, to_seed = torch.autograd.grad(first.sum(), (host, seed))
    # L' = 3 h^2 at the output, so the second derivative is 6 h, again for both branches.
    torch.testing.assert_close(to_host, 6 * host)
    torch.testing.assert_close(to_seed, 6 * host)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_straight_through_works_inside_gradient_checkpointing(reentrant: bool) -> None:
    host, seed = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    output = checkpoint(lambda h, s: straight_through(h, s).square(), host, seed, use_reentrant=reentrant)
    output.sum().backward()
    assert torch.equal(host.grad, 2 * host)
    assert torch.equal(seed.grad, 2 * host)


@uses_forward_mode
def test_straight_through_carries_the_tangent_of_the_host() -> None:
    host, seed, tangent = (torch.randn(2, 3, 4) for _ in range(3))
    with forward_ad.dual_level():
        output = straight_through(forward_ad.make_dual(host, tangent), seed)
        assert torch.equal(forward_ad.unpack_dual(output).tangent, tangent)


# -- the slot in TRAINING ------------------------------------------------------------------------------------------


def one_step(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output of a host or model, and the gradients of the host's parameters."""
    module.zero_grad()
    output = module(x)
    target = torch.zeros(output.shape[:-1], dtype=torch.long)
    F.cross_entropy(output.flatten(0, -2), target.flatten()).backward()
    return output.detach(), gradients(getattr(module, "host", module))


@both_incubations
@every_dtype
@pytest.mark.parametrize("poison", [None, math.inf, math.nan, -0.0], ids=str)
def test_training_stage_leaves_output_and_host_gradients_of_a_cnn_bit_identical(
    dtype: torch.dtype, poison: float | None, incubation: Incubation
) -> None:
    bare, x = cnn_host().to(dtype), images().to(dtype)
    model = cnn_model(copy.deepcopy(bare), incubation=incubation)
    for slot in model.slots:
        place = grow_to(model, slot, SeedStage.TRAINING)
        if poison is not None:
            for p in place.seed_parameters():
                p.data.fill_(poison)
    for _ in range(2):
        expected, expected_gradients = one_step(bare, x)
        found, found_gradients = one_step(model, x)
        assert same_bits(found, expected)
        assert same_tensors(found_gradients, expected_gradients)
    assert all(g is not None and bool(g.any()) for g in expected_gradients.values())
    assert same_tensors(dict(model.host.named_buffers()), dict(bare.named_buffers()))


@both_incubations
@pytest.mark.parametrize("poison", [None, math.nan], ids=str)
def test_training_stage_leaves_output_and_host_gradients_of_a_transformer_bit_identical(
    poison: float | None, incubation: Incubation
) -> None:
    bare, x = causal_host(), tokens()
    model = causal_model(causal_host(), incubation=incubation)
    for slot in model.slots:
        place = grow_to(model, slot, SeedStage.TRAINING, "mlp")
        if poison is not None:
            for p in place.seed_parameters():
                p.data.fill_(poison)
    assert same_tensors(one_step(model, x), one_step(bare, x))


def test_features_of_minus_zero_and_infinity_pass_a_training_slot_unchanged() -> None:
    slot = grow_to(cnn_model(), "norm", SeedStage.TRAINING)
    features = torch.tensor(ODD[:4] * 8).view(2, 4, 2, 2)
    features[0, 0, 0, 0] = math.inf
    assert same_bits(slot(features), features)


@both_incubations
def test_slots_without_a_learning_seed_return_the_very_tensor(incubation: Incubation) -> None:
    model = cnn_model(incubation=incubation)
    features = torch.randn(2, 4, 3, 3)
    slot = model.slots["norm"]
    assert slot(features) is features  # dormant
    model.germinate("norm", "conv")
    assert slot(features) is features  # germinated
    model.advance_stage("norm")
    slot.eval()
    assert slot.stage is SeedStage.TRAINING
    assert slot(features) is features
    model.cull("norm")
    assert slot.train()(features) is features


def test_frozen_host_stays_without_gradient_while_its_seed_learns() -> None:
    bare = cnn_host().requires_grad_(False)
    model = cnn_model(copy.deepcopy(bare))
    slot = grow_to(model, "norm", SeedStage.TRAINING)
    output = model(images())
    assert same_bits(output, bare(images()))
    F.cross_entropy(output, labels()).backward()
    assert not any(p.grad is not None for p in model.host.parameters())
    assert all(bool(p.grad.any()) for p in slot.seed_parameters())


def seed_gradient_by_hand(seed: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The gradient at the slot ``norm`` of the bare host, sent through the seed."""
    bare, seen = cnn_host(), []

    def keep(_module: nn.Module, _args: object, features: Tensor) -> Tensor:
        features.retain_grad()
        seen.append((features.detach().clone(), features))
        return features.clone()  # the in-place ReLU behind would otherwise change what is kept

    bare.norm.register_forward_hook(keep)
    F.cross_entropy(bare(x), labels()).backward()
    value, features = seen[0]
    return torch.autograd.grad(seed(value), list(seed.parameters()), features.grad)


@pytest.mark.parametrize("bound", [math.inf, 10.0], ids=["no bound", "within the bound"])
def test_seed_gradient_is_that_of_the_loss_at_the_slot(bound: float) -> None:
    model = cnn_model(max_deviation=bound)
    slot = grow_to(model, "norm", SeedStage.TRAINING)
    F.cross_entropy(model(images()), labels()).backward()
    by_hand = seed_gradient_by_hand(copy.deepcopy(slot.seed), images())
    for parameter, expected in zip(slot.seed_parameters(), by_hand, strict=True):
        assert torch.equal(parameter.grad, expected)
        assert bool(expected.any())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # at the probe, rightly
def test_training_seeds_work_under_gradient_checkpointing_of_the_host() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.body, self.reentrant = cnn_host(), reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=self.reentrant)

    plain = cnn_model()
    grow_to(plain, "norm", SeedStage.TRAINING)
    F.cross_entropy(plain(images()), labels()).backward()
    for reentrant in (False, True):
        model = cnn_model(Checkpointed(reentrant), ("body.norm",))
        slot = model.slots["body.norm"]
        grow_to(model, "body.norm", SeedStage.TRAINING)
        slot.seed.load_state_dict(plain.slots["norm"].seed.state_dict())
        F.cross_entropy(model(images().requires_grad_()), labels()).backward()
        assert same_tensors(
            [p.grad for p in slot.seed_parameters()],
            [p.grad for p in plain.slots["norm"].seed_parameters()],
        )
        assert same_tensors(list(gradients(model.host).values()), list(gradients(plain.host).values()))


def test_per_sample_gradients_of_a_model_with_a_training_seed() -> None:
    model = causal_model()
    grow_to(model, "blocks.0", SeedStage.TRAINING, "mlp")
    weights, x = dict(model.named_parameters()), tokens(3)

    def loss(values: dict[str, Tensor], sequence: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, values, (sequence[None],))
        return F.cross_entropy(logits[0, :-1], sequence[1:])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i, sequence in enumerate(x):
        model.zero_grad()
        loss(weights, sequence).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(per_sample[name][i], parameter.grad, rtol=1e-4, atol=1e-6)


@uses_forward_mode
def test_forward_mode_differentiation_of_a_training_model_is_that_of_the_host() -> None:
    bare = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten())  # BatchNorm writes to buffers
    model = cnn_model(copy.deepcopy(bare), ("0",))
    grow_to(model, "0", SeedStage.TRAINING)
    x, tangent = images(), images(seed=9)
    found = torch.func.jvp(model, (x,), (tangent,))
    assert same_tensors(found, torch.func.jvp(bare, (x,), (tangent,)))


def test_training_model_exports_and_computes_the_host() -> None:
    model = cnn_model()
    grow_to(model, "norm", SeedStage.TRAINING)
    exported = torch.export.export(model, (images(),)).module()
    bare = cnn_host()
    torch.testing.assert_close(exported(images()), bare(images()))


# -- bounded deviation ---------------------------------------------------------------------------------------------


@every_dtype
def test_bound_is_the_identity_within_the_bound(dtype: torch.dtype) -> None:
    host = torch.randn(3, 4, 5, 5).to(dtype)
    seed = host + (0.05 * torch.randn(host.shape)).to(dtype)
    assert same_bits(bound_deviation(host, seed, 0.1), seed)
    assert bound_deviation(host, seed, math.inf) is seed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_bound_scales_each_sample_back_to_the_bound(dtype: torch.dtype) -> None:
    host = torch.randn(3, 4, 5, 5, dtype=dtype)
    delta = torch.randn(host.shape, dtype=dtype) * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1, 1)
    bounded = bound_deviation(host, host + delta, 0.1)
    for i, limited in enumerate([False, True, True]):
        rms = (bounded[i] - host[i]).square().mean().sqrt() / host[i].square().mean().sqrt()
        expected = 0.1 if limited else delta[i].square().mean().sqrt() / host[i].square().mean().sqrt()
        torch.testing.assert_close(rms, torch.as_tensor(expected, dtype=dtype), rtol=1e-3, atol=0)
        direction = F.cosine_similarity((bounded[i] - host[i]).flatten(), delta[i].flatten(), dim=0)
        torch.testing.assert_close(direction, torch.ones((), dtype=dtype), rtol=1e-4, atol=0)


def test_at_the_bound_the_gradient_is_orthogonal_to_the_deviation() -> None:
    host = torch.randn(2, 6, 3, dtype=torch.float64)
    seed = (host + torch.randn(2, 6, 3, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(2, 6, 3, dtype=torch.float64)
    (bound_deviation(host, seed, 0.1) * weight).sum().backward()
    delta = seed.detach() - host
    along = (seed.grad * delta).sum((1, 2)) / (seed.grad.norm() * delta.norm())
    assert bool(seed.grad.any())
    torch.testing.assert_close(along, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)


@every_dtype
@pytest.mark.parametrize("host_is_zero", [False, True])
@pytest.mark.parametrize("deviation", [0.0, 1e-6, 1.0])
def test_bound_gives_finite_values_and_gradients_at_zero(
    dtype: torch.dtype, host_is_zero: bool, deviation: float
) -> None:
    host = torch.zeros(2, 3, 4, 4, dtype=dtype) if host_is_zero else torch.randn(2, 3, 4, 4).to(dtype)
    seed = (host + deviation).requires_grad_()
    output = bound_deviation(host, seed, 0.1)
    output.sum().backward()
    assert bool(output.isfinite().all())
    assert bool(seed.grad.isfinite().all())


def deviation_after_training(bound: float, steps: int) -> float:
    """RMS of what a seed alone has learned to add, over the RMS of the features."""
    model = cnn_model(max_deviation=bound)
    slot = grow_to(model, "norm", SeedStage.TRAINING)
    optimizer = torch.optim.Adam(slot.seed_parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), labels()).backward()
        optimizer.step()
    with torch.no_grad():
        features = F.batch_norm(model.host.stem(images()), None, None, training=True)
        return float(relative_deviation(features, slot.seed(features)))


def test_deviation_stays_bounded_in_long_training_and_would_not_without_the_bound() -> None:
    assert deviation_after_training(0.1, 300) < 0.2
    assert deviation_after_training(math.inf, 300) > 5.0


# -- the monitor ---------------------------------------------------------------------------------------------------


class Sharing(nn.Module):
    """``x * weight`` with a weight that may belong to the host."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1)


class Reading(nn.Module):
    """Reads a host's parameter without owning it."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 0.9))
        self.read = lambda: weight

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + 1e-3 * self.read().view(1, -1, 1, 1)


def test_monitor_reads_zero_for_an_honest_seed_beside_a_large_host_gradient() -> None:
    model = cnn_model()
    slot = grow_to(model, "norm", SeedStage.TRAINING)
    scramble(slot.seed)
    (1e6 * F.cross_entropy(model(images()), labels())).backward()
    assert max(float(p.grad.norm()) for p in model.host.parameters()) > 1e3
    monitor = GradientIsolationMonitor(model.host.named_parameters())
    reading = monitor.measure(slot)
    assert (reading.leak, reading.tensors, reading.is_violation) == (0.0, (), False)
    assert monitor.violations == 0


@every_dtype
def test_monitor_reads_zero_for_an_honest_seed_in_every_dtype(dtype: torch.dtype) -> None:
    slot = grow_to(cnn_model(cnn_host().to(dtype)), "norm", SeedStage.TRAINING)
    scramble(slot.seed)
    assert slot.check_isolation().leak == 0.0


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_monitor_reads_zero_for_an_honest_seed_that_is_not_finite(poison: float) -> None:
    model = cnn_model()
    slot = grow_to(model, "norm", SeedStage.TRAINING)
    for p in slot.seed_parameters():
        p.data.fill_(poison)
    assert GradientIsolationMonitor(model.host.named_parameters()).measure(slot).leak == 0.0


@pytest.mark.parametrize("kind", [Sharing, Reading])
def test_monitor_names_the_host_parameter_that_a_seed_reaches(kind: type[nn.Module]) -> None:
    host = cnn_host()
    nn.init.uniform_(host.norm2.weight, 0.5, 0.9)
    model = cnn_model(host, seeds=registry(leak=lambda dim: kind(host.norm2.weight)), max_deviation=math.inf)
    slot = grow_to(model, "norm", SeedStage.GERMINATED, "leak")
    model.advance_stage("norm")
    monitor = GradientIsolationMonitor(model.host.named_parameters())
    reading = monitor.measure(slot)
    assert reading.is_violation
    assert reading.tensors == ("norm2.weight",)
    assert monitor.violations == 1


def test_monitor_counts_a_leak_that_is_not_a_number() -> None:
    host = cnn_host()
    model = cnn_model(host, seeds=registry(leak=lambda dim: Sharing(host.norm2.weight)))
    slot = grow_to(model, "norm", SeedStage.TRAINING, "leak")
    host.norm2.weight.data.fill_(math.nan)
    reading = GradientIsolationMonitor(host.named_parameters()).measure(slot)
    assert math.isnan(reading.leak)
    assert reading.is_violation
    assert reading.tensors == ("norm2.weight",)


def test_monitor_notices_a_slot_that_does_not_detach(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cnn_model()
    slot = grow_to(model, "norm", SeedStage.TRAINING)
    monkeypatch.setattr(Tensor, "detach", lambda self: self)
    reading = GradientIsolationMonitor(model.host.named_parameters()).measure(slot)
    monkeypatch.undo()
    assert reading.is_violation
    assert reading.tensors == ("features",)


@pytest.mark.parametrize("blueprint", ["conv", "norm", "counting"])
def test_monitor_changes_no_buffer_gradient_mode_or_random_number(blueprint: str) -> None:
    model = cnn_model()
    slot = grow_to(model, "norm", SeedStage.TRAINING, blueprint)
    F.cross_entropy(model(images()), labels()).backward()
    before = snapshot(model), copy.deepcopy(gradients(model)), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    GradientIsolationMonitor(model.host.named_parameters()).measure(slot)
    assert same_tensors(before, (snapshot(model), gradients(model), torch.get_rng_state()))
    assert modes == [module.training for module in model.modules()]
    assert slot.stage is SeedStage.TRAINING


def test_monitor_measures_batch_statistics_on_features_of_one_value() -> None:
    host = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 4, 1))
    slot = grow_to(cnn_model(host, ("1",)), "1", SeedStage.TRAINING, "norm")
    assert slot.check_isolation().leak == 0.0
    assert slot.seed.training


def test_monitor_works_under_no_grad_and_autocast() -> None:
    host = cnn_host()
    model = cnn_model(host, seeds=registry(leak=lambda dim: Sharing(host.norm2.weight)))
    nn.init.uniform_(host.norm2.weight, 0.5, 0.9)
    leaking = grow_to(model, "norm", SeedStage.TRAINING, "leak")
    honest = grow_to(model, "norm2", SeedStage.TRAINING)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert GradientIsolationMonitor(host.named_parameters()).measure(leaking).is_violation
        assert GradientIsolationMonitor(host.named_parameters()).measure(honest).leak == 0.0


def test_monitor_needs_a_seed() -> None:
    model = cnn_model()
    with pytest.raises(TransitionError, match="'norm' holds no seed"):
        GradientIsolationMonitor(model.host.named_parameters()).measure(model.slots["norm"])


class Recorder:
    def __init__(self, events: list[TelemetryEvent]) -> None:
        self.emit = events.append


def test_isolation_violation_is_counted_and_emitted_once_an_epoch() -> None:
    host, events = cnn_host(), []
    nn.init.uniform_(host.norm2.weight, 0.5, 0.9)
    model = cnn_model(host, seeds=registry(leak=lambda dim: Sharing(host.norm2.weight)))
    model.emit_to(Recorder(events))
    slot = grow_to(model, "norm", SeedStage.TRAINING, "leak")
    reading = slot.check_isolation()
    assert slot.check_isolation() is None  # fresh already
    emitted = [e for e in events if e.type is TelemetryEventType.ISOLATION_VIOLATION]
    assert slot.state.metrics.isolation_violations == 1
    assert [(e.leak, e.tensors) for e in emitted] == [(reading.leak, ("norm2.weight",))]


def test_honest_seed_has_no_violation_to_count() -> None:
    slot = grow_to(cnn_model(), "norm", SeedStage.TRAINING)
    assert slot.check_isolation().leak == 0.0
    assert slot.state.metrics.isolation_violations == 0


# -- seeds that a training slot could not isolate ------------------------------------------------------------------


@pytest.mark.parametrize("blueprint", ["inplace", "trains-inplace"])
@both_incubations
def test_seed_that_writes_to_its_input_cannot_germinate(blueprint: str, incubation: Incubation) -> None:
    model = cnn_model(incubation=incubation)
    before = snapshot(model)
    with pytest.raises(GerminationError, match=r"input unchanged failed.*must not write into the features"):
        model.germinate("norm", blueprint)
    assert same_tensors(before, snapshot(model))
    assert model.slots["norm"].stage is SeedStage.DORMANT


@pytest.mark.parametrize("host", [torch.zeros(0, 4, 2, 2), torch.zeros(3, 4, 2, 2)], ids=["empty", "zero"])
def test_features_without_a_size_measure_no_deviation(host):
    assert relative_deviation(host, host + 1.0).item() == 0.0
    assert relative_deviation(torch.zeros(3, 4), torch.full((3, 4), torch.inf)).isnan()
