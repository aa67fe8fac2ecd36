// Copies a block of grads into [columns][lanes] float32, widening the dtype. Internal linkage: every SIMD file has its own copy,
// compiled with its own flags.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/project_args.h"

namespace pyattr::cpu {
namespace {

inline float widen(float x) { return x; }

inline float widen_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline float widen_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7FFFu;
  // Scaling by 2^112 moves the exponent's bias and makes subnormals normal; inf and NaN need their exponent set by hand.
  uint32_t wide = magnitude << 13;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  value *= 0x1p112f;
  std::memcpy(&wide, &value, sizeof wide);
  if (magnitude >= 0x7C00u) wide |= 0x7F800000u;
  wide |= sign;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// staged[(c - first) * lanes + l] = grads[sample + l, c] for c in [begin, end), samples beyond `samples` left as they are.
template <int kLanes, typename T, typename Widen>
void stage_columns(const ProjectArgs& args, int64_t sample, int64_t samples, int64_t begin, int64_t end, float* staged,
                   Widen widen_one) {
  const T* grads = static_cast<const T*>(args.grads);
  for (int64_t l = 0; l < samples; ++l) {
    const T* row = grads + (sample + l) * args.sample_stride + begin * args.column_stride;
    for (int64_t c = 0; c < end - begin; ++c) staged[c * kLanes + l] = widen_one(row[c * args.column_stride]);
  }
}

template <int kLanes>
void stage(const ProjectArgs& args, int64_t sample, int64_t samples, int64_t begin, int64_t end, float* staged) {
  switch (args.dtype) {
    case Dtype::float32:
      return stage_columns<kLanes, float>(args, sample, samples, begin, end, staged, widen);
    case Dtype::bfloat16:
      return stage_columns<kLanes, uint16_t>(args, sample, samples, begin, end, staged, widen_bfloat16);
    case Dtype::float16:
      return stage_columns<kLanes, uint16_t>(args, sample, samples, begin, end, staged, widen_float16);
  }
}

}  // namespace
}  // namespace pyattr::cpu
