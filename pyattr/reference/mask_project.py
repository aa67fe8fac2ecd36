"""Coordinate sampling by definition: Y[b, j] = scale * G[b, r_j - column_offset], r_j = permutation(j) of [0, num_columns).

An entry whose coordinate lies outside the piece [column_offset, column_offset + P) is 0. Complexity: D evaluations of the
permutation, B * D copies.
"""

import torch

from .permutation import permutation


def mask_indices(num_columns, proj_dim, seed=0, stream=0, device="cpu"):  # -> [D] int64
    return permutation(torch.arange(proj_dim, device=device), num_columns, seed, stream)


def mask_project(grads, proj_dim, seed=0, stream=0, column_offset=0, num_columns=None, scale=1.0):  # [B, P] -> [B, D]
    num_columns = grads.shape[1] if num_columns is None else num_columns
    columns = mask_indices(num_columns, proj_dim, seed, stream, grads.device) - column_offset
    inside = (columns >= 0) & (columns < grads.shape[1])
    out = torch.zeros(grads.shape[0], proj_dim, dtype=torch.float64, device=grads.device)
    out[:, inside] = grads[:, columns[inside]].to(torch.float64) * scale
    return out.to(torch.float64 if grads.dtype == torch.float64 else torch.float32)


def mask_project_transpose(
    coefficients, num_columns_here, seed=0, stream=0, column_offset=0, num_columns=None, scale=1.0
):  # [B, D] -> [B, P]
    """The adjoint: every coordinate is kept at most once, so nothing is added up."""
    total = num_columns_here if num_columns is None else num_columns
    columns = mask_indices(total, coefficients.shape[1], seed, stream, coefficients.device) - column_offset
    inside = (columns >= 0) & (columns < num_columns_here)
    dtype = torch.float64 if coefficients.dtype == torch.float64 else torch.float32
    out = torch.zeros(coefficients.shape[0], num_columns_here, dtype=dtype, device=coefficients.device)
    out[:, columns[inside]] = coefficients[:, inside].to(dtype) * scale
    return out
