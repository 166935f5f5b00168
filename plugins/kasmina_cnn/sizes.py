"""Widths, group counts and parameter counts of the pack's seeds, as arithmetic: needs no torch."""

from __future__ import annotations

from typing import Final

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


def group_count(channels: int) -> int:
    """Return the number of normalisation groups for ``channels``.

    The largest divisor of ``channels`` up to 8 that leaves at least 4 channels in a group; 1 if there is none. Smaller
    groups would be constant, or nearly, where the features have shrunk to 1x1.

    >>> [group_count(channels) for channels in (1, 6, 7, 8, 32, 96)]
    [1, 1, 1, 2, 8, 8]
    """
    fitting = (
        groups
        for groups in range(MAX_GROUPS, 0, -1)
        if channels % groups == 0 and channels // groups >= MIN_GROUP_CHANNELS
    )
    return next(fitting, 1)


def waist_width(dim: int, reduction: int = 4) -> int:
    """Return ``dim // reduction``, but at least 4 and at most ``dim``.

    >>> [waist_width(dim) for dim in (2, 8, 64)]
    [2, 4, 16]
    """
    return min(dim, max(MIN_WAIST, dim // reduction))


def bottleneck_refusal(dim: int) -> str | None:
    """Return why the bottleneck does not take width ``dim``, or ``None`` if it does."""
    if dim == 1:
        return (
            "on a single channel its 1x1 convolution is a factor that the normalisation after it divides out "
            "again, so it could not learn; it takes 2 channels or more"
        )
    return None


def attention_params(dim: int) -> int:
    """Two linear maps with biases, through the waist ``m``: ``2 dim m + m + dim``."""
    m = waist_width(dim)
    return 2 * dim * m + m + dim


def bottleneck_params(dim: int) -> int:
    """1x1 in, 3x3, 1x1 out with bias, and two norms, with the waist ``m``: ``2 dim m + 9 m² + 4 m + dim``."""
    m = waist_width(dim)
    return 2 * dim * m + 9 * m * m + 4 * m + dim


def conv_heavy_params(dim: int) -> int:
    """3x3, norm, 3x3 with bias: ``18 dim² + 3 dim``."""
    return 18 * dim * dim + 3 * dim


def conv_light_params(dim: int) -> int:
    """3x3, norm, 1x1 with bias: ``10 dim² + 3 dim``."""
    return 10 * dim * dim + 3 * dim


def depthwise_params(dim: int) -> int:
    """3x3 per channel, norm, 1x1 with bias: ``dim² + 12 dim``."""
    return dim * dim + 12 * dim


def norm_params(dim: int) -> int:
    """Three numbers per channel: ``3 dim``."""
    return 3 * dim
