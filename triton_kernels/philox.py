"""Philox4x32-10 (Salmon et al., SC 2011) and the numbers made from it, as device functions; the same words on every backend."""

import triton
import triton.language as tl


@triton.jit
def philox_words(c0, c1, seed, stream, c2=None, c3=None):
    """The four words of counter (c0, c1, c2, c3) and key (seed, stream); uint32 tensors of one shape, None means 0."""
    k0 = tl.zeros_like(c0) + seed.to(tl.uint32)
    k1 = tl.zeros_like(c0) + stream.to(tl.uint32)
    x0, x1 = c0, c1
    x2 = tl.zeros_like(c0) if c2 is None else c2
    x3 = tl.zeros_like(c0) if c3 is None else c3
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    w0 = tl.full(c0.shape, 0x9E3779B9, tl.uint32)
    w1 = tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(m0, x0), m0 * x0
        high1, low1 = tl.umulhi(m1, x2), m1 * x2
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0 += w0
        k1 += w1
    return x0, x1, x2, x3


@triton.jit
def interleave_four(a, b, c, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Four [ROWS, COLUMNS / 4] tensors as one [ROWS, COLUMNS]: a, b, c, d of the first column, then of the next."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(ROWS, COLUMNS)


@triton.jit
def normal_pair(a, b):
    """Two standard normals from two words, by Box and Muller; within 2e-6 of float64.

    u1 = (a + 0.5) 2^-32, u2 = b 2^-32, r = sqrt(-2 ln u1): r cos(2 pi u2) and r sin(2 pi u2). The same polynomials as
    ``csrc/cuda/normal_entry.cuh``, which explains them.
    """
    u = (a.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    u_bits = u.to(tl.uint32, bitcast=True)
    exponent_bits = (u_bits - 0x3F3504F3) & 0xFF800000
    near_one = a >= 0xB504F334
    f_near = ((a ^ 0xFFFFFFFF) * 2 + 1).to(tl.float32) * -1.1641532182693481e-10  # -2^-33
    f = tl.where(near_one, f_near, (u_bits - exponent_bits).to(tl.float32, bitcast=True) - 1.0)
    exponent = tl.where(near_one, 0.0, exponent_bits.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07)
    p = -0.0762228742
    p = p * f + 0.129046887
    p = p * f - 0.132428959
    p = p * f + 0.141817749
    p = p * f - 0.166090891
    p = p * f + 0.200019777
    p = p * f - 0.250015825
    p = p * f + 0.333333254
    p = p * f - 0.499999881
    log_u = exponent * 0.693147182 + (p * f * f + f)
    r = tl.sqrt_rn(-2.0 * log_u)

    quadrant = (b + 0x20000000) >> 30
    x = (b - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    xx = x * x
    s = -0.589078665
    s = s * xx + 2.54976726
    s = s * xx - 5.16770792
    s = (s * xx + 3.14159274) * x
    c = 0.231329709
    c = c * xx - 1.33504462
    c = c * xx + 4.05870724
    c = c * xx - 4.93480206
    c = c * xx + 1.0
    swap = (quadrant & 1) != 0
    even = r * tl.where(swap, s, c)
    odd = r * tl.where(swap, c, s)
    return tl.where((quadrant == 1) | (quadrant == 2), -even, even), tl.where(quadrant >= 2, -odd, odd)
