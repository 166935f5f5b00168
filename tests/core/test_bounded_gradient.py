"""The one function of straight-through TRAINING equals its parts, whose formulas are tested in test_isolation.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kasmina_core import SeedShapeError, bound_deviation, straight_through
from kasmina_core.isolation import bounded_straight_through, relative_deviation

BOUND = 0.1
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)


def pair(dtype: torch.dtype, shape: tuple[int, ...] = (4, 3, 5, 5)) -> tuple[Tensor, Tensor, Tensor]:
    """Features, a seed's output within the bound in the first samples and beyond it in the last, and a gradient."""
    draw = torch.Generator().manual_seed(0)
    host, delta, gradient = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(3))
    sizes = torch.logspace(-3, 1, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    seed = host + sizes * delta
    return host.to(dtype).requires_grad_(), seed.to(dtype).requires_grad_(), gradient.to(dtype)


def in_parts(host: Tensor, seed: Tensor, bound: float = BOUND) -> Tensor:
    """The two parts, and the pull: beyond the bound a gradient along the deviation, as long as the bounded one."""
    apart, own = host.detach(), seed.view_as(seed)

    def pull(gradient: Tensor) -> Tensor:
        dims = tuple(range(1, seed.dim()))
        wide = torch.float32 if seed.dtype in (torch.float16, torch.bfloat16) else seed.dtype
        delta, features = (own - apart).to(wide), apart.to(wide)
        size = delta.square().sum(dims, keepdim=True).sqrt()
        is_beyond = size > bound * features.square().sum(dims, keepdim=True).sqrt()
        length = gradient.to(wide).square().sum(dims, keepdim=True).sqrt()
        pulled = gradient.to(wide) + length * delta / size
        return torch.where(is_beyond, pulled, gradient.to(wide)).to(gradient.dtype)

    if seed.requires_grad:
        own.register_hook(pull)
    return straight_through(host, bound_deviation(apart, own, bound))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_small_step_shortens_what_is_beyond_the_bound_whatever_the_loss_wants(sign: float) -> None:
    host, seed, gradient = pair(torch.float64)
    bounded_straight_through(host, seed, BOUND).backward(sign * gradient)
    with torch.no_grad():
        dims = tuple(range(1, seed.dim()))
        before = (seed - host).square().mean(dims).sqrt()
        is_beyond = before > BOUND * host.square().mean(dims).sqrt()
        after = (seed - 1e-4 * seed.grad - host).square().mean(dims).sqrt()
    assert 0 < int(is_beyond.sum()) < len(seed)
    assert bool((after < before)[is_beyond].all())


@every_dtype
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 7, 6), (1, 2, 1, 1), (2, 1, 1)], ids=str)
def test_value_and_gradients_are_those_of_the_parts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    host, seed, gradient = pair(dtype, shape)
    output, expected = bounded_straight_through(host, seed, BOUND), in_parts(host, seed)
    assert torch.equal(output.view(torch.uint8), host.detach().view(torch.uint8))
    found = torch.autograd.grad(output, [host, seed], gradient)
    wanted = torch.autograd.grad(expected, [host, seed], gradient)
    assert torch.equal(found[0], wanted[0])
    assert found[1].dtype is seed.dtype
    scale = float(wanted[1].abs().max())
    torch.testing.assert_close(found[1], wanted[1], rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * scale)


def test_within_the_bound_the_gradient_is_that_of_the_output_bit_for_bit() -> None:
    host = torch.randn(3, 4, 6, 6).requires_grad_()
    seed = (host.detach() + 0.01 * torch.randn(3, 4, 6, 6)).requires_grad_()
    gradient = torch.randn(3, 4, 6, 6)
    bounded_straight_through(host, seed, BOUND).backward(gradient)
    assert torch.equal(seed.grad, gradient)


def test_second_derivatives_within_the_bound_are_those_of_the_parts_and_finite_beyond() -> None:
    host, seed, _ = pair(torch.float64)
    inside = (host + 1e-2 * (seed - host) / (seed - host).abs().amax((1, 2, 3), keepdim=True)).detach()
    inside.requires_grad_()
    (beyond,) = torch.autograd.grad(
        (bounded_straight_through(host, seed, BOUND) ** 3).sum(), seed, create_graph=True
    )
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(beyond.square().sum(), [host, seed]))
    seed = inside
    results = []
    for function in (bounded_straight_through, in_parts):
        output = function(host, seed, BOUND)
        (first,) = torch.autograd.grad((output**3).sum(), seed, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [host, seed]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_vmap_and_grad_compose() -> None:
    host, seed, gradient = (t.detach() for t in pair(torch.float64))

    def loss(h: Tensor, s: Tensor, w: Tensor) -> Tensor:
        return (w * bounded_straight_through(h[None], s[None], BOUND)).sum()

    found = torch.func.vmap(torch.func.grad(loss, argnums=1))(host, seed, gradient)
    seed.requires_grad_()
    (in_parts(host, seed) * gradient).sum().backward()
    torch.testing.assert_close(found, seed.grad)


def test_a_seed_that_is_not_finite_leaves_the_host_alone() -> None:
    for poison in (math.inf, -math.inf, math.nan):
        host, seed, gradient = pair(torch.float32)
        seed = torch.full_like(seed, poison).requires_grad_()
        output = bounded_straight_through(host, seed, BOUND)
        output.backward(gradient)
        assert torch.equal(output, host)
        assert torch.equal(host.grad, gradient)
        assert not bool(seed.grad.isfinite().any())


@pytest.mark.parametrize("zero", ["host", "delta", "both"])
def test_gradients_are_finite_where_host_or_deviation_is_zero(zero: str) -> None:
    host, seed, gradient = pair(torch.float32)
    host = torch.zeros_like(host) if zero != "delta" else host.detach()
    seed = (host.clone() if zero != "host" else seed.detach()).requires_grad_()
    bounded_straight_through(host, seed, BOUND).backward(gradient)
    assert bool(seed.grad.isfinite().all())


def test_without_a_bound_the_gradient_is_that_of_the_output() -> None:
    host, seed, gradient = pair(torch.float32)
    bounded_straight_through(host, seed, math.inf).backward(gradient)
    assert torch.equal(seed.grad, gradient)


def test_another_shape_is_refused_with_both() -> None:
    with pytest.raises(SeedShapeError, match=r"(?s)\(2, 3, 4\).*\(2, 1, 4\)"):
        bounded_straight_through(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4), BOUND)


def test_of_features_nothing_but_host_and_seed_is_kept_for_backward() -> None:
    host, seed, _ = pair(torch.float32)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        bounded_straight_through(host, seed, BOUND)
    features = {pointer for pointer, size in kept.items() if size > len(host) * host.element_size()}
    assert features == {t.untyped_storage().data_ptr() for t in (host, seed)}


@every_dtype
def test_relative_deviation_is_a_ratio_of_root_mean_squares(dtype: torch.dtype) -> None:
    host, seed, _ = pair(dtype)
    measured = relative_deviation(host, seed)
    host, seed = host.detach().double(), seed.detach().double()
    expected = (seed - host).square().mean().sqrt() / host.square().mean().sqrt()
    assert measured.dtype is torch.float32
    assert float(measured) == pytest.approx(float(expected), rel=1e-2 if dtype.itemsize == 2 else 1e-5)
