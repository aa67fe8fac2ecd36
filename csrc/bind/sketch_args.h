// From Python's integers to SketchArgs, with the checks that memory safety needs.
#pragma once

#include "bind/project_args.h"
#include "sparse_project.h"

namespace pyattr::bind {

inline SketchArgs sketch_args(uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride,
                              int64_t column_stride, uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream,
                              int64_t column_offset, int nonzeros, float scale) {
  constexpr int64_t kMaxColumns = int64_t{1} << 39;  // what the Philox counter's 32 bits reach
  if (nonzeros < 1 || nonzeros > 8) throw std::invalid_argument("nonzeros must lie in [1, 8]");
  if (proj_dim < nonzeros || proj_dim > (int64_t{1} << 31)) throw std::invalid_argument("proj_dim must lie in [nonzeros, 2^31]");
  return {project_args(grads, dtype, num_samples, num_columns, sample_stride, column_stride, out, proj_dim, seed, stream,
                       column_offset, scale, kMaxColumns),
          nonzeros};
}

}  // namespace pyattr::bind
