"""How a seed's features come in: the alpha ramp and the blend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Final, final

import torch
from torch import Tensor

from kasmina_core.errors import SeedShapeError
from kasmina_core.records import Mark, Range, Record

STEPS_PER_TEMPERATURE: Final = 12.0
"""Default steepness: the ramp spans this many temperatures, so its largest step is about 3 / total_steps."""

LARGEST_STEEPNESS: Final = 24.0
"""Steepest ramp allowed: beyond it a single step would exceed about 6 / total_steps."""

_CHANNELS_LAST: Final = {4: torch.channels_last, 5: torch.channels_last_3d}


@final
@dataclass(init=False, repr=False, slots=True, unsafe_hash=True)
class AlphaSchedule(Record):
    """A sigmoid ramp that starts at exactly ``start`` and ends at exactly ``end``.

    With ``z(k) = (k - total_steps / 2) / temperature`` and ``s(z) = (1 + tanh(z / 2)) / 2``::

        alpha(k) = start + (end - start) * (s(z(k)) - s(z(0))) / (s(z(total_steps)) - s(z(0)))

    Args:
        total_steps: Steps of the ramp, at least 1. A step is an epoch or an optimiser step, as its driver chooses.
        start: Alpha at step 0, in [0, 1].
        end: Alpha at step ``total_steps`` and after, in [0, 1], not below ``start``.
        temperature: Width of the sigmoid, in steps. Default ``total_steps / 12``: it must scale with the steps, or
            the ramp becomes one jump. No single step then exceeds ``3.1 / total_steps``.

    Raises:
        ValueError: If an argument is out of range, or the temperature is below ``total_steps / 24``.

    >>> ramp = AlphaSchedule(10)
    >>> ramp(0), ramp(10), ramp(99)
    (0.0, 1.0, 1.0)
    """

    total_steps: Annotated[int, Range(1)]
    start: Annotated[float, Mark.LATER]
    end: Annotated[float, Mark.LATER]
    temperature: Annotated[float, Mark.LATER]

    def __init__(
        self, total_steps: int, start: float = 0.0, end: float = 1.0, temperature: float | None = None
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be a whole number of at least 1, not {total_steps!r}.")
        if not (0.0 <= start <= end <= 1.0):
            raise ValueError(f"A ramp needs 0 <= start <= end <= 1, not start={start!r}, end={end!r}.")
        width = total_steps / STEPS_PER_TEMPERATURE if temperature is None else float(temperature)
        smallest = total_steps / LARGEST_STEEPNESS
        if not (math.isfinite(width) and width >= smallest):
            raise ValueError(
                f"temperature={temperature!r} makes the ramp of {total_steps} steps a jump.\n"
                f"  smallest: {smallest:g} (total_steps / {LARGEST_STEEPNESS:g})\n"
                f"  default:  {total_steps / STEPS_PER_TEMPERATURE:g} (total_steps / {STEPS_PER_TEMPERATURE:g})"
            )
        self.total_steps = total_steps
        self.start = float(start)
        self.end = float(end)
        self.temperature = width

    def __call__(self, step: int) -> float:
        """Return alpha at ``step``; steps outside ``[0, total_steps]`` are clamped."""
        if step <= 0:
            return self.start
        if step >= self.total_steps:
            return self.end
        # tanh is odd, so the normalised sigmoid is (1 + tanh(z/2) / tanh(z_end/2)) / 2.
        half = self.total_steps / 2
        ratio = math.tanh((step - half) / self.temperature / 2) / math.tanh(half / self.temperature / 2)
        return self.start + (self.end - self.start) * min(1.0, max(0.0, 0.5 * (1.0 + ratio)))

    def first_step_reaching(self, alpha: float) -> int:
        """Return the first step whose alpha is at least ``alpha`` (``total_steps`` if none before it is)."""
        low, high = 0, self.total_steps
        while low < high:
            middle = (low + high) // 2
            if self(middle) >= alpha:
                high = middle
            else:
                low = middle + 1
        return low

    def __repr__(self) -> str:
        return (
            f"AlphaSchedule({self.total_steps}, {self.start}, {self.end}, temperature={self.temperature:g})"
        )


def like_host(seed: Tensor, host: Tensor) -> Tensor:
    """Return the seed's features in the dtype and memory format of the host's.

    Raises:
        SeedShapeError: If the two shapes differ (they would broadcast silently).
    """
    if seed.shape != host.shape:
        raise SeedShapeError(host.shape, seed.shape)
    if seed.dtype != host.dtype:
        seed = seed.to(host.dtype)
    memory_format = memory_format_of(host)
    return seed if memory_format is None else seed.contiguous(memory_format=memory_format)


def memory_format_of(features: Tensor) -> torch.memory_format | None:
    """Return the memory format in which features are whole; ``None`` if they are, say, a part of something else."""
    if features.is_contiguous():
        return torch.contiguous_format
    last = _CHANNELS_LAST.get(features.dim())
    return last if last is not None and features.is_contiguous(memory_format=last) else None


def blend_with_isolation(
    host: Tensor, seed: Tensor, alpha: float | Tensor, detach_host: bool = False
) -> Tensor:
    """Return ``(1 - alpha) * host + alpha * seed`` in the host's dtype and memory format.

    Args:
        host: Features at the slot, batch first.
        seed: The seed's output for those features; shape of ``host``, any floating dtype.
        alpha: Weight of the seed, clamped to [0, 1]: a float or a 0-d tensor. A tensor keeps one compiled graph for
            all values.
        detach_host: Whether the host's own path gets no gradient. Everything upstream of the slot is then starved of
            the share ``1 - alpha``, and of all of it where the seed's input is detached as well; leave it False to
            train the host.

    Raises:
        SeedShapeError: If the two shapes differ.

    >>> blend_with_isolation(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), 0.25).unique()
    tensor([0.2500])
    """
    seed = like_host(seed, host)
    path = host.detach() if detach_host else host
    if isinstance(alpha, Tensor):
        return torch.lerp(path, seed, alpha.to(host.dtype).clamp(0.0, 1.0))
    return torch.lerp(path, seed, min(1.0, max(0.0, float(alpha))))
