"""Sparse projection (sketch) by a matrix with a few random signs in each column, never stored."""

from typing import NamedTuple

import torch

from .. import backends, threads
from ..reference import sparse_project as reference
from . import _arguments
from ._projection import DTYPES, Projection, check_grads

MAX_COLUMNS = 2**39  # the Philox counter holds the column div 128 in 32 bits
MAX_PROJ_DIM = 2**31


class Sketch(NamedTuple):
    """A sparse matrix with its scale: everything that defines it but its width."""

    seed: int
    stream: int
    column_offset: int
    nonzeros: int
    scale: float


def _transpose_cpu(coefficients, num_columns, *matrix):
    batch, proj_dim = coefficients.shape
    out = torch.empty(batch, num_columns, dtype=torch.float32)
    if out.numel() == 0:
        return out
    backends.extension().sparse_project_transpose_cpu(
        coefficients.data_ptr(), DTYPES[coefficients.dtype], batch, num_columns, *coefficients.stride(), out.data_ptr(),
        proj_dim, *matrix, threads.usable(torch.get_num_threads()),
    )  # fmt: skip
    return out


_PROJECT = Projection(
    "sparse_project",
    reference.sparse_project,
    reference.sparse_project_transpose,
    max_columns=MAX_COLUMNS,
    matrix=Sketch,
    max_proj_dim=MAX_PROJ_DIM,
    transposes={"cpu": _transpose_cpu},
)


def sparse_project(
    grads, proj_dim, *, nonzeros=1, seed=0, stream=0, column_offset=0, num_columns=None, scale=1.0, backend=None
):
    """Project each row by a sparse random sign matrix: one addition per entry and nonzero.

    ``Y[b, j] = scale * sum_p M[j, column_offset + p] * grads[b, p]``, where each column of M [D, num_columns] has ``nonzeros``
    entries +-1 in different rows and zeros elsewhere. Row and sign of an entry are functions of (seed, stream, column, D,
    nonzeros) alone: the same on every device, backend and batch.

    Columns come in tiles of about D / nonzeros consecutive ones, which an entry of the column sends to different rows, so that
    gradients within a tile are kept exactly; columns of different tiles meet with probability ``nonzeros / D``. Inner products
    have ``E <Y, Y'> = nonzeros * <g, g'>`` (unscaled), and with ``scale = nonzeros ** -0.5``, where ``nonzeros`` divides D, the
    variance

        ``Var <Y, Y'> = 1/D * sum over p != q of different tiles of (g_p^2 g'_q^2 + g_p g'_p g_q g'_q)``,

    at most that of CountSketch and of SJLT with as many nonzeros, ``(|g|^2 |g'|^2 + <g, g'>^2 - 2 sum_p g_p^2 g'_p^2) / D``,
    which is also that of a dense sign matrix. Where ``nonzeros`` does not divide D, the nonzeros have m_r rows each, not all as
    many, and 1/D becomes ``sum_r 1 / m_r / nonzeros^2`` (1.125 / D for 6 rows and 4 nonzeros, 1.0001 / D for 4096 and 3). More
    nonzeros do not lower the variance; they make large deviations rarer when few entries hold most of the norm.

    Args:
        grads: [B, P] float16, bfloat16, float32 or float64 (reference only); a torch tensor, NumPy array or CuPy array, any
            strides.
        proj_dim: D, from ``nonzeros`` to 2^31. Multiples of 32 are fastest.
        nonzeros: entries of a column, 1 to 8.
        seed: word 0 of the Philox key, in [0, 2^32).
        stream: word 1 of the Philox key, in [0, 2^32); independent matrices of one seed.
        column_offset: the column of M that multiplies ``grads[:, 0]``. Pieces of a gradient, each with its own offset, add up
            to the projection of the whole (to rounding).
        num_columns: columns of M in all, of which the piece must be a part; P by default, required with ``column_offset``.
        scale: multiplies the result; 0, or of a magnitude that float32 holds at full precision.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        [B, D] float32 (float64 for float64 input), of the kind and on the device of ``grads``. The bits of a row do not depend
        on the thread count, on the other rows, or on the run; the CPU gives the same bits at every SIMD level. Entries are sums
        of about ``P * nonzeros / D`` numbers, rounded to at most ``(2^12 + P / 2^12) * 2^-24`` of the sum of their magnitudes
        on the CPU; every backend is tested to 2^-20 of it. NaN and inf propagate to the outputs that their column meets.
        Differentiable in both modes and any order, also under torch.compile.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: CPU, per thread a row of sums (4 D bytes) or 256 KB, whichever is more, and 50 KB. CUDA and Triton, partial
    sums of at most 64 MiB or one row of outputs per sample, whichever is more. Reference, 60 MB and 16 B D bytes. Reverse
    mode: see :func:`sparse_project_transpose`.

    Source: Charikar, Chen, Farach-Colton, "Finding Frequent Items in Data Streams", 2002 (CountSketch); Kane, Nelson, "Sparser
    Johnson-Lindenstrauss Transforms", J. ACM 2014, section 3 (block construction); the tiles are ours.
    """
    nonzeros = check_nonzeros("sparse_project", nonzeros, proj_dim)
    _arguments.check_piece("sparse_project", grads, column_offset, num_columns, MAX_COLUMNS)
    return _PROJECT(grads, proj_dim, Sketch(seed, stream, column_offset, nonzeros, scale), backend)


