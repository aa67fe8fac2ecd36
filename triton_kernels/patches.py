"""What the operations on patches share: images with their border, which windows meet, distances, sums over a row of them.

A program has a few query windows and one image. It forms their distances to all windows of the image that they may match as
differences in float32, which cancel nothing, and keeps them in registers; where they do not fit, in scratch memory of its own.
The order of every sum depends on the images' size alone.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional

PLANE_FLOATS = 1 << 22  # of the images at work together
HELD = 1 << 13  # distances that a program keeps in registers
MOST_WINDOWS = 16  # query windows of a program
SCRATCH_BLOCK = 1 << 10  # distances of a window that are formed together where a row does not fit
SCRATCH_WINDOWS = 8
SCRATCH_FLOATS = 1 << 24
LOG2_E = 1.4426950408889634


def stage(images, geometry):  # [n, C, H, W] -> [n, C, R, S] float32
    """Pixels with the border's zeros around them, or the sums of their 2 x 2 blocks times 1/2."""
    values = images.to(torch.float32)
    if images.dtype == torch.uint8:
        values = (2 * values - 255) / 255
    pad = 0 if geometry.border == "inside" else (geometry.patch_size - 1) // 2
    values = functional.pad(values, (pad, pad, pad, pad))
    if geometry.lowres:
        pairs = values[..., :-1] + values[..., 1:]
        values = 0.5 * (pairs[..., :-1, :] + pairs[..., 1:, :])
    return values.contiguous()


class Axis(NamedTuple):
    """Along one axis, groups of the query's positions that meet the same positions of an image: (first, count) of both."""

    whole: tuple[int, int, int, int]
    cut: tuple[tuple[int, int, int, int], ...]


def axis(geometry, query_length: int, image_length: int, begin: int, end: int) -> Axis:
    """The groups among the positions [begin, end); without classes of borders all are one."""
    if geometry.border != "class":
        return Axis((begin, end - begin, 0, image_length), ())
    pad = (geometry.patch_size - 1) // 2
    last = max(pad, image_length - pad)
    first, stop = (min(max(i, begin), end) for i in (pad, last))
    cut = tuple((i, 1, i, 1) for i in range(begin, end) if not first <= i < stop)
    return Axis((first, stop - first, pad, last - pad), cut)


@functools.cache
def tiles(rows, columns, windows: int, device):  # -> [T, 9] int32
    """The query windows of every group of rows and columns, ``windows`` to a tile.

    A tile is the group's (first row, first column, columns, windows) of the query, the first of its windows, and the group's
    (first row, first column, columns, windows) of an image. Kept for good: a call under CUDA graph capture that follows one of
    the same shape copies nothing.
    """
    table = []
    for row, height, image_row, image_height in rows:
        for column, width, image_column, image_width in columns:
            group = (row, column, width, height * width)
            image = (image_row, image_column, image_width, image_height * image_width)
            table += [(*group, first, *image) for first in range(0, height * width, windows)]
    return torch.tensor(table, dtype=torch.int32, device=device).reshape(-1, 9)


@triton.jit
def tile_distances(
    query_ptr,  # [channels, query_plane]
    image_ptr,  # [channels, plane]
    x_at,  # [BU] offsets of the query windows in a plane
    y_at,  # [BV] offsets of the image's windows
    channels,
    query_plane,
    query_columns,
    plane,
    columns,
    taps,
    step,
    scale,
    BU: tl.constexpr,
    BV: tl.constexpr,
):
    """[BU, BV] sums of squared differences, line by line and then over the lines, which keeps their rounding small."""
    total = tl.zeros([BU, BV], tl.float32)
    for channel in range(channels):
        for i in range(taps):
            line = tl.zeros([BU, BV], tl.float32)
            for j in range(taps):
                x = tl.load(query_ptr + channel * query_plane + i * step * query_columns + j * step + x_at)
                y = tl.load(image_ptr + channel * plane + i * step * columns + j * step + y_at)
                apart = x[:, None] - (scale * y)[None, :]
                line += apart * apart
            total += line
    return total


