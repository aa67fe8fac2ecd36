"""Sparse projection by definition: Y = scale * G M^T, M a D x P matrix with s entries +-1 in each column.

The D outputs are NB = D / W blocks of W lanes, W = gcd(D, 32), halved until NB >= s and, where s divides D, s
divides NB. Nonzero r of s belongs to the block group
[F_r, F_(r+1)) with F_r = r NB div s, of size G_r: the nonzeros of a column lie in different rows. A column i is lane i mod W of
block q = i div W, the m-th block of tile t: q = t G_r + m. Its row is

    W * (F_r + (a m + b) mod G_r) + (lane xor x)

with a prime to G_r, b uniform in [0, G_r) and x in [0, W), which the tile draws: words of Philox4x32-10 with counter
(t mod 2^32, r, 2, t div 2^32) and key (seed, stream) give a = 2^32 - GAPS[word 0 mod 64], b = (word 1 * G_r) div 2^32,
x = word 2 mod W. The sign is bit (i mod 32) of word (i mod 128) div 32 of counter (i div 128, r, 1, 0); a set bit is +1.

Within a tile no two columns of a nonzero meet; those of different tiles meet with probability 1 / (G_r W), as in a CountSketch.
Complexity: s * P multiply-adds per sample.
"""

import math
from itertools import pairwise

import torch

from .philox import philox4x32_10

# 2^32 minus its 64 largest primes, which are prime to every number of blocks.
GAPS = (
    5, 17, 65, 99, 107, 135, 153, 185, 209, 267, 299, 315, 353, 369, 387, 419, 467, 483, 527, 629, 635, 639, 645, 657, 677, 705,
    713, 743, 819, 849, 855, 869, 923, 929, 959, 999, 1053, 1059, 1065, 1079, 1109, 1119, 1133, 1143, 1167, 1175, 1197, 1209,
    1223, 1253, 1289, 1295, 1319, 1325, 1329, 1347, 1359, 1385, 1409, 1449, 1455, 1457, 1475, 1503,
)  # fmt: skip
BLOCK_COLUMNS = 1 << 18  # worked on at a time


def lanes(proj_dim, nonzeros):
    """W: columns of a block, a power of two that divides D and leaves blocks to every nonzero, evenly if s divides D."""
    width, even = math.gcd(proj_dim, 32), proj_dim % nonzeros == 0
    while proj_dim // width < nonzeros or (even and proj_dim // width % nonzeros):
        width //= 2
    return width


def groups(proj_dim, nonzeros):
    """[(F_r, G_r)]: first block and number of blocks of every nonzero."""
    blocks = proj_dim // lanes(proj_dim, nonzeros)
    firsts = [r * blocks // nonzeros for r in range(nonzeros + 1)]
    return [(first, last - first) for first, last in pairwise(firsts)]


def sketch_entries(columns, proj_dim, nonzeros, seed, stream=0):  # [C] int64 -> [C, s] int64 rows, [C, s] float64 +-1
    """See :func:`pyattr.ops.sketch_entries`."""
    width = lanes(proj_dim, nonzeros)
    gaps = torch.tensor(GAPS, device=columns.device)
    rows, signs = [], []
    for r, (first, size) in enumerate(groups(proj_dim, nonzeros)):
        tile, m = columns // width // size, columns // width % size
        words = philox4x32_10((tile & 0xFFFFFFFF, r, 2, tile >> 32), (seed, stream))
        a, b, x = (2**32 - gaps[words[0] % 64]) % size, words[1] * size >> 32, words[2] % width
        rows.append(width * (first + (a * m + b) % size) + (columns % width ^ x))
        calls, inverse = torch.unique(columns // 128, return_inverse=True)
        word = torch.stack(philox4x32_10((calls, r, 1, 0), (seed, stream)))[columns % 128 // 32, inverse]
        signs.append((word >> columns % 32 & 1) * 2 - 1)
    return torch.stack(rows, 1), torch.stack(signs, 1).to(torch.float64)


def sparse_project(grads, proj_dim, seed=0, stream=0, column_offset=0, nonzeros=1, scale=1.0):  # [B, P] -> [B, D]
    out = torch.zeros(grads.shape[0], proj_dim, dtype=torch.float64, device=grads.device)
    for part, rows, signs in _blocks(grads.shape[1], proj_dim, seed, stream, column_offset, nonzeros, grads.device):
        for r in range(nonzeros):
            out.index_add_(1, rows[:, r], grads[:, part].to(torch.float64) * signs[:, r])
    return (out * scale).to(torch.float64 if grads.dtype == torch.float64 else torch.float32)


def sparse_project_transpose(
    coefficients, num_columns, seed=0, stream=0, column_offset=0, nonzeros=1, scale=1.0
):  # [B, D] -> [B, P]
    dtype = torch.float64 if coefficients.dtype == torch.float64 else torch.float32
    out = torch.empty(coefficients.shape[0], num_columns, dtype=dtype, device=coefficients.device)
    proj_dim, wide = coefficients.shape[1], coefficients.to(torch.float64)
    for part, rows, signs in _blocks(num_columns, proj_dim, seed, stream, column_offset, nonzeros, out.device):
        out[:, part] = sum(wide[:, rows[:, r]] * signs[:, r] for r in range(nonzeros)) * scale
    return out


def _blocks(num_columns, proj_dim, seed, stream, column_offset, nonzeros, device):
    """Slices of columns with their rows and signs."""
    for start in range(0, num_columns, BLOCK_COLUMNS):
        part = slice(start, min(start + BLOCK_COLUMNS, num_columns))
        columns = torch.arange(column_offset + part.start, column_offset + part.stop, device=device)
        yield part, *sketch_entries(columns, proj_dim, nonzeros, seed, stream)
