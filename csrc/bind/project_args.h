// From Python's integers to ProjectArgs, with the checks that memory safety needs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/project_args.h"

namespace pyattr::bind {

inline ProjectArgs project_args(uintptr_t grads, int dtype, int64_t num_samples, int64_t num_columns, int64_t sample_stride,
                                int64_t column_stride, uintptr_t out, int64_t proj_dim, uint32_t seed, uint32_t stream,
                                int64_t column_offset, float scale, int64_t max_columns) {
  const auto require = [](bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
  };
  require(dtype >= 0 && dtype <= 2, "dtype must be 0 (float16), 1 (bfloat16) or 2 (float32)");
  require(num_samples >= 0 && num_columns >= 0, "num_samples and num_columns must not be negative");
  require(proj_dim >= 0 && proj_dim <= (int64_t{1} << 32), "proj_dim must lie in [0, 2^32]");
  require(column_offset >= 0 && column_offset <= max_columns - num_columns, "column_offset is out of range");
  require(grads != 0 || num_samples == 0 || num_columns == 0, "grads is a null address");
  require(out != 0 || num_samples == 0 || proj_dim == 0, "out is a null address");
  return {reinterpret_cast<const void*>(grads), static_cast<Dtype>(dtype), num_samples, num_columns, sample_stride,
          column_stride, reinterpret_cast<float*>(out), proj_dim, seed, stream, column_offset, scale};
}

}  // namespace pyattr::bind
