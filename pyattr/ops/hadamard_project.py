"""Projection by a subsampled randomised Hadamard transform that is never stored."""

from typing import NamedTuple

from ..reference import hadamard_project as reference
from ._arguments import check_integer
from ._projection import Projection

MAX_COLUMNS = 2**39  # the Philox counter holds the column div 128 in 32 bits


class Transform(NamedTuple):
    """Everything that defines the rows and signs, and the scale; whole vectors only, so no offset."""

    seed: int
    stream: int
    scale: float


_PROJECT = Projection(
    "hadamard_project",
    reference.hadamard_project,
    reference.hadamard_project_transpose,
    max_columns=MAX_COLUMNS,
    matrix=Transform,
)


def hadamard_project(grads, proj_dim, *, seed=0, stream=0, scale=1.0, backend=None):
    """Project each row by a subsampled randomised Hadamard transform (SRHT).

    ``Y[b, j] = scale * sum_p (-1)^popcount(r_j & p) * s_p * grads[b, p]``: signs s_p in {-1, +1}, then rows r_j of the Hadamard
    matrix of order N, the first power of two from P on, all different and in random order. Signs and rows are functions of
    (seed, stream, p) and (seed, stream, N, j) alone: the same on every device, backend and batch.

    Unscaled entries are +-1, so that inner products grow by a factor D, ``E <Y, Y'> = scale^2 * D * <g, g'>``;
    ``scale=D ** -0.5`` keeps them. Over random signs and rows drawn without replacement the variance is exactly

        ``Var <Y, Y'> = scale^4 * D * (N - D) / (N - 1) * (|g|^2 |g'|^2 + <g, g'>^2 - 2 sum_p g_p^2 g'_p^2)``,

    that of a dense sign matrix times (N - D) / (N - 1). With D = N and scale = N ** -0.5 it is an isometry.

    Takes whole vectors only, no ``column_offset``: N, and with it every row, depends on P, and a transform of pieces would be
    another matrix. For gradients that come layer by layer use `rademacher_project` or `sparse_project`.

    Args:
        grads: [B, P] float16, bfloat16, float32 or float64 (reference only); a torch tensor, NumPy array or CuPy array, any
            strides; P at most 2^39.
        proj_dim: D, 1 to N.
        seed: word 0 of the Philox key, in [0, 2^32).
        stream: word 1 of the Philox key, in [0, 2^32); independent transforms of one seed.
        scale: multiplies the result; 0, or of a magnitude that float32 holds at full precision.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        [B, D] float32 (float64 for float64 input), of the kind and on the device of ``grads``. On cpu, cuda and triton the bits
        of a row do not depend on the thread count, on the other rows, or on the run; the CPU gives the same bits at every SIMD
        level. Rounding is at most ``(25 + P / (32 D')) * 2^-24 * |scale| * sum_p |grads[b, p]|`` on the CPU, D' being D but at
        least 2^8 and at most 2^14 (the longest chain of sums); every backend is tested to 2^-19 of that sum, the CPU to 2^-21.
        NaN and inf propagate to the whole row. Differentiable in both modes and any order, also under torch.compile.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: CPU, 8 D bytes, and per thread 32 D bytes and at most 270 KB. CUDA and Triton, 8 D bytes and partial sums of
    at most 64 MiB, or of one sample where its outputs take more. Reference, 100 MB and 16 B D bytes. The transpose (reverse
    mode), 100 MB.

    Time: per entry, on the CPU log2 of min(4 D, 2^16) additions and max(1 / 4, D / 2^16) look-ups at most.

    Source: Ailon and Chazelle, SIAM J. Comput. 39 (2009); Tropp, "Improved analysis of the subsampled randomized Hadamard
    transform", Adv. Adapt. Data Anal. 3 (2011).
    """
    check_size(grads, proj_dim)
    return _PROJECT(grads, proj_dim, Transform(seed, stream, scale), backend)


def check_size(grads, proj_dim):
    """D <= N; what is no [B, P] array is for the shared checks to reject."""
    shape = getattr(grads, "shape", ())
    if len(shape) != 2:
        return
    if shape[1] > MAX_COLUMNS:
        raise ValueError(f"hadamard_project: grads must have at most {MAX_COLUMNS} columns, got {shape[1]}")
    proj_dim = check_integer("hadamard_project", "proj_dim", proj_dim, 1, 2**32)
    least = 1 << (proj_dim - 1).bit_length()  # what N must reach, as it does from P = least / 2 + 1 on
    if least > 1 and 2 * shape[1] <= least:
        limit = reference.hadamard_rows(int(shape[1]))
        raise ValueError(
            f"hadamard_project: proj_dim must be at most {limit}, the first power of two from P = {shape[1]} on, "
            f"got {proj_dim}"
        )
