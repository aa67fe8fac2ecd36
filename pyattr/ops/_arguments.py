"""Checks of the ops' arguments, worded for the user: every error names the op and the argument."""

import operator

import numpy as np
import torch

from .. import arrays

# Scales that a float32 holds at full precision.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def check_integer(op: str, argument: str, value, low: int, high: int) -> int:
    """A Python integer in [low, high]; anything with ``__index__`` will do but a bool."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {argument} must be an integer, got {type(value).__name__}") from None
    if not low <= value <= high:
        raise ValueError(f"{op}: {argument} must lie in [{low}, {high}], got {value}")
    return value


def check_piece(op: str, grads, column_offset, num_columns, max_columns: int) -> int:
    """The number of columns in all, of which ``grads`` [B, P] holds those from ``column_offset`` on."""
    shape = getattr(grads, "shape", ())
    if len(shape) != 2:  # said by the op's own check, together with what is no array at all
        return 0
    if num_columns is None:
        if column_offset != 0:
            raise ValueError(f"{op}: num_columns must be given with column_offset, got None")
        return shape[1]
    num_columns = check_integer(op, "num_columns", num_columns, 0, max_columns)
    if check_integer(op, "column_offset", column_offset, 0, max_columns) + shape[1] > num_columns:
        raise ValueError(
            f"{op}: num_columns must be at least column_offset + P = {column_offset + shape[1]}, got {num_columns}"
        )
    return num_columns


def check_scale(op: str, value) -> float:
    """A finite float that float32 can hold without going subnormal."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        value = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: scale must be a real number, got {type(value).__name__}") from None
    except OverflowError:  # an integer beyond float64
        value = float("inf")
    if value != 0 and not SMALLEST_SCALE <= abs(value) <= LARGEST_SCALE:
        raise ValueError(f"{op}: scale must be 0 or of magnitude 2^-126 to 2^128 (float32), got {value}")
    return value


def check_indices(op: str, argument: str, indices, limit: int) -> torch.Tensor:
    """An int64 tensor of row or column numbers in [0, limit), on the device of a tensor and otherwise on the CPU."""
    if isinstance(indices, (list, tuple, range)):
        if any(isinstance(index, bool) or not hasattr(index, "__index__") for index in indices):
            raise TypeError(f"{op}: {argument} must hold integers only")
        if indices and not 0 <= min(indices) <= max(indices) < limit:
            raise ValueError(f"{op}: {argument} must lie in [0, {limit}), got {min(indices)}..{max(indices)}")
        indices = np.array(indices, dtype=np.int64)
    indices, _ = arrays.to_torch(indices, op, argument)
    if indices.dim() != 1 or indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        raise TypeError(f"{op}: {argument} must be a sequence of integers, got {indices.dtype} {list(indices.shape)}")
    wide = indices.to(torch.int64)
    if wide.numel() and not 0 <= int(wide.min()) <= int(wide.max()) < limit:
        got = f"{int(wide.min())}..{int(wide.max())}"
        # Conversion turned them negative.
        got = "numbers from 2^63 on" if indices.dtype == torch.uint64 and int(wide.min()) < 0 else got
        raise ValueError(f"{op}: {argument} must lie in [0, {limit}), got {got}")
    return wide
