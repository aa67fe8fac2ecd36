"""Sign projection in Triton: see ``csrc/rademacher_project.h`` for the matrix.

Signs are made in registers and met with tl.dot; float32 gradients are three bfloat16 limbs, so products are exact in every
input type. Error: that of float32 sums, in which a tensor core may cut off instead of round. Extra memory: partial sums, at
most 64 MiB.
"""

import torch
import triton
import triton.language as tl

from .philox import philox_words
from .projection import leading_limb, load_gradients, project

OPERANDS = {torch.float16: (1, tl.float16), torch.bfloat16: (1, tl.bfloat16), torch.float32: (3, tl.bfloat16)}


@triton.jit(do_not_specialize=["seed", "stream", "column_offset", "first_row", "first_block"])
def rademacher_project_kernel(
    grads_ptr,  # [num_samples, num_columns]
    partial_ptr,  # [ranges, num_samples, num_rows]
    num_samples,
    num_columns,
    sample_stride,
    column_stride,
    first_row,  # of the matrix
    num_rows,
    seed,
    stream,
    column_offset,
    first_block,  # column_offset div 128
    num_blocks,
    range_blocks,
    LIMBS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
):
    """partial[r, b, d] = sum over the columns of range r of S[first_row + d, column] * grads[b, column - column_offset]."""
    local_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [d]
    rows = (local_rows.to(tl.int64) + first_row).to(tl.uint32)
    samples = tl.arange(0, BLOCK_SAMPLES).to(tl.int64)  # [b]
    begin = tl.program_id(1).to(tl.int64) * range_blocks
    end = tl.minimum(begin + range_blocks, num_blocks)
    bit = tl.arange(0, 16).to(tl.uint32)

    total = tl.zeros([BLOCK_ROWS, BLOCK_SAMPLES], tl.float32)
    # Eight blocks are summed by the tensor core, which cuts off, before they are added to a sum that rounds.
    for start in range(begin, end, 8):
        products = tl.zeros([BLOCK_ROWS, BLOCK_SAMPLES], tl.float32)
        for block in range(start, tl.minimum(start + 8, end)):
            call = block + first_block
            w0, w1, w2, w3 = philox_words(tl.zeros_like(rows) + call.to(tl.uint32), rows, seed, stream)
            for word in tl.static_range(4):
                w = w0 if word == 0 else w1 if word == 1 else w2 if word == 2 else w3
                # Through a join, so that a call is made by one thread; broadcast directly, every thread that needs its words
                # would make it again.
                halves = tl.join(w, w >> 16)  # [d, 2]
                bits = (halves[:, :, None] >> bit[None, None, :]) & 1  # [d, 2, 16]
                signs = tl.where(bits.reshape(BLOCK_ROWS, 32) != 0, 1.0, -1.0).to(DOT_TYPE)
                columns = call * 128 + word * 32 - column_offset + tl.arange(0, 32)
                rest = load_gradients(
                    grads_ptr, samples, columns, num_samples, num_columns, sample_stride, column_stride
                )
                if LIMBS == 1:
                    products = tl.dot(signs, rest.to(DOT_TYPE), products, input_precision="ieee")
                else:
                    for limb in tl.static_range(LIMBS):
                        part = leading_limb(rest)
                        products = tl.dot(signs, part.to(DOT_TYPE), products, input_precision="ieee")
                        if limb + 1 < LIMBS:
                            # An infinity is its first limb alone: inf - inf would make it a NaN.
                            rest = tl.where(tl.abs(rest) == float("inf"), 0.0, rest - part)
        total += products
    out = (
        partial_ptr + (tl.program_id(1).to(tl.int64) * num_samples + samples[None, :]) * num_rows + local_rows[:, None]
    )
    tl.store(out, total, mask=(local_rows[:, None] < num_rows) & (samples[None, :] < num_samples))


def rademacher_project(grads, out, seed, stream, column_offset, scale):  # [B, P] -> [B, D]
    """out[b, j] = scale * sum_p S[j, column_offset + p] * grads[b, p]; out float32, contiguous."""
    project(rademacher_project_kernel, OPERANDS, 128, 4, grads, out, seed, stream, column_offset, scale)
