"""Sparse projection in Triton: see ``csrc/sparse_project.h`` for the matrix.

Gathered: a program owns blocks of outputs of one group and up to 8 samples, and takes the column that each of its outputs gets
from one tile after the other. Products are exact; a sum is a chunk of 1024 tiles, then chunks, then ranges of columns in order,
which depend on (P, column_offset, D) alone. Extra memory: partial sums, at most 64 MiB, none where one range is enough, as it
is for small P and for D above 2^18.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl

from ..reference.sparse_project import GAPS, lanes
from .philox import philox_words
from .projection import LAUNCH_SAMPLES, RANGE_ROWS, reduce_kernel

BLOCK_OUTPUTS = 512  # of a program
SAMPLES = 8  # of a program, at most
CHUNK_TILES = 1024
RANGE_WIDTHS = 16  # a range has at least 16 D columns: its partial sums are then 1/16 of its input
MAX_RANGES = 2048


@triton.jit(do_not_specialize=["seed", "stream", "column_offset", "chunks", "range_columns", "num_ranges"])
def sparse_project_kernel(
    grads_ptr,  # [num_samples, num_columns]
    inverse_ptr,  # [2, 64] multipliers' inverses modulo a group's size: the smaller, the larger
    sums_ptr,  # [num_ranges, num_samples, proj_dim]
    num_samples,
    num_columns,
    sample_stride,
    column_stride,
    proj_dim,
    nonzeros,
    seed,
    stream,
    column_offset,
    chunks,  # programs along a group
    range_columns,
    num_ranges,
    scale,
    WIDTH: tl.constexpr,  # lanes of a block
    BLOCKS: tl.constexpr,  # of a program
    SAMPLES: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
):
    """sums[i, b, d] = scale * sum over the tiles of range i of M[d, column] * grads[b, column - column_offset]."""
    r = tl.program_id(0) // chunks
    all_blocks = tl.cast(proj_dim, tl.int64) // WIDTH
    first = r * all_blocks // nonzeros
    size = (r + 1) * all_blocks // nonzeros - first
    larger = (size > all_blocks // nonzeros).to(tl.int64)
    h = (tl.program_id(0) % chunks).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [n], blocks of the group
    lanes = tl.arange(0, WIDTH)
    samples = tl.program_id(2).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)  # [b]

    tile_columns = size * WIDTH
    range_index = tl.program_id(1).to(tl.int64)
    start = column_offset + range_index * range_columns
    stop = tl.where(range_index + 1 < num_ranges, start + range_columns, tl.cast(column_offset, tl.int64) + num_columns)
    begin = (start + tl.where(range_index == 0, 0, tile_columns - 1)) // tile_columns
    end = (stop + tile_columns - 1) // tile_columns

    total = tl.zeros([SAMPLES, BLOCKS, WIDTH], tl.float32)
    for chunk in range(begin, end, CHUNK_TILES):
        sums = tl.zeros([SAMPLES, BLOCKS, WIDTH], tl.float32)
        for tile in range(chunk, tl.minimum(chunk + CHUNK_TILES, end)):
            counter = tl.zeros([1], tl.int64) + tile
            group = (tl.zeros([1], tl.int64) + r).to(tl.uint32)
            w0, w1, w2, _ = philox_words(
                counter.to(tl.uint32), group, seed, stream, group * 0 + 2, (counter >> 32).to(tl.uint32)
            )
            inverse = tl.load(inverse_ptr + larger * 64 + (w0 % 64).to(tl.int64))  # [1]
            b = (w1.to(tl.int64) * size) >> 32
            x = (w2 % WIDTH).to(tl.int32)
            apart = h % size - b
            source = inverse * tl.where(apart < 0, apart + size, apart) % size  # [n], below 2^62 before the modulo
            blocks = tile * size + source

            # Words of signs, one to a block. A call is made once, joined and reshaped: broadcast directly, every thread that
            # needs its word would make it again.
            call = blocks * WIDTH // 128
            v0, v1, v2, v3 = philox_words(
                call.to(tl.uint32), tl.zeros_like(call).to(tl.uint32) + group, seed, stream,
                tl.zeros_like(call).to(tl.uint32) + 1, tl.zeros_like(call).to(tl.uint32),
            )  # fmt: skip
            which = blocks * WIDTH % 128 // 32
            word = tl.where(which < 2, tl.where(which == 0, v0, v1), tl.where(which == 2, v2, v3))
            word = word >> (blocks * WIDTH % 32).to(tl.uint32)
            if WIDTH == 1:
                bits = word[:, None] & 1
            else:
                upper = (x & (WIDTH // 2)).to(tl.uint32)
                halves = tl.join(word >> upper, word >> (upper ^ (WIDTH // 2)))  # [n, 2]
                shift = (tl.arange(0, WIDTH // 2) ^ (x & (WIDTH // 2 - 1))).to(tl.uint32)
                bits = ((halves[:, :, None] >> shift[None, None, :]) & 1).reshape(BLOCKS, WIDTH)

            columns = (blocks * WIDTH)[:, None] + (lanes ^ x)[None, :] - column_offset  # [n, lane]
            inside = (columns >= 0) & (columns < num_columns) & (h < size)[:, None]
            offsets = samples[:, None, None] * sample_stride + (columns * column_stride)[None, :, :]
            values = tl.load(
                grads_ptr + offsets, mask=inside[None, :, :] & (samples < num_samples)[:, None, None], other=0.0
            ).to(tl.float32)
            sums += tl.where((bits != 0)[None, :, :], values, -values)
        total += sums
    rows = (first + h)[:, None] * WIDTH + lanes[None, :]  # [n, lane]
    out = sums_ptr + (range_index * num_samples + samples[:, None, None]) * proj_dim + rows[None, :, :]
    tl.store(out, total * scale, mask=(h < size)[None, :, None] & (samples < num_samples)[:, None, None])


@functools.cache
def inverses(smallest, device):  # -> [2, 64] int64
    """Of the 64 multipliers modulo ``smallest`` and ``smallest + 1``.

    Kept for good: a call under CUDA graph capture that follows one of the same shape copies nothing, and the graph may
    read it for as long as it lives.
    """
    table = [[pow(2**32 - gap, -1, size) for gap in GAPS] for size in (smallest, smallest + 1)]
    return torch.tensor(table, device=device)


def plan_ranges(num_columns, proj_dim):
    """Columns of a range and how many ranges: a function of (P, D), since it is part of the order of summation."""
    wanted = min(max(RANGE_ROWS // proj_dim, 1), MAX_RANGES)
    columns = max(triton.cdiv(num_columns, wanted), RANGE_WIDTHS * proj_dim)
    return columns, max(triton.cdiv(num_columns, columns), 1)


def sparse_project(grads, out, seed, stream, column_offset, nonzeros, scale):  # [B, P] -> [B, D]
    """out[b, j] = scale * sum_p M[j, column_offset + p] * grads[b, p]; out float32, contiguous."""
    (num_samples, num_columns), proj_dim = grads.shape, out.shape[1]
    if num_samples == 0:
        return
    if num_columns == 0:
        out.zero_()
        return
    width = lanes(proj_dim, nonzeros)
    range_columns, num_ranges = plan_ranges(num_columns, proj_dim)
    table = inverses(proj_dim // width // nonzeros, grads.device)
    blocks = BLOCK_OUTPUTS // width
    chunks = triton.cdiv(triton.cdiv(proj_dim // width, nonzeros), blocks)
    together = min(num_samples, LAUNCH_SAMPLES)
    partial = None
    if num_ranges > 1:
        partial = torch.empty(num_ranges * together * proj_dim, dtype=torch.float32, device=grads.device)
    with torch.cuda.device(grads.device) if grads.is_cuda else contextlib.nullcontext():
        for sample in range(0, num_samples, together):
            group = grads[sample : sample + together]
            samples = min(SAMPLES, triton.next_power_of_2(group.shape[0]))
            sparse_project_kernel[(nonzeros * chunks, num_ranges, triton.cdiv(group.shape[0], samples))](
                group, table, out[sample:] if partial is None else partial, group.shape[0], num_columns, *group.stride(),
                proj_dim, nonzeros, seed, stream, column_offset, chunks, range_columns, num_ranges,
                scale if partial is None else 1.0,
                WIDTH=width, BLOCKS=blocks, SAMPLES=samples, CHUNK_TILES=CHUNK_TILES, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
            if partial is not None:
                count = group.shape[0] * proj_dim
                reduce_kernel[(triton.cdiv(count, 1024),)](
                    partial, out[sample:], num_ranges, group.shape[0], proj_dim, proj_dim, scale, BLOCK=1024,
                    enable_fp_fusion=True,
                )  # fmt: skip
