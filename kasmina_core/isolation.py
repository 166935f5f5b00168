"""Isolation: functions by which a seed learns from the host's loss without touching the host."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from torch import Tensor

from kasmina_core.errors import SeedShapeError

DEVIATION_EPS: Final = 1e-12
"""Added to mean squares under the root: without it a seed equal to the host has a NaN gradient."""


class _SeedGradientOnly(torch.autograd.Function):
    """Negative zeros forward, the identity backward: adding it changes no value and routes the gradient."""

    # vmap needs a rule. A jvp of our own would break graphs with fullgraph=True.
    generate_vmap_rule = True

    @staticmethod
    def forward(seed: Tensor) -> Tensor:
        # x + (-0.0) is x for every x; +0.0 would turn -0.0 into +0.0.
        return seed.new_full((), -0.0).expand_as(seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output


def straight_through(host: Tensor, seed: Tensor) -> Tensor:
    """Return the host's features while the seed learns from their loss.

    Forward is ``host``, bit for bit, whatever the seed computed (infinity and NaN too). Backward gives both branches
    the gradient of the output: ``dL/dhost = dL/dseed = dL/doutput``. The result is a tensor of its own, so that an
    in-place operation behind it harms neither branch.

    Args:
        host: Features at the slot, batch first.
        seed: The seed's output for those features; shape of ``host``, any floating dtype.

    Raises:
        SeedShapeError: If the two shapes differ.

    Source: Bengio et al. 2013, https://arxiv.org/abs/1308.3432
    """
    if seed.shape != host.shape:
        raise SeedShapeError(host.shape, seed.shape)
    return host + cast("Tensor", _SeedGradientOnly.apply(seed.to(host.dtype)))  # type: ignore[no-untyped-call]  # torch


def bound_deviation(host: Tensor, seed: Tensor, bound: float) -> Tensor:
    """Scale the seed's deviation from the host back to ``bound`` times the host's size.

    With ``rms`` the root mean square over one sample and ``delta = seed - host``::

        output = host + delta * min(1, bound * rms(host) / rms(delta))

    Within the bound the output equals the seed's. At the bound the gradient along ``delta`` vanishes, so a step can
    turn the deviation but not lengthen it: a straight-through loss is linear in the seed's output, and nothing else
    would stop its growth.

    Args:
        host: Features at the slot, detached, batch first.
        seed: The seed's output; shape of ``host``.
        bound: Largest deviation as a share of the host's RMS, above 0; ``inf`` for none.
    """
    if math.isinf(bound):
        return seed
    dims = tuple(range(1, host.dim()))
    wide = _wide(host.dtype)
    delta = (seed - host).to(wide)
    limit = (host.to(wide).square().mean(dims, keepdim=True) + DEVIATION_EPS).sqrt() * bound
    size = (delta.square().mean(dims, keepdim=True) + DEVIATION_EPS).sqrt()
    bounded = host + (delta * (limit / size)).to(host.dtype)
    return torch.where(size > limit, bounded, seed)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which to sum squares: half precision overflows."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class _BoundedSeedGradient(torch.autograd.Function):
    """`_SeedGradientOnly` of `bound_deviation`: its value is not needed, and its gradient is found from two sums."""

    generate_vmap_rule = True

    @staticmethod
    def forward(host: Tensor, seed: Tensor, whole: Tensor, part: Tensor, bound: float) -> Tensor:
        return seed.new_full((), -0.0).expand_as(seed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: Tensor) -> None:
        *tensors, ctx.bound = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None, None]:
        host, seed, whole, part = ctx.saved_tensors
        # Only where asking does not wait for a device, and is not part of a graph.
        can_ask = not (torch.compiler.is_compiling() or host.is_cuda) and _is_eager()
        if torch.is_grad_enabled():  # the norms of the forward pass have no derivative
            whole, part = _norms(host, seed)
        eps = DEVIATION_EPS * math.prod(host.shape[1:])
        square = part.square() + eps
        scale = ((whole.square() + eps) / square).sqrt() * ctx.bound
        if can_ask and bool((scale >= 1.0).all()):
            return None, grad_output, None, None, None
        dims, wide = tuple(range(1, host.dim())), _wide(host.dtype)
        delta, gradient = (seed - host).to(wide), grad_output.to(wide)
        along = (gradient * delta).sum(dims, keepdim=True)
        # d(delta * limit / size): beyond the bound what lies along delta is taken out, and the rest is scaled.
        taken = scale * along / square * (scale < 1.0)
        bounded = torch.addcmul(gradient * scale.clamp(max=1.0), delta, taken, value=-1.0)
        # Beyond the bound a gradient of the same length along delta pulls the seed back.
        length = torch.linalg.vector_norm(bounded, dim=dims, keepdim=True)
        bounded = torch.addcmul(bounded, delta, length * (scale < 1.0) / square.sqrt())
        return None, bounded.to(grad_output.dtype), None, None, None


# torch binds the arguments of every call to the signature, and looks here before it works one out.
_BoundedSeedGradient.forward.__signature__ = inspect.signature(_BoundedSeedGradient.forward)  # type: ignore[attr-defined]


def _norms(host: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the L2 norm of each sample, of the host and of the seed's deviation from it: ``(b, 1, ...)``."""
    dims, wide = tuple(range(1, host.dim())), _wide(host.dtype)
    whole, part = (
        torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide) for x in (host, seed - host)
    )
    return whole, part


