// float32 to 16-bit floats, rounded to nearest, ties to even; the same bits on a CPU and on a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/philox.h"  // PYATTR_HOST_DEVICE

namespace pyattr {

PYATTR_HOST_DEVICE uint32_t narrow_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

PYATTR_HOST_DEVICE uint16_t narrow_bfloat16(float x) {
  const uint32_t bits = narrow_bits(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN: rounding could give inf
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

PYATTR_HOST_DEVICE uint16_t narrow_float16(float x) {
  const uint32_t bits = narrow_bits(x), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the units of 2^-24, rounded, in the last bits
    float positive;
    memcpy(&positive, &magnitude, sizeof positive);
    return static_cast<uint16_t>(sign | (narrow_bits(positive + 0.5f) - narrow_bits(0.5f)));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13);
}

}  // namespace pyattr
