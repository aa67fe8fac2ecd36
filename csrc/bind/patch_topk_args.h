// PatchTopkArgs for every backend.
#pragma once

#include "bind/patch_args.h"
#include "patch_topk.h"

namespace pyattr::bind {

inline PatchTopkArgs patch_topk_args(const PatchNumbers& given, int64_t stats_stride, int64_t k, uintptr_t minima, uintptr_t sums,
                                     uintptr_t tops, uintptr_t nearest) {
  const PatchArgs args = patch_args(given, stats_stride);
  require(k >= 1, "k must be positive");
  require((minima != 0 && sums != 0 && tops != 0) || args.num_images == 0 || args.positions() == 0, "an array is a null address");
  return {args, k, reinterpret_cast<float*>(minima), reinterpret_cast<float*>(sums), reinterpret_cast<float*>(tops),
          reinterpret_cast<int32_t*>(nearest)};
}

}  // namespace pyattr::bind
