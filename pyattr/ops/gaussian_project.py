"""Dense projection by a matrix of standard normals that is never stored."""

from ..reference import gaussian_project as reference
from ._arguments import check_indices, check_integer
from ._projection import Matrix, Projection

MAX_COLUMNS = 2**34  # the Philox counter holds the column div 4 in 32 bits

_PROJECT = Projection(
    "gaussian_project",
    reference.gaussian_project,
    reference.gaussian_project_transpose,
    max_columns=MAX_COLUMNS,
)


def gaussian_project(grads, proj_dim, *, seed=0, stream=0, column_offset=0, scale=1.0, backend=None):
    """Project each row onto ``proj_dim`` random normal vectors.

    ``Y[b, j] = scale * sum_p Z[j, column_offset + p] * grads[b, p]``, with Z standard normal, a function of (seed, stream, j,
    column) alone. Unscaled by default: ``E <Y, Y'> = scale^2 * D * <g, g'>``, with the variance

        ``Var <Y, Y'> = scale^4 * D * (|g|^2 |g'|^2 + <g, g'>^2)``.

    The Rademacher projection has lower variance and is several times faster; this one is for agreement with published settings.

    Args:
        grads: [B, P] float16, bfloat16, float32 or float64 (reference only); a torch tensor, NumPy array or CuPy array, any
            strides.
        proj_dim: D, 1 to 2^32.
        seed: word 0 of the Philox key, in [0, 2^32).
        stream: word 1 of the Philox key, in [0, 2^32).
        column_offset: the column of Z that multiplies ``grads[:, 0]``; at most 2^34 - P.
        scale: multiplies the result; 0, or of a magnitude that float32 holds at full precision.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        [B, D] float32 (float64 for float64 input), of the kind and on the device of ``grads``. Each entry of Z is within 2e-6
        of its float64 value, and every backend is tested to ``(2e-6 + 2^-15) * |scale| * sum_p |grads[b, p]|`` against the
        float64 definition, the CPU to 2^-19 in place of 2^-15. On cpu, cuda and triton the bits of a row do not depend on the
        thread count, on the other rows, or on the run; the reference and the transpose end in a library's matmul, whose bits
        may. NaN and inf propagate.
        Differentiable in both modes and any order, also under torch.compile.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: CPU, 8.5 MB per thread.
    CUDA and Triton, partial sums of at most 64 MiB. Reference, 90 MB and 16 B D bytes. The transpose (reverse mode), 90 MB.

    Source: Box and Muller 1958 on Philox4x32-10 (Salmon et al., SC 2011); D-TRAK, Zheng et al., ICLR 2024, projects so.
    """
    return _PROJECT(grads, proj_dim, Matrix(seed, stream, column_offset, scale), backend)


def normal_matrix(rows, columns, seed, stream=0):
    """Entries of the normal matrix that :func:`gaussian_project` multiplies by.

    ``Z[j, i]`` is ``r cos(2 pi u)`` for even i and ``r sin(2 pi u)`` for odd i, ``r = (-2 ln((a + 1/2) 2^-32))^(1/2)`` and
    ``u = b 2^-32``, where (a, b) is the pair (i div 2) mod 2 of the words of Philox4x32-10 with counter (i div 4, j, 0, 0) and
    key (seed, stream).

    Args:
        rows: [R] integers j, a list, range or array, in [0, 2^32).
        columns: [C] integers i, likewise, in [0, 2^34).
        seed, stream: the key, each in [0, 2^32).

    Returns:
        [R, C] float64 tensor on the device of ``rows``.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Extra memory: about 150 bytes per entry.
    """
    rows = check_indices("normal_matrix", "rows", rows, 2**32)
    columns = check_indices("normal_matrix", "columns", columns, 2**34).to(rows.device)
    key = [
        check_integer("normal_matrix", name, word, 0, 2**32 - 1) for name, word in (("seed", seed), ("stream", stream))
    ]
    return reference.normal_matrix(rows, columns, *key)
