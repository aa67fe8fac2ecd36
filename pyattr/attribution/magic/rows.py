"""Items in whatever form a loss takes them: a tensor, conditioned images, or several tensors of as many rows."""

import torch
from torch import Tensor

from ... import arrays
from ...diffusion.conditioned import Conditioned, contents
from ...diffusion.sampling import Samples
from ..queries import query_images


class Several:
    """Tensors of N rows each that belong together, such as inputs and labels.

    Args:
        tensors: [N, ...] each.

    Raises:
        ValueError: they have different numbers of rows, or there are none.
    """

    def __init__(self, tensors: tuple[Tensor, ...]):
        counts = {len(tensor) for tensor in tensors}
        if len(counts) != 1:
            raise ValueError(f"MAGIC: tensors that belong together must have as many rows, got {sorted(counts)}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])


Rows = Tensor | Conditioned | Several


def as_rows(data, argument: str) -> Rows:
    """Items from what a caller gives.

    Args:
        data: an array of N rows, :class:`~pyattr.diffusion.Conditioned`, :class:`~pyattr.diffusion.Samples`, or a tuple of
            arrays of N rows each.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if isinstance(data, Samples):
        return query_images(data, "MAGIC")
    if isinstance(data, Conditioned | Several):
        return data
    if isinstance(data, tuple):
        return Several(tuple(arrays.to_torch(part, "MAGIC", argument)[0] for part in data))
    rows, _ = arrays.to_torch(data, "MAGIC", argument)
    if rows.dim() == 0:
        raise ValueError(f"MAGIC: {argument} must have one row for each item, got a single number")
    return rows


def device_of(rows: Rows) -> torch.device:
    """Where the items lie."""
    return rows.tensors[0].device if isinstance(rows, Several) else rows.device


def take(rows: Rows, which: Tensor | slice, device: torch.device):
    """Some of the items, as a loss gets them, on a device: a tensor, Conditioned, or a tuple of tensors."""
    there = which.to(device_of(rows)) if isinstance(which, Tensor) else which
    if isinstance(rows, Several):
        return tuple(tensor[there].to(device) for tensor in rows.tensors)
    if isinstance(rows, Conditioned):
        return Conditioned(rows.images[there].to(device), rows.conditions[which])
    return rows[there].to(device)


def named(rows: Rows) -> dict[str, Tensor]:
    """The items as tensors by name, for what identifies them."""
    if isinstance(rows, Several):
        return {f"tensor {number}": tensor for number, tensor in enumerate(rows.tensors)}
    return contents(rows)
