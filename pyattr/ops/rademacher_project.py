"""Dense projection by a matrix of random signs that is never stored."""

import torch

from ..reference import rademacher_project as reference
from ._arguments import check_indices, check_integer
from ._projection import Matrix, Projection

MAX_COLUMNS = 2**39  # the Philox counter holds the column div 128 in 32 bits

_PROJECT = Projection(
    "rademacher_project",
    reference.rademacher_project,
    reference.rademacher_project_transpose,
    max_columns=MAX_COLUMNS,
)


def rademacher_project(grads, proj_dim, *, seed=0, stream=0, column_offset=0, scale=1.0, backend=None):
    """Project each row onto ``proj_dim`` random sign vectors.

    ``Y[b, j] = scale * sum_p S[j, column_offset + p] * grads[b, p]``, with S in {-1, +1} a function of (seed, stream, j,
    column) alone: the same on every device, backend and batch. Unscaled by default, so that inner products grow by a factor
    ``proj_dim``, ``E <Y, Y'> = scale^2 * D * <g, g'>``; ``scale=proj_dim ** -0.5`` keeps them in expectation. Their variance is

        ``Var <Y, Y'> = scale^4 * D * (|g|^2 |g'|^2 + <g, g'>^2 - 2 sum_p g_p^2 g'_p^2)``.

    Args:
        grads: [B, P] float16, bfloat16, float32 or float64 (reference only); a torch tensor, NumPy array or CuPy array, any
            strides.
        proj_dim: D, 1 to 2^32.
        seed: word 0 of the Philox key, in [0, 2^32).
        stream: word 1 of the Philox key, in [0, 2^32); independent matrices of one seed.
        column_offset: the column of S that multiplies ``grads[:, 0]``. Pieces of a gradient, each with its own offset, add up
            to the projection of the whole (to rounding).
        scale: multiplies the result; 0, or of a magnitude that float32 holds at full precision.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        [B, D] float32 (float64 for float64 input), of the kind and on the device of ``grads``. On cpu, cuda and triton the bits
        of a row do not depend on the thread count, on the other rows, or on the run; the CPU gives the same bits at every SIMD
        level. The reference and the transpose end in a library's matmul, whose bits may. Rounding is at most
        ``(523 + P / 32768) * 2^-24 * |scale| * sum_p |grads[b, p]|`` on the CPU (the longest chain of sums); every backend is
        tested to 2^-17 of that sum against the float64 definition, the CPU to 2^-21. NaN and inf propagate to the whole row.
        Differentiable in both modes and any order, also under torch.compile.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: CPU, 0.5 MB per thread.
    CUDA and Triton, partial sums of at most 64 MiB. Reference, 70 MB and 16 B D bytes. The transpose (reverse mode), 60 MB.

    Source: Philox4x32-10, Salmon et al., SC 2011; TRAK, Park et al., ICML 2023, section 3.2 (random projection of gradients).
    """
    return _PROJECT(grads, proj_dim, Matrix(seed, stream, column_offset, scale), backend)


def sign_matrix(rows, columns, seed, stream=0):
    """Entries of the sign matrix that :func:`rademacher_project` multiplies by.

    ``S[j, i]`` is +1 where bit (i mod 32) of word (i mod 128) div 32 of Philox4x32-10 with counter (i div 128, j, 0, 0) and
    key (seed, stream) is set, else -1.

    Args:
        rows: [R] integers j, a list, range or array, in [0, 2^32).
        columns: [C] integers i, likewise, in [0, 2^39).
        seed, stream: the key, each in [0, 2^32).

    Returns:
        [R, C] float32 tensor of +-1, on the device of ``rows``.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Extra memory: about 100 bytes per entry.
    """
    rows = check_indices("sign_matrix", "rows", rows, 2**32)
    columns = check_indices("sign_matrix", "columns", columns, 2**39).to(rows.device)
    key = [
        check_integer("sign_matrix", name, word, 0, 2**32 - 1) for name, word in (("seed", seed), ("stream", stream))
    ]
    return reference.sign_matrix(rows, columns, *key).to(torch.float32)
