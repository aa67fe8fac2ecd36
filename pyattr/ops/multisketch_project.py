"""Projection in two stages: a sparse one to 2^20 entries, then a dense one."""

import torch

from .. import backends
from ..backends import Backend
from ..reference import multisketch_project as reference
from ..reference.multisketch_project import WIDTH
from ..reference.rademacher_project import rademacher_project_transpose
from ..reference.sparse_project import sparse_project_transpose
from ._arguments import check_integer, check_piece
from ._linear import register_pair
from ._projection import Matrix, check_grads, check_matrix
from .rademacher_project import rademacher_project
from .sparse_project import MAX_COLUMNS, sparse_project

BLOCK_SAMPLES = 16  # whose intermediate results are in memory at a time: 4 MiB each


def multisketch_project(
    grads, proj_dim, *, seed=0, stream=0, column_offset=0, num_columns=None, scale=1.0, backend=None
):
    """Project each row sparsely to 2^20 entries, and those densely to ``proj_dim``: the accuracy of one, the cost of the other.

    ``Y = scale * S (M g)``, with M the matrix of `sparse_project` with 2^20 rows and one nonzero a column, S [D, 2^20] that of
    `rademacher_project`, both of the same key. It costs P + 2^20 D additions per row where a dense projection costs P D.

    Inner products have ``E <Y, Y'> = D * <g, g'>`` (unscaled), as in `rademacher_project`; ``scale = D ** -0.5`` keeps them.
    With that scale their variance is

        ``Var <Y, Y'> = v + E (|z|^2 |z'|^2 + <z, z'>^2 - 2 sum_q z_q^2 z'_q^2) / D``,

    where z = M g and v <= (|g|^2 |g'|^2 + <g, g'>^2) / 2^20 is the sparse stage's: that of a dense projection times
    ``1 + D / 2^20`` and terms of the order of 2^-20, unless few entries hold the norm. A gradient of at most 2^20 entries is
    only permuted by the first stage, and loses nothing.

    Args:
        grads: [B, P] float16, bfloat16, float32 or float64 (reference only); a torch tensor, NumPy array or CuPy array, any
            strides.
        proj_dim: D, 1 to 2^32.
        seed: word 0 of the Philox key, in [0, 2^32).
        stream: word 1 of the Philox key, in [0, 2^32); independent matrices of one seed.
        column_offset: the column that multiplies ``grads[:, 0]``. Pieces of a gradient, each with its own offset, add up to the
            projection of the whole (to rounding), but each pays for the dense stage: project the pieces by `sparse_project` to
            2^20, add them up, then project once by `rademacher_project` for the same result.
        num_columns: columns in all, of which the piece must be a part; P by default, required with ``column_offset``.
        scale: multiplies the result; 0, or of a magnitude that float32 holds at full precision.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        [B, D] float32 (float64 for float64 input), of the kind and on the device of ``grads``, as reproducible and as
        accurate as the two projections it is made of. Differentiable in both modes and any order, also under torch.compile.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: 4 MiB a row for up to 16 rows at a time (8 MiB on the reference, for all rows), and what the two take.

    Source: Sobczyk, Gallopoulos, "Estimating leverage scores via rank revealing methods and randomization", 2021 (CountSketch
    followed by a dense projection).
    """
    op = "multisketch_project"
    grads, restore = check_grads(op, grads)
    check_piece(op, grads, column_offset, num_columns, MAX_COLUMNS)
    proj_dim = check_integer(op, "proj_dim", proj_dim, 1, 2**32)
    matrix = check_matrix(op, Matrix(seed, stream, column_offset, scale), MAX_COLUMNS - grads.shape[1])
    return restore(_OP(grads, proj_dim, *matrix, backend))


def _run(name):
    def run(grads, proj_dim, seed, stream, column_offset, scale):
        key, total = {"seed": seed, "stream": stream, "backend": name}, column_offset + grads.shape[1]
        blocks = [
            rademacher_project(
                sparse_project(block, WIDTH, column_offset=column_offset, num_columns=total, **key),
                proj_dim,
                scale=scale,
                **key,
            )
            for block in grads.split(BLOCK_SAMPLES)
        ]
        return torch.cat(blocks) if len(blocks) > 1 else blocks[0]

    return run


def _unsupported(name):
    return lambda grads, *_: backends.placement_unsupported(name, grads=grads)


backends.register(
    "multisketch_project",
    [Backend("reference", reference.multisketch_project, backends.always, lambda *args: [])]
    + [
        Backend(name, _run(name), backends.made_of(name, "sparse_project", "rademacher_project"), _unsupported(name))
        for name in ("cpu", "cuda", "triton")
    ],
)


def _project(grads, proj_dim, *matrix_and_backend):
    *matrix, backend = matrix_and_backend
    return backends.choose("multisketch_project", backend, grads, proj_dim, *matrix).run(grads, proj_dim, *matrix)


def _transpose(coefficients, num_columns, seed, stream, column_offset, scale, backend):
    between = rademacher_project_transpose(coefficients, WIDTH, seed, stream, 0, scale)
    return sparse_project_transpose(between, num_columns, seed, stream, column_offset)


_OP, _ = register_pair("multisketch_project", _project, _transpose, Matrix)
