// What every dense projection [B, P] -> [B, D] takes: plain addresses, sizes in elements, no tensor type.
#pragma once

#include <cstdint>

namespace pyattr {

enum class Dtype : int32_t { float16 = 0, bfloat16 = 1, float32 = 2 };

struct ProjectArgs {
  const void* grads;      // [B, P] of dtype, element (b, p) at b * sample_stride + p * column_stride
  Dtype dtype;
  int64_t num_samples;    // B
  int64_t num_columns;    // P
  int64_t sample_stride;  // elements
  int64_t column_stride;  // elements
  float* out;             // [B, D], contiguous
  int64_t proj_dim;       // D
  uint32_t seed;          // Philox key word 0
  uint32_t stream;        // Philox key word 1
  int64_t column_offset;  // column of the random matrix that multiplies grads[:, 0]
  float scale;            // out = scale * (grads @ matrix^T)
};

}  // namespace pyattr
