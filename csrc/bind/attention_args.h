// From Python's integers to AttentionJvpArgs, with the checks that memory safety needs.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>

#include "attention_jvp.h"

namespace pyattr::bind {

// An address and strides of K, B, H, rows, columns.
using OperandNumbers = std::pair<uintptr_t, std::array<int64_t, 5>>;

// operands: query, key, value and their tangents; sizes: K, B, H, L, S, E, V.
struct AttentionNumbers {
  std::array<OperandNumbers, 6> operands;
  int dtype;
  uintptr_t mask;
  int mask_kind;
  std::array<int64_t, 4> mask_strides;
  std::array<int64_t, 7> sizes;
  bool causal;
  float scale;
  uintptr_t y, y_dot;
};

inline AttentionJvpArgs attention_args(const AttentionNumbers& given) {
  const auto require = [](bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
  };
  require(given.dtype >= 0 && given.dtype <= 2, "dtype must be 0 (float16), 1 (bfloat16) or 2 (float32)");
  require(given.mask_kind >= 0 && given.mask_kind <= 2, "mask_kind must be 0 (none), 1 (allowed) or 2 (added)");
  const auto [K, B, H, L, S, E, V] = given.sizes;
  require(*std::min_element(given.sizes.begin(), given.sizes.end()) >= 0, "sizes must not be negative");
  const bool empty = B == 0 || H == 0 || L == 0 || V == 0;
  require(empty || (given.y != 0 && (K == 0 || given.y_dot != 0)), "an output is a null address");
  const bool no_pairs = empty || S == 0;
  require(no_pairs || given.mask_kind == 0 || given.mask != 0, "mask is a null address");
  require(no_pairs || E == 0 || (given.operands[0].first != 0 && given.operands[1].first != 0), "query or key is a null address");
  require(no_pairs || given.operands[2].first != 0, "value is a null address");
  const auto operand = [&](int i) {
    AttentionOperand out{reinterpret_cast<const void*>(given.operands[i].first), {}};
    std::copy(given.operands[i].second.begin(), given.operands[i].second.end(), out.strides);
    return out;
  };
  AttentionJvpArgs args{operand(0), operand(1), operand(2), operand(3), operand(4), operand(5),
                        static_cast<Dtype>(given.dtype), reinterpret_cast<const void*>(given.mask),
                        static_cast<MaskKind>(given.mask_kind), {}, K, B, H, L, S, E, V, given.causal, given.scale,
                        reinterpret_cast<void*>(given.y), reinterpret_cast<void*>(given.y_dot)};
  std::copy(given.mask_strides.begin(), given.mask_strides.end(), args.mask_strides);
  return args;
}

}  // namespace pyattr::bind
