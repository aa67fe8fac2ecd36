"""Means of pixels in Triton: see ``csrc/patch_mean.h`` for what they are, ``patches.py`` for the distances.

2 C p^2 operations for each pair of windows. Extra memory: 64 MiB for the images, 64 MiB of distances where rows do not fit into
registers.
"""

import triton
import triton.language as tl

from .patches import LOG2_E, launches, on_device, row_distances, row_minimum, row_within, window_offsets

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def weighed_pixels(d, pixels_ptr, index, count, first_row, first_column, group_columns, columns, base, rate):
    """Of a block [BU, BV] the sums [BU] of terms times the windows' pixels; a term of 0 counts for nothing."""
    at = window_offsets(tl.minimum(index, count - 1), first_row, first_column, group_columns, columns)
    pixels = tl.load(pixels_ptr + at)
    terms = tl.exp2(-((d - base[:, None]) * rate))
    return tl.sum(tl.where(terms == 0, 0.0, terms * pixels[None, :]), 1)


@triton.jit(do_not_specialize=["num_items", "num_tiles", "stats_stride", "first_image"])
def patch_mean_kernel(
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
    minima_ptr,  # [positions, stats_stride], likewise sums
    sums_ptr,
    pixels_ptr,  # [channels, positions, stats_stride]
    positions,
    stats_stride,
    first_image,
    part_row,
    part_column,
    part_columns,
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
        image_ptr = planes_ptr + image * channels * plane
        d = row_distances(
            query_ptr, image_ptr, x_at, scratch, image_row, image_column, image_width, count,
            channels, query_plane, query_columns, plane, columns, taps, step, scale, HELD, BU, BV,
        )  # fmt: skip
        least, _ = row_minimum(d, scratch, count, HELD, BV)
        base = tl.where(least == float("inf"), 0.0, least)
        total = row_within(d, scratch, base, base * 0 + float("inf"), rate, count, HELD, False, BV)
        position = window_offsets(number, row - part_row, column - part_column, width, part_columns).to(tl.int64)
        to = position * stats_stride + image + first_image
        tl.store(minima_ptr + to, tl.minimum(least, LARGEST), mask=there)
        tl.store(sums_ptr + to, total, mask=there)
        centre = (taps - 1) // 2
        index = tl.arange(0, BV)
        for channel in range(channels):
            centres_ptr = image_ptr + channel * plane + centre * columns + centre
            if HELD:
                mean = weighed_pixels(
                    d, centres_ptr, index, count, image_row, image_column, image_width, columns, base, rate
                )
            else:
                mean = tl.zeros([BU], tl.float32)
                for start in range(0, count, BV):
                    mean += weighed_pixels(
                        tl.load(scratch + start), centres_ptr, start + index, count, image_row, image_column, image_width,
                        columns, base, rate,
                    )  # fmt: skip
            tl.store(pixels_ptr + to, mean, mask=there)
            to += tl.cast(positions, tl.int64) * stats_stride


def patch_mean(query, images, geometry, scale, sigma, part, minima, sums, pixels):
    """Statistics of a query [C, H, W] float32 and images [n, C, H, W] into [U, n] and [C, U, n]; see the header."""
    rate = LOG2_E / (2 * sigma**2)
    with on_device(query):
        for first, programs, arguments, options in launches(query, images, geometry, scale, part):
            patch_mean_kernel[(programs,)](
                *arguments, rate, minima, sums, pixels, *minima.shape, first,
                part.row_begin, part.column_begin, part.column_end - part.column_begin,
                enable_fp_fusion=True, **options,
            )  # fmt: skip
