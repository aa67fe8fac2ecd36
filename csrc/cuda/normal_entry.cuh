// Two standard normals from two words, by Box and Muller, in float32 arithmetic of IEEE operations only: multiply, add,
// fused multiply-add and square root, each rounded once. A CPU computes the same bits, so the error bound is tested there:
// against the float64 definition at most 2e-6 (measured: 9.2e-7 over 3e7 pairs and the extreme words).
#pragma once

#include "cuda/exact_float.cuh"

namespace pyattr::cuda {

struct NormalPair {
  float even, odd;
};

// u1 = (a + 0.5) 2^-32, u2 = b 2^-32, r = sqrt(-2 ln u1): even = r cos(2 pi u2), odd = r sin(2 pi u2).
PYATTR_HOST_DEVICE NormalPair normal_pair(uint32_t a, uint32_t b) {
  // ln u1 = exponent * ln 2 + ln(1 + f), f in [-0.293, 0.415]. Near u1 = 1 the logarithm is as small as 2^-33 and every
  // digit of 1 - u1 counts: it is taken from the integer, not from a rounded u1.
  const float u = multiply(add(static_cast<float>(a), 0.5f), 0x1p-32f);
  const uint32_t exponent_bits = (bits_of(u) - 0x3F3504F3u) & 0xFF800000u;  // relative to sqrt(1/2)
  const bool near_one = a >= 0xB504F334u;                                   // u1 >= sqrt(1/2)
  const float f = near_one ? multiply(static_cast<float>(2u * ~a + 1u), -0x1p-33f)
                           : add(float_of(bits_of(u) - exponent_bits), -1.0f);
  const float exponent = near_one ? 0.0f : multiply(static_cast<float>(static_cast<int32_t>(exponent_bits)), 0x1p-23f);
  // (ln(1 + f) - f) / f^2: minimax, relative error of ln(1 + f) 4e-9.
  float p = -0.0762228742f;
  p = multiply_add(p, f, 0.129046887f);
  p = multiply_add(p, f, -0.132428959f);
  p = multiply_add(p, f, 0.141817749f);
  p = multiply_add(p, f, -0.166090891f);
  p = multiply_add(p, f, 0.200019777f);
  p = multiply_add(p, f, -0.250015825f);
  p = multiply_add(p, f, 0.333333254f);
  p = multiply_add(p, f, -0.499999881f);
  const float log1p_f = multiply_add(multiply(p, f), f, f);
  const float r = square_root(multiply(-2.0f, multiply_add(exponent, 0.693147182f, log1p_f)));

  // 2 pi u2 = quadrant * pi / 2 + pi x, |x| <= 1/4, split on the integer.
  const uint32_t quadrant = (b + 0x20000000u) >> 30;
  const float x = multiply(static_cast<float>(static_cast<int32_t>(b - (quadrant << 30))), 0x1p-31f);
  const float xx = multiply(x, x);
  float s = -0.589078665f;  // sin(pi x) / x, error 1e-8
  s = multiply_add(s, xx, 2.54976726f);
  s = multiply_add(s, xx, -5.16770792f);
  s = multiply(multiply_add(s, xx, 3.14159274f), x);
  float c = 0.231329709f;  // cos(pi x), error 5e-11
  c = multiply_add(c, xx, -1.33504462f);
  c = multiply_add(c, xx, 4.05870724f);
  c = multiply_add(c, xx, -4.93480206f);
  c = multiply_add(c, xx, 1.0f);
  const float even = multiply(r, quadrant & 1u ? s : c);
  const float odd = multiply(r, quadrant & 1u ? c : s);
  return {quadrant == 1u || quadrant == 2u ? -even : even, quadrant >= 2u ? -odd : odd};
}

}  // namespace pyattr::cuda
