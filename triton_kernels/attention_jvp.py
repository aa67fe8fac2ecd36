"""Attention and its tangents in Triton: see ``csrc/attention_jvp.h`` for what they are.

P of some rows is written to memory once (the kernel ``primal``: one product for the scores' maxima and sums, again for P, one for y) and
read by every tangent: 4 products for each tangent. A tangent's rows are one sweep over the keys, with r = rowsum(P * S_dot) and
y_dot = (P * S_dot) v + P v_dot - r y. Products of float32 are three of TF32 each, those of q, k and their tangents in 16 bits exact ones;
P is never rounded to 16 bits. Extra memory: 64 MiB of P, or 64 rows of every head if that is more, and y in float32.
"""

import contextlib

import torch
import triton
import triton.language as tl

PROBABILITIES = 16 << 20  # floats of P at a time
MOST_VALUES = 256  # columns of y that a program sums

MINUS_ZERO = tl.constexpr(-2147483648)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(ptr, rows, num_rows, row_stride, columns, num_columns, column_stride):
    """[rows, columns] with zeros outside; rows and columns int64."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    return tl.load(ptr + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def add_products(
    sums,  # [BL, BS]
    query_ptr,
    query_row,
    query_column,
    key_ptr,
    key_row,
    key_column,
    rows,
    num_rows,
    keys,
    num_keys,
    width,
    BE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums + q k^T."""
    for start in range(0, width, BE):
        columns = start + tl.arange(0, BE).to(tl.int64)
        q = tile(query_ptr, rows, num_rows, query_row, columns, width, query_column)
        k = tile(key_ptr, keys, num_keys, key_row, columns, width, key_column)
        sums = tl.dot(q, tl.trans(k), sums, input_precision=PRECISION)
    return sums


