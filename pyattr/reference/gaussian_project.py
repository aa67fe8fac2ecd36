"""Gaussian projection by definition: Y = scale * G Z^T with Z standard normal, written out in blocks of columns.

Z[j, i]: Philox4x32-10 with counter (i div 4, j, 0, 0) and key (seed, stream) gives x0..x3; pair q = (i div 2) mod 2 takes
a = x0 or x2 and b = x1 or x3; u1 = (a + 0.5) 2^-32, u2 = b 2^-32, r = sqrt(-2 ln u1); even i is r cos(2 pi u2), odd i is
r sin(2 pi u2) (Box and Muller 1958).
"""

import math

import torch

from .philox import philox4x32_10
from .rademacher_project import _project, _project_transpose


def normal_matrix(rows, columns, seed, stream=0):  # [R], [C] int64 -> [R, C] float64
    """See :func:`pyattr.ops.normal_matrix`."""
    calls, inverse = torch.unique(columns // 4, return_inverse=True)  # one Philox call makes 4 columns
    x = torch.stack(philox4x32_10((calls, rows[:, None], 0, 0), (seed, stream))).to(torch.float64)  # [4, R, calls]
    radius = torch.sqrt(-2 * torch.log((x[0::2] + 0.5) * 2.0**-32))  # [2, R, calls]
    angle = x[1::2] * (2 * math.pi * 2.0**-32)
    normals = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1).flatten(0, 1)  # [4, R, calls]
    return normals[columns % 4, :, inverse].T


def gaussian_project(grads, proj_dim, seed=0, stream=0, column_offset=0, scale=1.0):  # [B, P] -> [B, D]
    return _project(normal_matrix, grads, proj_dim, seed, stream, column_offset, scale)


def gaussian_project_transpose(
    coefficients, num_columns, seed=0, stream=0, column_offset=0, scale=1.0
):  # [B, D] -> [B, P]
    return _project_transpose(normal_matrix, coefficients, num_columns, seed, stream, column_offset, scale)
