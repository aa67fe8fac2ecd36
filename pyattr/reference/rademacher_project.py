"""Rademacher projection by definition: Y = scale * G S^T with the D x P sign matrix S written out in blocks of columns.

S[j, i] is bit (i mod 32) of word (i mod 128) div 32 of Philox4x32-10 with counter (i div 128, j, 0, 0) and key (seed, stream);
a set bit is +1, a clear one -1. Complexity: D * P Philox words, B * D * P multiply-adds.
"""

import torch

from .philox import philox4x32_10

BLOCK_ENTRIES = 1 << 20  # of the matrix written out at a time: 8 MB in float64


def sign_matrix(rows, columns, seed, stream=0):  # [R], [C] int64 -> [R, C] float64 of +-1
    """See :func:`pyattr.ops.sign_matrix`."""
    blocks, inverse = torch.unique(columns // 128, return_inverse=True)  # one Philox call makes 128 columns
    words = torch.stack(philox4x32_10((blocks, rows[:, None], 0, 0), (seed, stream)))  # [4, R, blocks]
    word = words[columns % 128 // 32, :, inverse].T  # [R, C]
    return ((word >> (columns % 32)) & 1).to(torch.float64) * 2 - 1


def rademacher_project(grads, proj_dim, seed=0, stream=0, column_offset=0, scale=1.0):  # [B, P] -> [B, D]
    return _project(sign_matrix, grads, proj_dim, seed, stream, column_offset, scale)


def rademacher_project_transpose(
    coefficients, num_columns, seed=0, stream=0, column_offset=0, scale=1.0
):  # [B, D] -> [B, P]
    return _project_transpose(sign_matrix, coefficients, num_columns, seed, stream, column_offset, scale)


def _blocks(num_columns, proj_dim):
    """Slices of columns and of rows whose product is at most BLOCK_ENTRIES; columns in whole Philox calls where they can be."""
    height = min(proj_dim, BLOCK_ENTRIES // 128)
    width = BLOCK_ENTRIES // max(height, 1) // 128 * 128
    for start in range(0, num_columns, width):
        for row in range(0, proj_dim, height):
            yield slice(start, min(start + width, num_columns)), slice(row, min(row + height, proj_dim))


def _block(matrix, columns, rows, seed, stream, column_offset, device):
    """M[rows, column_offset + columns] in float64."""
    rows = torch.arange(rows.start, rows.stop, device=device)
    columns = torch.arange(column_offset + columns.start, column_offset + columns.stop, device=device)
    return matrix(rows, columns, seed, stream)


def _project(matrix, grads, proj_dim, seed, stream, column_offset, scale):
    """Y = scale * G M^T, M generated a block at a time, summed in float64."""
    out = torch.zeros(grads.shape[0], proj_dim, dtype=torch.float64, device=grads.device)  # [B, D]
    for columns, rows in _blocks(grads.shape[1], proj_dim):
        block = _block(matrix, columns, rows, seed, stream, column_offset, grads.device)
        out[:, rows] += grads[:, columns].to(torch.float64) @ block.T
    return (out * scale).to(torch.float64 if grads.dtype == torch.float64 else torch.float32)


def _project_transpose(matrix, coefficients, num_columns, seed, stream, column_offset, scale):
    """X = scale * C M, the adjoint of :func:`_project`."""
    dtype = torch.float64 if coefficients.dtype == torch.float64 else torch.float32
    shape = (coefficients.shape[0], num_columns)  # [B, P]
    out = torch.zeros(shape, dtype=dtype, device=coefficients.device)
    for columns, rows in _blocks(num_columns, coefficients.shape[1]):
        block = _block(matrix, columns, rows, seed, stream, column_offset, coefficients.device).to(dtype)
        out[:, columns] += coefficients[:, rows].to(dtype) @ block
    return out.mul_(scale)
