"""Numbers and integers as NumPy arrays, from whatever holds them; what does not is refused by name."""

import numpy as np
import torch
from torch import Tensor

from .. import arrays


def as_numbers(values, op: str, argument: str) -> np.ndarray:
    """float64, from real numbers.

    Args:
        values: torch tensor on any device, NumPy or CuPy array, number, or nested lists of numbers.
        op, argument: for the error message.

    Raises:
        TypeError: no real numbers, or a masked array.
        ValueError: lists of different lengths.
    """
    tensor = _tensor(values, op, argument)
    if tensor.is_complex():
        raise TypeError(f"{op}: {argument} must be real numbers, got {tensor.dtype}")
    return tensor.double().numpy()


def as_integers(values, op: str, argument: str) -> np.ndarray:
    """int64, from what :func:`as_numbers` takes.

    Raises:
        TypeError: no integers.
        ValueError: lists of different lengths.
    """
    tensor = _tensor(values, op, argument)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{op}: {argument} must be integers, got {tensor.dtype}")
    return tensor.long().numpy()


def as_booleans(values, op: str, argument: str) -> np.ndarray:
    """bool, from what :func:`as_numbers` takes; an empty list is one of booleans.

    Raises:
        TypeError: no booleans.
        ValueError: lists of different lengths.
    """
    tensor = _tensor(values, op, argument)
    if tensor.dtype != torch.bool and tensor.numel():
        raise TypeError(f"{op}: {argument} must be booleans, got {tensor.dtype}")
    return tensor.bool().numpy()


def _tensor(values, op: str, argument: str) -> Tensor:
    """On the CPU, without a graph."""
    if isinstance(values, (list, tuple, int, float, complex, np.generic)):
        if isinstance(values, (list, tuple)) and any(isinstance(value, Tensor) for value in values):
            raise TypeError(f"{op}: {argument} must be one array, got a {type(values).__name__} of tensors: stack them")
        try:
            values = np.asarray(values)
        except ValueError:
            raise ValueError(f"{op}: {argument} must be an array, got lists of different lengths") from None
    return arrays.to_torch(values, op, argument)[0].detach().cpu()
