"""Codes against their limits in Triton: see ``csrc/code_topk.h`` for the form.

A program meets the bits of a block of codes with the integer matrix by ``tl.dot``, in two products of bytes, exact.
"""

import contextlib

import torch
import triton
import triton.language as tl

BLOCK = 128  # codes of a program


@triton.jit(do_not_specialize=["num_codes", "outside"])
def code_topk_kernel(
    codes_ptr,  # [num_codes] int64
    num_codes,
    outside,  # the bits from n on
    rows_ptr,  # [2, 64, 64] int8
    limits_ptr,  # [65] float32
    flags_ptr,  # [ceil(num_codes / 8)] uint8
    LARGEST: tl.constexpr,
    MEMBERS: tl.constexpr,  # 32 or 64
    BLOCK: tl.constexpr,
):
    """flags[j] has bit i for code 8 j + i whose |R c|^2 reaches its limit, or that has a bit from n on."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [b]
    codes = tl.load(codes_ptr + places, mask=places < num_codes, other=0)
    i = tl.arange(0, MEMBERS)  # rows of R, and bits of a code
    bits = ((codes[:, None] >> i[None, :].to(tl.int64)) & 1).to(tl.int8)  # [b, bit]
    weights = tl.sum(bits.to(tl.int32), axis=1)
    for bit in range(MEMBERS, 64):  # of no member: the limits of their weights let all pass
        weights += ((codes >> bit) & 1).to(tl.int32)
    at = rows_ptr + i[None, :] * 64 + i[:, None]  # [bit, row]
    sums = 256 * tl.dot(bits, tl.load(at)) + tl.dot(bits, tl.load(at + 64 * 64))  # [b, row] int32
    values = sums.to(tl.float32)
    squares = tl.sum(values * values, axis=1)
    limits = tl.load(limits_ptr + weights)
    if LARGEST:
        passes = squares >= limits
    else:
        passes = squares <= limits
    passes = (passes | ((codes & outside) != 0)) & (places < num_codes)
    eight = tl.arange(0, 8)
    flags = tl.sum(passes.to(tl.int32).reshape(BLOCK // 8, 8) << eight[None, :], axis=1)
    bytes_ = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(flags_ptr + bytes_, flags.to(tl.uint8), mask=bytes_ * 8 < num_codes)


def code_topk(codes, members, rows, limits, largest, flags):
    """Writes the flags of ``codes``; arguments as in csrc/code_topk.h."""
    outside = 0 if members == 64 else -1 << members
    with torch.cuda.device(codes.device) if codes.is_cuda else contextlib.nullcontext():
        code_topk_kernel[(triton.cdiv(len(codes), BLOCK),)](
            codes, len(codes), outside, rows, limits, flags,
            LARGEST=largest, MEMBERS=32 if members <= 32 else 64, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
