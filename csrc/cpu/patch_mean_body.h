// The statistics of patch_mean for blocks of images, one image a lane; included by one file per SIMD level, internal linkage throughout.
#include "cpu/patch_stage.h"
#include "cpu/patch_weights.h"
#include "patch_mean.h"

namespace pyattr::cpu {
namespace {

// centres [C][H][W][lanes], as they are, but 0 where they are not finite: the patch has the weight 0 or NaN.
void stage_centres(const PatchMeanArgs& args, int64_t first, float* centres) {
  for (int64_t l = 0; l < kLanes; ++l) {
    const int64_t n = std::min(first + l, args.num_images - 1);
    float* to = centres + l;
    for (int64_t c = 0; c < args.channels; ++c) {
      for (int64_t r = 0; r < args.height; ++r) {
        const int64_t at = n * args.bank_strides[0] + c * args.bank_strides[1] + r * args.bank_strides[2];
        for (int64_t i = 0; i < args.width; ++i, to += kLanes) {
          const float value = pixel(args, at + i * args.bank_strides[3]);
          *to = std::fabs(value) <= kLargest ? value : 0.0f;
        }
      }
    }
  }
}

// The sum of weights [rows][columns] times pixels, `stride` vectors from row to row.
inline reg weighted_sum(const reg* weights, const reg* pixels, int64_t rows, int64_t columns, int64_t stride) {
  reg total{};
  for (int64_t r = 0; r < rows; ++r, weights += columns, pixels += stride) {
    reg sum[2] = {};
    int64_t c = 0;
    for (; c + 2 <= columns; c += 2)
      for (int g = 0; g < 2; ++g) sum[g] = multiply_add(weights[c + g], pixels[c + g], sum[g]);
    if (c < columns) sum[0] = multiply_add(weights[c], pixels[c], sum[0]);
    total += sum[0] + sum[1];
  }
  return total;
}

void reduce_tile(const PatchMeanArgs& args, const PatchTile& tile, int64_t first, const reg* distances, const reg* centres,
                 reg* weights) {
  const PatchAxis &row = tile.row, &column = tile.column;
  const int64_t matches = row.bank_count * column.bank_count, images = std::min(kLanes, args.num_images - first);
  const int64_t offset = args.border == Border::inside ? (args.patch_size - 1) / 2 : 0, width = args.column_end - args.column_begin;
  const float slope = static_cast<float>(-args.inverse * 1.4426950408889634);
  for (int64_t r = 0; r < row.count; ++r) {
    for (int64_t c = 0; c < column.count; ++c) {
      const reg* const d = distances + (r * column.count + c) * matches;
      const int64_t u = (row.first + r - args.row_begin) * width + column.first + c - args.column_begin;
      const int64_t at = u * args.stats_stride + first;
      reg least[kClasses];
      class_minima(d, matches, least);
      const Exponential weight(least_of(least), slope);
      const reg sum_of_weights = weigh(
          d, matches, weight, [&](int64_t i, reg, reg w) { weights[i] = w; },
          [&](int64_t i) { std::fill_n(weights + i, kGroup, reg{}); });
      store(weight.m, images, args.minima + at);
      store(sum_of_weights, images, args.sums + at);
      const int64_t bank_row = offset + (row.alike ? row.first + r : row.bank_first);
      const int64_t bank_column = offset + (column.alike ? column.first + c : column.bank_first);
      for (int64_t k = 0; k < args.channels; ++k) {
        const reg* const pixels = centres + (k * args.height + bank_row) * args.width + bank_column;
        const reg sum = weighted_sum(weights, pixels, row.bank_count, column.bank_count, args.width);
        store(sum, images, args.pixels + k * (args.row_end - args.row_begin) * width * args.stats_stride + at);
      }
    }
  }
}

void mean_blocks(const PatchWork& work) {
  const PatchPlan& plan = *work.plan;
  const PatchMeanArgs& args = static_cast<const PatchMeanArgs&>(*plan.args);
  PatchScratch scratch(plan);
  const PatchBuffers buffers = scratch.buffers();
  const reg* const distances = reinterpret_cast<const reg*>(buffers.distances);
  auto weights = aligned_array<reg>(plan.matches + kGroup);
  auto centres = aligned_array<float>(args.channels * args.height * args.width * kLanes);
  for (int64_t end = 0, block = 0;; ++block) {
    if (block == end) {
      block = __atomic_fetch_add(work.next, work.together, __ATOMIC_RELAXED);
      end = std::min(block + work.together, work.num_blocks);
      if (block >= end) return;
    }
    stage_images(plan, block * kLanes, scratch);
    stage_centres(args, block * kLanes, centres.get());
    for (int64_t t = 0; t < plan.num_tiles; ++t) {
      work.distances(plan, plan.tiles[t], buffers);
      reduce_tile(args, plan.tiles[t], block * kLanes, distances, reinterpret_cast<const reg*>(centres.get()), weights.get());
    }
  }
}

}  // namespace
}  // namespace pyattr::cpu
