"""Arrays in, same kind out: torch tensors, NumPy arrays and CuPy arrays, without a copy where the layout allows."""

import sys
import warnings
from collections.abc import Callable

import numpy as np
import torch


def to_torch(array, op: str, argument: str) -> tuple[torch.Tensor, Callable]:
    """A tensor over the array's memory, and the function that turns a result back into the array's kind.

    Raises:
        TypeError: not a torch tensor, NumPy array or CuPy array, masked, or of a dtype or byte order torch does not have.
    """
    if isinstance(array, torch.Tensor):
        return array, lambda tensor: tensor
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{op}: {argument} must not be a masked array: fill it first, as the mask would be lost")
    if isinstance(array, np.ndarray):
        if not array.dtype.isnative:
            raise TypeError(f"{op}: {argument} must be in this machine's byte order, got dtype {array.dtype.str}")
        try:
            with warnings.catch_warnings():
                # A read-only memory map is an ordinary input, and no op writes to its inputs.
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                # Torch has no negative strides, and none in fractions of an element (a field of a packed structure).
                fits = all(s >= 0 and s % array.itemsize == 0 for s in array.strides)
                view = array if fits else array.copy()
                return torch.from_numpy(view), lambda tensor: tensor.numpy(force=True)
        except TypeError:
            raise TypeError(f"{op}: {argument} has dtype {array.dtype}, which torch does not have") from None
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return torch.from_dlpack(array), cupy.from_dlpack
    raise TypeError(f"{op}: {argument} must be a torch tensor, NumPy array or CuPy array, got {type(array).__name__}")
