// For each position u of a query and each image n, over the patches v that may match: m = min d, sum of w = exp(-(d - m) / (2 sigma^2))
// and sum of w times the centre pixel y_n[v] of the patch, unscaled; see common/patch_args.h for d.
//
// The centre of a window is at offset (p - 1) / 2: the image's pixel v itself where windows are padded. One that is not finite is taken
// as 0: the weight of its patch is 0 or NaN. An infinite m is written as the
// largest float, with sums 0; a NaN in any d that counts makes both sums NaN.
#pragma once

#include "common/patch_args.h"

#if defined(PYATTR_WITH_CUDA)
#include <cstddef>
struct CUstream_st;
#endif

namespace pyattr {

struct PatchMeanArgs : PatchArgs {
  float* minima;  // [U, stats_stride], m at u * stats_stride + n
  float* sums;    // the same shape
  float* pixels;  // [C, U, stats_stride]
};

// Adds the statistics of N more images, in their order, to the running float64 totals of a query's U positions:
// M = min of m so far, Z and A relative to it. Start with M = +inf, Z = 0, A = 0.
struct PatchMeanJoinArgs {
  const float* minima;  // [U, N]
  const float* sums;    // [U, N]
  const float* pixels;  // [C, U, N]
  int64_t positions;    // U
  int64_t num_images;   // N
  int64_t channels;     // C
  double inverse;       // 1 / (2 sigma^2)
  double* least;        // [U], M
  double* total;        // [U], Z
  double* mean;         // [C, U], A
};

namespace cpu {
void patch_mean(const PatchMeanArgs& args, int num_threads);
void patch_mean_join(const PatchMeanJoinArgs& args, int num_threads);
}  // namespace cpu
#if defined(PYATTR_WITH_CUDA)
namespace cuda {
size_t patch_mean_workspace(const PatchMeanArgs& args);
void patch_mean(const PatchMeanArgs& args, void* workspace, CUstream_st* stream);
}  // namespace cuda
#endif
}  // namespace pyattr
