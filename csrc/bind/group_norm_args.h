// GroupNormSiluJvpArgs for every backend.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "group_norm_silu_jvp.h"

namespace pyattr::bind {

// Address and strides of K, B, C, L; of x, x_dot, residual, residual_dot, y, y_dot, sum, sum_dot, 0 where there is none.
using GroupNormArrays = std::array<std::pair<uintptr_t, std::array<int64_t, 4>>, 8>;

// shape: K, B, C, L, G.
inline GroupNormSiluJvpArgs group_norm_args(int dtype, std::array<int64_t, 5> shape, const GroupNormArrays& arrays,
                                            uintptr_t weight, uintptr_t bias, double eps, bool silu) {
  const auto require = [](bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
  };
  require(dtype >= 0 && dtype <= 2, "dtype must be 0 (float16), 1 (bfloat16) or 2 (float32)");
  const auto [K, B, C, L, G] = shape;
  require(K >= 0 && B >= 0 && C >= 0 && L >= 0 && G >= 1 && C % G == 0, "sizes must not be negative, num_groups must divide C");
  TangentArray views[8];
  for (int i = 0; i < 8; ++i) {
    const auto& [address, strides] = arrays[i];
    views[i] = {reinterpret_cast<void*>(address), strides[0], strides[1], strides[2], strides[3]};
  }
  const auto& [x, x_dot, residual, residual_dot, y, y_dot, sum, sum_dot] = views;
  const bool any = B * C * L > 0;
  require(!any || (x.data != nullptr && y.data != nullptr), "x or y is a null address");
  require(!any || K == 0 || (x_dot.data != nullptr && y_dot.data != nullptr), "x_dot or y_dot is a null address");
  require(residual.data != nullptr || (residual_dot.data == nullptr && sum.data == nullptr), "residual is a null address");
  require(residual_dot.data != nullptr || sum_dot.data == nullptr, "residual_dot is a null address");
  return {static_cast<Dtype>(dtype), K, B, C, L, G, x, x_dot, residual, residual_dot, y, y_dot, sum, sum_dot,
          reinterpret_cast<const float*>(weight), reinterpret_cast<const float*>(bias), eps, silu};
}

}  // namespace pyattr::bind