@triton.jit
def window_offsets(index, first_row, first_column, group_columns, columns):
    """Where the windows with these numbers in a group begin, in a plane with ``columns`` columns."""
    return (first_row + index // group_columns) * columns + first_column + index % group_columns


@triton.jit
def within(apart, limit, rate, COUNT: tl.constexpr):
    """How many of [BU, BV] are at most limit [BU], or the sum of their terms 2^(-rate * apart), which a NaN makes a NaN."""
    near = apart <= limit[:, None]
    if COUNT:
        return tl.sum(near.to(tl.int32), 1)
    else:
        return tl.sum(tl.where(near | (apart != apart), tl.exp2(-(apart * rate)), 0.0), 1)


@triton.jit
def row_within(d, scratch, base, limit, rate, count, HELD: tl.constexpr, COUNT: tl.constexpr, BV: tl.constexpr):
    """The same over whole rows of distances: d [BU, BV], or scratch pointers [BU, BV] to their first block."""
    if HELD:
        total = within(d - base[:, None], limit, rate, COUNT)
    else:
        if COUNT:
            total = tl.zeros(base.shape, tl.int32)
        else:
            total = tl.zeros(base.shape, tl.float32)
        for start in range(0, count, BV):
            total += within(tl.load(scratch + start) - base[:, None], limit, rate, COUNT)
    return total


@triton.jit
def row_minimum(d, scratch, count, HELD: tl.constexpr, BV: tl.constexpr):
    """Minimum of every row, infinite where there is no number, and where it first occurs (0 if nowhere)."""
    index = tl.arange(0, BV)
    if HELD:
        numbers = tl.where(d == d, d, float("inf"))
        least = tl.min(numbers, 1)
        place = tl.min(tl.where(d == least[:, None], index[None, :], 0x7FFFFFFF), 1)
    else:
        least = tl.full([d.shape[0]], float("inf"), tl.float32)
        place = tl.full([d.shape[0]], 0x7FFFFFFF, tl.int32)
        for start in range(0, count, BV):
            block = tl.load(scratch + start)
            numbers = tl.where(block == block, block, float("inf"))
            lower = tl.min(numbers, 1)
            found = tl.min(tl.where(block == lower[:, None], start + index[None, :], 0x7FFFFFFF), 1)
            place = tl.where(lower < least, found, tl.minimum(place, tl.where(lower == least, found, place)))
            least = tl.minimum(least, lower)
    return least, tl.where(place == 0x7FFFFFFF, 0, place)


@triton.jit
def row_distances(
    query_ptr,
    image_ptr,
    x_at,
    scratch,  # [BU, BV] pointers to the first block
    first_row,
    first_column,
    group_columns,
    count,
    channels,
    query_plane,
    query_columns,
    plane,
    columns,
    taps,
    step,
    scale,
    HELD: tl.constexpr,
    BU: tl.constexpr,
    BV: tl.constexpr,
):
    """Distances of BU query windows to the ``count`` windows of a group, infinite beyond: returned, or left in scratch."""
    index = tl.arange(0, BV)
    if HELD:
        y_at = window_offsets(tl.minimum(index, count - 1), first_row, first_column, group_columns, columns)
        d = tile_distances(
            query_ptr,
            image_ptr,
            x_at,
            y_at,
            channels,
            query_plane,
            query_columns,
            plane,
            columns,
            taps,
            step,
            scale,
            BU,
            BV,
        )
        d = tl.where((index < count)[None, :], d, float("inf"))
    else:
        d = tl.zeros([BU, 1], tl.float32)
        tl.debug_barrier()  # the scratch of the tile before is read
        for start in range(0, count, BV):
            y_at = window_offsets(tl.minimum(start + index, count - 1), first_row, first_column, group_columns, columns)
            block = tile_distances(
                query_ptr, image_ptr, x_at, y_at, channels, query_plane, query_columns, plane, columns, taps, step, scale,
                BU, BV,
            )  # fmt: skip
            tl.store(scratch + start, tl.where((start + index < count)[None, :], block, float("inf")))
        tl.debug_barrier()  # what follows may read what other threads wrote
    return d


def launches(query, images, geometry, scale, part):
    """What the kernels take, for some images and some query windows at a time.

    Yields:
        the number of the first image, the number of programs, the arguments that both kernels begin with, and those by name.
    """
    rows = axis(geometry, geometry.query_grid[0], geometry.bank_grid[0], part.row_begin, part.row_end)
    columns = axis(geometry, geometry.query_grid[1], geometry.bank_grid[1], part.column_begin, part.column_end)
    device = query.device
    query_planes = stage(query[None], geometry)[0]
    channels, _, query_columns = query_planes.shape
    step = 2 if geometry.lowres else 1
    taps = geometry.patch_size // step
    plane = query_planes[0].numel()
    extents = [length + (taps - 1) * step for length in geometry.bank_grid]
    together = max(1, PLANE_FLOATS // (channels * extents[0] * extents[1]))
    groups = (
        ((rows.whole,), (columns.whole,)),
        (rows.cut, (columns.whole, *columns.cut)),
        ((rows.whole,), columns.cut),
    )
    for first in range(0, len(images), together):
        planes = stage(images[first : first + together], geometry)
        for group_rows, group_columns in groups:
            longest = max((r[3] for r in group_rows), default=0) * max((c[3] for c in group_columns), default=0)
            if longest == 0:
                continue
            length = max(16, triton.next_power_of_2(longest))
            held = length <= HELD
            block = length if held else SCRATCH_BLOCK
            windows = min(MOST_WINDOWS, HELD // length) if held else SCRATCH_WINDOWS
            table = tiles(group_rows, group_columns, windows, device)
            items = len(planes) * len(table)
            row = triton.cdiv(longest, block) * block
            programs = items if held else max(1, min(items, SCRATCH_FLOATS // (windows * row)))
            scratch = torch.empty(1 if held else programs * windows * row, dtype=torch.float32, device=device)
            arguments = (
                query_planes, planes, table, scratch, items, len(table), row, channels, plane, query_columns,
                planes.shape[2] * planes.shape[3], planes.shape[3], taps, step, scale,
            )  # fmt: skip
            if items:
                yield first, programs, arguments, {"HELD": held, "BU": windows, "BV": block, "num_warps": 8}


def on_device(tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
