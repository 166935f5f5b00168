"""Gradient clipping for host and seeds separately: no seed changes the host's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from kasmina_core.growth.model import MorphogeneticModel
from kasmina_core.sharding import whole_tensor


@final
@dataclass(frozen=True, slots=True)
class ClippedGradients:
    """What `clip_gradients` found, and what it dropped.

    Attributes:
        host_norm: Norm of the host's gradient before clipping, a 0-d tensor.
        seed_norms: The same of each seed that had a gradient, by slot.
        dropped: Slots whose seed had a non-finite gradient; it is set to ``None``, so the seed skips this step.
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
    """Clip the host's gradient and each seed's by separate norms.

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
    seeds = _learning(model)
    norms = _norms(seeds, norm_type, foreach)
    dropped = _drop_nonfinite(model, seeds, norms)
    for slot, parameters in seeds.items():
        if slot not in dropped:
            clip_grads_with_norm_(parameters, limit, norms[slot], foreach)
    return ClippedGradients(host_norm.detach(), norms, dropped)


def drop_nonfinite_seed_gradients(model: MorphogeneticModel) -> tuple[str, ...]:
    """Drop the gradient of each seed that has a non-finite element; the seed skips this step.

    For training with a GradScaler: call it before ``scaler.unscale_`` and ``scaler.step``. If anything in an optimiser
    overflowed, a scaler skips the whole step and lowers its scale; without this a seed's overflow changes the host's run.

    Returns:
        The slots whose gradients were dropped.
    """
    seeds = _learning(model)
    # The largest element, and not a sum of squares: that overflows where a scaled gradient does not.
    return _drop_nonfinite(model, seeds, _norms(seeds, torch.inf, None))


def _learning(model: MorphogeneticModel) -> dict[str, list[nn.Parameter]]:
    """Return the parameters with a gradient of each seed that has some, by slot."""
    model.growth.agreement.gradients(is_step=False)  # clip what the optimiser will see
    found = {slot: [p for p in model.seed_parameters(slot) if p.grad is not None] for slot in model.slots}
    return {slot: parameters for slot, parameters in found.items() if parameters}


def _norms(seeds: dict[str, list[nn.Parameter]], norm_type: float, foreach: bool | None) -> dict[str, Tensor]:
    gradients = {slot: [p.grad for p in ps if p.grad is not None] for slot, ps in seeds.items()}
    return {slot: get_total_norm(found, norm_type, foreach=foreach) for slot, found in gradients.items()}


def _drop_nonfinite(
    model: MorphogeneticModel, seeds: dict[str, list[nn.Parameter]], norms: dict[str, Tensor]
) -> tuple[str, ...]:
    if not norms:
        return ()
    whole = [whole_tensor(norm).detach() for norm in norms.values()]
    # Stacked, so that the device is waited for once.
    finite = torch.stack([norm.to(whole[0].device).isfinite() for norm in whole]).tolist()
    dropped = tuple(slot for slot, is_finite in zip(norms, finite, strict=True) if not is_finite)
    for parameter in [p for slot in dropped for p in seeds[slot]]:
        parameter.grad = None
    model.growth.misuse.note_dropped(dropped)
    return dropped
