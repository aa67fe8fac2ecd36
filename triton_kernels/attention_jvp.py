"""Attention and its tangents in Triton: see ``csrc/attention_jvp.h`` for what they are.

P of some rows is written to memory once (one product for the scores' maxima and sums, again for P,
one for y) and read by every tangent: 4 products for each. A tangent's rows are one sweep over the keys, with r =
rowsum(P * S_dot) and y_dot = (P * S_dot) v + P v_dot - r y. Products of float32 are three of TF32 each, those of q, k
and their tangents in 16 bits exact ones; P is never rounded to 16 bits. Extra memory: 64 MiB of P, or 64 rows of one
head if that is more, and their y in float32.
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

PROBABILITIES = 16 << 20  # floats of P at a time
MOST_VALUES = 256  # columns of y that a program sums
MOST_PROGRAMS = 2**31 - 1  # of a launch
DOT_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

MINUS_ZERO = tl.constexpr(-2147483648)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(ptr, row, num_rows, row_stride, column, num_columns, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] from a row and column on, with zeros outside. Only the tile's own offsets are 32 bits wide."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows[:, None] < num_rows - row) & (columns[None, :] < num_columns - column)
    ptr += tl.cast(row, tl.int64) * row_stride + tl.cast(column, tl.int64) * column_stride
    return tl.load(ptr + (rows[:, None] * row_stride + columns[None, :] * column_stride), mask=inside, other=0.0)


@triton.jit
def add_products(
    sums,  # [BL, BS]
    query_ptr,
    query_row,
    query_column,
    key_ptr,
    key_row,
    key_column,
    row,
    num_rows,
    key,
    num_keys,
    width,
    BL: tl.constexpr,
    BS: tl.constexpr,
    BE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums + q k^T."""
    for start in range(0, width, BE):
        q = tile(query_ptr, row, num_rows, query_row, start, width, query_column, BL, BE)
        k = tile(key_ptr, key, num_keys, key_row, start, width, key_column, BS, BE)
        sums = tl.dot(q.to(DOT_TYPE), tl.trans(k.to(DOT_TYPE)), sums, input_precision=PRECISION)
    return sums


