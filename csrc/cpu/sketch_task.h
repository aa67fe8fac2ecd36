// The sparse projection's work: samples and chunks of columns, computed by the kernel of some SIMD level.
#pragma once

#include <cstdint>

#include "sparse_project.h"

namespace pyattr::cpu {

// sums[b * D + j] += the products of columns [column_begin, column_end) of grads with the matrix, samples [begin, end), unscaled.
struct SketchTask {
  const SketchArgs* args;
  int64_t sample_begin, sample_end;
  int64_t column_begin, column_end;  // of P
  float* sums;                       // [sample_end - sample_begin, D]
};

using SketchKernel = void (*)(const SketchTask&);

// out[b * P + p] = scale * sum_j M[j, column_offset + p] * coefficients[b * D + j] for p in [column_begin, column_end), all samples.
struct TransposeTask {
  const SketchArgs* args;
  const float* coefficients;         // [B, D]
  int64_t column_begin, column_end;  // of P
};

using TransposeKernel = void (*)(const TransposeTask&);

}  // namespace pyattr::cpu