def sparse_project_transpose(
    coefficients, num_columns, *, nonzeros=1, seed=0, stream=0, column_offset=0, scale=1.0, backend=None
):
    """Multiply each row by the transpose of :func:`sparse_project`'s matrix, back to the columns.

    ``X[b, p] = scale * sum_j M[j, column_offset + p] * coefficients[b, j]``: an entry is a signed sum of ``nonzeros``
    coefficients. ``sparse_project`` and this are each other's derivative in reverse mode.

    Args:
        coefficients: [B, D] float16, bfloat16, float32 or float64 (reference only), D from ``nonzeros`` to 2^31; a torch
            tensor, NumPy array or CuPy array, any strides.
        num_columns: P, columns to return, from 0.
        nonzeros, seed, stream, scale: as in :func:`sparse_project`.
        column_offset: the column of M that gives ``X[:, 0]``; ``column_offset + num_columns`` is at most 2^39.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable. "cuda" and "triton" compute it by torch
            operations on their device, with the same bits as the reference.

    Returns:
        [B, P] float32 (float64 for float64 input), of the kind and on the device of ``coefficients``: the exact sum in the
        reference, rounded; on the CPU rounded at each of the additions, to at most ``nonzeros * 2^-24`` of the sum of
        magnitudes. NaN and inf propagate to the columns that meet them. Differentiable in both modes and any order.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: CPU, 16 KB and 2 KB per nonzero a thread, and 4 B D bytes unless the coefficients are contiguous float32.
    Others, 60 MB and 16 B D bytes.

    Source: as :func:`sparse_project`.
    """
    op = "sparse_project_transpose"
    coefficients, restore = check_grads(op, coefficients, "coefficients", "[B, D]")
    nonzeros = check_nonzeros(op, nonzeros, coefficients.shape[1], "coefficients.shape[1]")
    matrix = Sketch(seed, stream, column_offset, nonzeros, scale)
    return restore(_PROJECT.transpose(op, coefficients, num_columns, matrix, backend))


def check_nonzeros(op: str, nonzeros, proj_dim, name: str = "proj_dim") -> int:
    """1 to 8, and no more than there are outputs."""
    nonzeros = _arguments.check_integer(op, "nonzeros", nonzeros, 1, 8)
    _arguments.check_integer(op, name, proj_dim, nonzeros, MAX_PROJ_DIM)
    return nonzeros


def sketch_entries(columns, proj_dim, *, nonzeros=1, seed=0, stream=0):
    """Rows and signs of the matrix that :func:`sparse_project` multiplies by.

    Column i has ``M[rows[i, r], i] = signs[i, r]`` for its nonzeros r, and zeros elsewhere. Outputs are blocks of W <= 32
    lanes, of which nonzero r has G_r from block F_r on. Column i, lane i mod W of the m-th block of its tile, goes to row
    ``W * (F_r + (a m + b) mod G_r) + ((i mod W) xor x)``; a, b and x are Philox4x32-10 of the tile, r and the key, the sign is
    that of i div 128, r and the key. docs/projections.md gives every bit.

    Args:
        columns: [C] integers, a list, range or array, in [0, 2^39).
        proj_dim: D, from ``nonzeros`` to 2^31.
        nonzeros: entries of a column, 1 to 8.
        seed, stream: the key, each in [0, 2^32).

    Returns:
        rows: [C, nonzeros] int64 tensor, in [0, D), different within a column.
        signs: [C, nonzeros] float32 tensor of +-1. Both on the device of ``columns``.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Extra memory: about 200 bytes per entry.
    """
    op = "sketch_entries"
    columns = _arguments.check_indices(op, "columns", columns, MAX_COLUMNS)
    nonzeros = check_nonzeros(op, nonzeros, proj_dim)
    key = [
        _arguments.check_integer(op, name, word, 0, 2**32 - 1) for name, word in (("seed", seed), ("stream", stream))
    ]
    rows, signs = reference.sketch_entries(columns, int(proj_dim), nonzeros, *key)
    return rows, signs.to(torch.float32)