@triton.jit
def scores_of(
    query_ptr,
    query_row,
    query_column,
    key_ptr,
    key_row,
    key_column,
    mask_ptr,
    mask_row,
    mask_column,
    row,
    num_rows,
    key,
    num_keys,
    width,
    scale,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BL: tl.constexpr,
    BS: tl.constexpr,
    BE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BL, BS] scaled products with the mask added, -inf where a pair is forbidden, and which are."""
    scores = add_products(
        tl.zeros([BL, BS], tl.float32), query_ptr, query_row, query_column, key_ptr, key_row, key_column,
        row, num_rows, key, num_keys, width, BL, BS, BE, DOT_TYPE, PRECISION,
    )  # fmt: skip
    scores *= scale
    rows, keys = tl.arange(0, BL), tl.arange(0, BS)
    forbidden = (keys[None, :] >= num_keys - key) | (rows[:, None] < 0)  # none of them, but of the tile's shape
    if CAUSAL:
        forbidden = forbidden | (keys[None, :] + key > rows[:, None] + row)
    if MASK != 0:
        entries = tile(mask_ptr, row, num_rows, mask_row, key, num_keys, mask_column, BL, BS)
        if MASK == 1:
            forbidden = forbidden | (entries == 0)
        else:
            forbidden = forbidden | (entries == -float("inf"))
            scores += entries
    return tl.where(forbidden, -float("inf"), scores), forbidden


@triton.jit(do_not_specialize=["first_item", "items", "first_row", "slab_rows"])
def primal_kernel(
    query_ptr,  # [B, H, L, E]
    key_ptr,  # [B, H, S, E]
    value_ptr,  # [B, H, S, V]
    mask_ptr,  # [B, H, L, S]
    probabilities_ptr,  # [items, slab_rows, S] float32: -0.0 where a pair is forbidden
    out_ptr,  # [B, H, L, V] of the inputs' dtype
    exact_ptr,  # [items, slab_rows, V] float32
    first_item,
    items,
    first_row,
    slab_rows,
    heads,
    num_rows,
    num_keys,
    width,
    value_width,
    scale,
    query_batch, query_head, query_row, query_column,
    key_batch, key_head, key_row, key_column,
    value_batch, value_head, value_row, value_column,
    mask_batch, mask_head, mask_row, mask_column,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BL: tl.constexpr,
    BS: tl.constexpr,
    BE: tl.constexpr,
    BV: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(slab_rows, BL)
    local = tl.program_id(0) % blocks * BL  # row of the wave
    item = (tl.program_id(0) // blocks).to(tl.int64)  # of the wave
    head = item + first_item
    b, h = head // heads, head % heads
    row, end = local + first_row, first_row + slab_rows
    query_ptr += b * query_batch + h * query_head
    key_ptr += b * key_batch + h * key_head
    value_ptr += b * value_batch + h * value_head
    mask_ptr += b * mask_batch + h * mask_head
    probabilities_ptr += (item * slab_rows + local) * num_keys
    column = tl.program_id(1) * BV
    rows, keys, columns = tl.arange(0, BL), tl.arange(0, BS), tl.arange(0, BV)
    inside = (rows[:, None] < slab_rows - local) & (columns[None, :] < value_width - column)
    exact_ptr += (item * slab_rows + local) * value_width + column
    out_ptr += (head * num_rows + row) * value_width + column
    places = rows[:, None] * value_width + columns[None, :]

    most = tl.full([BL], -float("inf"), tl.float32)
    total = tl.zeros([BL], tl.float32)
    for start in range(0, num_keys, BS):
        scores, _ = scores_of(
            query_ptr, query_row, query_column, key_ptr, key_row, key_column, mask_ptr, mask_row, mask_column,
            row, end, start, num_keys, width, scale, MASK, CAUSAL, BL, BS, BE, DOT_TYPE, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2((most - base) * LOG2_E) + tl.sum(tl.exp2((scores - base[:, None]) * LOG2_E), 1)
        most = higher
    base = tl.where(most == -float("inf"), 0.0, most)
    total = tl.where(total == 0, 1.0, total)

    y = tl.zeros([BL, BV], tl.float32)
    for start in range(0, num_keys, BS):
        scores, forbidden = scores_of(
            query_ptr, query_row, query_column, key_ptr, key_row, key_column, mask_ptr, mask_row, mask_column,
            row, end, start, num_keys, width, scale, MASK, CAUSAL, BL, BS, BE, DOT_TYPE, PRECISION,
        )  # fmt: skip
        p = tl.exp2((scores - base[:, None]) * LOG2_E) / total[:, None]
        # By its bits, since Triton 3.7 makes 0.0 of a literal -0.0.
        p = tl.where(forbidden, MINUS_ZERO, p.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        values = tile(value_ptr, start, num_keys, value_row, column, value_width, value_column, BS, BV)
        y = tl.dot(p, values.to(tl.float32), y, input_precision="tf32x3")
        if tl.program_id(1) == 0:
            to = probabilities_ptr + start + (rows[:, None] * num_keys + keys[None, :])
            tl.store(to, p, mask=(rows[:, None] < slab_rows - local) & (keys[None, :] < num_keys - start))
    tl.store(out_ptr + places, y.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(exact_ptr + places, y, mask=inside)


@triton.jit(do_not_specialize=["first_item", "items", "first_row", "slab_rows"])
def attention_jvp_kernel(
    query_ptr,  # [B, H, L, E]
    key_ptr,  # [B, H, S, E]
    value_ptr,  # [B, H, S, V]
    query_dot_ptr,  # [K, B, H, L, E]
    key_dot_ptr,  # [K, B, H, S, E]
    value_dot_ptr,  # [K, B, H, S, V]
    probabilities_ptr,  # [items, slab_rows, S] float32
    exact_ptr,  # [items, slab_rows, V] float32
    out_ptr,  # [K, B, H, L, V] of the inputs' dtype
    first_item,
    items,
    first_row,
    slab_rows,
    batch,
    heads,
    num_rows,
    num_keys,
    width,
    value_width,
    scale,
    query_batch, query_head, query_row, query_column,
    key_batch, key_head, key_row, key_column,
    value_batch, value_head, value_row, value_column,
    query_dot_tangent, query_dot_batch, query_dot_head, query_dot_row, query_dot_column,
    key_dot_tangent, key_dot_batch, key_dot_head, key_dot_row, key_dot_column,
    value_dot_tangent, value_dot_batch, value_dot_head, value_dot_row, value_dot_column,
    QUERY_DOT: tl.constexpr,
    KEY_DOT: tl.constexpr,
    VALUE_DOT: tl.constexpr,
    BL: tl.constexpr,
    BS: tl.constexpr,
    BE: tl.constexpr,
    BV: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(slab_rows, BL)
    local = tl.program_id(0) % blocks * BL  # row of the wave
    item = (tl.program_id(0) // blocks % items).to(tl.int64)  # of the wave
    k = (tl.program_id(0) // blocks // items).to(tl.int64)
    head = item + first_item
    b, h = head // heads, head % heads
    row, end = local + first_row, first_row + slab_rows
    query_ptr += b * query_batch + h * query_head
    key_ptr += b * key_batch + h * key_head
    value_ptr += b * value_batch + h * value_head
    query_dot_ptr += k * query_dot_tangent + b * query_dot_batch + h * query_dot_head
    key_dot_ptr += k * key_dot_tangent + b * key_dot_batch + h * key_dot_head
    value_dot_ptr += k * value_dot_tangent + b * value_dot_batch + h * value_dot_head
    probabilities_ptr += (item * slab_rows + local) * num_keys
    column = tl.program_id(1) * BV
    rows, keys, columns = tl.arange(0, BL), tl.arange(0, BS), tl.arange(0, BV)
    inside = (rows[:, None] < slab_rows - local) & (columns[None, :] < value_width - column)
    exact_ptr += (item * slab_rows + local) * value_width + column
    out_ptr += ((k * batch * heads + head) * num_rows + row) * value_width + column
    places = rows[:, None] * value_width + columns[None, :]

    y_dot = tl.zeros([BL, BV], tl.float32)
    mean = tl.zeros([BL], tl.float32)
    for start in range(0, num_keys, BS):
        at = probabilities_ptr + start + (rows[:, None] * num_keys + keys[None, :])
        here = (rows[:, None] < slab_rows - local) & (keys[None, :] < num_keys - start)
        p = tl.load(at, mask=here, other=0.0)
        if QUERY_DOT or KEY_DOT:
            scores_dot = tl.zeros([BL, BS], tl.float32)
            if QUERY_DOT:
                scores_dot = add_products(
                    scores_dot, query_dot_ptr, query_dot_row, query_dot_column, key_ptr, key_row, key_column,
                    row, end, start, num_keys, width, BL, BS, BE, DOT_TYPE, PRECISION,
                )  # fmt: skip
            if KEY_DOT:
                scores_dot = add_products(
                    scores_dot, query_ptr, query_row, query_column, key_dot_ptr, key_dot_row, key_dot_column,
                    row, end, start, num_keys, width, BL, BS, BE, DOT_TYPE, PRECISION,
                )  # fmt: skip
            forbidden = (p.to(tl.int32, bitcast=True) == MINUS_ZERO) | (here == 0)
            weights = p * tl.where(forbidden, 0.0, scores_dot * scale)
            mean += tl.sum(weights, 1)
            values = tile(value_ptr, start, num_keys, value_row, column, value_width, value_column, BS, BV)
            y_dot = tl.dot(weights, values.to(tl.float32), y_dot, input_precision="tf32x3")
        if VALUE_DOT:
            values_dot = tile(
                value_dot_ptr, start, num_keys, value_dot_row, column, value_width, value_dot_column, BS, BV
            )
            y_dot = tl.dot(p, values_dot.to(tl.float32), y_dot, input_precision="tf32x3")
    if QUERY_DOT or KEY_DOT:
        y_dot -= mean[:, None] * tl.load(exact_ptr + places, mask=inside, other=0.0)
    tl.store(out_ptr + places, y_dot.to(out_ptr.dtype.element_ty), mask=inside)


def blocks_of(num_rows: int, width: int, value_width: int) -> dict[str, int]:
    """Tile sizes and what else a launch takes; they depend on the sizes alone, so that nothing else changes a bit.

    Three products of TF32 for each take registers: tiles twice as long in S or E, or loads ahead of their use, spill
    300 to 3000 bytes a thread on sm_90, these at most 60.
    """
    values = min(max(triton.next_power_of_2(value_width), 16), MOST_VALUES)
    rows = min(max(triton.next_power_of_2(num_rows), 16), 32 if values > 128 else 64)
    return {
        "BL": rows,
        "BS": 16 if values > 128 else 32,
        "BE": min(max(triton.next_power_of_2(width), 16), 32),
        "BV": values,
        "num_warps": 8 if rows * values >= 4096 else 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


class Wave(NamedTuple):
    """Heads and rows whose P lies in memory together."""

    first_item: int
    items: int
    first_row: int
    rows: int


def waves(items: int, num_rows: int, num_keys: int, block: int) -> list[Wave]:
    """All rows of some heads, or of one head some rows: whole blocks of them."""
    together = min(max(PROBABILITIES // max(num_rows * num_keys, 1), 1), items)
    fit = max(PROBABILITIES // max(num_keys, 1) // block, 1) * block
    rows = num_rows if together > 1 else min(num_rows, fit)
    return [
        Wave(item, min(together, items - item), row, min(rows, num_rows - row))
        for item in range(0, items, together)
        for row in range(0, num_rows, rows)
    ]


def attention_jvp(query, key, value, query_dot, key_dot, value_dot, mask, causal, scale, y, y_dot):
    """Into y [B, H, L, V] and y_dot [K, B, H, L, V], contiguous; a tangent that is None is one of zeros."""
    batch, heads, num_rows, width = query.shape
    num_keys, value_width = value.shape[2:]
    if y.numel() == 0:
        return
    options = blocks_of(num_rows, width, value_width)
    native = query.is_cuda and query.dtype != torch.float32
    # Widened, products are the same; Triton's interpreter takes a bfloat16 for its bits.
    options["DOT_TYPE"] = DOT_TYPES[query.dtype] if native else tl.float32
    options["PRECISION"] = "ieee" if native else "tf32x3"
    given = {"QUERY_DOT": query_dot is not None, "KEY_DOT": key_dot is not None, "VALUE_DOT": value_dot is not None}
    # One that is not there is never read.
    query_dot, key_dot, value_dot = (
        primal[None] if t is None else t for t, primal in ((query_dot, query), (key_dot, key), (value_dot, value))
    )
    # A tile's own offsets are 32 bits wide.
    query, key, value, query_dot, key_dot, value_dot = (
        t if max(t.stride()[-2:]) * MOST_VALUES < 2**31 else t.contiguous()
        for t in (query, key, value, query_dot, key_dot, value_dot)
    )
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    mask = query if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    mask = mask if max(mask.stride()[-2:]) * MOST_VALUES < 2**31 else mask.contiguous()
    sizes = (heads, num_rows, num_keys, width, value_width, scale)
    strides = (*query.stride(), *key.stride(), *value.stride())
    value_blocks = triton.cdiv(value_width, options["BV"])
    for wave in waves(batch * heads, num_rows, num_keys, options["BL"]):
        probabilities = query.new_empty((wave.items, wave.rows, num_keys), dtype=torch.float32)
        exact = query.new_empty((wave.items, wave.rows, value_width), dtype=torch.float32)
        programs = wave.items * triton.cdiv(wave.rows, options["BL"])
        with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
            primal_kernel[(programs, value_blocks)](
                query, key, value, mask, probabilities, y, exact, *wave, *sizes, *strides, *mask.stride(),
                MASK=kind, CAUSAL=causal, **options,
            )  # fmt: skip
            together = MOST_PROGRAMS // programs
            for k in range(0, len(y_dot), together):
                part = [t[k : k + together] for t in (query_dot, key_dot, value_dot)]
                out = y_dot[k : k + together]
                attention_jvp_kernel[(programs * len(out), value_blocks)](
                    query, key, value, *part, probabilities, exact, out, *wave, batch, *sizes, *strides,
                    *(stride for t in part for stride in t.stride()), **given, **options,
                )  # fmt: skip
