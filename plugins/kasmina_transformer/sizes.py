"""Head counts, ranks and parameter counts of the pack's seeds, as arithmetic: needs no torch."""

from __future__ import annotations

from typing import Final

from kasmina_layers.sizes import mlp_params, require_at_least

MAX_DEFAULT_HEADS: Final = 4
MAX_DEFAULT_RANK: Final = 8


def require_divisor(owner: str, option: str, value: object, dim: int) -> int:
    """Return ``value`` if it is a whole number that divides ``dim``.

    Raises:
        ValueError: If it is not; the message gives both values and the numbers that do.
    """
    number = require_at_least(owner, option, value, 1)
    if dim % number != 0:
        divisors = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
        raise ValueError(
            f"{owner} cannot split its width evenly.\n"
            f"  {option}: {number}\n"
            f"  dim: {dim}\n"
            f"Give {option} as one of {divisors}."
        )
    return number


def default_heads(dim: int) -> int:
    """Return the largest number of heads up to 4 that divides ``dim``.

    >>> [default_heads(dim) for dim in (2, 3, 7, 64)]
    [2, 3, 1, 4]
    """
    return next(heads for heads in range(MAX_DEFAULT_HEADS, 0, -1) if dim % heads == 0)


def default_rank(dim: int) -> int:
    """Return rank 8, or ``dim`` where that is less.

    >>> [default_rank(dim) for dim in (3, 64)]
    [3, 8]
    """
    return min(dim, MAX_DEFAULT_RANK)


def attention_params(dim: int) -> int:
    """Norm, queries, keys and values without biases, output with bias: ``4 dim² + 3 dim``."""
    return 4 * dim * dim + 3 * dim


def block_params(dim: int) -> int:
    """Attention and feed-forward network: ``12 dim² + 10 dim``."""
    return attention_params(dim) + mlp_params(dim)


def lora_params(dim: int) -> int:
    """Two matrices of rank ``r = min(dim, 8)``: ``2 dim r``."""
    return 2 * dim * default_rank(dim)