def _is_eager() -> bool:
    return torch._C._functorch.maybe_current_level() is None


def bounded_straight_through(host: Tensor, seed: Tensor, bound: float) -> Tensor:
    """Return ``straight_through(host, bound_deviation(host.detach(), seed, bound))``, and pull back what is beyond.

    `bound_deviation` bounds the seed's part in the loss, not the seed: its steps across ``delta`` still lengthen it,
    and what is blended in later is the seed itself. So where a sample is beyond the bound, a gradient of the same
    length as the bounded one, along ``delta = seed - host``, is added to it: a descending step then shortens the
    deviation as much as it turns it. Where no sample is beyond, the gradient goes on as it is.

    Args:
        host: Features at the slot, batch first.
        seed: The seed's output for those features; shape of ``host``, any floating dtype.
        bound: See `bound_deviation`.

    Raises:
        SeedShapeError: If the two shapes differ.
    """
    return isolated(host, seed, bound)[0]


def isolated(host: Tensor, seed: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return `bounded_straight_through` and `relative_deviation`, which need the same sums."""
    if math.isinf(bound):
        return straight_through(host, seed), relative_deviation(host, seed)
    if seed.shape != host.shape:
        raise SeedShapeError(host.shape, seed.shape)
    fixed, seed = host.detach(), seed.to(host.dtype)
    norms = _norms(fixed, seed.detach())
    routed = _BoundedSeedGradient.apply(fixed, seed, *norms, bound)  # type: ignore[no-untyped-call]  # torch
    whole, part = (torch.linalg.vector_norm(norm).float() for norm in norms)
    return host + cast("Tensor", routed), _ratio(whole, part, host.numel())


def relative_deviation(host: Tensor, seed: Tensor) -> Tensor:
    """Return ``rms(seed - host) / rms(host)`` over all elements, a 0-d float32 tensor.

    Features without a size (no sample, or all zero) measure nothing: 0, but NaN where the seed is not finite.
    """
    host, delta = host.detach(), seed.detach() - host.detach()
    whole, part = (torch.linalg.vector_norm(x, dtype=_wide(x.dtype)).float() for x in (host, delta))
    return _ratio(whole, part, host.numel())


def _ratio(whole: Tensor, part: Tensor, count: int) -> Tensor:
    ratio = part / (whole.square() + DEVIATION_EPS * count).sqrt()
    return torch.where(whole > 0.0, ratio, 0.0 * part)


def note_largest(noted: Tensor, value: Tensor) -> bool:
    """Raise a buffer to ``value``, in place, and return whether that could be done.

    ``torch.func`` transforms forbid writes to captured tensors, so nothing is noted within them.
    """
    can_write = torch.compiler.is_compiling() or _is_eager()
    if can_write:
        noted.copy_(torch.maximum(noted, value))
    return can_write


@final
@dataclass(frozen=True, slots=True)
class IsolationReading:
    """One measurement of what a seed leaks into its host.

    Attributes:
        leak: L2 norm of the gradient that reached the host through the seed, relative to the gradient at the slot.
            NaN if it could not be computed; that counts as a violation.
        threshold: Largest leak that is not a violation.
        tensors: What it reached: names of host parameters, and ``"features"`` for the slot's input.
    """

    leak: float
    threshold: float
    tensors: tuple[str, ...] = ()

    @property
    def is_violation(self) -> bool:
        """Whether the leak exceeds the threshold or is not a number."""
        return not self.leak <= self.threshold
