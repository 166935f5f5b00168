"""Widths, kernel sizes and parameter counts of the pack's seeds, as arithmetic: needs no torch."""

from __future__ import annotations

from typing import Final

MAX_GROUPS: Final = 8
MIN_GROUP_CHANNELS: Final = 4
MIN_WAIST: Final = 4

CBAM_REDUCTION: Final = 16
CBAM_KERNEL: Final = 7
CONVNEXT_EXPANSION: Final = 4
CONVNEXT_KERNEL: Final = 7
CONVNEXT_MIN_WIDTH: Final = 3
INVERTED_EXPANSION: Final = 6


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


def require_odd(owner: str, option: str, value: object) -> int:
    """Return ``value`` if it is an odd whole number of at least 1: a kernel with a middle keeps the size of an image.

    Raises:
        ValueError: If it is not; the message names the owner, the option and both values.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
        raise ValueError(
            f"{owner} cannot use the {option} it was given.\n"
            f"  given:   {option}={value!r}\n"
            "  allowed: an odd whole number, 1 or more\n"
            f"Give {option}=1, 3, 5 or another odd number."
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


def waist_width(dim: int, reduction: int) -> int:
    """Return ``dim // reduction``, but at least 4 and at most ``dim``.

    >>> [waist_width(dim, 16) for dim in (2, 64, 256)]
    [2, 4, 16]
    """
    return min(dim, max(MIN_WAIST, dim // reduction))


def eca_kernel_size(dim: int) -> int:
    """Return how many neighbouring channels efficient channel attention looks at: ``(log2(dim) + 1) / 2``, made odd.

    >>> [eca_kernel_size(dim) for dim in (1, 8, 64, 256)]
    [1, 3, 3, 5]
    """
    return dim.bit_length() // 2 | 1


def convnext_refusal(dim: int) -> str | None:
    """Return why the ConvNeXt block does not take width ``dim``, or ``None`` if it does."""
    if dim < CONVNEXT_MIN_WIDTH:
        kept = "nothing of one channel" if dim == 1 else "of two channels only which is the larger"
        return (
            f"its layer normalisation keeps {kept}, so the depthwise convolution before it could not learn; "
            f"it takes {CONVNEXT_MIN_WIDTH} channels or more"
        )
    return None


def cbam_params(dim: int) -> int:
    """Two linear maps through the waist ``m``, and a 7x7 from two maps to one, all with biases.

    ``2 dim m + m + dim + 99``.
    """
    m = waist_width(dim, CBAM_REDUCTION)
    return 2 * dim * m + m + dim + 2 * CBAM_KERNEL**2 + 1


def convnext_params(dim: int) -> int:
    """7x7 per channel, norm, two linear maps, four times as wide between, and layer scale: ``8 dim² + 58 dim``."""
    e, k = CONVNEXT_EXPANSION, CONVNEXT_KERNEL
    return 2 * e * dim * dim + (k * k + e + 5) * dim


def eca_params(dim: int) -> int:
    """One kernel over the channels, without bias: `eca_kernel_size`."""
    return eca_kernel_size(dim)


def inverted_residual_params(dim: int) -> int:
    """1x1, norm, 3x3 per channel, norm, 1x1 with bias, six times as wide between: ``12 dim² + 79 dim``."""
    h = INVERTED_EXPANSION * dim
    return 2 * dim * h + 13 * h + dim
