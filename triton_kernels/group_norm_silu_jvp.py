"""Group normalisation with SiLU and K tangents in Triton: see ``csrc/group_norm_silu_jvp.h`` for what is computed.

A program owns a group of one sample and some of its tangents. A group that fits into its registers is read once, as is each of
its tangents; a larger one is read three times and each tangent twice, the primal's values made anew along the way. Tangents are
cut into programs' shares by (K, B, G) alone, and each is summed by itself: no bits depend on the share.

The mean is taken twice, the second time of what the first left, so that a large common offset costs the variance no digits.
"""

import triton
import triton.language as tl

from .patches import on_device

HELD_ELEMENTS = 8192  # of a group, in the registers of 8 warps
BLOCK = 4096  # elements at a time of a larger one
PROGRAMS = 2048  # wanted


@triton.jit
def offsets(index, first_channel, num_channels, group_channels, positions, LAST: tl.constexpr, ORDER: tl.constexpr):
    """Where elements of a group lie in their sample, channels-last or not; ``ORDER``: whether channels run fastest in index."""
    if ORDER:
        channel, position = index % group_channels, index // group_channels
    else:
        channel, position = index // positions, index % positions
    channel += first_channel
    if LAST:
        at = position.to(tl.int64) * num_channels + channel
    else:
        at = channel.to(tl.int64) * positions + position
    return at, channel


@triton.jit
def load_sum(a_ptr, b_ptr, at, inside):
    """a + b in float32, a alone without b; zeros outside."""
    value = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if b_ptr is not None:
        value += tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def activate(xhat, inverse, channel, inside, weight_ptr, bias_ptr, SILU: tl.constexpr):
    """y, and what (s_dot - its means) is multiplied by."""
    z = xhat
    slope = xhat * 0 + inverse
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
        z = z * weight
        slope = slope * weight
    if bias_ptr is not None:
        z = z + tl.load(bias_ptr + channel, mask=inside, other=0.0)
    if SILU:
        share = tl.sigmoid(z)
        slope = slope * (share * (1 + z * (1 - share)))
        z = z * share
    return z, slope


@triton.jit
def inverse_deviation(squares, rest, count, eps):
    """1 / sqrt(variance + eps) from the sum of squares about a point and the mean's distance from it."""
    variance = squares / count - rest * rest
    return 1 / tl.sqrt(tl.where(variance < 0, 0.0, variance) + eps)


