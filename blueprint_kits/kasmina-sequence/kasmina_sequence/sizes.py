"""Hidden widths, ranks and parameter counts of the pack's seeds, as arithmetic: needs no torch."""

from __future__ import annotations

from typing import Final

GAU_EXPANSION: Final = 2
MAX_DEFAULT_KEY_DIM: Final = 128
MAX_DEFAULT_RANK: Final = 8
MIN_EXPERTS: Final = 2
MIN_WIDTH: Final = 2
MOE_EXPANSION: Final = 1
MOE_EXPERTS: Final = 4
SWIGLU_EXPANSION: Final = 4


def require_at_least(owner: str, option: str, value: object, minimum: int) -> int:
    """Return ``value`` if it is a whole number of at least ``minimum``.

    Raises:
        ValueError: If it is not; the message names the owner, the option and both values.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(
            f"{owner} cannot use the {option} it was given.\n"
            f"  given:   {option}={value!r}\n"
            f"  allowed: a whole number, {minimum} or more\n"
            f"Give {option}={minimum} or more."
        )
    return value


def require_width(owner: str, dim: object) -> int:
    """Return ``dim`` if it is a whole number that a seed with RMS normalisation takes.

    Raises:
        ValueError: If it is not; the message gives the reason.
    """
    width = require_at_least(owner, "dim", dim, 1)
    if (reason := rms_norm_refusal(width)) is not None:
        raise ValueError(f"{owner} does not take width {width}: {reason}")
    return width


def rms_norm_refusal(dim: int) -> str | None:
    """Return why a seed with RMS normalisation does not take width ``dim``, or ``None`` if it does."""
    if dim < MIN_WIDTH:
        return (
            "the RMS normalisation of a single feature keeps nothing but its sign; "
            f"it takes {MIN_WIDTH} features or more"
        )
    return None


def default_key_dim(dim: int) -> int:
    """Return 128 features for queries and keys, or ``dim`` where that is less.

    >>> [default_key_dim(dim) for dim in (6, 512)]
    [6, 128]
    """
    return min(dim, MAX_DEFAULT_KEY_DIM)


def default_rank(dim: int) -> int:
    """Return rank 8, or ``dim`` where that is less.

    >>> [default_rank(dim) for dim in (3, 64)]
    [3, 8]
    """
    return min(dim, MAX_DEFAULT_RANK)


def swiglu_hidden(dim: int, expansion: int) -> int:
    """Return two thirds of ``expansion * dim``: three matrices of that size have as many parameters as two of the whole.

    >>> [swiglu_hidden(dim, 4) for dim in (2, 3, 64)]
    [5, 8, 170]
    """
    return 2 * expansion * dim // 3


def gau_params(dim: int) -> int:
    """Norm, one linear map to two gated parts and the shared keys, their scales and shifts, and the output.

    ``6 dim² + 6 dim + dim s + 5 s`` with ``s = min(dim, 128)``.
    """
    e, s = GAU_EXPANSION * dim, default_key_dim(dim)
    return dim + (dim + 1) * (2 * e + s) + 4 * s + (e + 1) * dim


def moe_params(dim: int) -> int:
    """Norm, router without bias, and four experts as wide as the features: ``8 dim² + 10 dim``."""
    h = MOE_EXPERTS * MOE_EXPANSION * dim
    return dim + MOE_EXPERTS * dim + (dim + 1) * h + (h + 1) * dim


def rmsnorm_adapter_params(dim: int) -> int:
    """Norm and two linear maps with biases through the rank ``r = min(dim, 8)``: ``2 dim r + 2 dim + r``."""
    r = default_rank(dim)
    return 2 * dim * r + 2 * dim + r


def swiglu_params(dim: int) -> int:
    """Norm and three matrices to or from the hidden width ``h = 8 dim // 3``: ``3 dim h + dim``."""
    return 3 * dim * swiglu_hidden(dim, SWIGLU_EXPANSION) + dim