@triton.jit
def biased(scores, mask_ptr, mask_row, mask_column, rows, num_rows, keys, num_keys, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """The scores with the mask added, -inf where a pair is forbidden, and which are."""
    inside = (rows[:, None] < num_rows) & (keys[None, :] < num_keys)
    forbidden = keys[None, :] >= num_keys
    if CAUSAL:
        forbidden = forbidden | (keys[None, :] > rows[:, None])
    if MASK != 0:
        entries = tl.load(mask_ptr + rows[:, None] * mask_row + keys[None, :] * mask_column, mask=inside, other=0)
        if MASK == 1:
            forbidden = forbidden | (entries == 0)
        else:
            forbidden = forbidden | (entries == -float("inf"))
            scores += entries
    forbidden = forbidden | tl.zeros_like(scores).to(tl.int1)
    return tl.where(forbidden, -float("inf"), scores), forbidden


@triton.jit(do_not_specialize=["first_row"])
def primal_kernel(
    query_ptr,  # [B, H, L, E]
    key_ptr,  # [B, H, S, E]
    value_ptr,  # [B, H, S, V]
    mask_ptr,  # [B, H, L, S]
    probabilities_ptr,  # [B H, slab_rows, S] float32: -0.0 where a pair is forbidden
    out_ptr,  # [B, H, L, V] of the inputs' dtype
    exact_ptr,  # [B H, slab_rows, V] float32
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
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(slab_rows, BL)
    local = (tl.program_id(0) % blocks).to(tl.int64) * BL + tl.arange(0, BL)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = item // heads, item % heads
    rows = local + first_row
    end = tl.minimum(num_rows, tl.cast(first_row, tl.int64) + slab_rows)
    query_ptr += b * query_batch + h * query_head
    key_ptr += b * key_batch + h * key_head
    value_ptr += b * value_batch + h * value_head
    mask_ptr += b * mask_batch + h * mask_head
    columns = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)

    most = tl.full([BL], -float("inf"), tl.float32)
    total = tl.zeros([BL], tl.float32)
    for start in range(0, num_keys, BS):
        keys = start + tl.arange(0, BS).to(tl.int64)
        scores = add_products(
            tl.zeros([BL, BS], tl.float32), query_ptr, query_row, query_column, key_ptr, key_row, key_column,
            rows, end, keys, num_keys, width, BE, PRECISION,
        )  # fmt: skip
        scores, _ = biased(scores * scale, mask_ptr, mask_row, mask_column, rows, end, keys, num_keys, MASK, CAUSAL)
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2((most - base) * LOG2_E) + tl.sum(tl.exp2((scores - base[:, None]) * LOG2_E), 1)
        most = higher
    base = tl.where(most == -float("inf"), 0.0, most)
    total = tl.where(total == 0, 1.0, total)

    y = tl.zeros([BL, BV], tl.float32)
    here = (local < slab_rows) & (rows < end)
    for start in range(0, num_keys, BS):
        keys = start + tl.arange(0, BS).to(tl.int64)
        scores = add_products(
            tl.zeros([BL, BS], tl.float32), query_ptr, query_row, query_column, key_ptr, key_row, key_column,
            rows, end, keys, num_keys, width, BE, PRECISION,
        )  # fmt: skip
        scores, forbidden = biased(
            scores * scale, mask_ptr, mask_row, mask_column, rows, end, keys, num_keys, MASK, CAUSAL
        )
        p = tl.exp2((scores - base[:, None]) * LOG2_E) / total[:, None]
        p = tl.where(forbidden, -0.0, p)
        values = tile(value_ptr, keys, num_keys, value_row, columns, value_width, value_column)
        y = tl.dot(p, values.to(tl.float32), y, input_precision="tf32x3")
        if tl.program_id(1) == 0:
            to = probabilities_ptr + (item * slab_rows + local)[:, None] * num_keys + keys[None, :]
            tl.store(to, p, mask=here[:, None] & (keys[None, :] < num_keys))
    inside = here[:, None] & (columns[None, :] < value_width)
    to = (item * num_rows + rows)[:, None] * value_width + columns[None, :]
    tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(exact_ptr + (item * slab_rows + local)[:, None] * value_width + columns[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["first_row"])
def attention_jvp_kernel(
    query_ptr,  # [B, H, L, E]
    key_ptr,  # [B, H, S, E]
    value_ptr,  # [B, H, S, V]
    query_dot_ptr,  # [K, B, H, L, E]
    key_dot_ptr,  # [K, B, H, S, E]
    value_dot_ptr,  # [K, B, H, S, V]
    probabilities_ptr,  # [B H, slab_rows, S] float32
    exact_ptr,  # [B H, slab_rows, V] float32
    out_ptr,  # [K, B, H, L, V] of the inputs' dtype
    first_row,
    slab_rows,
    items,  # B H
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
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(slab_rows, BL)
    local = (tl.program_id(0) % blocks).to(tl.int64) * BL + tl.arange(0, BL)
    item = (tl.program_id(0) // blocks % items).to(tl.int64)
    k = (tl.program_id(0) // blocks // items).to(tl.int64)
    b, h = item // heads, item % heads
    rows = local + first_row
    end = tl.minimum(num_rows, tl.cast(first_row, tl.int64) + slab_rows)
    here = (local < slab_rows) & (rows < end)
    query_ptr += b * query_batch + h * query_head
    key_ptr += b * key_batch + h * key_head
    value_ptr += b * value_batch + h * value_head
    query_dot_ptr += k * query_dot_tangent + b * query_dot_batch + h * query_dot_head
    key_dot_ptr += k * key_dot_tangent + b * key_dot_batch + h * key_dot_head
    value_dot_ptr += k * value_dot_tangent + b * value_dot_batch + h * value_dot_head
    columns = tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)

    y_dot = tl.zeros([BL, BV], tl.float32)
    mean = tl.zeros([BL], tl.float32)
    for start in range(0, num_keys, BS):
        keys = start + tl.arange(0, BS).to(tl.int64)
        at = probabilities_ptr + (item * slab_rows + local)[:, None] * num_keys + keys[None, :]
        p = tl.load(at, mask=here[:, None] & (keys[None, :] < num_keys), other=-0.0)
        if QUERY_DOT or KEY_DOT:
            scores_dot = tl.zeros([BL, BS], tl.float32)
            if QUERY_DOT:
                scores_dot = add_products(
                    scores_dot, query_dot_ptr, query_dot_row, query_dot_column, key_ptr, key_row, key_column,
                    rows, end, keys, num_keys, width, BE, PRECISION,
                )  # fmt: skip
            if KEY_DOT:
                scores_dot = add_products(
                    scores_dot, query_ptr, query_row, query_column, key_dot_ptr, key_dot_row, key_dot_column,
                    rows, end, keys, num_keys, width, BE, PRECISION,
                )  # fmt: skip
            forbidden = p.to(tl.int32, bitcast=True) == MINUS_ZERO
            weights = p * tl.where(forbidden, 0.0, scores_dot * scale)
            mean += tl.sum(weights, 1)
            values = tile(value_ptr, keys, num_keys, value_row, columns, value_width, value_column)
            y_dot = tl.dot(weights, values.to(tl.float32), y_dot, input_precision="tf32x3")
        if VALUE_DOT:
            values_dot = tile(value_dot_ptr, keys, num_keys, value_dot_row, columns, value_width, value_dot_column)
            y_dot = tl.dot(p, values_dot.to(tl.float32), y_dot, input_precision="tf32x3")
    inside = here[:, None] & (columns[None, :] < value_width)
    if QUERY_DOT or KEY_DOT:
        at = exact_ptr + (item * slab_rows + local)[:, None] * value_width + columns[None, :]
        y_dot -= mean[:, None] * tl.load(at, mask=inside, other=0.0)
    to = ((k * items + item) * num_rows + rows)[:, None] * value_width + columns[None, :]
    tl.store(out_ptr + to, y_dot.to(out_ptr.dtype.element_ty), mask=inside)


def blocks_of(num_rows: int, width: int, value_width: int) -> dict[str, int]:
    """Tile sizes and warps; they depend on the sizes alone, so that nothing else changes a bit."""
    values = min(max(triton.next_power_of_2(value_width), 16), MOST_VALUES)
    rows = min(max(triton.next_power_of_2(num_rows), 16), 32 if values > 128 else 64)
    return {
        "BL": rows,
        "BS": 32 if values > 128 else 64,
        "BE": min(max(triton.next_power_of_2(width), 16), 64),
        "BV": values,
        "num_warps": 8 if rows * values > 4096 else 4,
    }


def attention_jvp(query, key, value, query_dot, key_dot, value_dot, mask, causal, scale, y, y_dot):
    """Into y [B, H, L, V] and y_dot [K, B, H, L, V], contiguous; a tangent that is None is one of zeros."""
    batch, heads, num_rows, width = query.shape
    num_keys, value_width, num_tangents = key.shape[2], value.shape[3], len(y_dot)
    items = batch * heads
    if y.numel() == 0:
        return
    options = blocks_of(num_rows, width, value_width)
    options["PRECISION"] = "tf32x3" if query.dtype == torch.float32 else "ieee"
    given = {"QUERY_DOT": query_dot is not None, "KEY_DOT": key_dot is not None, "VALUE_DOT": value_dot is not None}
    # A tangent that is not there is never read.
    query_dot, key_dot, value_dot = (
        primal[None] if t is None else t
        for t, primal in ((query_dot, query), (key_dot, key), (value_dot, value))
    )
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    mask = query if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    slab_rows = min(num_rows, max(PROBABILITIES // max(items * num_keys, 1) // options["BL"], 1) * options["BL"])
    probabilities = query.new_empty((items, slab_rows, num_keys), dtype=torch.float32)
    exact = query.new_empty((items, slab_rows, value_width), dtype=torch.float32)
    value_blocks = triton.cdiv(value_width, options["BV"])
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        for first_row in range(0, num_rows, slab_rows):
            programs = items * triton.cdiv(slab_rows, options["BL"])
            sizes = (heads, num_rows, num_keys, width, value_width, scale)
            strides = (*query.stride(), *key.stride(), *value.stride())
            primal_kernel[(programs, value_blocks)](
                query, key, value, mask, probabilities, y, exact, first_row, slab_rows, *sizes, *strides,
                *mask.stride(), MASK=kind, CAUSAL=causal, **options,
            )  # fmt: skip
            if num_tangents == 0:
                continue
            attention_jvp_kernel[(programs * num_tangents, value_blocks)](
                query, key, value, query_dot, key_dot, value_dot, probabilities, exact, y_dot, first_row, slab_rows,
                items, *sizes, *strides, *query_dot.stride(), *key_dot.stride(), *value_dot.stride(),
                **given, **options,
            )  # fmt: skip
