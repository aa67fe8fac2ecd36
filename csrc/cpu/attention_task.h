// What the driver of attention_jvp hands to the kernels of a SIMD level.
#pragma once

#include <cstdint>

#include "attention_jvp.h"

namespace pyattr::cpu {

constexpr int64_t kAttentionLanes = 32;  // rows of P and of a tile's outputs are a multiple of this long, for every level

// packed[p][i][j] = source[i * inner_stride + (p * panel + j) * column_stride] as float32 for panels [begin, end), 0 beyond the
// columns.
struct AttentionPack {
  const void* source;
  Dtype dtype;
  int64_t inner, inner_stride;
  int64_t columns, column_stride;
  int64_t begin, end;
  float* packed;
};

// Rows [first, first + rows) of the queries of head (b, h).
struct AttentionRows {
  const AttentionJvpArgs* args;
  int64_t b, h, first, rows;
  const float* key;         // packed, keys the columns
  const float* value;       // packed, values' entries the columns
  float* probabilities;     // [rows, keys_stride]: -0.0 where a pair is forbidden, and beyond the keys
  int64_t keys_stride, values_stride;
  // Of one tangent:
  int64_t k;
  const float* key_dot;     // packed, or null
  const float* value_dot;   // packed, or null
  float* scratch;           // of attention_scratch() floats
};

inline int64_t attention_scratch(int64_t rows, int64_t width, int64_t keys_stride, int64_t values_stride) {
  return rows * ((width + kAttentionLanes - 1) / kAttentionLanes * kAttentionLanes + keys_stride + values_stride) + keys_stride;
}

struct AttentionKernels {
  int64_t panel;  // columns of a panel
  int64_t rows;   // of a register tile
  void (*pack)(const AttentionPack&);
  void (*primal)(const AttentionRows&);   // writes probabilities and y
  void (*tangent)(const AttentionRows&);  // writes y_dot of tangent k
};

}  // namespace pyattr::cpu
