// PatchMeanArgs for every backend.
#pragma once

#include "bind/patch_args.h"
#include "patch_mean.h"

namespace pyattr::bind {

inline PatchMeanArgs patch_mean_args(const PatchNumbers& given, int64_t stats_stride, uintptr_t minima, uintptr_t sums,
                                     uintptr_t pixels) {
  const PatchArgs args = patch_args(given, stats_stride);
  require(!args.lowres, "lowres must be false");
  require((minima != 0 && sums != 0 && pixels != 0) || args.num_images == 0 || args.positions() == 0, "an array is a null address");
  return {args, reinterpret_cast<float*>(minima), reinterpret_cast<float*>(sums), reinterpret_cast<float*>(pixels)};
}

}  // namespace pyattr::bind
