"""Widths, group counts and parameter counts that several bundled packs share, as arithmetic: needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

DEFAULT_COPIES: Final = 1
DEFAULT_EXPANSION: Final = 4
DEFAULT_REDUCTION: Final = 4
MAX_GROUPS: Final = 8
MIN_GROUP_CHANNELS: Final = 4
MIN_WAIST: Final = 4


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


def require_width(owner: str, dim: int, refusal: Callable[[int], str | None] = lambda dim: None) -> None:
    """Return if ``dim`` is a width that ``owner`` takes.

    Args:
        owner: What the message begins with.
        dim: Width of the features.
        refusal: Returns why a width is refused, or ``None``.

    Raises:
        ValueError: If ``dim`` is not a whole number of at least 1, or is refused.
    """
    require_at_least(owner, "dim", dim, 1)
    if (reason := refusal(dim)) is not None:
        raise ValueError(f"{owner} does not take width {dim}: {reason}")


def group_count(channels: int) -> int:
    """Return the number of normalisation groups for ``channels``.

    The largest divisor of ``channels`` up to 8 that leaves at least 4 channels in a group; 1 if there is none. Smaller
    groups would be constant, or nearly, where the features have shrunk to a single position.

    >>> [group_count(channels) for channels in (1, 6, 7, 8, 32, 96)]
    [1, 1, 1, 2, 8, 8]
    """
    fitting = (
        groups
        for groups in range(MAX_GROUPS, 0, -1)
        if channels % groups == 0 and channels // groups >= MIN_GROUP_CHANNELS
    )
    return next(fitting, 1)


def waist_width(dim: int, reduction: int = DEFAULT_REDUCTION) -> int:
    """Return ``dim // reduction``, but at least 4 and at most ``dim``.

    >>> [waist_width(dim) for dim in (2, 8, 64)]
    [2, 4, 16]
    """
    return min(dim, max(MIN_WAIST, dim // reduction))


def layer_norm_refusal(dim: int) -> str | None:
    """Return why a seed with layer normalisation does not take width ``dim``, or ``None`` if it does."""
    if dim == 1:
        return "the layer normalisation of a single feature is constant; it takes 2 features or more"
    return None


def bottleneck_refusal(dim: int) -> str | None:
    """Return why the convolution through a waist does not take width ``dim``, or ``None`` if it does."""
    if dim == 1:
        return (
            "on a single channel its pointwise convolution is a factor that the normalisation after it divides out "
            "again, so it could not learn; it takes 2 channels or more"
        )
    return None


def waist_params(dim: int) -> int:
    """Two linear maps with biases, through the waist ``m``: ``2 dim m + m + dim``."""
    m = waist_width(dim)
    return 2 * dim * m + m + dim


def mlp_params(dim: int) -> int:
    """Norm and two linear maps with biases, four times as wide between: ``8 dim² + 7 dim``."""
    return 2 * DEFAULT_EXPANSION * dim * dim + (DEFAULT_EXPANSION + 3) * dim


def norm_params(dim: int) -> int:
    """Three numbers per feature: ``3 dim``."""
    return 3 * dim
