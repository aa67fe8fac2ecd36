"""The seeded permutation of [0, 2^bits) as a device function: see ``csrc/common/permutation.h``; the same on every backend."""

import triton
import triton.language as tl

from .philox import philox_words


@triton.jit
def permute_bits(index, bits, seed, stream):
    """Where a Feistel network with halves of at most 31 bits sends each index; int64 in, int64 out."""
    left_bits = bits // 2
    right_bits = bits - left_bits
    ones = tl.full(index.shape, 1, tl.int64)
    left_mask = ((ones << left_bits) - 1).to(tl.uint32)
    right_mask = ((ones << right_bits) - 1).to(tl.uint32)
    left = (index >> right_bits).to(tl.uint32)
    right = index.to(tl.uint32) & right_mask
    word = tl.full(index.shape, 3, tl.uint32)
    for t in range(0, tl.where(bits >= 8, 6, 24), 2):
        half_round = tl.zeros_like(left) + tl.cast(t, tl.uint32)
        left ^= philox_words(right, half_round, seed, stream, word)[0] & left_mask
        right ^= philox_words(left, half_round + 1, seed, stream, word)[0] & right_mask
    return (left.to(tl.int64) << right_bits) | right.to(tl.int64)
