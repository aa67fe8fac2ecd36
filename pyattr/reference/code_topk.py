"""The largest or smallest influence norms of codes, by definition.

With c the n bits of a code, h of them set, w = (1 - c) / (n - h) - 1 / n and H the centring matrix, w = -H c / (n - h), so
that w^T G w = c^T (HGH) c / (n - h)^2. HGH is formed exactly, in integers, and rounded once, to a multiple of a power of two;
sums of such multiples are exact in whatever order, so that every backend gives the same bits and ties stay ties.
"""

import numpy as np
import torch

CODES = 8192  # at a time
_LOW = 26  # bits of the lower limb: n^2 products of one sum to less than 2^53


def centred_gram(gram):  # [n, n] float64 -> [n, n] int64, int
    """M and e with M * 4^e = 2 n^2 H S H up to half a unit in each entry, S the symmetric part of ``gram``.

    The largest entry of M has 62 - 2 ceil(log2 n) or one fewer bits, so that a sum of n^2 entries fits in 63.
    """
    n = len(gram)
    ratios = [[float(x).as_integer_ratio() for x in row] for row in gram.tolist()]
    low = max(q.bit_length() - 1 for row in ratios for _, q in row)  # entries are multiples of 2^-low
    whole = [[p << low - (q.bit_length() - 1) for p, q in row] for row in ratios]
    twice = [[whole[i][j] + whole[j][i] for j in range(n)] for i in range(n)]
    rows = [sum(row) for row in twice]
    total = sum(rows)
    centred = [[n * n * twice[i][j] - n * (rows[i] + rows[j]) + total for j in range(n)] for i in range(n)]
    shift = max(abs(x) for row in centred for x in row).bit_length() - (62 - 2 * (n - 1).bit_length())
    shift += (shift - low) % 2
    rounded = [[(x + (1 << shift - 1)) >> shift if shift > 0 else x << -shift for x in row] for row in centred]
    return torch.tensor(rounded, dtype=torch.int64), (shift - low) // 2


def relative_squares(matrix, codes):  # [n, n] int64, [B] int64 -> [B] float64
    """c^T M c / (n - h)^2, or 0 where that is negative; c^T M c of a code or its complement, the one without bit n - 1."""
    n = len(matrix)
    bits = (codes[:, None] >> torch.arange(n, device=codes.device)) & 1
    weights = bits.sum(1)
    bits = (bits ^ bits[:, -1:]).double()
    matrix = matrix.to(codes.device)
    limbs = [matrix >> _LOW, matrix & ((1 << _LOW) - 1)]
    high, low = (((bits @ limb.double()) * bits).sum(1).long() for limb in limbs)
    return ((high << _LOW) + low).clamp(min=0).double() / (n - weights).square()


def norms(squares, n, exponent):  # [k] float64 -> [k] float64
    """Influence norms from relative squares; by NumPy, as torch's square root is not always the nearest number."""
    roots = np.sqrt(squares.cpu().numpy() / (2 * n * n))
    return torch.from_numpy(np.ldexp(roots, exponent)).to(squares.device)


def merge(best, values, indices, k, largest):
    """The k best of ``best`` (values, indices) and of what comes after it, ties by lowest index."""
    values, indices = torch.cat([best[0], values]), torch.cat([best[1], indices])
    values, order = values.sort(descending=largest, stable=True)
    return values[:k], indices[order[:k]]


def code_topk(gram, codes, k, largest):  # [n, n] float64, [N] int64 -> [k] float64, [k] int64
    """See :func:`pyattr.ops.code_topk`."""
    matrix, exponent = centred_gram(gram)
    best = codes.new_empty(0, dtype=torch.float64), codes.new_empty(0)
    for first in range(0, len(codes), CODES):
        piece = codes[first : first + CODES]
        indices = torch.arange(first, first + len(piece), device=codes.device)
        best = merge(best, relative_squares(matrix, piece), indices, k, largest)
    return norms(best[0], len(gram), exponent), best[1]
