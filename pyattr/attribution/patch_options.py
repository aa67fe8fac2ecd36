"""The options of NDA and of its tuning: their kinds, and patch sizes."""

import math
import operator
from collections.abc import Callable, Iterable

from ..ops._patches import LARGEST_PATCH


def integer(name: str, value) -> int:
    """``value`` as an int.

    Raises:
        TypeError: it is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"NDA: {name} must be an integer, got {value!r}") from None


def number(name: str, value) -> float:
    """``value`` as a float.

    Raises:
        TypeError: it is no number; nor is text that reads like one.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"NDA: {name} must be a number, got {value!r}") from None


def sequence(name: str, values, kind: Callable) -> list:
    """``values`` as a list of what ``kind(name, value)`` makes of each.

    Raises:
        TypeError: it is no sequence, or one of its values is not of the kind.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"NDA: {name} must be a sequence, got {values!r}")
    return [kind(f"each of {name}", value) for value in values]


def check_patch_size(name: str, size: int, coarse: bool) -> None:
    """Refuse a size that no window of the scale has.

    Raises:
        ValueError: it is not positive, beyond what the kernels take or, on the coarse scale, odd.
    """
    if size < 1 or (coarse and size % 2):
        raise ValueError(f"NDA: {name} must be positive{' and even' if coarse else ''}, got {size}")
    if size > LARGEST_PATCH:
        raise ValueError(f"NDA: {name} must be at most {LARGEST_PATCH}, got {size}")


def nearest_patch_size(size: float, coarse: bool) -> int:
    """The patch size nearest to ``size``: odd and at least 3, or even and at least 4 on the coarse scale."""
    odd = 0 if coarse else 1
    nearest = 2 * math.floor((size - odd) / 2 + 0.5) + odd
    return min(max(4 - odd, nearest), LARGEST_PATCH - 1 + odd)
