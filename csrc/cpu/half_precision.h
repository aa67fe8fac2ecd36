// Float32 to float16 and bfloat16, to the nearest, ties to even; the way back is in stage.h. Internal linkage throughout.
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
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u), quiet = bits | 0x400000u;
  return static_cast<uint16_t>(((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded) >> 16);
}

inline uint16_t narrow_float16(float x) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7FFFFFFFu;
  float positive;
  std::memcpy(&positive, &magnitude, sizeof positive);
  const uint32_t normal = (magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u)) >> 13;  // exponent bias 127 to 15
  const uint32_t subnormal = float_bits(positive + 0.5f) - 0x3F000000u;  // one unit of 0.5f in the last place is 2^-24
  const uint32_t beyond = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>((magnitude >= 0x47800000u ? beyond : finite) | ((bits >> 16) & 0x8000u));
}

}  // namespace
}  // namespace pyattr::cpu
