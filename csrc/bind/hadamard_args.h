// ProjectArgs of the Hadamard projection: no column offset, and no more outputs than the matrix has rows.
#pragma once

#include "bind/project_args.h"
#include "hadamard_project.h"

namespace pyattr::bind {

inline ProjectArgs hadamard_args(uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride,
                                 int64_t column_stride, uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream, float scale) {
  if (num_columns < 0 || num_columns > kHadamardMaxColumns) throw std::invalid_argument("num_columns must lie in [0, 2^39]");
  if (proj_dim > int64_t{1} << hadamard_bits(num_columns)) {
    throw std::invalid_argument("proj_dim must be at most the first power of two from num_columns on");
  }
  return project_args(grads, dtype, num_samples, num_columns, sample_stride, column_stride, out, proj_dim, seed, stream, 0, scale,
                      kHadamardMaxColumns);
}

}  // namespace pyattr::bind
