"""Which codes may count, by a form that is quick to evaluate in few bits and off by no more than a stated bound."""

from typing import NamedTuple

import numpy as np
import torch

ROUNDING = 2.0**-44  # of products in float64, relative to the largest entry, with much to spare
PIECE, ENTRIES, LANES = 5, 32, 16  # as in csrc/code_topk.h
_MARGIN = 1 + 1e-6  # of bounds that are themselves computed in float64


class Factor(NamedTuple):
    """|R c|^2 is c^T M c but for ``slack``, of a code or of its complement alike."""

    rows: np.ndarray  # [n, n] float64, R, upper triangular
    reach: float  # |R c| at most
    slack: float


def factor(matrix: torch.Tensor) -> Factor:  # [n, n] int64
    """R of the part of M that is positive; what is negative, from rounding or of no Gram matrix, goes to ``slack``."""
    whole = matrix.double().numpy()
    n = len(whole)
    values, vectors = np.linalg.eigh(whole)
    values = values.clip(min=0)
    rows = np.linalg.qr(np.sqrt(values)[:, None] * vectors.T, mode="r")
    # A row of M sums to n / 2 units at most, and a complement's form differs by 2 n^2 of them.
    slack = n * np.linalg.norm(whole - rows.T @ rows) + n * n * (4 + ROUNDING * np.abs(whole).max())
    return Factor(rows, float(np.sqrt(values[-1] * n / 4 * _MARGIN + slack)), float(slack * _MARGIN))


class Rounded(NamedTuple):
    """Integers instead of ``scale`` times the rows; sums of them over a code have an error of at most ``error`` in norm."""

    integers: torch.Tensor
    scale: float
    error: float


def scale_of(rows: np.ndarray, largest_sum: float) -> float:
    """The factor with which no subset of a row sums to more than this in magnitude."""
    most = max(rows.clip(min=0).sum(1).max(), -rows.clip(max=0).sum(1).min())
    return float(largest_sum / most) if most > 0 else 1.0


def tables(factor: Factor) -> Rounded:
    """[planes, 32, 16] int16 of the CPU: see csrc/code_topk.h. At most 34 KB."""
    n = len(factor.rows)
    pieces = -(-n // PIECE)
    furthest = pieces / 2 * (n**0.5)  # half a unit in each row and piece
    scale = min(scale_of(factor.rows, 32767 - pieces), (46340 - furthest) / factor.reach if factor.reach > 0 else 1.0)
    rows = np.zeros((64, pieces * PIECE))
    rows[:n, :n] = scale * factor.rows
    combinations = (np.arange(ENTRIES)[:, None] >> np.arange(PIECE)) & 1
    sums = np.einsum("eb,rpb->per", combinations, rows.reshape(64, pieces, PIECE))  # [pieces, 32, 64]
    whole = np.rint(sums)
    error = np.linalg.norm(whole - sums, axis=2).max(1).sum()
    planes = [
        whole[p, :, first : first + LANES] for p in range(pieces) for first in range(0, min((p + 1) * PIECE, 64), LANES)
    ]
    return Rounded(torch.from_numpy(np.stack(planes).astype(np.int16)).clone(), scale, float(error * _MARGIN))


def integers(factor: Factor) -> Rounded:
    """[2, 64, 64] int8 of a GPU: 256 times the first and the second make an integer matrix. See csrc/code_topk.h."""
    n = len(factor.rows)
    largest = np.abs(factor.rows).max()
    scale = float(32000 / largest) if largest > 0 else 1.0
    whole = np.zeros((64, 64), dtype=np.int64)
    whole[:n, :n] = np.rint(scale * factor.rows)
    apart = whole[:n, :n] - scale * factor.rows
    error = np.linalg.norm(np.maximum(apart.clip(min=0).sum(1), -apart.clip(max=0).sum(1)))
    high = (whole + 128) >> 8
    limbs = np.stack([high, whole - 256 * high]).astype(np.int8)
    return Rounded(torch.from_numpy(limbs).clone(), scale, float(error * _MARGIN))


def limits(factor: Factor, rounded: Rounded, worst: float, largest: bool) -> torch.Tensor:  # -> [65] float32
    """By weight, what a float32 |R c|^2 must reach, or must not exceed, for a code to be as good as ``worst``."""
    n, margin = len(factor.rows), 1 + 1e-5  # the sum of 64 rounded squares is right to 2^-17
    found = np.full(65, 0.0 if largest else np.inf)  # a code of all members' bits passes, to be refused
    forms = worst * (n - np.arange(n)) ** 2.0
    if largest:
        reached = rounded.scale * np.sqrt((forms / margin - factor.slack).clip(min=0)) / margin - rounded.error
        found[:n] = reached.clip(min=0) ** 2 / margin
    else:
        reached = rounded.scale * np.sqrt(forms * margin + factor.slack) * margin + rounded.error
        found[:n] = reached**2 * margin
    return torch.from_numpy(found.astype(np.float32))
