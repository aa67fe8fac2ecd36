// For each position u of a query and each image n, over the patches v that may match: m = min d, sum of exp(-(d - m) / (2 sigma^2)),
// the same sum over the k smallest d alone, and where the first smallest lies. See common/patch_args.h for d.
//
// An infinite m is written as the largest float, with sums 0; a NaN in any d that counts makes both sums NaN.
#pragma once

#include "common/patch_args.h"

#if defined(PYATTR_WITH_CUDA)
#include <cstddef>
struct CUstream_st;
#endif

namespace pyattr {

struct PatchTopkArgs : PatchArgs {
  int64_t k;         // 1 or more; more than an image's patches is all of them
  float* minima;     // [U, stats_stride], m at u * stats_stride + n
  float* sums;       // the same shape
  float* tops;       // the same shape
  int32_t* nearest;  // the same shape: row * W' + column of the first v with d = m, 0 where m is NaN; or null
};

// The statistics of all N images of a query's U positions, in the images' order and in float64, with M = min over n of m:
// Z(u) = sum_n sums * exp(-(m - M) / (2 sigma^2)), log_normaliser = log Z - M / (2 sigma^2), and
// weights[n] += sum over u of tops * exp(-(m - M) / (2 sigma^2)) / Z, and nearest_weights the weight of one patch at M, 1 / Z, which
// log_normaliser is too coarse to give where M / (2 sigma^2) is large. `tops` is overwritten.
struct PatchJoinArgs {
  const float* minima;      // [U, N]
  const float* sums;        // [U, N]
  float* tops;              // [U, N]
  int64_t positions;        // U
  int64_t num_images;       // N
  double inverse;           // 1 / (2 sigma^2)
  double* log_normaliser;   // [U]
  double* nearest_weights;  // [U]; or null
  double* weights;          // [N], added to
};

namespace cpu {
void patch_topk(const PatchTopkArgs& args, int num_threads);
void patch_join(const PatchJoinArgs& args, int num_threads);
}  // namespace cpu
#if defined(PYATTR_WITH_CUDA)
namespace cuda {
size_t patch_topk_workspace(const PatchTopkArgs& args);
void patch_topk(const PatchTopkArgs& args, void* workspace, CUstream_st* stream);
}  // namespace cuda
#endif
}  // namespace pyattr
