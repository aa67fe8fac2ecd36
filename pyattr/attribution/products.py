"""Inner products between rows of features, a block of each side at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.features import Features

_ROWS = 256  # of either side that are in float64 at a time


def inner_products(
    queries: Features, train: Features, *, cosine: bool = False, device: torch.device | str = "cpu"
) -> Tensor:
    """``phi_q . phi_n``, or the cosine of the angle between them.

    Args:
        queries: Q rows of D.
        train: N rows of D.
        cosine: divide by the norms of both; 0 where either row is zero.
        device: where the products are taken.

    Returns:
        [Q, N] float32 on the CPU, rounded once from float64.

    Extra memory: 16 * 256 (D + 256) bytes and a block of either side.
    """
    out = torch.empty(len(queries), len(train), dtype=torch.float32, device="cpu")
    for columns, theirs in blocks(train, device):
        for rows, ours in blocks(queries, device):
            products = ours @ theirs.T
            if cosine:
                norms = torch.outer(*(torch.linalg.vector_norm(side, dim=1) for side in (ours, theirs)))
                products = divided(products, norms)
            out[rows, columns] = products.to("cpu", torch.float32)
    return out


def row_norms(features: Features, device: torch.device | str = "cpu") -> Tensor:
    """The Euclidean norm of each row, [N] float64 on ``device``."""
    norms = [torch.linalg.vector_norm(block, dim=1) for _, block in blocks(features, device)]
    return torch.cat([torch.empty(0, dtype=torch.float64, device=device), *norms])


def divided(values: Tensor, norms: Tensor) -> Tensor:
    """``values / norms``, and 0 where a norm is."""
    return torch.where(norms == 0, torch.zeros((), dtype=values.dtype, device=values.device), values / norms)


def blocks(features: Features, device: torch.device | str) -> Iterator[tuple[slice, Tensor]]:
    """Rows in order, with where they stand, [R, D] float64 on ``device``; R is at most 256."""
    for start, block in features.blocks():
        for first in range(0, len(block), _ROWS):
            rows = block[first : first + _ROWS].to(device, torch.float64)
            yield slice(start + first, start + first + len(rows)), rows
