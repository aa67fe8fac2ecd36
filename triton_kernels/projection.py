"""What the dense projections share: how columns are cut into ranges, limbs of float32 for bfloat16 tensor cores, the last sum.

The order of summation depends on (P, column_offset, D) alone, and every program sees 64 samples, filled up with zeros: the
bits of a row do not depend on the batch or on the device's size.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

BLOCK_COLUMNS = 128  # of the matrix, worked on at a time
LAUNCH_SAMPLES = 64  # samples of a launch, one tile
SLAB_ROWS = 32768  # outputs of a launch
RANGE_ROWS = 1 << 18  # ranges * outputs, which bounds the partial results at 64 * 2^18 * 4 B = 64 MiB
MIN_RANGE_BLOCKS = 8


class Ranges(NamedTuple):
    """The blocks of 128 columns that a projection touches, cut into ranges of equal length."""

    first_block: int
    num_blocks: int
    range_blocks: int
    num_ranges: int


def plan_ranges(num_columns: int, column_offset: int, proj_dim: int) -> Ranges:
    """At most 64 ranges and at least 8, fewer for few columns."""
    first = column_offset // BLOCK_COLUMNS
    blocks = (column_offset + num_columns - 1) // BLOCK_COLUMNS + 1 - first
    wanted = min(max(RANGE_ROWS // min(proj_dim, SLAB_ROWS), 8), 64)
    length = max(triton.cdiv(blocks, wanted), MIN_RANGE_BLOCKS)
    return Ranges(first, blocks, length, triton.cdiv(blocks, length))


@triton.jit
def load_gradients(grads_ptr, samples, columns, num_samples, num_columns, sample_stride, column_stride):
    """[columns, samples] tile of grads [B, P] with zeros outside; samples and columns int64."""
    inside = (columns[:, None] >= 0) & (columns[:, None] < num_columns) & (samples[None, :] < num_samples)
    offsets = columns[:, None] * column_stride + samples[None, :] * sample_stride
    return tl.load(grads_ptr + offsets, mask=inside, other=0.0)


@triton.jit
def leading_limb(x):
    """The first 8 significant bits of a float32, exact in bfloat16; never rounds up to infinity."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def reduce_kernel(
    partial_ptr,  # [num_ranges, num_samples, num_rows]
    out_ptr,  # [num_samples, num_rows], out_stride elements from sample to sample
    num_ranges,
    num_samples,
    num_rows,
    out_stride,
    scale,
    BLOCK: tl.constexpr,
):
    """out = scale * sum over ranges, in order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.cast(num_samples, tl.int64) * num_rows
    inside = index < count
    total = tl.zeros([BLOCK], tl.float32)
    for r in range(num_ranges):
        total += tl.load(partial_ptr + r * count + index, mask=inside, other=0.0)
    tl.store(out_ptr + index // num_rows * out_stride + index % num_rows, total * scale, mask=inside)


def project(kernel, operands, block_rows, num_warps, grads, out, seed, stream, column_offset, scale):
    """Run ``kernel`` over slabs of outputs and groups of samples, and add up its ranges.

    Args:
        kernel: writes partial [R, b, d] for b samples and d rows; arguments as below.
        operands: for each dtype of grads, in how many limbs of which type it meets the matrix.
        block_rows: rows of the matrix per program.
        num_warps: per program.
        grads: [B, P] float16, bfloat16 or float32, any strides.
        out: [B, D] float32, contiguous.
    """
    (num_samples, num_columns), proj_dim = grads.shape, out.shape[1]
    if out.numel() == 0:
        return
    if num_columns == 0:
        out.zero_()
        return
    plan = plan_ranges(num_columns, column_offset, proj_dim)
    # Products of limbs are exact in float32 too, which is what Triton's interpreter multiplies.
    limbs, dot_type = operands[grads.dtype]
    dot_type = dot_type if grads.is_cuda else tl.float32
    width, height = min(num_samples, LAUNCH_SAMPLES), min(proj_dim, SLAB_ROWS)
    partial = torch.empty(plan.num_ranges * width * height, dtype=torch.float32, device=grads.device)
    with torch.cuda.device(grads.device) if grads.is_cuda else contextlib.nullcontext():
        for row in range(0, proj_dim, SLAB_ROWS):
            rows = min(SLAB_ROWS, proj_dim - row)
            for sample in range(0, num_samples, LAUNCH_SAMPLES):
                group = grads[sample : sample + LAUNCH_SAMPLES]
                kernel[(triton.cdiv(rows, block_rows), plan.num_ranges)](
                    group, partial, group.shape[0], num_columns, *group.stride(), row, rows, seed, stream, column_offset,
                    plan.first_block, plan.num_blocks, plan.range_blocks,
                    LIMBS=limbs, DOT_TYPE=dot_type, BLOCK_ROWS=block_rows, BLOCK_SAMPLES=LAUNCH_SAMPLES,
                    num_warps=num_warps, enable_fp_fusion=True,
                )  # fmt: skip
                count = group.shape[0] * rows
                reduce_kernel[(triton.cdiv(count, 1024),)](
                    partial,
                    out[sample:, row:],
                    plan.num_ranges,
                    group.shape[0],
                    rows,
                    proj_dim,
                    scale,
                    BLOCK=1024,
                    enable_fp_fusion=True,
                )
