// A thread's scratch for patches, and the images of a block as the kernels read them; internal linkage throughout.
#pragma once

#include <sys/mman.h>

#include "cpu/buffer.h"
#include "cpu/patch_lanes.h"
#include "cpu/stage.h"

namespace pyattr::cpu {
namespace {

// In large pages where the system has them: the distances are written all over a few megabytes at a time.
inline Aligned<float> large_array(int64_t count) {
  constexpr size_t kPage = 2 << 20;
  if (count * sizeof(float) < kPage) return aligned_array<float>(count);
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + kPage - 1) / kPage * kPage;
  void* p = std::aligned_alloc(kPage, bytes);
  if (p == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return Aligned<float>(static_cast<float*>(p));
}

// Scratch of one thread, for any tile of a plan.
struct PatchScratch {
  Aligned<float> pixels;  // one image, padded
  Aligned<float> images;  // [C][rows][columns][lanes]
  Aligned<float> norms;   // [rows][columns][lanes]
  Aligned<float> squares, boxes, rows, strip, distances;

  explicit PatchScratch(const PatchPlan& plan)
      : pixels(aligned_array<float>((plan.args->height + 2 * plan.padding) * (plan.args->width + 2 * plan.padding))),
        images(aligned_array<float>(plan.args->channels * plan.bank_rows * plan.bank_columns * kLanes)),
        norms(aligned_array<float>(plan.bank_rows * plan.bank_columns * kLanes)),
        squares(aligned_array<float>(plan.squares * kLanes)),
        boxes(aligned_array<float>(plan.boxes * kLanes)),
        rows(aligned_array<float>(plan.rows * kLanes)),
        strip(aligned_array<float>(plan.strip * kLanes)),
        distances(large_array(plan.distances * kLanes)) {}

  PatchBuffers buffers() const {
    return {images.get(), norms.get(), squares.get(), boxes.get(), rows.get(), strip.get(), distances.get()};
  }
};

inline float pixel(const PatchArgs& args, int64_t at) {
  switch (args.pixel) {
    case Pixel::float16: return widen_float16(static_cast<const uint16_t*>(args.bank)[at]);
    case Pixel::bfloat16: return widen_bfloat16(static_cast<const uint16_t*>(args.bank)[at]);
    case Pixel::uint8: return static_cast<float>((2 * static_cast<const uint8_t*>(args.bank)[at] - 255) / 255.0);
    default: return static_cast<const float*>(args.bank)[at];
  }
}

// The planes of images [first, first + kLanes), the last of them again where there are no more.
void stage_images(const PatchPlan& plan, int64_t first, PatchScratch& scratch) {
  const PatchArgs& args = *plan.args;
  const int64_t pad = plan.padding;
  const int64_t wide = args.width + 2 * pad, high = args.height + 2 * pad, plane = plan.bank_rows * plan.bank_columns;
  std::fill_n(scratch.pixels.get(), high * wide, 0.0f);
  for (int64_t l = 0; l < kLanes; ++l) {
    const int64_t n = std::min(first + l, args.num_images - 1);
    for (int64_t c = 0; c < args.channels; ++c) {
      for (int64_t r = 0; r < args.height; ++r) {
        const int64_t at = n * args.bank_strides[0] + c * args.bank_strides[1] + r * args.bank_strides[2];
        float* const to = scratch.pixels.get() + (r + pad) * wide + pad;
        for (int64_t i = 0; i < args.width; ++i)
          to[i] = plain_nan(static_cast<float>(args.scale * pixel(args, at + i * args.bank_strides[3])));
      }
      float* const to = scratch.images.get() + c * plane * kLanes + l;
      for (int64_t r = 0; r < plan.bank_rows; ++r) {
        const float* const from = scratch.pixels.get() + r * wide;
        for (int64_t i = 0; i < plan.bank_columns; ++i) {
          float value = from[i];
          if (args.lowres) {
            const double sum = static_cast<double>(value) + from[i + 1] + from[i + wide] + from[i + wide + 1];
            value = static_cast<float>(0.5 * sum);
          }
          to[(r * plan.bank_columns + i) * kLanes] = value;
        }
      }
    }
  }
  const reg* const images = reinterpret_cast<const reg*>(scratch.images.get());
  reg* const norms = reinterpret_cast<reg*>(scratch.norms.get());
  for (int64_t i = 0; i < plane; ++i) {  // in the order of the differences, so that these are the differences from 0
    norms[i] = images[i] * images[i];
    for (int64_t c = 1; c < args.channels; ++c) norms[i] = multiply_add(images[c * plane + i], images[c * plane + i], norms[i]);
  }
}

}  // namespace
}  // namespace pyattr::cpu
