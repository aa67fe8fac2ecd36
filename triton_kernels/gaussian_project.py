"""Normal projection in Triton: see ``csrc/gaussian_project.h`` for the matrix.

An entry is three bfloat16 limbs, a gradient one (bfloat16), two (float16) or three (float32); the products that matter in
float32 meet in tl.dot. Error: 2e-6 per entry, and that of float32 sums, in which a tensor core may cut off instead of round.
Extra memory: partial sums, at most 64 MiB.
"""

import torch
import triton
import triton.language as tl

from .philox import interleave_four, normal_pair, philox_words
from .projection import leading_limb, load_gradients, project

OPERANDS = {torch.float16: (2, tl.bfloat16), torch.bfloat16: (1, tl.bfloat16), torch.float32: (3, tl.bfloat16)}


@triton.jit(do_not_specialize=["seed", "stream", "column_offset", "first_row", "first_block"])
def gaussian_project_kernel(
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
    """partial[r, b, d] = sum over the columns of range r of Z[first_row + d, column] * grads[b, column - column_offset]."""
    STEP: tl.constexpr = 32  # columns at a time: a block of 128 would not fit in registers
    local_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [d]
    rows = (local_rows.to(tl.int64) + first_row).to(tl.uint32)
    samples = tl.arange(0, BLOCK_SAMPLES).to(tl.int64)  # [b]
    begin = tl.program_id(1).to(tl.int64) * range_blocks
    end = tl.minimum(begin + range_blocks, num_blocks)
    row_of_call = tl.broadcast_to(rows[:, None], [BLOCK_ROWS, STEP // 4])

    total = tl.zeros([BLOCK_ROWS, BLOCK_SAMPLES], tl.float32)
    for step in range(begin * (128 // STEP), end * (128 // STEP)):
        first = tl.cast(first_block, tl.int64) * 128 + step * STEP
        call = first // 4 + tl.arange(0, STEP // 4)
        w0, w1, w2, w3 = philox_words(
            tl.zeros_like(row_of_call) + call.to(tl.uint32)[None, :], row_of_call, seed, stream
        )
        z0, z1 = normal_pair(w0, w1)
        z2, z3 = normal_pair(w2, w3)
        entries = interleave_four(z0, z1, z2, z3, BLOCK_ROWS, STEP)
        columns = first - column_offset + tl.arange(0, STEP)
        grads = load_gradients(grads_ptr, samples, columns, num_samples, num_columns, sample_stride, column_stride)
        grads = grads.to(tl.float32)
        special = (tl.abs(grads) == float("inf")) | (grads != grads)
        finite = tl.where(special, 0.0, grads)

        entries_0 = leading_limb(entries)
        entries_1 = leading_limb(entries - entries_0)
        entries_2 = entries - entries_0 - entries_1
        grads_0 = leading_limb(finite)
        products = tl.zeros([BLOCK_ROWS, BLOCK_SAMPLES], tl.float32)
        a0, a1, a2, b0 = entries_0.to(DOT_TYPE), entries_1.to(DOT_TYPE), entries_2.to(DOT_TYPE), grads_0.to(DOT_TYPE)
        products = tl.dot(a2, b0, products, input_precision="ieee")
        if LIMBS > 1:
            grads_1 = leading_limb(finite - grads_0)
            b1 = grads_1.to(DOT_TYPE)
            if LIMBS > 2:
                products = tl.dot(a0, (finite - grads_0 - grads_1).to(DOT_TYPE), products, input_precision="ieee")
            products = tl.dot(a1, b1, products, input_precision="ieee")
            products = tl.dot(a0, b1, products, input_precision="ieee")
        products = tl.dot(a1, b0, products, input_precision="ieee")
        products = tl.dot(a0, b0, products, input_precision="ieee")
        # Infinities and NaNs meet the entry's sign, not its limbs: a limb may be 0, and 0 times an infinity is a NaN.
        sign = tl.where(entries > 0, 1.0, tl.where(entries < 0, -1.0, 0.0))
        products = tl.dot(
            sign.to(DOT_TYPE), tl.where(special, grads, 0.0).to(DOT_TYPE), products, input_precision="ieee"
        )
        total += products
    out = (
        partial_ptr + (tl.program_id(1).to(tl.int64) * num_samples + samples[None, :]) * num_rows + local_rows[:, None]
    )
    tl.store(out, total, mask=(local_rows[:, None] < num_rows) & (samples[None, :] < num_samples))


def gaussian_project(grads, out, seed, stream, column_offset, scale):  # [B, P] -> [B, D]
    """out[b, j] = scale * sum_p Z[j, column_offset + p] * grads[b, p]; out float32, contiguous."""
    project(gaussian_project_kernel, OPERANDS, 64, 4, grads, out, seed, stream, column_offset, scale)
