"""A machine-checked proof of what straight-through training does, tied to the code by autograd.

Symbols: ``h`` the host's features, ``t`` a parameter of the seed, ``S(h, t)`` the seed and ``L`` the loss of what
comes out of the slot; ``S`` and ``L`` are any differentiable functions. ``detach`` is a symbol of its own while one
differentiates, and its value is put in afterwards.
"""

from __future__ import annotations

import pytest
import sympy
import torch
from numeric_helpers import cnn_model, grow_to
from torch import Tensor

from kasmina_core import SeedStage, bound_deviation, straight_through

h, t = sympy.symbols("h t", real=True)
held_h, held_s = sympy.symbols("held_h held_s", real=True)  # detach(h), detach(s) while differentiating
S, L = sympy.Function("S"), sympy.Function("L")


class SeedGradientOnly(sympy.Function):  # type: ignore[misc]  # sympy has no types
    """The term our code adds: its value is 0 and its derivative is 1, both by definition."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.Integer(1)


def value(expression: sympy.Expr) -> sympy.Expr:
    """Put in what was held fixed: the added term is 0, ``detach(x)`` is ``x``."""
    return (
        expression.replace(SeedGradientOnly, lambda _: sympy.Integer(0))
        .subs({held_s: S(held_h, t)})
        .subs({held_h: h})
        .doit()
    )


def ours(host: sympy.Expr, seed: sympy.Expr) -> sympy.Expr:
    return host + SeedGradientOnly(seed)


def reviewed(host: sympy.Expr, seed: sympy.Expr) -> sympy.Expr:
    return host + (seed - held_s)


both_forms = pytest.mark.parametrize("form", [ours, reviewed], ids=["ours", "host + (seed - detach(seed))"])


def slope_of_loss() -> sympy.Expr:
    return sympy.Subs(L(sympy.Symbol("y")).diff(sympy.Symbol("y")), sympy.Symbol("y"), h)


@both_forms
def test_forward_is_the_host(form: object) -> None:
    assert value(form(h, S(held_h, t))) == h


@both_forms
def test_host_gradient_is_that_of_the_loss_without_a_slot(form: object) -> None:
    through_slot = value(sympy.diff(L(form(h, S(held_h, t))), h))
    assert sympy.simplify(through_slot - L(h).diff(h)) == 0


@both_forms
def test_seed_gradient_is_that_of_the_loss_at_the_slot_times_the_seed(form: object) -> None:
    through_slot = value(sympy.diff(L(form(h, S(held_h, t))), t))
    expected = L(h).diff(h) * S(h, t).diff(t)
    assert sympy.simplify(through_slot - expected) == 0


def test_an_input_that_is_not_detached_would_change_the_host_gradient() -> None:
    leaking = value(sympy.diff(L(ours(h, S(h, t))), h))
    assert sympy.simplify(leaking - L(h).diff(h) * (1 + S(h, t).diff(h))) == 0
    assert sympy.simplify(leaking - L(h).diff(h)) != 0


def test_gradients_of_several_features_add_up_over_the_features() -> None:
    host, held = sympy.symbols("h:3", real=True), sympy.symbols("c:3", real=True)
    seeds = [sympy.Function(f"S{i}")(*held, t) for i in range(3)]
    loss = sympy.Function("L")
    out = [ours(a, s) for a, s in zip(host, seeds, strict=True)]

    def put_in(expression: sympy.Expr) -> sympy.Expr:
        plain = expression.replace(SeedGradientOnly, lambda _: sympy.Integer(0))
        return plain.subs(dict(zip(held, host, strict=True))).doit()

    for a in host:
        assert sympy.simplify(put_in(sympy.diff(loss(*out), a)) - loss(*host).diff(a)) == 0
    expected = sum(
        loss(*host).diff(a) * s.subs(dict(zip(held, host, strict=True))).diff(t)
        for a, s in zip(host, seeds, strict=True)
    )
    assert sympy.simplify(put_in(sympy.diff(loss(*out), t)) - expected) == 0


@pytest.mark.parametrize("seed", [sympy.oo, -sympy.oo, sympy.nan], ids=str)
def test_only_our_form_is_defined_where_the_seed_is_not_finite(seed: sympy.Expr) -> None:
    assert (h + (seed - seed)) is sympy.nan  # oo - oo
    assert value(ours(h, seed)) == h


def test_the_value_of_our_form_does_not_depend_on_the_seed() -> None:
    s = sympy.Symbol("s")
    assert s not in value(ours(h, s)).free_symbols


def test_at_the_bound_a_step_along_the_deviation_changes_nothing() -> None:
    """``d/dlambda out(h + lambda * delta) = 0``: the directional derivative along the deviation vanishes."""
    delta = sympy.symbols("d:3", real=True, nonzero=True)
    size, length, bound = sympy.symbols("r lambda b", positive=True)
    norm = sympy.sqrt(sum((length * d) ** 2 for d in delta) / 3)
    bounded = [length * d * bound * size / norm for d in delta]
    assert all(sympy.simplify(b.diff(length)) == 0 for b in bounded)


# -- the proof speaks of this code ---------------------------------------------------------------------------------


def loss_and_seed() -> tuple[sympy.Expr, sympy.Expr, sympy.Symbol]:
    y = sympy.Symbol("y", real=True)
    return sympy.sin(2 * y) + y**3 / 3, t * sympy.tanh(h) + t**2 * h, y


def derived(at_h: Tensor, at_t: float) -> tuple[Tensor, Tensor]:
    """``dL/dh`` per feature and ``dL/dt``, from the symbols alone."""
    loss, seed, y = loss_and_seed()
    slope = sympy.lambdify(h, loss.diff(y).subs(y, h), "math")
    sensitivity = sympy.lambdify((h, t), seed.diff(t), "math")
    to_host = torch.tensor([slope(v) for v in at_h.tolist()], dtype=torch.float64)
    to_seed = sum(slope(v) * sensitivity(v, at_t) for v in at_h.tolist())
    return to_host, torch.tensor(to_seed, dtype=torch.float64)


@pytest.mark.parametrize("number", range(5))
def test_autograd_through_the_code_gives_the_proved_gradients(number: int) -> None:
    source = torch.Generator().manual_seed(number)
    host = torch.randn(7, dtype=torch.float64, generator=source).requires_grad_()
    theta = torch.randn((), dtype=torch.float64, generator=source).requires_grad_()
    held = host.detach()
    out = straight_through(host, theta * held.tanh() + theta**2 * held)
    assert torch.equal(out, host)
    ((2 * out).sin() + out**3 / 3).sum().backward()
    to_host, to_seed = derived(held, theta.item())
    torch.testing.assert_close(host.grad, to_host)
    torch.testing.assert_close(theta.grad, to_seed)


def test_a_slot_in_training_gives_the_proved_gradients() -> None:
    model = cnn_model(max_deviation=torch.inf)
    slot = grow_to(model, "norm", SeedStage.TRAINING, "foreign")  # S(h, t) = t h
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    out = slot(features)
    (out**3 / 3).sum().backward()
    torch.testing.assert_close(features.grad, features.detach() ** 2)  # L'(h)
    torch.testing.assert_close(slot.seed.scale.grad, (features.detach() ** 3).sum())  # L'(h) h


def test_the_code_is_defined_where_the_symbols_say_and_the_reviewed_form_is_not() -> None:
    host = torch.randn(3)
    for seed in (torch.full((3,), torch.inf), torch.full((3,), -torch.inf), torch.full((3,), torch.nan)):
        assert torch.equal(straight_through(host, seed), host)
        assert bool((host + (seed - seed.detach())).isnan().all())


def test_the_code_at_the_bound_does_not_move_along_the_deviation() -> None:
    host, delta = (torch.randn(1, 5, 3, dtype=torch.float64) for _ in range(2))
    length = torch.ones((), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 5, 3, dtype=torch.float64)
    (bound_deviation(host, host + length * delta, 0.1) * weight).sum().backward()
    torch.testing.assert_close(length.grad, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-9)
