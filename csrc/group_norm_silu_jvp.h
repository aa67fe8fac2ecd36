// Group normalisation of s = x + residual, with or without SiLU, and its derivative along K directions.
//
// Per group of C / G channels at L positions, n elements: xhat = (s - mean s) / sqrt(var s + eps), z = weight * xhat + bias,
//   y = z sigma(z),  y_dot = silu'(z) weight / sqrt(var s + eps) * (s_dot - mean s_dot - xhat mean(xhat s_dot)),
// sigma the logistic function. Everything between the inputs and the outputs is float32 or wider, s is not rounded to the dtype.
#pragma once

#include <cstdint>

#include "common/project_args.h"

#if defined(PYATTR_WITH_CUDA)
#include <cstddef>
struct CUstream_st;
#endif

namespace pyattr {

// An array [K, B, C, L] or, with the first stride 0, [B, C, L]; null where there is none. Strides in elements.
struct TangentArray {
  void* data;
  int64_t tangent_stride, sample_stride, channel_stride, position_stride;
};

struct GroupNormSiluJvpArgs {
  Dtype dtype;  // of all arrays but weight and bias
  int64_t num_tangents, num_samples, num_channels, num_positions;  // K, B, C, L
  int64_t num_groups;                                              // G, divides C
  TangentArray x, x_dot, residual, residual_dot;                   // read; residual_dot has a residual
  TangentArray y, y_dot, sum, sum_dot;                             // written; sum (s) and sum_dot (s_dot) where not null
  const float* weight;                                             // [C], or null: ones
  const float* bias;                                               // [C], or null: zeros
  double eps;
  bool silu;

  int64_t group_channels() const { return num_channels / num_groups; }
  int64_t group_size() const { return group_channels() * num_positions; }  // n
};

namespace cpu {
void group_norm_silu_jvp(const GroupNormSiluJvpArgs& args, int num_threads);
}  // namespace cpu
#if defined(PYATTR_WITH_CUDA)
namespace cuda {
size_t group_norm_silu_jvp_workspace(const GroupNormSiluJvpArgs& args);
void group_norm_silu_jvp(const GroupNormSiluJvpArgs& args, void* workspace, CUstream_st* stream);
}  // namespace cuda
#endif
}  // namespace pyattr