@triton.jit(do_not_specialize=["num_tangents", "share", "num_groups"])
def group_norm_silu_jvp_kernel(
    x_ptr,  # [B, C, L], likewise residual, y and sum
    residual_ptr,
    x_dot_ptr,  # [K, B, C, L], likewise residual_dot, y_dot and sum_dot
    residual_dot_ptr,
    weight_ptr,  # [C] float32
    bias_ptr,
    y_ptr,
    y_dot_ptr,
    sum_ptr,
    sum_dot_ptr,
    num_tangents,
    share,  # tangents of a program
    num_samples,
    num_groups,
    group_channels,
    positions,
    eps,
    SILU: tl.constexpr,
    X_LAST: tl.constexpr,  # whether x and its like are channels-last
    DOT_LAST: tl.constexpr,
    HELD: tl.constexpr,  # whether BLOCK holds a whole group
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) % num_groups
    sample = (tl.program_id(0) // num_groups).to(tl.int64)
    first = group * group_channels
    channels = num_groups * group_channels
    size = tl.cast(channels, tl.int64) * positions  # of a sample
    count = group_channels * positions
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, num_tangents)
    tangent_size = size * num_samples
    index = tl.arange(0, BLOCK)
    if HELD:
        inside = index < count
        at, channel = offsets(index, first, channels, group_channels, positions, X_LAST, DOT_LAST)
        at += sample * size
        s = load_sum(x_ptr, residual_ptr, at, inside)
        centred = tl.where(inside, s - tl.sum(s) / count, 0.0)
        rest = tl.sum(centred) / count
        centred = tl.where(inside, centred - rest, 0.0)
        inverse = inverse_deviation(tl.sum(centred * centred), 0.0, count, eps)
        xhat = centred * inverse
        y, slope = activate(xhat, inverse, channel, inside, weight_ptr, bias_ptr, SILU)
        if tl.program_id(1) == 0:
            tl.store(y_ptr + at, y, mask=inside)
            if sum_ptr is not None:
                tl.store(sum_ptr + at, s, mask=inside)
        at, _ = offsets(index, first, channels, group_channels, positions, DOT_LAST, DOT_LAST)
        for tangent in range(begin, end):
            to = tangent * tangent_size + sample * size + at
            t = load_sum(x_dot_ptr, residual_dot_ptr, to, inside)
            if sum_dot_ptr is not None:
                tl.store(sum_dot_ptr + to, t, mask=inside)
            mean = tl.sum(t) / count
            along = tl.sum(xhat * t) / count
            tl.store(y_dot_ptr + to, slope * ((t - mean) - xhat * along), mask=inside)
    else:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, count, BLOCK):
            at, _ = offsets(start + index, first, channels, group_channels, positions, X_LAST, DOT_LAST)
            total += load_sum(x_ptr, residual_ptr, sample * size + at, start + index < count)
        mean = tl.sum(total) / count
        total = tl.zeros([BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, count, BLOCK):
            inside = start + index < count
            at, _ = offsets(start + index, first, channels, group_channels, positions, X_LAST, DOT_LAST)
            centred = load_sum(x_ptr, residual_ptr, sample * size + at, inside) - mean
            centred = tl.where(inside, centred, 0.0)
            total += centred
            squares += centred * centred
        rest = tl.sum(total) / count
        inverse = inverse_deviation(tl.sum(squares), rest, count, eps)
        if tl.program_id(1) == 0:
            for start in range(0, count, BLOCK):
                inside = start + index < count
                at, channel = offsets(start + index, first, channels, group_channels, positions, X_LAST, DOT_LAST)
                at += sample * size
                s = load_sum(x_ptr, residual_ptr, at, inside)
                xhat = ((s - mean) - rest) * inverse
                y, _ = activate(xhat, inverse, channel, inside, weight_ptr, bias_ptr, SILU)
                tl.store(y_ptr + at, y, mask=inside)
                if sum_ptr is not None:
                    tl.store(sum_ptr + at, s, mask=inside)
        for tangent in range(begin, end):
            base = tangent * tangent_size + sample * size
            total = tl.zeros([BLOCK], tl.float32)
            product = tl.zeros([BLOCK], tl.float32)
            for start in range(0, count, BLOCK):
                inside = start + index < count
                at, _ = offsets(start + index, first, channels, group_channels, positions, X_LAST, DOT_LAST)
                to, _ = offsets(start + index, first, channels, group_channels, positions, DOT_LAST, DOT_LAST)
                xhat = ((load_sum(x_ptr, residual_ptr, sample * size + at, inside) - mean) - rest) * inverse
                t = load_sum(x_dot_ptr, residual_dot_ptr, base + to, inside)
                total += t
                product += tl.where(inside, xhat * t, 0.0)
            t_mean = tl.sum(total) / count
            along = tl.sum(product) / count
            for start in range(0, count, BLOCK):
                inside = start + index < count
                at, channel = offsets(start + index, first, channels, group_channels, positions, X_LAST, DOT_LAST)
                to, _ = offsets(start + index, first, channels, group_channels, positions, DOT_LAST, DOT_LAST)
                xhat = ((load_sum(x_ptr, residual_ptr, sample * size + at, inside) - mean) - rest) * inverse
                t = load_sum(x_dot_ptr, residual_dot_ptr, base + to, inside)
                _, slope = activate(xhat, inverse, channel, inside, weight_ptr, bias_ptr, SILU)
                tl.store(y_dot_ptr + base + to, slope * ((t - t_mean) - xhat * along), mask=inside)
                if sum_dot_ptr is not None:
                    tl.store(sum_dot_ptr + base + to, t, mask=inside)


def group_norm_silu_jvp(x, x_dot, residual, residual_dot, num_groups, weight, bias, eps, silu, out):
    """x and residual [B, C, L], x_dot and residual_dot [K, B, C, L] into out = (y, y_dot, sum, sum_dot), as many as there are.

    Inputs that lie neither contiguous nor channels-last, or otherwise than the output that is like them, are copied; so is what
    goes to an output that is a part of something larger.
    """
    y, y_dot, *sums = written = [a if a.is_contiguous() or a.mT.is_contiguous() else a.new_empty(a.shape) for a in out]
    x_last, dot_last = (not array.is_contiguous() for array in (y, y_dot))
    x, residual = (_laid_out(array, x_last) for array in (x, residual))
    x_dot, residual_dot = (_laid_out(array, dot_last) for array in (x_dot, residual_dot))
    weight, bias = (None if array is None else array.float().contiguous() for array in (weight, bias))
    num_tangents, num_samples, channels, positions = x_dot.shape
    count = channels // num_groups * positions
    programs = num_samples * num_groups
    share = max(1, num_tangents * programs // PROGRAMS, triton.cdiv(num_tangents, 65535))
    held = count <= HELD_ELEMENTS
    block = max(triton.next_power_of_2(count), 128) if held else BLOCK
    with on_device(x):
        group_norm_silu_jvp_kernel[(programs, max(1, triton.cdiv(num_tangents, share)))](
            x, residual, x_dot, residual_dot, weight, bias, y, y_dot, *sums, *[None] * (2 - len(sums)),
            num_tangents, share, num_samples, num_groups, channels // num_groups, positions, eps,
            SILU=silu, X_LAST=x_last, DOT_LAST=dot_last, HELD=held, BLOCK=block,
            num_warps=8 if block > 2048 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    for array, result in zip(out, written, strict=True):
        if result is not array:
            array.copy_(result)


def _laid_out(array, last):
    """The array [..., C, L] contiguous or channels-last, copied where it is not."""
    if array is None:
        return None
    return array.mT.contiguous().mT if last else array.contiguous()
