// A layer whose per-sample weight gradient G_b = sum over its views and positions of err (x) patch is wanted: a convolution, or a
// linear layer as one with 1 x 1 kernels and its positions as a map one pixel high.
#pragma once

#include <cstdint>

namespace pyattr {

struct LayerArgs {
  const float* acts;         // [B, K, C, H, W], strides in elements
  const float* errs;         // [B, K, O, H', W']
  int64_t acts_strides[5], errs_strides[5];
  int64_t num_samples;       // B
  int64_t num_views;         // K, summed over
  int64_t channels;          // C
  int64_t height, width;     // H, W
  int64_t out_channels;      // O
  int64_t out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups;

  int64_t positions() const { return num_views * out_height * out_width; }
  int64_t group_channels() const { return channels / groups; }
  int64_t row_columns() const { return group_channels() * kernel[0] * kernel[1]; }  // of a weight [O, C / groups, kh, kw]
};

}  // namespace pyattr
