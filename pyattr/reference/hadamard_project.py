"""Subsampled randomised Hadamard transform by definition: Y = scale * G M^T with M written out in blocks.

M[j, p] = (-1)^popcount(r_j & p) * s_p. r_j is the place to which the seeded permutation of [0, N) sends j, N the first power of
two from P on; s_p is bit (p mod 32) of word (p mod 128) div 32 of Philox4x32-10 with counter (p div 128, 0, 4, 0) and key
(seed, stream), a set bit +1, a clear one -1. Complexity: B * D * P multiply-adds.
"""

import torch

from .permutation import permutation
from .philox import philox4x32_10
from .rademacher_project import _project, _project_transpose

WORD = 4  # third counter word of the signs


def hadamard_rows(num_columns):
    """N: rows of the whole matrix, the first power of two from P on."""
    return 1 << max(num_columns - 1, 0).bit_length()


def hadamard_matrix(rows, columns, num_columns, seed=0, stream=0):  # [R], [C] int64 -> [R, C] float64 of +-1
    calls, inverse = torch.unique(columns // 128, return_inverse=True)
    words = torch.stack(torch.broadcast_tensors(*philox4x32_10((calls, 0, WORD, 0), (seed, stream))))  # [4, calls]
    signs = ((words[columns % 128 // 32, inverse] >> (columns % 32)) & 1) * 2 - 1  # [C]
    parity = permutation(rows, hadamard_rows(num_columns), seed, stream)[:, None] & columns  # [R, C]
    for shift in (32, 16, 8, 4, 2, 1):
        parity ^= parity >> shift
    return ((1 - 2 * (parity & 1)) * signs).to(torch.float64)


def hadamard_project(grads, proj_dim, seed=0, stream=0, scale=1.0):  # [B, P] -> [B, D]
    return _project(_entries(grads.shape[1]), grads, proj_dim, seed, stream, 0, scale)


def hadamard_project_transpose(coefficients, num_columns, seed=0, stream=0, scale=1.0):  # [B, D] -> [B, P]
    return _project_transpose(_entries(num_columns), coefficients, num_columns, seed, stream, 0, scale)


def _entries(num_columns):
    def entries(rows, columns, seed, stream):
        return hadamard_matrix(rows, columns, num_columns, seed, stream)

    return entries
