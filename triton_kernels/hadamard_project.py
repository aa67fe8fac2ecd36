"""Subsampled randomised Hadamard transform in Triton: see ``csrc/hadamard_project.h`` for the matrix and the idea.

A program owns one sample and a range of blocks of columns: it reads each element once, with its sign, transforms the block
in registers, and adds each output's entry to sums of its own. The order of summation depends on (P, D) alone. Extra memory:
8 D bytes, and partial sums of at most 64 MiB, or of one sample where its outputs take more.
"""

import contextlib

import torch
import triton
import triton.language as tl

from .permutation import permute_bits
from .philox import interleave_four, philox_words
from .projection import reduce_kernel

FEWEST_BITS, MOST_BITS = 10, 12  # of a block: what a program's registers hold
MAX_RANGES, RANGE_ROWS = 256, 1 << 20  # ranges of blocks, and ranges * outputs
PARTIALS = 1 << 24  # floats of a launch's partial sums; no bits depend on it


@triton.jit(do_not_specialize=["bits", "seed", "stream"])
def rows_kernel(rows_ptr, count, bits, seed, stream, BLOCK: tl.constexpr):
    """rows[j] = permute_bits(j), [count] int64."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(rows_ptr + index, permute_bits(index, bits, seed, stream), mask=index < count)


@triton.jit
def butterflies(x, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Sums and differences of entries STRIDE apart."""
    pairs = tl.permute(x.reshape(WIDTH // (2 * STRIDE), 2, STRIDE), (0, 2, 1))
    a, b = tl.split(pairs)
    return tl.permute(tl.join(a + b, a - b), (0, 2, 1)).reshape(WIDTH)


@triton.jit
def column_signs(first_call, seed, stream, WIDTH: tl.constexpr):
    """+-1 for WIDTH columns from 128 * first_call on."""
    calls = (first_call + tl.arange(0, WIDTH // 128)).to(tl.uint32)
    word = tl.full(calls.shape, 4, tl.uint32)
    w0, w1, w2, w3 = philox_words(calls, tl.zeros_like(calls), seed, stream, word)
    words = interleave_four(w0[:, None], w1[:, None], w2[:, None], w3[:, None], WIDTH // 128, 4).reshape(WIDTH // 32)
    bits = (words[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    return tl.where(bits.reshape(WIDTH) != 0, 1.0, -1.0)


@triton.jit(do_not_specialize=["seed", "stream"])
def hadamard_project_kernel(
    grads_ptr,  # [num_samples, num_columns]
    rows_ptr,  # [num_rows] int64
    partial_ptr,  # [ranges, num_samples, num_rows]
    num_samples,
    num_columns,
    sample_stride,
    column_stride,
    num_rows,
    seed,
    stream,
    num_blocks,
    range_blocks,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """partial[r, b, j] = sum over the blocks of range r of the transform's entry that row j names, with its sign."""
    WIDTH: tl.constexpr = 1 << BITS
    sample = (tl.program_id(0) % num_samples).to(tl.int64)
    part = tl.program_id(0) // num_samples
    sums_ptr = partial_ptr + (part.to(tl.int64) * num_samples + sample) * num_rows
    begin = part.to(tl.int64) * range_blocks
    end = tl.minimum(begin + range_blocks, num_blocks)
    for start in range(0, num_rows, BLOCK_ROWS):
        local = start + tl.arange(0, BLOCK_ROWS)
        tl.store(sums_ptr + local, tl.zeros([BLOCK_ROWS], tl.float32), mask=local < num_rows)
    tl.debug_barrier()  # the sums below may be other threads'
    for block in range(begin, end):
        columns = block * WIDTH + tl.arange(0, WIDTH)
        address = grads_ptr + sample * sample_stride + columns * column_stride
        x = tl.load(address, mask=columns < num_columns, other=0.0).to(tl.float32)
        x = x * column_signs(block * (WIDTH // 128), seed, stream, WIDTH)
        for stage in tl.static_range(BITS):
            x = butterflies(x, 1 << (BITS - 1 - stage), WIDTH)
        for start in range(0, num_rows, BLOCK_ROWS):
            local = start + tl.arange(0, BLOCK_ROWS)
            inside = local < num_rows
            row = tl.load(rows_ptr + local, mask=inside, other=0)
            entry = tl.gather(x, (row & (WIDTH - 1)).to(tl.int32), 0)
            parity = ((row >> BITS) & block).to(tl.uint32)
            parity ^= parity >> 16
            parity ^= parity >> 8
            parity ^= parity >> 4
            parity ^= parity >> 2
            parity ^= parity >> 1
            term = tl.where((parity & 1) != 0, -entry, entry)
            before = tl.load(sums_ptr + local, mask=inside, other=0.0)
            tl.store(sums_ptr + local, before + term, mask=inside)


def hadamard_project(grads, out, seed, stream, scale):  # [B, P] -> [B, D]
    """out[b, j] = scale * sum_p (-1)^popcount(r_j & p) * s_p * grads[b, p]; out float32, contiguous."""
    (num_samples, num_columns), proj_dim = grads.shape, out.shape[1]
    if out.numel() == 0:
        return
    if num_columns == 0:
        out.zero_()
        return
    bits = min(max((proj_dim - 1).bit_length() + 1, FEWEST_BITS), MOST_BITS)
    num_blocks = triton.cdiv(num_columns, 1 << bits)
    range_blocks = triton.cdiv(num_blocks, min(max(RANGE_ROWS // proj_dim, 1), MAX_RANGES))
    num_ranges = triton.cdiv(num_blocks, range_blocks)
    samples = min(max(PARTIALS // (num_ranges * proj_dim), 1), num_samples)  # of a launch
    rows = torch.empty(proj_dim, dtype=torch.int64, device=grads.device)
    partial = torch.empty(num_ranges * samples * proj_dim, dtype=torch.float32, device=grads.device)
    with torch.cuda.device(grads.device) if grads.is_cuda else contextlib.nullcontext():
        rows_kernel[(triton.cdiv(proj_dim, 256),)](
            rows, proj_dim, (num_columns - 1).bit_length(), seed, stream, BLOCK=256, enable_fp_fusion=True
        )
        for sample in range(0, num_samples, samples):
            group = grads[sample : sample + samples]
            hadamard_project_kernel[(num_ranges * group.shape[0],)](
                group, rows, partial, group.shape[0], num_columns, *group.stride(), proj_dim, seed, stream, num_blocks,
                range_blocks, BITS=bits, BLOCK_ROWS=1024, num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip
            reduce_kernel[(triton.cdiv(group.shape[0] * proj_dim, 1024),)](
                partial,
                out[sample:],
                num_ranges,
                group.shape[0],
                proj_dim,
                proj_dim,
                scale,
                BLOCK=1024,
                enable_fp_fusion=True,
            )
