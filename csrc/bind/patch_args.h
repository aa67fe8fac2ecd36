// From Python's integers to PatchArgs, with the checks that memory safety needs.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>

#include "common/patch_args.h"

namespace pyattr::bind {

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// bank_shape: N, C, H, W; query_size: Hq, Wq; part: row_begin, row_end, column_begin, column_end.
struct PatchNumbers {
  uintptr_t query, bank;
  int pixel;
  std::array<int64_t, 4> bank_strides, bank_shape;
  std::array<int64_t, 2> query_size;
  int64_t patch_size;
  int border;
  bool lowres;
  double scale, inverse;
  std::array<int64_t, 4> part;
};

inline PatchArgs patch_args(const PatchNumbers& given, int64_t stats_stride) {
  require(given.pixel >= 0 && given.pixel <= 3, "pixel must be 0 (float16), 1 (bfloat16), 2 (float32) or 3 (uint8)");
  require(given.border >= 0 && given.border <= 2, "border must be 0 (class), 1 (zero) or 2 (inside)");
  const auto [N, C, H, W] = given.bank_shape;
  const auto [Hq, Wq] = given.query_size;
  require(N >= 0 && C >= 0 && H >= 1 && W >= 1 && Hq >= 1 && Wq >= 1, "sizes must be positive");
  require(given.patch_size >= 1 && given.patch_size < (1 << 15), "patch_size must lie in [1, 2^15)");
  require(!given.lowres || given.patch_size % 2 == 0, "lowres needs an even patch_size");
  const PatchArgs args{reinterpret_cast<const float*>(given.query),
                       reinterpret_cast<const void*>(given.bank),
                       static_cast<Pixel>(given.pixel),
                       {given.bank_strides[0], given.bank_strides[1], given.bank_strides[2], given.bank_strides[3]},
                       N, C, Hq, Wq, H, W,
                       given.patch_size,
                       static_cast<Border>(given.border),
                       given.lowres,
                       given.scale,
                       given.inverse,
                       given.part[0], given.part[1], given.part[2], given.part[3],
                       stats_stride};
  require(args.border == Border::inside || (H == Hq && W == Wq), "the query must be of the bank's size");
  require(args.grid(H) >= 1 && args.grid(W) >= 1 && args.grid(Hq) >= 1 && args.grid(Wq) >= 1, "no window fits");
  require(args.grid(H) * args.grid(W) <= INT32_MAX, "images are too large");
  require(args.row_begin >= 0 && args.row_begin <= args.row_end && args.row_end <= args.grid(Hq), "the rows are out of range");
  require(args.column_begin >= 0 && args.column_begin <= args.column_end && args.column_end <= args.grid(Wq),
          "the columns are out of range");
  require(stats_stride >= N, "stats_stride must be at least the number of images");
  require((args.query != nullptr && args.bank != nullptr) || N == 0 || C == 0, "query or bank is a null address");
  return args;
}

}  // namespace pyattr::bind
