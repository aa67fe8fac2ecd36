"""Multisketch by definition: Y = scale * S (M g), M the sparse matrix with 2^20 rows and one sign per column, S dense signs.

Both have the same key (seed, stream); their words of the generator differ. Complexity: P + 2^20 * D multiply-adds per sample.
"""

from .rademacher_project import rademacher_project
from .sparse_project import sparse_project

WIDTH = 1 << 20  # between the two


def multisketch_project(grads, proj_dim, seed=0, stream=0, column_offset=0, scale=1.0):  # [B, P] -> [B, D]
    return rademacher_project(
        sparse_project(grads, WIDTH, seed, stream, column_offset), proj_dim, seed, stream, 0, scale
    )
