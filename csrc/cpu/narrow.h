// float32 to 16-bit floats, rounded to nearest, ties to even. Internal linkage: every SIMD file has its own copy, compiled with its own
// flags.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyattr::cpu {
namespace {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint16_t narrow_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN: rounding could give inf
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

inline uint16_t narrow_float16(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7F800000u) return sign | 0x7E00u;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the units of 2^-24, rounded, in the last bits
    float positive;
    std::memcpy(&positive, &magnitude, sizeof positive);
    return sign | static_cast<uint16_t>(float_bits(positive + 0.5f) - float_bits(0.5f));
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13);
}

}  // namespace
}  // namespace pyattr::cpu
