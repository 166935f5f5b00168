"""Gradients of host and seeds, clipped apart: what a seed does to its gradient never reaches the host's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from kasmina_core.growth.model import MorphogeneticModel


@final
@dataclass(frozen=True, slots=True)
class ClippedGradients:
    """What `clip_gradients` found, and what it dropped.

    Attributes:
        host_norm: Norm of the host's gradient before clipping, a 0-d tensor.
        seed_norms: The same of each seed that had a gradient, by slot.
        dropped: Slots whose seed had a gradient that is not finite; it is gone, and the seed sits this step out.
    """

    host_norm: Tensor
    seed_norms: dict[str, Tensor]
    dropped: tuple[str, ...]


def clip_gradients(
    model: MorphogeneticModel,
    max_norm: float,
    seed_max_norm: float | None = None,
    *,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> ClippedGradients:
    """Clip the host's gradient and each seed's by norms of their own.

    The host's gradient becomes what ``clip_grad_norm_(host.parameters(), max_norm)`` makes of it, bit for bit, whatever
    the seeds' are. Clipped together, one large or infinite seed gradient would shrink the host's or make it NaN.

    Call it after ``backward`` (and ``incubate``) and, with a GradScaler, after ``scaler.unscale_(optimizer)``; before
    ``model.step()`` and the optimiser. With gradient accumulation, once, when all of it is there.

    Args:
        model: The model.
        max_norm: Largest norm of the host's gradient; ``inf`` for no limit.
        seed_max_norm: Largest norm of each seed's gradient. Default ``max_norm``.
        norm_type: Of the norms, ``inf`` for the largest element.
        error_if_nonfinite: Whether a host's gradient that is not finite raises, as in torch.
        foreach: See ``torch.nn.utils.clip_grad_norm_``.

    Raises:
        ValueError: If a largest norm is negative or NaN.
        RuntimeError: If the host's gradient is not finite and ``error_if_nonfinite`` is set.

    Source: Pascanu et al. 2013, https://arxiv.org/abs/1211.5063
    """
    limit = max_norm if seed_max_norm is None else seed_max_norm
    if not (max_norm >= 0.0 and limit >= 0.0):
        raise ValueError(
            "Gradients are clipped to norms of at least 0; inf is no limit.\n"
            f"  max_norm:      {max_norm!r}\n  seed_max_norm: {seed_max_norm!r}"
        )
    host_norm = clip_grad_norm_(model.host_parameters(), max_norm, norm_type, error_if_nonfinite, foreach)
    gradients = _seed_gradients(model)
    norms = {
        slot: get_total_norm([_gradient(p) for p in ps], norm_type, foreach=foreach)
        for slot, ps in gradients.items()
    }
    finite = _finite(norms)
    dropped = tuple(slot for slot in gradients if not finite[slot])
    for slot, parameters in gradients.items():
        if slot in dropped:
            _drop(parameters)
        else:
            clip_grads_with_norm_(parameters, limit, norms[slot], foreach)
    return ClippedGradients(host_norm.detach(), norms, dropped)


def drop_nonfinite_seed_gradients(model: MorphogeneticModel) -> tuple[str, ...]:
    """Drop the gradient of each seed that has an element which is not finite; the seed sits this step out.

    For training with a GradScaler: call it before ``scaler.unscale_`` and ``scaler.step``. A scaler skips the step of
    everything in an optimiser if anything in it overflowed, and lowers its scale; a seed's overflow would so change the
    host's run. Dropped first, it does neither.

    Returns:
        The slots whose gradients were dropped.
    """
    gradients = _seed_gradients(model)
    # The largest element, and not a sum of squares: that overflows where a scaled gradient does not.
    finite = _finite(
        {slot: get_total_norm([_gradient(p) for p in ps], torch.inf) for slot, ps in gradients.items()}
    )
    for slot, parameters in gradients.items():
        if not finite[slot]:
            _drop(parameters)
    return tuple(slot for slot in gradients if not finite[slot])


def _seed_gradients(model: MorphogeneticModel) -> dict[str, list[nn.Parameter]]:
    model.growth.agreement.gradients(is_step=False)  # what is clipped shall be what the optimiser will see
    found = {slot: [p for p in model.seed_parameters(slot) if p.grad is not None] for slot in model.slots}
    return {slot: parameters for slot, parameters in found.items() if parameters}


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _finite(norms: dict[str, Tensor]) -> dict[str, bool]:
    """Whether each norm is finite; one wait for the device for all of them."""
    if not norms:
        return {}
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms.values()]
    flags = torch.stack([norm.detach().to(whole[0].device).isfinite() for norm in whole]).tolist()
    return dict(zip(norms, flags, strict=True))


def _drop(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
