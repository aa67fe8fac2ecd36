"""Patch statistics in Triton: see ``csrc/patch_topk.h`` for what they are, ``patches.py`` for the distances.

The k-th largest term is found by bisection on the bits of d - minimum, all windows of a program at once, so that the sum is
exact for every k. 2 C p^2 operations for each pair of windows. Extra memory: 64 MiB for the images, and 64 MiB of distances
where rows do not fit into registers.
"""

import triton
import triton.language as tl

from .patches import LOG2_E, launches, on_device, row_distances, row_minimum, row_within, window_offsets

LARGEST = tl.constexpr(3.4028234663852886e38)
DEAD = tl.constexpr(150.0)  # 2^-150 rounds to 0


@triton.jit
def top_sum(d, scratch, base, total, k, rate, count, HELD: tl.constexpr, BV: tl.constexpr):
    """The sum of the k largest terms of every row [BU]; ``total`` is that of all."""
    zero = tl.zeros_like(base)
    high = tl.minimum(zero + DEAD / rate, 3e38).to(tl.int32, bitcast=True)
    low = high * 0
    alive = row_within(d, scratch, base, high.to(tl.float32, bitcast=True), rate, count, HELD, True, BV)
    nearest = row_within(d, scratch, base, zero, rate, count, HELD, True, BV)
    inside = nearest  # how many are no further than `low`
    all_of_them = (alive <= k) | (count <= k)
    ties = nearest >= k
    high = tl.where(all_of_them | ties, low, high)
    while tl.max(high - low) > 1:
        searching = high - low > 1
        middle = low + (high - low) // 2
        found = row_within(d, scratch, base, middle.to(tl.float32, bitcast=True), rate, count, HELD, True, BV)
        inside = tl.where(searching & (found <= k), found, inside)
        low = tl.where(searching & (found <= k), middle, low)
        high = tl.where(searching & (found >= k), middle, high)
    nearer = row_within(d, scratch, base, low.to(tl.float32, bitcast=True), rate, count, HELD, False, BV)
    rest = (k - inside).to(tl.float32)
    top = tl.where(rest > 0, nearer + rest * tl.exp2(-(high.to(tl.float32, bitcast=True) * rate)), nearer)
    return tl.where(all_of_them | (total != total), total, tl.where(ties, zero + k, top))


@triton.jit(do_not_specialize=["num_items", "num_tiles", "stats_stride", "first_image", "k"])
def patch_topk_kernel(
    query_ptr,  # [channels, query_plane] float32
    planes_ptr,  # [images, channels, plane] float32
    tiles_ptr,  # [num_tiles, 9] int32
    scratch_ptr,  # [programs, BU, row_length]
    num_items,  # images * num_tiles
    num_tiles,
    row_length,
    channels,
    query_plane,
    query_columns,
    plane,
    columns,
    taps,
    step,
    scale,
    rate,  # log2(e) / (2 sigma^2)
    k,
    minima_ptr,  # [positions, stats_stride], likewise sums, tops and nearest
    sums_ptr,
    tops_ptr,
    nearest_ptr,
    stats_stride,
    first_image,
    part_row,
    part_column,
    part_columns,
    image_columns,  # positions of an image along a row
    NEAREST: tl.constexpr,
    HELD: tl.constexpr,
    BU: tl.constexpr,
    BV: tl.constexpr,
):
    own = scratch_ptr + tl.program_id(0).to(tl.int64) * BU * row_length
    scratch = own + tl.arange(0, BU)[:, None] * row_length + tl.arange(0, BV)[None, :]
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        image = (item // num_tiles).to(tl.int64)
        tile = tiles_ptr + (item % num_tiles) * 9
        row, column, width, windows = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
        number = tl.load(tile + 4) + tl.arange(0, BU)
        there = number < windows
        number = tl.minimum(number, windows - 1)
        image_row, image_column, image_width = tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
        count = tl.load(tile + 8)
        x_at = window_offsets(number, row, column, width, query_columns)
        d = row_distances(
            query_ptr, planes_ptr + image * channels * plane, x_at, scratch, image_row, image_column, image_width, count,
            channels, query_plane, query_columns, plane, columns, taps, step, scale, HELD, BU, BV,
        )  # fmt: skip
        least, place = row_minimum(d, scratch, count, HELD, BV)
        base = tl.where(least == float("inf"), 0.0, least)
        total = row_within(d, scratch, base, base * 0 + float("inf"), rate, count, HELD, False, BV)
        top = top_sum(d, scratch, base, total, k, rate, count, HELD, BV)
        position = window_offsets(number, row - part_row, column - part_column, width, part_columns)
        to = position.to(tl.int64) * stats_stride + image + first_image
        tl.store(minima_ptr + to, tl.minimum(least, LARGEST), mask=there)
        tl.store(sums_ptr + to, total, mask=there)
        tl.store(tops_ptr + to, top, mask=there)
        if NEAREST:
            at = window_offsets(place, image_row, image_column, image_width, image_columns)
            tl.store(nearest_ptr + to, at, mask=there)


def patch_topk(query, images, geometry, scale, sigma, part, k, minima, sums, tops, nearest):
    """Statistics of a query [C, H, W] float32 and images [n, C, H, W] into [U, n], rows any stride apart; see the header."""
    rate = LOG2_E / (2 * sigma**2)
    k = min(k, geometry.bank_grid[0] * geometry.bank_grid[1])
    with on_device(query):
        for first, programs, arguments, options in launches(query, images, geometry, scale, part):
            patch_topk_kernel[(programs,)](
                *arguments, rate, k, minima, sums, tops, minima if nearest is None else nearest, minima.stride(0), first,
                part.row_begin, part.column_begin, part.column_end - part.column_begin, geometry.bank_grid[1],
                NEAREST=nearest is not None, enable_fp_fusion=True, **options,
            )  # fmt: skip
